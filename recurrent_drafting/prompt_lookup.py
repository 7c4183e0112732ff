"""Prompt lookup: where the text's last tokens have stood before, propose what followed them there.

Text repeats itself: names, quotations, code, lists, and the loops of small models. A repeat needs no
network to be continued, and it can be copied much further than a drafter was trained to look ahead.
The copy is one more beam beside the drafter's; where both propose the same token they share the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recurrent_drafting.draft_tree import Beams

# A repeat is found by its last two tokens, and measured up to a longest length; of several the longest counts,
# and the latest among equals. So many are compared. Where there is none, the latest place of the last token counts.
MAX_MATCH = 9
_MOST_COMPARED = 16
# How often a repeat of 1, 2, 3, ... tokens went on by one more in replies of the packaged base, and how many tokens
# of a row's own record that is worth.
_PRIOR_RATES = (0.24, 0.48, 0.62, 0.73, 0.76, 0.77, 0.82, 0.82, 0.90)
_PRIOR_TOKENS = 4.0
# Log-odds of the copied token from those that the repeat gives it and those that the drafter gives it: a logistic
# regression on the same replies, moved to where held-out prompts gave most tokens per step, with token recycling and
# without. The drafter's odds of a token that it did not keep are not known, but low.
_INTERCEPT, _REPEAT_WEIGHT, _DRAFTER_WEIGHT = 0.7, 0.7, 0.5
_NOT_DRAFTED = 0.01
_LEAST = 1e-3


class RepeatIndex:
    """One row's text, indexed by its repeats, with a record of how far they went on.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._text: list[int] = []
        # The latest position after each token and each pair, and per position the one before it with the same pair.
        self._latest: dict[int, int] = {}
        self._latest_pair: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []
        self._source = self._length = 0
        self._hits = [rate * _PRIOR_TOKENS for rate in _PRIOR_RATES]
        self._tries = [_PRIOR_TOKENS] * len(_PRIOR_RATES)
        for token in tokens:
            self._append(token)

    @property
    def repeats(self) -> bool:
        """Tell whether the text's last token has stood before."""
        return self._length > 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append decided tokens; they count in the record of repeats."""
        for token in tokens:
            if self._length:
                self._tries[self._length - 1] += 1
                self._hits[self._length - 1] += self._text[self._source] == token
            self._append(token)

    def continuation(self, most: int) -> tuple[list[int], list[float]]:
        """Return what followed the longest repeat, and per token the log-probability that it follows here too.

        7 8 has stood before. A copy that reaches the end of the text goes on with itself:

        >>> tokens, _ = RepeatIndex([7, 8, 9, 5, 7, 8]).continuation(6)
        >>> tokens
        [9, 5, 7, 8, 9, 5]
        >>> RepeatIndex([7, 8, 9]).continuation(6)
        ([], [])

        Args:
            most: tokens wanted.

        Returns:
            Tokens, at most ``most``, and per token the log-probability given those before it; both are empty
            where the last tokens are new.
        """
        if not self._length:
            return [], []
        tokens = self._text[self._source : self._source + most]
        while len(tokens) < most:  # the repeat runs into the end: what it copies goes on with the copy
            tokens.append(tokens[len(tokens) - (len(self._text) - self._source)])
        places = [min(length, MAX_MATCH) - 1 for length in range(self._length, self._length + most)]
        return tokens, [math.log(self._hits[place] / self._tries[place]) for place in places]

    def _append(self, token: int) -> None:
        text = self._text
        pair = (text[-1], token) if text else None
        text.append(token)
        self._earlier.append(self._latest_pair.get(pair, 0) if pair else 0)
        self._source, self._length = self._longest()
        self._latest[token] = len(text)
        if pair:
            self._latest_pair[pair] = len(text)

    def _longest(self) -> tuple[int, int]:
        """Return the position after the longest earlier repeat of the text's end, and its length (0: there is none)."""
        best = self._latest.get(self._text[-1], 0)
        longest = min(best, 1)
        position = self._earlier[-1]
        for _ in range(_MOST_COMPARED):
            if not position or longest == MAX_MATCH:
                break
            length = self._common(position)
            if length > longest:
                best, longest = position, length
            position = self._earlier[position - 1]
        return best, longest

    def _common(self, position: int) -> int:
        """Return how many tokens before a position are those of the text's end: two at least, ``MAX_MATCH`` at most."""
        text, length = self._text, 2
        while length < min(MAX_MATCH, position) and text[position - 1 - length] == text[-1 - length]:
            length += 1
        return length


