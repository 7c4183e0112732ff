"""The draft tree: every beam kept at every depth, merged by parent pointers, and its geometry.

Node 0 is the root (the token the verifier has already chosen). Nodes are stored parents first,
so a parent's index is always smaller than its children's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Beams:
    """What a beam search kept at every depth, as token ids of the verifier.

    Args:
        tokens: drafted tokens, int64 ``[B, L, W]``; siblings are distinct.
        parents: index of the parent among the previous depth's beams, int64 ``[B, L, W]``
            (0 at the first depth, whose parent is the root).
        log_probs: log-probability of the path from the root in nats, float32 ``[B, L, W]``;
            it never rises along a path, and ``-inf`` marks a beam that must not be proposed.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor

    def on_host(self) -> Beams:
        """Fetch the beams from the device; a step waits for it here."""
        return Beams(self.tokens.cpu(), self.parents.cpu(), self.log_probs.cpu())


@dataclass(frozen=True)
class DraftTree:
    """A batch of prefix trees with the same number of nodes.

    Trees are small and are built, cut and walked on the host, so all tensors are on the CPU; the verifier takes what
    it needs to its device.

    Tokens 5 and 6 may follow the root 4, and 7 and 8 the 5. Two beams begin with 5, and one node holds it:

    >>> beams = Beams(
    ...     tokens=torch.tensor([[[5, 6], [7, 8]]]),
    ...     parents=torch.tensor([[[0, 0], [0, 0]]]),
    ...     log_probs=torch.tensor([[[-0.5, -2.0], [-1.0, -3.0]]]),
    ... )
    >>> tree = DraftTree.from_beams(torch.tensor([4]), beams)
    >>> tree.tokens.tolist(), tree.parents.tolist()
    ([[4, 5, 6, 7, 8]], [[0, 0, 0, 1, 1]])
    >>> tree.child(row=0, node=1, token=8)
    4
    >>> tree.ancestor_mask()[0, 4].tolist()  # node 4 attends to the root, node 1 and itself
    [True, True, False, False, True]
    >>> small = tree.prune(3)
    >>> small.tokens.tolist(), small.parents.tolist()
    ([[4, 5, 7]], [[0, 0, 1]])

    Args:
        tokens: token of each node, int64 ``[B, N]``.
        parents: parent index of each node, int64 ``[B, N]``; the root is its own parent.
        depths: distance from the root, int64 ``[B, N]``.
        log_probs: path log-probability in nats, float32 ``[B, N]``; 0 at the root.
        valid: nodes that may be accepted, bool ``[B, N]``.
        height: largest depth that any node may have.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_probs: Tensor
    valid: Tensor
    height: int

    @property
    def num_nodes(self) -> int:
        """Return N, the root included."""
        return self.tokens.shape[1]

    @classmethod
    def root_only(cls, root: Tensor) -> DraftTree:
        """Build the tree that proposes nothing.

        Args:
            root: root tokens, int64 ``[B]``.
        """
        zeros = torch.zeros(len(root), 1, dtype=torch.long)
        return cls(
            tokens=root.cpu().unsqueeze(1),
            parents=zeros,
            depths=zeros,
            log_probs=torch.zeros(len(root), 1),
            valid=torch.ones(len(root), 1, dtype=torch.bool),
            height=0,
        )

    @classmethod
    def from_beams(cls, root: Tensor, beams: Beams, max_nodes: int | None = None) -> DraftTree:
        """Merge beams into a tree and keep the most likely nodes.

        Two beams with the same prefix share that prefix's nodes, because beams point to their
        parents instead of repeating them.

        Path log-probabilities fall along a path, so the best ``max_nodes`` nodes are connected.

        Args:
            root: root tokens, int64 ``[B]``.
            beams: output of the beam search.
            max_nodes: nodes to keep, the root included (N); ``None`` keeps all.
        """
        beams = beams.on_host()
        batch, length, width = beams.tokens.shape
        # Beam w of depth d (0-based) becomes node 1 + d * W + w; its parent lies W columns back.
        offsets = (np.arange(length) - 1) * width + 1
        above = beams.parents.numpy() + offsets[:, None]
        above[:, 0] = 0
        tokens, parents, depths = np.zeros((3, batch, 1 + length * width), dtype=np.int64)
        tokens[:, 0] = root.cpu().numpy()
        tokens[:, 1:] = beams.tokens.numpy().reshape(batch, -1)
        parents[:, 1:] = above.reshape(batch, -1)
        depths[:, 1:] = np.arange(1, length + 1).repeat(width)
        log_probs = np.zeros(tokens.shape, dtype=np.float32)
        log_probs[:, 1:] = beams.log_probs.numpy().reshape(batch, -1)
        return cls._cut((tokens, parents, depths, log_probs), length, max_nodes)

    def prune(self, max_nodes: int) -> DraftTree:
        """Keep the ``max_nodes`` most likely nodes of each row (the root is always among them)."""
        if max_nodes >= self.num_nodes:
            return self
        parts = (self.tokens, self.parents, self.depths, self.log_probs)
        return self._cut([part.numpy() for part in parts], self.height, max_nodes)

    @classmethod
    def _cut(cls, parts: Sequence[Array], height: int, max_nodes: int | None) -> DraftTree:
        """Build a tree of the most likely nodes.

        Args:
            parts: tokens, parents, depths and log-probabilities of all nodes, each ``[B, n]``.
            height: largest depth that any node may have.
            max_nodes: nodes to keep, the root included (N); ``None`` keeps all.
        """
        tokens, parents, depths, log_probs = parts
        if max_nodes is not None and max_nodes < tokens.shape[1]:
            rows = np.arange(len(tokens))[:, None]
            # Stable: among equals the shallower node wins, so a child never stays without its parent.
            kept = np.sort(np.argsort(-log_probs, axis=1, kind="stable")[:, :max_nodes], axis=1)
            new_index = np.zeros_like(parents)
            new_index[rows, kept] = np.arange(max_nodes)
            tokens, depths, log_probs = tokens[rows, kept], depths[rows, kept], log_probs[rows, kept]
            parents = new_index[rows, parents[rows, kept]]
            height = min(height, max_nodes - 1)
        return cls(
            tokens=torch.from_numpy(tokens),
            parents=torch.from_numpy(parents),
            depths=torch.from_numpy(depths),
            log_probs=torch.from_numpy(log_probs),
            valid=torch.from_numpy(log_probs > -np.inf),
            height=height,
        )

    def ancestor_mask(self) -> Tensor:
        """Tell which nodes each node attends to: itself and its ancestors.

        Returns:
            bool ``[B, N, N]``; entry ``[b, i, j]`` is true when j is i or an ancestor of i.
        """
        batch, nodes = self.tokens.shape
        parents = self.parents.numpy()
        mask = np.zeros((batch, nodes, nodes), dtype=bool)
        rows, columns = np.arange(batch)[:, None], np.arange(nodes)
        ancestor = np.broadcast_to(columns, (batch, nodes))
        for _ in range(self.height + 1):
            mask[rows, columns, ancestor] = True
            ancestor = parents[rows, ancestor]
        return torch.from_numpy(mask)

    def child(self, row: int, node: int, token: int) -> int:
        """Return the child of a node that carries a token, 0 (the root is nobody's child) where none is."""
        return self._children.get((row, node, token), 0)

    @cached_property
    def _children(self) -> dict[tuple[int, int, int], int]:
        """Return the nodes that may be accepted, by row, parent and token."""
        columns = (part.tolist() for part in (self.parents, self.tokens, self.valid))
        return {
            (row, parent, token): node
            for row, nodes in enumerate(zip(*columns, strict=True))
            for node, (parent, token, valid) in enumerate(zip(*nodes, strict=True))
            if valid and node
        }
