"""Choose how many nodes to verify by cost: expected tokens against a measured latency curve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.verifier import Verifier

# Tree sizes that are timed; a step verifies one of them, so shapes stay few.
NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of one verify forward by tree size, for one verifier on this machine.

    Args:
        nodes: tree sizes N, rising.
        seconds: median seconds of a forward over N nodes.
        draft_seconds: seconds that a step spends outside the forward.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    draft_seconds: float = 0.0

    @classmethod
    def measure(
        cls, verifier: Verifier, max_nodes: int, *, prefix_length: int = 128, repeats: int = 5, batch_size: int = 1
    ) -> LatencyCurve:
        """Time verify forwards over chains of growing size behind a prefix.

        Args:
            verifier: the base model.
            max_nodes: largest tree.
            prefix_length: committed tokens in the cache.
            repeats: forwards per size; sizes take turns, the median counts.
            batch_size: rows B.
        """
        sizes = sorted({n for n in NODE_COUNTS if n < max_nodes} | {max_nodes})
        window = verifier.context_window
        if window is not None:
            prefix_length = max(1, min(prefix_length, window - 1))
        cache = verifier.new_cache(batch_size, prefix_length + max_nodes)
        verifier.prefill([[1] * prefix_length] * batch_size, cache)
        samples: dict[int, list[float]] = {n: [] for n in sizes}
        for _ in range(repeats + 1):
            for size in sizes:
                tree = _chain(size, batch_size, verifier.device)
                start = time.perf_counter()
                logits = verifier.verify(tree, cache).logits
                logits[:, 0].argmax(dim=-1).tolist()  # waits for the device
                samples[size].append(time.perf_counter() - start)
        # The first round warms up. A curve never falls: noise must not make a larger tree "cheaper".
        medians = [sorted(samples[n][1:])[repeats // 2] for n in sizes]
        rising = [max(medians[: index + 1]) for index in range(len(medians))]
        return cls(nodes=tuple(sizes), seconds=tuple(rising))

    def best_nodes(self, tree: DraftTree) -> int:
        """Return the tree size that maximises expected tokens per second over the batch.

        With path probabilities P_1 >= P_2 >= ... a step over N nodes is expected to emit
        1 + sum of P_1..P_{N-1} tokens per row.

        Args:
            tree: full trees whose ``log_probs`` are the drafter's.
        """
        order = tree.log_probs.exp().sort(dim=1, descending=True).values
        expected = order.sum(dim=0).cumsum(dim=0).tolist()
        return self._argmax(expected)

    def _argmax(self, expected: Sequence[float]) -> int:
        rates = [
            (expected[min(count, len(expected)) - 1] / (self.draft_seconds + seconds), count)
            for count, seconds in zip(self.nodes, self.seconds, strict=True)
        ]
        best = max(rates, key=lambda rate: (rate[0], -rate[1]))
        return min(best[1], len(expected))


def _chain(nodes: int, batch_size: int, device: torch.device) -> DraftTree:
    """Build trees that are a single path: as costly to verify as any of that size."""
    index = torch.arange(nodes, device=device).expand(batch_size, -1)
    zeros: Tensor = torch.zeros(batch_size, nodes, device=device)
    return DraftTree(
        tokens=torch.ones_like(index),
        parents=(index - 1).clamp(min=0),
        depths=index,
        log_probs=zeros,
        valid=zeros == 0,
        height=nodes - 1,
    )