@dataclass(frozen=True)
class Copies:
    """What repeats propose, one chain per row.

    Args:
        tokens: copied tokens, int64 ``[B, M]``.
        log_probs: log-probability of each given those before it, float32 ``[B, M]``; ``-inf`` throughout a
            row without a repeat.
    """

    tokens: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, texts: Sequence[RepeatIndex], most: int, device: torch.device) -> Copies:
        """Look every row up.

        Args:
            texts: the rows, each ending with its root token.
            most: tokens M that are copied.
            device: where the tensors go.
        """
        found = [text.continuation(most) for text in texts]
        nothing = [0] * most, [-math.inf] * most
        tokens, log_probs = zip(*(pair if pair[0] else nothing for pair in found), strict=True)
        return cls(torch.tensor(tokens, device=device), torch.tensor(log_probs, device=device))


def join(beams: Beams, copies: Copies) -> Beams:
    """Add the copies to the drafter's beams, as one more beam of every depth.

    A copied token that the drafter has at the same place shares its node; its probability is pooled from both,
    and the node's other children share what is left in the proportions that the drafter gave them.

    Args:
        beams: of the beam search, ``[B, L, W]``.
        copies: M tokens per row.

    Returns:
        Beams ``[B, max(L, M), W + 1]``; the last column holds what is copied alone.
    """
    _, length, width = beams.tokens.shape
    missing = max(length - copies.tokens.shape[1], 0)
    tokens = functional.pad(copies.tokens, (0, missing))
    log_repeat = functional.pad(copies.log_probs, (0, missing), value=-torch.inf)
    descent = _descend(beams, tokens[:, :length], ~log_repeat[:, :length].isneginf())
    log_probs, pooled = _pool(beams, descent, log_repeat[:, :length])
    # Below the drafter's last depth the copy goes on alone: the last column hangs on itself.
    tail = tokens.shape[1] - length
    parents = functional.pad(descent.columns, (0, tail), value=width)[:, : length + tail]
    deeper = pooled[:, -1:] + log_repeat[:, length:].cumsum(dim=1)
    return Beams(
        tokens=torch.cat([functional.pad(beams.tokens, (0, 0, 0, tail)), tokens.unsqueeze(2)], dim=2),
        parents=torch.cat([functional.pad(beams.parents, (0, 0, 0, tail)), parents.unsqueeze(2)], dim=2),
        log_probs=torch.cat([log_probs, functional.pad(deeper.unsqueeze(2), (width, 0), value=-torch.inf)], dim=1),
    )


@dataclass(frozen=True)
class _Descent:
    """The copied text's way down the drafter's beams; L depths, W columns.

    Args:
        columns: the column of its node before each depth and after the last, W where it is copied alone, int64
            ``[B, L + 1]``.
        shared: whether the drafter has the node above and something is copied, bool ``[B, L]``.
        siblings: the drafter's children of the node above, bool ``[B, L, W]``.
        same: which of them is the copied token, bool ``[B, L, W]``.
    """

    columns: Tensor
    shared: Tensor
    siblings: Tensor
    same: Tensor


