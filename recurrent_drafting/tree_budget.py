"""Choose how many nodes to verify by cost: expected tokens against a measured latency curve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafting import beam_search
from recurrent_drafting.config import BeamConfig
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.verifier import Verifier

# Tree sizes that are timed; a step verifies one of them, so shapes stay few.
NODE_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of one verify forward by tree size, for one verifier on this machine.

    Args:
        nodes: tree sizes N, rising.
        seconds: median seconds of a forward over N nodes.
        depth_seconds: seconds of drafting one depth.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    depth_seconds: float = 0.0

    @classmethod
    def measure(
        cls, verifier: Verifier, drafter: Drafter, beam: BeamConfig, *, prefix_length: int = 128, repeats: int = 5
    ) -> LatencyCurve:
        """Time the draft, and verify forwards over chains of growing size behind a prefix.

        Args:
            verifier: the base model.
            drafter: in the verifier's dtype and on its device.
            beam: shape of the beams; the largest tree holds all of them.
            prefix_length: committed tokens in the cache.
            repeats: timed forwards per size; sizes take turns, the median counts.
        """
        most = beam.width * beam.length + 1
        sizes = sorted({n for n in NODE_COUNTS if n < most} | {most})
        if verifier.context_window is not None:
            prefix_length = max(1, min(prefix_length, verifier.context_window - 1))
        cache = verifier.new_cache(1, prefix_length + most)
        hidden = verifier.prefill([[1] * prefix_length], cache).hidden[:, 0]
        samples: dict[int, list[float]] = {n: [] for n in [0, *sizes]}
        root = torch.ones(1, dtype=torch.long, device=verifier.device)
        for _ in range(repeats + 1):
            start = time.perf_counter()
            with torch.inference_mode():
                beams = beam_search.draft(drafter, hidden, root, verifier.embed, beam)
                DraftTree.from_beams(root, beams).parents.tolist()  # waits for the device
            samples[0].append(time.perf_counter() - start)
            for size in sizes:
                start = time.perf_counter()
                verifier.verify(_chain(size, verifier.device), cache).logits[0, 0].argmax().item()
                samples[size].append(time.perf_counter() - start)
        # The first round warms up. A curve never falls: noise must not make a larger tree "cheaper".
        medians = {n: sorted(values[1:])[repeats // 2] for n, values in samples.items()}
        rising = [max(medians[n] for n in sizes[: index + 1]) for index in range(len(sizes))]
        return cls(tuple(sizes), tuple(rising), depth_seconds=medians[0] / beam.length)

    def best_nodes(self, tree: DraftTree) -> int:
        """Return the tree size that maximises expected tokens per second over the batch.

        With path probabilities P_1 >= P_2 >= ... a step over N nodes is expected to emit
        1 + sum of P_1..P_{N-1} tokens per row.

        Args:
            tree: full trees whose ``log_probs`` are the drafter's.
        """
        order = tree.log_probs.exp().sort(dim=1, descending=True).values
        expected = order.sum(dim=0).cumsum(dim=0).tolist()
        return min(self._best_rate(expected, tree.height)[1], len(expected))

    def worth_going_on(self, log_probs: Tensor) -> bool:
        """Tell whether drafting one more depth is expected to raise tokens per second.

        The next depth is expected to survive as the last one did: with S_d the summed path
        probabilities of depth d (S_0 = 1 per row) it adds about S_d * S_d / S_{d-1} tokens.

        Args:
            log_probs: path log-probabilities of the depths so far, float32 ``[B, depths, W]``.
        """
        rows, depths = log_probs.shape[:2]
        sums = [float(rows), *log_probs.exp().sum(dim=(0, 2)).tolist()]
        gain = sums[-1] * min(sums[-1] / max(sums[-2], 1e-9), 1.0)
        paths = log_probs.exp().flatten(1).sort(dim=1, descending=True).values.sum(dim=0).cumsum(dim=0)
        rate, _ = self._best_rate([float(rows), *(rows + paths).tolist()], depths)
        return bool(gain > rate * self.depth_seconds)

    def _best_rate(self, expected: Sequence[float], depths: int) -> tuple[float, int]:
        """Return the highest tokens per second and its tree size.

        Args:
            expected: tokens of a step by number of nodes, from one node on.
            depths: depths that were drafted.
        """
        draft_seconds = depths * self.depth_seconds
        rates = [
            (expected[min(count, len(expected)) - 1] / (draft_seconds + seconds), count)
            for count, seconds in zip(self.nodes, self.seconds, strict=True)
        ]
        return max(rates, key=lambda rate: (rate[0], -rate[1]))


def _chain(nodes: int, device: torch.device) -> DraftTree:
    """Build a tree that is a single path: as costly to verify as any of that size."""
    index = torch.arange(nodes, device=device).unsqueeze(0)
    zeros = torch.zeros(1, nodes, device=device)
    return DraftTree(
        tokens=torch.ones_like(index),
        parents=(index - 1).clamp(min=0),
        depths=index,
        log_probs=zeros,
        valid=zeros == 0,
        height=nodes - 1,
    )
