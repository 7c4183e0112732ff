"""The draft tree: every beam kept at every depth, merged by parent pointers, and its geometry.

Node 0 is the root (the token the verifier has already chosen). Nodes are stored parents first,
so a parent's index is always smaller than its children's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class DraftTree:
    """A batch of prefix trees with the same number of nodes.

    Tokens 5 and 6 may follow the root 4, and 7 and 8 the 5. Two beams begin with 5, and one node holds it:

    >>> beams = Beams(
    ...     tokens=torch.tensor([[[5, 6], [7, 8]]]),
    ...     parents=torch.tensor([[[0, 0], [0, 0]]]),
    ...     log_probs=torch.tensor([[[-0.5, -2.0], [-1.0, -3.0]]]),
    ... )
    >>> tree = DraftTree.from_beams(torch.tensor([4]), beams)
    >>> tree.tokens.tolist(), tree.parents.tolist()
    ([[4, 5, 6, 7, 8]], [[0, 0, 0, 1, 1]])
    >>> tree.child(rows=torch.tensor([0]), nodes=torch.tensor([1]), tokens=torch.tensor([8])).tolist()
    [4]
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
        zeros = torch.zeros_like(root).unsqueeze(1)
        return cls(
            tokens=root.unsqueeze(1),
            parents=zeros,
            depths=zeros,
            log_probs=torch.zeros_like(zeros, dtype=torch.float32),
            valid=torch.ones_like(zeros, dtype=torch.bool),
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
        batch, length, width = beams.tokens.shape
        device = root.device
        # Beam w of depth d (0-based) becomes node 1 + d * W + w; its parent lies W columns back.
        offsets = (torch.arange(length, device=device) - 1) * width + 1
        parents = beams.parents + offsets.view(1, length, 1)
        parents[:, 0] = 0
        depths = torch.arange(1, length + 1, device=device).repeat_interleave(width)
        zero = root.new_zeros(batch, 1)
        tree = cls(
            tokens=torch.cat([root.unsqueeze(1), beams.tokens.flatten(1)], dim=1),
            parents=torch.cat([zero, parents.flatten(1)], dim=1),
            depths=torch.cat([zero, depths.expand(batch, -1)], dim=1),
            log_probs=torch.cat([zero.float(), beams.log_probs.flatten(1)], dim=1),
            valid=torch.cat([zero == 0, beams.log_probs.flatten(1) > -torch.inf], dim=1),
            height=length,
        )
        return tree if max_nodes is None else tree.prune(max_nodes)

    def prune(self, max_nodes: int) -> DraftTree:
        """Keep the ``max_nodes`` most likely nodes of each row (the root is always among them)."""
        if max_nodes >= self.num_nodes:
            return self
        # Stable: among equals the shallower node wins, so a child never stays without its parent.
        order = torch.sort(self.log_probs, dim=1, descending=True, stable=True).indices
        kept = order[:, :max_nodes].sort(dim=1).values
        new_index = torch.zeros_like(self.parents)
        new_index.scatter_(1, kept, torch.arange(max_nodes, device=kept.device).expand_as(kept))
        return DraftTree(
            tokens=self.tokens.gather(1, kept),
            parents=new_index.gather(1, self.parents.gather(1, kept)),
            depths=self.depths.gather(1, kept),
            log_probs=self.log_probs.gather(1, kept),
            valid=self.valid.gather(1, kept),
            height=min(self.height, max_nodes - 1),
        )

    def ancestor_mask(self) -> Tensor:
        """Tell which nodes each node attends to: itself and its ancestors.

        Returns:
            bool ``[B, N, N]``; entry ``[b, i, j]`` is true when j is i or an ancestor of i.
        """
        shape = (*self.tokens.shape, self.num_nodes)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.tokens.device)
        ancestor = torch.arange(self.num_nodes, device=self.tokens.device).expand_as(self.parents)
        for _ in range(self.height + 1):
            mask.scatter_(2, ancestor.unsqueeze(2), True)
            ancestor = self.parents.gather(1, ancestor)
        return mask

    def child(self, rows: Tensor, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Find the child of a node that carries a token.

        Args:
            rows: batch rows, int64 ``[R]``.
            nodes: one node per row, int64 ``[R]``.
            tokens: the wanted token per row, int64 ``[R]``.

        Returns:
            int64 ``[R]``: index of the child, or 0 (the root is nobody's child) where none is.
        """
        match = (self.parents[rows] == nodes.unsqueeze(1)) & (self.tokens[rows] == tokens.unsqueeze(1))
        match &= self.valid[rows]
        match[:, 0] = False
        return match.int().argmax(dim=1)
