"""Token recycling: what the verifier said after a token just now, it may say after the same token again.

A verify forward predicts the next token at every node of the draft tree, also at those that are not accepted. Most
of that is thrown away, though the text often comes to such a token one step later: the draft was right but for one
word, or a place too early. The last nodes are kept here with the verifier's most likely next tokens; where a beam
ends with a node's token, they are mixed into the drafter's distribution. That takes no forward, and it brings tokens
from outside the draft vocabulary. The idea is from Luo et al., 2024 (arXiv 2408.08696), who draft from such a table
alone; here it is one more voice in the beam search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.drafter import Drafter

# Most likely next tokens that are kept of a node.
KEPT = 8
# The prediction's share of the mixture: of a node whose predecessor is the same too, of one of the last step, of an
# older one. Rounded from the most likely shares on held-out replies of the packaged base, greedy and sampled.
_SAME_PAIR, _LAST_STEP, _OLDER = 0.65, 0.5, 0.25
# Logits that are compared at once in the search for the largest.
_BLOCK = 128


@dataclass(frozen=True)
class Predictions:
    """What the verifier said at recycled nodes, one node for each of n beams.

    Args:
        tokens: its most likely next tokens, int64 ``[B, n, KEPT]``.
        log_weights: log of their probabilities times the node's share of the mixture, float32
            ``[B, n, KEPT]``; ``-inf`` throughout where no node was found. A vocabulary below KEPT has fewer.
    """

    tokens: Tensor
    log_weights: Tensor


class RecycledNodes:
    """The last verified nodes of every row of a batch, in a ring.

    Args:
        before: the token before each row's root, int64 ``[B]``.
        draft_token_ids: the draft vocabulary, int64 ``[V_d]``.
        vocab_size: the verifier's V.
        capacity: nodes that are kept of a row.
    """

    def __init__(self, before: Tensor, draft_token_ids: Tensor, vocab_size: int, capacity: int) -> None:
        rows, device = len(before), before.device
        self.before = before
        self._kept = min(KEPT, vocab_size)
        # By slot [B, capacity], and of each slot its next tokens [B, capacity, KEPT].
        self._tokens = torch.full((rows, capacity), -1, dtype=torch.long, device=device)
        self._predecessors = self._tokens.clone()
        shape = (rows, capacity, self._kept)
        self._next_tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._log_probs = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        # By slot: the step that filled it, from 1 on, all rows take their steps together; and its share of the mixture.
        self._steps = torch.zeros(capacity, dtype=torch.long, device=device)
        self._log_shares = torch.full((capacity,), math.log(_OLDER), device=device, dtype=torch.float32)
        self._step = self._free = 0
        # The place of each token in the draft vocabulary, -1 outside.
        self._places = torch.full((vocab_size,), -1, dtype=torch.long, device=device)
        self._places[draft_token_ids] = torch.arange(len(draft_token_ids), device=device)

    @classmethod
    def of(cls, before: Tensor, drafter: Drafter, capacity: int) -> RecycledNodes | None:
        """Return an empty ring for a drafter's vocabulary, None for a capacity of 0; ``before`` is int64 ``[B]``."""
        return cls(before, drafter.draft_token_ids, drafter.config.vocab_size, capacity) if capacity else None

    def record(self, tree: DraftTree, logits: Tensor, last: Tensor) -> None:
        """Keep the nodes of a verified tree in place of the oldest ones.

        Args:
            tree: B rows of N nodes.
            logits: the verifier's at each node, ``[B, N, V]``.
            last: the last accepted node of each row, int64 ``[B]``.
        """
        count = min(tree.num_nodes, len(self._steps))
        # A tree's nodes lie side by side: where the end is too near, the ring starts again a little early.
        start = self._free if self._free + count <= len(self._steps) else 0
        self._free = start + count
        self._step += 1
        tokens, parents, valid = (part.to(logits.device) for part in (tree.tokens, tree.parents, tree.valid))
        predecessors = torch.cat([self.before.unsqueeze(1), tokens.gather(1, parents[:, 1:])], dim=1)
        # An LM head may have more rows than there are tokens.
        next_tokens, log_probs = most_likely(logits[:, :count, : len(self._places)], self._kept)
        self._tokens[:, start : self._free] = torch.where(valid, tokens, -1)[:, :count]
        self._predecessors[:, start : self._free] = predecessors[:, :count]
        self._next_tokens[:, start : self._free], self._log_probs[:, start : self._free] = next_tokens, log_probs
        self._steps[start : self._free] = self._step
        self._log_shares.fill_(math.log(_OLDER))[start : self._free] = math.log(_LAST_STEP)
        self.before = tokens.gather(1, last.unsqueeze(1)).squeeze(1)

    def look_up(self, tokens: Tensor, before: Tensor) -> Predictions:
        """Find the latest node with the same token; one with the same predecessor comes first.

        Args:
            tokens: last token of each beam, int64 ``[B, n]``.
            before: the token before it, int64 ``[B, n]``.
        """
        same = tokens.unsqueeze(2) == self._tokens.unsqueeze(1)
        pair = before.unsqueeze(2) == self._predecessors.unsqueeze(1)
        # By step; a pair of any age ranks above all that are none.
        ranks = torch.where(pair, self._steps + self._step, self._steps)
        rank, slots = torch.where(same, ranks, 0).max(dim=2)
        log_share = torch.where(rank > self._step, math.log(_SAME_PAIR), self._log_shares[slots])
        log_share = log_share.masked_fill(rank == 0, -torch.inf)
        rows = torch.arange(len(slots), device=slots.device).unsqueeze(1)
        log_weights = self._log_probs[rows, slots] + log_share.unsqueeze(2)
        return Predictions(self._next_tokens[rows, slots], log_weights)

    def blend(self, logits: Tensor, found: Predictions) -> Tensor:
        """Mix the drafter's distribution with what was found; the shares of tokens that were not kept stay with it.

        Args:
            logits: the drafter's, ``[B, n, V_d]``.
            found: for the same beams.

        Returns:
            Log-probabilities, float32 ``[B, n, V_d + KEPT]``: of the draft vocabulary, then of the found tokens,
            ``-inf`` for those of them that are in the draft vocabulary.
        """
        left = torch.log1p(-found.log_weights.exp().sum(dim=2, keepdim=True))
        padded = functional.pad(logits.float(), (0, self._kept), value=-torch.inf)
        mixed = padded.log_softmax(dim=2).add_(left)
        places = self._places[found.tokens]
        outside = logits.shape[2] + torch.arange(self._kept, device=logits.device)
        index = torch.where(places < 0, outside, places)
        return mixed.scatter_(2, index, torch.logaddexp(mixed.gather(2, index), found.log_weights))

    def replace(self, row: int, before: int) -> None:
        """Let another text, whose root follows the token ``before``, take a row's place: it starts with no nodes."""
        self.before[row] = before
        self._tokens[row] = self._predecessors[row] = -1

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows, in the given order; the others leave the batch."""
        index = list(rows)
        for name in ("before", "_tokens", "_predecessors", "_next_tokens", "_log_probs"):
            setattr(self, name, getattr(self, name)[index])


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens and their log-probabilities, without a pass over all logits but one for maxima.

    The ``count`` largest lie in the ``count`` blocks with the largest maxima. Of the other blocks only the maxima
    enter the normaliser, so probabilities come out too large, by a tenth on average for the packaged base. They
    guide a draft, never a pick.

    >>> tokens, log_probs = most_likely(torch.tensor([0.5, 0.125, 0.25, 0.125]).log(), 2)
    >>> tokens.tolist(), [round(value, 3) for value in log_probs.exp().tolist()]
    ([0, 2], [0.5, 0.25])

    Args:
        logits: ``[..., V]``.
        count: tokens wanted.

    Returns:
        Token ids, int64 ``[..., count]``, and float32 log-probabilities of the same shape, largest first;
        ``-inf`` throughout where they are not finite.
    """
    blocks = logits.shape[-1] // _BLOCK
    if blocks <= count:
        values, index = logits, torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
        others = logits[..., :0]
    else:
        # Block i holds the tokens i, i + blocks, i + 2 * blocks, ...: maxima across rows of a table are fast.
        table = logits[..., : blocks * _BLOCK].unflatten(-1, (_BLOCK, blocks))
        maxima = table.amax(dim=-2)
        best = maxima.topk(count, dim=-1).indices
        others = maxima.scatter(-1, best, -torch.inf)
        best = best.unsqueeze(-2).expand(*best.shape[:-1], _BLOCK, count)
        values = table.gather(-1, best).flatten(-2)
        index = (best + blocks * torch.arange(_BLOCK, device=logits.device).unsqueeze(-1)).flatten(-2)
        # What does not fill a block competes too.
        rest = torch.arange(blocks * _BLOCK, logits.shape[-1], device=logits.device).expand(*logits.shape[:-1], -1)
        values, index = torch.cat([values, logits[..., blocks * _BLOCK :]], dim=-1), torch.cat([index, rest], dim=-1)
    found, places = values.topk(count, dim=-1)
    normaliser = torch.cat([values, others], dim=-1).float().logsumexp(dim=-1, keepdim=True)
    log_probs = found.float() - normaliser
    sound = log_probs.isfinite().all(dim=-1, keepdim=True)
    return index.gather(-1, places), log_probs.masked_fill(~sound, -torch.inf)
