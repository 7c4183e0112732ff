"""Choose by cost whether to draft, how deep, and how many nodes to verify: expected tokens against measured seconds."""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrent_drafting import beam_search
from recurrent_drafting.config import BeamConfig
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.packed_model import decoding_twin
from recurrent_drafting.recycling import RecycledNodes
from recurrent_drafting.verifier import Verifier

Floats = np.ndarray[Any, np.dtype[Any]]

# Tree sizes that are timed; a step verifies one of them, so shapes stay few.
NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Beam widths that are timed besides the full one.
_NARROW = (2, 4, 6)
# Steps whose trees say how wide the next beams need to be.
_RECENT_STEPS = 8
# A tree whose nodes are recycled where drafting is timed.
_USUAL_NODES = 16
# Drafted tokens that a generation's own record of acceptance is weighed against.
_PRIOR_TOKENS = 8.0
# Losses are counted in baseline steps: what drafting may lose before it pauses, what a trial after a pause
# may lose, what gains may offset later; and how long the first pause and the longest are.
_MAX_LOSS, _TRIAL_LOSS, _MAX_CREDIT = 1.5, 0.25, 3.0
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of one verify forward by tree size, for one verifier on this machine.

    Args:
        nodes: tree sizes N, rising.
        seconds: median seconds of a forward over N nodes.
        depth_seconds: seconds of drafting one depth.
        narrow: beam widths below the full one, rising, each with its seconds of drafting one depth.
        baseline_seconds: seconds of a baseline step's forward: one node, and no draft before it that took the
            verifier's weights out of the caches. Default: those of one node after a draft.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    depth_seconds: float = 0.0
    narrow: tuple[tuple[int, float], ...] = ()
    baseline_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.baseline_seconds:
            object.__setattr__(self, "baseline_seconds", self.seconds[0])

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> LatencyCurve:
        """Return a curve from its fields as JSON has them."""
        narrow = tuple((width, seconds) for width, seconds in record.get("narrow", ()))
        nodes, seconds = tuple(record["nodes"]), tuple(record["seconds"])
        return cls(nodes, seconds, record["depth_seconds"], narrow, record.get("baseline_seconds", 0.0))

    @classmethod
    def measure(
        cls,
        verifier: Verifier,
        drafter: Drafter,
        beam: BeamConfig,
        *,
        batch_size: int = 1,
        prefix_length: int = 128,
        repeats: int = 5,
    ) -> LatencyCurve:
        """Time the draft, and verify forwards over chains of growing size behind a prefix.

        Recycling the nodes of a tree of usual size counts as drafting.

        Args:
            verifier: the base model.
            drafter: in the verifier's dtype and on its device.
            beam: shape of the beams; the largest tree holds all of them.
            batch_size: rows of a forward.
            prefix_length: committed tokens in the cache.
            repeats: timed forwards per size; sizes take turns, the median counts.
        """
        most = beam.width * beam.length + 1
        sizes = sorted({n for n in NODE_COUNTS if n < most} | {most})
        if verifier.context_window is not None:
            prefix_length = max(1, min(prefix_length, verifier.context_window - 1))
        cache = verifier.new_cache(batch_size, prefix_length + most)
        hidden = verifier.prefill([[1] * prefix_length] * batch_size, cache).hidden[:, 0]
        root = torch.ones(batch_size, dtype=torch.long, device=verifier.device)
        usual = verifier.verify(_chains(root, min(_USUAL_NODES, most)), cache)
        recycled = RecycledNodes.of(root, drafter, beam.recycled_nodes)
        widths = [beam.width, *(width for width in _NARROW if width < beam.width)]
        kinds = (("w", widths), ("n", sizes), ("baseline", [1]))
        samples: dict[str, list[float]] = {f"{kind}{n}": [] for kind, ns in kinds for n in ns}
        for _ in range(repeats + 1):
            for _ in range(2):  # the second comes after a forward of its kind
                start = time.perf_counter()
                verifier.verify(_chains(root, 1), cache).logits[0, 0].argmax().item()
            samples["baseline1"].append(time.perf_counter() - start)
            # A forward before every draft, as in decoding: it takes the drafter's weights out of the caches.
            for width, size in itertools.zip_longest(widths, sizes):
                if width:
                    start = time.perf_counter()
                    if recycled is not None:
                        recycled.record(_chains(root, usual.logits.shape[1]), usual.logits, torch.zeros_like(root))
                    _draft(verifier, drafter, hidden, root, replace(beam, width=width), recycled)
                    samples[f"w{width}"].append(time.perf_counter() - start)
                if size:
                    start = time.perf_counter()
                    verifier.verify(_chains(root, size), cache).logits[0, 0].argmax().item()
                    samples[f"n{size}"].append(time.perf_counter() - start)
        # The first round warms up. A curve never falls: noise must not make a larger tree "cheaper".
        medians = {name: sorted(values[1:])[repeats // 2] for name, values in samples.items()}
        rising = itertools.accumulate((medians[f"n{size}"] for size in sizes), max)
        depth, *narrow = (medians[f"w{width}"] / beam.length for width in widths)
        narrower = tuple(sorted(zip(widths[1:], narrow, strict=True)))
        return cls(tuple(sizes), tuple(rising), depth, narrower, medians["baseline1"])

    def at_width(self, width: int) -> LatencyCurve:
        """Return the curve of drafting with beams of a width: the next one that was timed."""
        return next((curve for timed, curve in self._narrower if timed >= width), self)

    @cached_property
    def _narrower(self) -> list[tuple[int, LatencyCurve]]:
        return [(timed, replace(self, depth_seconds=seconds, narrow=())) for timed, seconds in self.narrow]

    def seconds_of(self, nodes: int) -> float:
        """Return seconds of a forward over a number of nodes: those of the next size that was timed."""
        return self.seconds[min(bisect.bisect_left(self.nodes, nodes), len(self.nodes) - 1)]

    def can_pay(self, beam: BeamConfig, max_nodes: int) -> bool:
        """Tell whether drafting would pay if all of a draft were accepted.

        Args:
            beam: depths that may be drafted, and copied.
            max_nodes: nodes that may be verified, the root included.
        """
        return any(
            (1 + min(depth, min(nodes, max_nodes) - 1)) * self.baseline_seconds
            > min(depth, beam.length) * self.depth_seconds + seconds
            for depth in range(1, max(beam.length, beam.lookup_length) + 1)
            for nodes, seconds in zip(self.nodes, self.seconds, strict=True)
        )

    def best_nodes(
        self,
        log_probs: Tensor,
        calibration: float = 1.0,
        drafted_depths: int | None = None,
        max_nodes: int | None = None,
    ) -> int:
        """Return the tree size that maximises expected tokens per second over the batch.

        With path probabilities P_1 >= P_2 >= ... a step over N nodes is expected to emit
        1 + sum of P_1..P_{N-1} tokens per row.

        >>> curve = LatencyCurve(nodes=(1, 2, 4), seconds=(1.0, 1.25, 2.0))
        >>> curve.best_nodes(torch.tensor([[[0.5, 0.25, 0.25]]]).log())  # of 1 / 1, 1.5 / 1.25 and 2 / 2
        2

        Args:
            log_probs: path log-probabilities of the proposed nodes, float32 ``[B, depths, W]``.
            calibration: what their probabilities are multiplied by.
            drafted_depths: depths that the drafter was run for; default all.
            max_nodes: nodes that may be verified, the root included; default any number.
        """
        expected = _expected(_falling(_probabilities(log_probs)), calibration)[:max_nodes]
        depths = log_probs.shape[1] if drafted_depths is None else drafted_depths
        return self.fastest(expected, depths)[1]

    def worth_going_on(self, log_probs: Tensor, calibration: float = 1.0, max_nodes: int | None = None) -> bool:
        """Tell whether drafting one more depth is expected to raise tokens per second.

        The next depth is expected to survive as the last one did: with S_d the summed path probabilities of depth d
        (S_0 = 1 per row), with probability S_d / S_{d-1} every path goes on by a node as likely as its last, and
        else none does. Either way the depth's time counts, and that of the nodes of the best tree.

        Args:
            log_probs: path log-probabilities of the depths so far, float32 ``[B, depths, W]``.
            calibration: what their probabilities are multiplied by.
            max_nodes: nodes that may be verified, the root included; default any number.
        """
        probabilities = _probabilities(log_probs)
        rows, depths, width = probabilities.shape
        sums: list[float] = [float(rows), *probabilities.sum(axis=(0, 2)).tolist()]
        survival = min(sums[-1] / max(sums[-2], 1e-9), 1.0)
        # Twice: without a further depth (of which nothing would be expected), and with one like the last.
        paths = np.zeros((2, rows, depths + 1, width))
        paths[:, :, :depths] = probabilities
        paths[1, :, depths] = probabilities[:, -1]
        now, then = _expected(_falling(paths), calibration)[:, :max_nodes]
        hit, miss = self.fastest(then, depths + 1)[0], self.fastest(now, depths + 1)[0]
        return bool(survival * hit + (1 - survival) * miss > self.fastest(now, depths)[0])

    def widest(self, calibration: float = 1.0) -> float:
        """Return the beam width beyond which a beam brings fewer tokens than the cheapest tree asks of a node.

        The k-th best of a depth's paths has at most 1/k of the probability, and a tree beats a single node only where
        its nodes are expected, on average, to bring what the baseline would in the time that they add to a forward.

        >>> LatencyCurve((1, 2, 5), (1.0, 1.5, 2.0)).widest()  # four more nodes cost a baseline step
        4.0

        Args:
            calibration: what the paths' probabilities are multiplied by.
        """
        return calibration / self._least_cost if self._least_cost > 0 else math.inf

    @cached_property
    def _least_cost(self) -> float:
        """Return the least that a node of any tree adds to a forward, on average, in forwards over one node."""
        sizes = zip(self.nodes, self.seconds, strict=True)
        return min(
            ((seconds / self.seconds[0] - 1) / (nodes - 1) for nodes, seconds in sizes if nodes > 1), default=0.0
        )

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats]:
        """Return the places of tree sizes in a list that starts with one node, and their seconds."""
        return np.array(self.nodes) - 1, np.array(self.seconds)

    def fastest(self, expected: Floats, depths: int) -> tuple[float, int]:
        """Return the highest expected tokens per second and the nodes of its tree.

        Args:
            expected: tokens of a step by number of nodes, from one node on, ``[n]``.
            depths: depths that were drafted.
        """
        places, seconds = self._arrays
        places = np.minimum(places, len(expected) - 1)
        rates = expected[places] / (depths * self.depth_seconds + seconds)
        best = int(rates.argmax())  # the smallest among equals
        return float(rates[best]), int(places[best]) + 1


@dataclass(frozen=True)
class LatencyTable:
    """Latency curves by batch size.

    Args:
        curves: at least one.
    """

    curves: Mapping[int, LatencyCurve]

    @classmethod
    def measure(
        cls, verifier: Verifier, drafter: Drafter, beam: BeamConfig, batch_size: int, *, repeats: int = 5
    ) -> LatencyTable:
        """Measure the curves of batch sizes 1, 2, 4, ... up to the first that holds ``batch_size`` rows."""
        return cls(
            {
                rows: LatencyCurve.measure(verifier, drafter, beam, batch_size=rows, repeats=repeats)
                for rows in batch_sizes(batch_size)
            }
        )

    def at(self, rows: int) -> LatencyCurve:
        """Return the curve of the smallest batch that holds so many rows, of the largest if none does."""
        return self.curves[min((size for size in self.curves if size >= rows), default=max(self.curves))]


def batch_sizes(rows: int) -> list[int]:
    """Return 1, 2, 4, ... up to the first that holds so many rows.

    >>> batch_sizes(5)
    [1, 2, 4, 8]
    """
    return [1 << power for power in range((rows - 1).bit_length() + 1)]


class DraftBudget:
    """What one generation spends on drafting, step by step, and what it knows of its return.

    Path probabilities are multiplied by the generation's own ratio of accepted to predicted tokens. Where
    what is expected stays below the baseline's rate, drafting pauses, and is tried again ever more rarely.

    Args:
        table: measured costs.
        beam: the shape of the beams.
        max_nodes: most nodes of a tree, the root included.
    """

    def __init__(self, table: LatencyTable, beam: BeamConfig, max_nodes: int) -> None:
        self._table = table
        self._beam = beam
        self._max_nodes = max_nodes
        self._predicted = self._accepted = _PRIOR_TOKENS
        self._balance = 0.0
        self._pause = 0
        self._next_pause = _FIRST_PAUSE
        self._step = (0, 0.0)
        self._recent = deque([max_nodes], maxlen=_RECENT_STEPS)
        self.hopeless = False

    @property
    def calibration(self) -> float:
        """Return accepted over predicted tokens so far, 1 at the start."""
        return self._accepted / self._predicted

    def width(self, rows: int) -> int:
        """Return the beam width of the next draft of so many rows, at least 2.

        Enough for twice the drafted nodes of the largest recent tree, and no wider than could pay. The best N drafted
        nodes of a row are among its N best paths of each depth, so wider beams would only cost: with many rows most
        of a tree's beams are never verified.
        """
        recent = 2 * (max(self._recent) - 1)
        return max(int(min(recent, self._table.at(rows).widest(self.calibration), self._beam.width)), 2)

    def wants_draft(self, rows: int) -> bool:
        """Tell whether the next step of so many live rows should draft."""
        if not self._table.at(rows).at_width(1).can_pay(self._beam, self._max_nodes):
            self.hopeless = True
            return False
        if self._pause:
            self._pause -= 1
            return False
        return True

    def worth_going_on(self, log_probs: Tensor) -> bool:
        """See ``LatencyCurve.worth_going_on``; ``[B, depths, W]``."""
        return self._curve(len(log_probs)).worth_going_on(log_probs, self.calibration, self._max_nodes)

    def choose(self, log_probs: Tensor, drafted_depths: int | None = None) -> int:
        """Return the nodes to verify.

        Args:
            log_probs: path log-probabilities of the proposed nodes, float32 ``[B, depths, W]``.
            drafted_depths: depths that the drafter was run for; default all.
        """
        rows, depths = log_probs.shape[:2]
        depths = depths if drafted_depths is None else drafted_depths
        curve = self._curve(rows)
        nodes = curve.best_nodes(log_probs, self.calibration, depths, self._max_nodes)
        predicted = float(_falling(_probabilities(log_probs))[:, : nodes - 1].sum())
        cost = (depths * curve.depth_seconds + curve.seconds_of(nodes)) / curve.baseline_seconds
        self._settle(1 + self.calibration * predicted / rows - cost)
        self._step = (rows, predicted)
        self._recent.append(nodes)
        return nodes

    def record(self, accepted: int) -> None:
        """Take in how many drafted tokens of the chosen tree were accepted, over all rows."""
        rows, predicted = self._step
        if rows:
            self._predicted += predicted / rows
            self._accepted += accepted / rows
        self._step = (0, 0.0)

    def _curve(self, rows: int) -> LatencyCurve:
        """Return what the next draft of so many rows costs."""
        return self._table.at(rows).at_width(self.width(rows))

    def _settle(self, gain: float) -> None:
        """Book a drafted step's expected gain over the baseline, in baseline steps."""
        self._balance = min(self._balance + gain, _MAX_CREDIT)
        if self._balance >= 0:
            self._next_pause = _FIRST_PAUSE
        elif self._balance < -_MAX_LOSS:
            self.hopeless |= self._next_pause > _FIRST_PAUSE
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
            self._balance = _TRIAL_LOSS - _MAX_LOSS


def _probabilities(log_probs: Tensor) -> Floats:
    """Fetch path probabilities ``[B, depths, W]`` from the device; a step waits for it here.

    A row whose drafter is not finite has none.
    """
    probabilities: Floats = np.exp(np.fmax(log_probs.cpu().numpy(), -np.inf))
    return probabilities


def _falling(probabilities: Floats) -> Floats:
    """Sort a row's path probabilities ``[..., B, depths, W]`` of all depths together, falling, ``[..., B, n]``."""
    return -np.sort(-probabilities.reshape(*probabilities.shape[:-2], -1), axis=-1)


def _expected(falling: Floats, calibration: float) -> Floats:
    """Return expected tokens over the batch by tree size, from one node on, ``[..., n + 1]``.

    Args:
        falling: path probabilities of each row, the largest first, ``[..., B, n]``.
        calibration: what they are multiplied by; none rises above 1.
    """
    *outer, rows, count = falling.shape
    tokens = np.full((*outer, count + 1), float(rows))
    tokens[..., 1:] += np.minimum(calibration * falling, 1.0).sum(axis=-2).cumsum(axis=-1)
    return tokens


@torch.inference_mode()
def _draft(
    verifier: Verifier, drafter: Drafter, hidden: Tensor, root: Tensor, beam: BeamConfig, recycled: RecycledNodes | None
) -> None:
    """Draft once: beams, the questions how deep and how large, and the tree.

    Args:
        verifier: the base model.
        drafter: in the verifier's dtype and on its device.
        hidden: context of each row, ``[B, H]``.
        root: int64 ``[B]``.
        beam: shape of the beams.
        recycled: of nodes verified before, or None.
    """
    most = beam.width * beam.length + 1
    # Free of cost, so that it always goes on: the questions it is asked belong to drafting.
    budget = DraftBudget(LatencyTable({len(root): LatencyCurve((1, most), (1.0, 1.0))}), beam, most)
    twin: Any = decoding_twin(drafter)
    hints = beam_search.Hints(None, recycled)
    beams = beam_search.draft(twin, hidden, root, verifier.embed, beam, hints, budget.worth_going_on)
    DraftTree.from_beams(root, beams, budget.choose(beams.log_probs)).parents.tolist()  # waits for the device


def _chains(root: Tensor, nodes: int) -> DraftTree:
    """Build trees that are a single path below roots, int64 ``[B]``: as costly to verify as any of that size."""
    index = torch.arange(nodes, device=root.device).expand(len(root), -1)
    zeros = torch.zeros(len(root), nodes, device=root.device)
    return DraftTree(
        tokens=torch.ones_like(index),
        parents=(index - 1).clamp(min=0),
        depths=index,
        log_probs=zeros,
        valid=zeros == 0,
        height=nodes - 1,
    )