def _descend(beams: Beams, tokens: Tensor, copied: Tensor) -> _Descent:
    """Follow copied tokens from the root on.

    Args:
        beams: the drafter's, ``[B, L, W]``.
        tokens: of the copied text, int64 ``[B, L]``.
        copied: whether there are any, bool ``[B, L]``.
    """
    batch, length, width = beams.tokens.shape
    drafted = ~beams.log_probs.isneginf()
    matches = drafted & (beams.tokens == tokens.unsqueeze(2))
    columns = [beams.parents.new_zeros(batch)]
    shared = [copied[:, 0]]
    siblings, same = [], []
    for depth in range(length):
        siblings.append((beams.parents[:, depth] == columns[-1].unsqueeze(1)) & shared[-1].unsqueeze(1))
        same.append(siblings[-1] & matches[:, depth])
        hit, at = same[-1].max(dim=1)
        columns.append(torch.where(hit, at, width))
        if depth + 1 < length:
            shared.append(hit & copied[:, depth + 1])
    return _Descent(
        columns=torch.stack(columns, dim=1),
        shared=torch.stack(shared, dim=1),
        siblings=torch.stack(siblings, dim=1) & drafted,
        same=torch.stack(same, dim=1),
    )


def _pool(beams: Beams, descent: _Descent, log_repeat: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the copied tokens' probabilities, and move those of their siblings and all that is below.

    Args:
        beams: the drafter's, ``[B, L, W]``.
        descent: of the copied text.
        log_repeat: log-probabilities of the copied tokens as the repeat gives them, ``[B, L]``.

    Returns:
        Path log-probabilities of the W columns and of the copied text where it is alone, ``[B, L, W + 1]``, and of
        the copied text throughout, ``[B, L]``.
    """
    hit = descent.same.any(dim=2)
    own = torch.where(descent.same, beams.log_probs, 0.0).sum(dim=2)
    above = functional.pad(own[:, :-1], (1, 0))
    # The token's probability as the drafter gives it, and as pooled; both given the node above.
    q = torch.where(hit, (own - above).exp(), _NOT_DRAFTED).clamp(_LEAST, 1 - _LEAST)
    repeat = log_repeat.exp()
    p = torch.where(descent.shared, _pooled(repeat, q), repeat)
    pooled = p.log().cumsum(dim=1)
    rest = torch.where(descent.siblings, ((1 - p) / (1 - q)).log().unsqueeze(2), 0.0)
    lifted = (pooled - own).unsqueeze(2)
    # Per column of a depth: how far pooling moved its path log-probability, and where that led.
    moved = paths = beams.log_probs.new_zeros(len(own), beams.log_probs.shape[2])
    log_probs = []
    for depth, (parents, drafted) in enumerate(zip(beams.parents.unbind(1), beams.log_probs.unbind(1), strict=True)):
        moved = torch.where(descent.same[:, depth], lifted[:, depth], moved.gather(1, parents) + rest[:, depth])
        # Rounding must not lift a node above its parent.
        paths = torch.minimum(drafted + moved, paths.gather(1, parents))
        log_probs.append(paths)
    alone = torch.where(hit, -torch.inf, pooled).unsqueeze(2)
    return torch.cat([torch.stack(log_probs, dim=1), alone], dim=2), pooled


def best_chain(beams: Beams, copies: Copies) -> tuple[Tensor, Tensor]:
    """Choose between the drafter's chain and the copy, for engines that verify one chain per row.

    Args:
        beams: of width 1, ``[B, L, 1]``.
        copies: L tokens per row.

    Returns:
        Tokens, int64 ``[B, L]``, and how many of them are expected to be accepted, ``[B]``; 0 where there is
        nothing to propose.
    """
    joined = join(beams, copies)
    drafted, alone = joined.log_probs.unbind(dim=2)
    # What both propose stands in the drafter's column.
    copied = torch.where(alone.isneginf(), drafted, alone).exp().sum(dim=1)
    copied = torch.where(copies.log_probs[:, 0].isneginf(), 0.0, copied)
    own = drafted.exp().sum(dim=1)
    better = (copied > own).unsqueeze(1)
    return torch.where(better, joined.tokens[:, :, 1], joined.tokens[:, :, 0]), torch.maximum(own, copied)


def _pooled(repeat: Tensor, drafter: Tensor) -> Tensor:
    """Return the probability of a copied token, from that of the repeat and that of the drafter."""
    odds = _REPEAT_WEIGHT * repeat.clamp(_LEAST, 1 - _LEAST).logit() + _DRAFTER_WEIGHT * drafter.logit()
    return (odds + _INTERCEPT).sigmoid()
