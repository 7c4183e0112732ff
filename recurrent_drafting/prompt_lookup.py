"""Prompt lookup: where the text's last tokens have stood before, propose what followed them there.

Text repeats itself: names, quotations, code, lists, and the loops of small models. A repeat needs no
network to be continued, and it can be copied much further than a drafter was trained to look ahead.
The copy is one more beam beside the drafter's; where both propose the same token they share the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recurrent_drafting.draft_tree import Array, Beams

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
    """What repeats propose, one chain per row, on the host.

    Args:
        tokens: copied tokens, int64 ``[B, M]``.
        log_probs: log-probability of each given those before it, float32 ``[B, M]``; ``-inf`` throughout a
            row without a repeat.
    """

    tokens: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, texts: Sequence[RepeatIndex], most: int) -> Copies:
        """Look every row up.

        Args:
            texts: the rows, each ending with its root token.
            most: tokens M that are copied.
        """
        found = [text.continuation(most) for text in texts]
        nothing = [0] * most, [-math.inf] * most
        tokens, log_probs = zip(*(pair if pair[0] else nothing for pair in found), strict=True)
        return cls(torch.tensor(tokens), torch.tensor(log_probs))


def join(beams: Beams, copies: Copies) -> Beams:
    """Add the copies to the drafter's beams, as one more beam of every depth.

    A copied token that the drafter has at the same place shares its node; its probability is pooled from both,
    and the node's other children share what is left in the proportions that the drafter gave them.

    Args:
        beams: of the beam search, ``[B, L, W]``.
        copies: M tokens per row.

    Returns:
        Beams ``[B, max(L, M), W + 1]`` on the host; the last column holds what is copied alone.
    """
    beams = beams.on_host()
    batch, length, width = beams.tokens.shape
    depths, copied = max(length, copies.tokens.shape[1]), copies.tokens.shape[1]
    tokens = np.zeros((batch, depths, width + 1), dtype=np.int64)
    # Below the drafter's last depth the copy goes on alone: the last column hangs on itself.
    parents = np.full_like(tokens, width)
    log_probs = np.full(tokens.shape, -np.inf, dtype=np.float32)
    log_repeat = np.full((batch, depths), -np.inf, dtype=np.float32)
    tokens[:, :length, :width], tokens[:, :copied, width] = beams.tokens.numpy(), copies.tokens.numpy()
    parents[:, :length, :width], parents[:, length:, :width] = beams.parents.numpy(), 0
    log_probs[:, :length, :width] = beams.log_probs.numpy()
    log_repeat[:, :copied] = copies.log_probs.numpy()
    drafted = log_probs[:, :length, :width]  # a view: pooling moves it in place
    descent = _descend(
        parents[:, :length, :width], drafted, tokens[:, :length, :width] == tokens[:, :length, width:], log_repeat
    )
    parents[:, : length + 1, width] = descent.columns[:, :depths]
    pooled = _pool(parents[:, :length, :width], drafted, descent, log_repeat[:, :length])
    log_probs[:, :length, width] = np.where(descent.same.any(axis=2), -np.inf, pooled)
    log_probs[:, length:, width] = pooled[:, -1:] + log_repeat[:, length:].cumsum(axis=1)
    return Beams(*(torch.from_numpy(part) for part in (tokens, parents, log_probs)))


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

    columns: Array
    shared: Array
    siblings: Array
    same: Array


def _descend(parents: Array, log_probs: Array, matches: Array, log_repeat: Array) -> _Descent:
    """Follow copied tokens from the root on.

    Args:
        parents: of the drafter's beams, ``[B, L, W]``.
        log_probs: of their paths, ``[B, L, W]``.
        matches: which beams end with the copied token of their depth, bool ``[B, L, W]``.
        log_repeat: of the copied tokens, ``-inf`` where there is none, ``[B, L or more]``.
    """
    batch, length, width = parents.shape
    drafted, copied = log_probs > -np.inf, log_repeat > -np.inf
    columns = np.zeros((batch, length + 1), dtype=np.int64)
    shared = np.zeros((batch, length), dtype=bool)
    siblings, same = np.zeros((2, batch, length, width), dtype=bool)
    going = np.ones(batch, dtype=bool)
    for depth in range(length):
        shared[:, depth] = going & copied[:, depth]
        below = (parents[:, depth] == columns[:, depth, None]) & shared[:, depth, None]
        siblings[:, depth] = below & drafted[:, depth]
        same[:, depth] = siblings[:, depth] & matches[:, depth]
        going = same[:, depth].any(axis=1)
        columns[:, depth + 1] = np.where(going, same[:, depth].argmax(axis=1), width)
    return _Descent(columns, shared, siblings, same)


def _pool(parents: Array, log_probs: Array, descent: _Descent, log_repeat: Array) -> Array:
    """Pool the copied tokens' probabilities, and move those of their siblings and all that is below.

    Args:
        parents: of the drafter's beams, ``[B, L, W]``.
        log_probs: of their paths, ``[B, L, W]``; changed in place.
        descent: of the copied text.
        log_repeat: log-probabilities of the copied tokens as the repeat gives them, ``[B, L]``.

    Returns:
        Path log-probabilities of the copied text, ``[B, L]``.
    """
    own = np.where(descent.same, log_probs, 0).sum(axis=2)
    above = np.zeros_like(own)
    above[:, 1:] = own[:, :-1]
    # The token's probability as the drafter gives it, and as pooled; both given the node above.
    q = np.where(descent.same.any(axis=2), np.exp(own - above), _NOT_DRAFTED).clip(_LEAST, 1 - _LEAST)
    p = _pooled(np.exp(log_repeat), q)
    pooled: Array = np.where(descent.shared, np.log(p), log_repeat).cumsum(axis=1)
    rest = np.where(descent.siblings, np.log((1 - p) / (1 - q))[:, :, None], 0)
    lifted = (pooled - own)[:, :, None]
    # Per column of a depth: how far pooling moved its path log-probability, and where that led.
    rows = np.arange(len(own))[:, None]
    moved = paths = np.zeros((len(own), log_probs.shape[2]), dtype=np.float32)
    for depth in range(log_probs.shape[1]):
        above_it = parents[:, depth]
        moved = np.where(descent.same[:, depth], lifted[:, depth], moved[rows, above_it] + rest[:, depth])
        # Rounding must not lift a node above its parent.
        log_probs[:, depth] = np.minimum(log_probs[:, depth] + moved, paths[rows, above_it])
        paths = log_probs[:, depth]
    return pooled


def best_chain(beams: Beams, copies: Copies) -> tuple[Tensor, Tensor]:
    """Choose between the drafter's chain and the copy, for engines that verify one chain per row.

    Args:
        beams: of width 1, ``[B, L, 1]``.
        copies: L tokens per row.

    Returns:
        On the host: tokens, int64 ``[B, L]``, and how many of them are expected to be accepted, ``[B]``; 0 where
        there is nothing to propose.
    """
    joined = join(beams, copies)
    drafted, alone = joined.log_probs.unbind(dim=2)
    # What both propose stands in the drafter's column.
    copied = torch.where(alone.isneginf(), drafted, alone).exp().sum(dim=1)
    copied = torch.where(copies.log_probs[:, 0].isneginf(), 0.0, copied)
    own = drafted.exp().sum(dim=1)
    better = (copied > own).unsqueeze(1)
    return torch.where(better, joined.tokens[:, :, 1], joined.tokens[:, :, 0]), torch.maximum(own, copied)


def _pooled(repeat: Array, drafter: Array) -> Array:
    """Return the probability of a copied token, from that of the repeat and that of the drafter."""
    odds = _REPEAT_WEIGHT * _logit(repeat.clip(_LEAST, 1 - _LEAST)) + _DRAFTER_WEIGHT * _logit(drafter) + _INTERCEPT
    probability: Array = 1 / (1 + np.exp(-odds))
    return probability


def _logit(probability: Array) -> Array:
    odds: Array = np.log(probability / (1 - probability))
    return odds
