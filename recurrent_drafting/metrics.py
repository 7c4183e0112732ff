"""Counters of a decode and of training, kept as sums and counts so that any reduction is exact."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("prefill", "draft", "verify", "sample", "cache", "other")


@dataclass
class DecodingStats:
    """What a decode cost and yielded; two of them add up with ``merge``.

    One token of the prefill, then four steps that emit what they accept and one more: 1 + 2 + 3 + 3.

    >>> stats = DecodingStats(rows=1, tokens=10, prefill_tokens=1)
    >>> for accepted in (0, 1, 2, 2):
    ...     stats.count_step(accepted)
    >>> stats.tau, stats.acceptance_by_depth
    (2.25, [0.75, 0.5])

    Args:
        rows: requests.
        tokens: emitted tokens, after EOS, stop and length cuts.
        prefill_tokens: those of them that came from the prefill.
        row_steps: verify forwards summed over live rows.
        forwards: verify forwards.
        nodes: verified nodes summed over live rows, roots included.
        accepted: number of row steps per accepted length 0, 1, 2, ...
        seconds: wall time, prefill included.
        phase_seconds: the same by phase.
    """

    rows: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    row_steps: int = 0
    forwards: int = 0
    nodes: int = 0
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def tau(self) -> float:
        """Return tokens emitted per verifier step; NaN before the first step."""
        return (self.tokens - self.prefill_tokens) / self.row_steps if self.row_steps else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Return emitted tokens per second of wall time, prefill included; 0 if no time passed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_nodes(self) -> float:
        """Return verified nodes per row step, the root included."""
        return self.nodes / self.row_steps if self.row_steps else float("nan")

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Return the share of row steps whose accepted length is at least 1, 2, ..."""
        if not self.row_steps:
            return []
        return [sum(self.accepted[depth:]) / self.row_steps for depth in range(1, len(self.accepted))]

    def count_step(self, accepted: int) -> None:
        """Count one row step with the given accepted length (after cuts)."""
        self.row_steps += 1
        self.accepted += [0] * (accepted + 1 - len(self.accepted))
        self.accepted[accepted] += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase_seconds[name] += time.perf_counter() - start

    def close(self, seconds: float) -> None:
        """Set the wall time and book what no phase claimed as "other"."""
        self.seconds = seconds
        claimed = sum(value for name, value in self.phase_seconds.items() if name != "other")
        self.phase_seconds["other"] = max(seconds - claimed, 0.0)

    def merge(self, other: DecodingStats) -> None:
        """Add another decode's sums and counts to this one's."""
        for name in ("rows", "tokens", "prefill_tokens", "row_steps", "forwards", "nodes", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accepted += [0] * (len(other.accepted) - len(self.accepted))
        for depth, count in enumerate(other.accepted):
            self.accepted[depth] += count
        for name, value in other.phase_seconds.items():
            self.phase_seconds[name] += value


@dataclass
class MeanMetrics:
    """Named means, kept as (sum, count).

    >>> means, of_another_rank = MeanMetrics(), MeanMetrics()
    >>> means.add("loss", total=6.0, count=2)
    >>> of_another_rank.add("loss", total=2.0, count=6)
    >>> means.merge(of_another_rank)
    >>> means.pop_means()  # 8 / 8, not the mean of 3 and 1/3
    {'loss': 1.0}
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        """Add ``count`` observations that sum to ``total``."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def merge(self, other: MeanMetrics) -> None:
        """Add another one's sums and counts to this one's."""
        for name in other.sums:
            self.add(name, other.sums[name], other.counts[name])

    def pop_means(self) -> dict[str, float]:
        """Return the means since the last call and start anew; names without counts are left out."""
        means = {name: self.sums[name] / self.counts[name] for name in self.sums if self.counts[name]}
        self.sums.clear()
        self.counts.clear()
        return means
