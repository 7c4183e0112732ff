"""Distilled continuations: what the verifier would write next at every position of a text.

All positions branch at once, so that a token of every continuation costs one forward.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from recurrent_drafting import token_rows
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.errors import DataError, UsageError
from recurrent_drafting.kv_cache import VerifierCache
from recurrent_drafting.sampling import Sampler
from recurrent_drafting.token_rows import EncodedRow
from recurrent_drafting.verifier import Verifier

# Logits held at once while continuations are written, and the most branches of one forward: their
# keys are visible to themselves alone, so that more of them are mostly masked work.
_LOGITS_AT_ONCE = 2**24
_MOST_BRANCHES = 256


@dataclass(frozen=True)
class DistilConfig:
    """How distilled continuations are made.

    Args:
        num_future_tokens: tokens n of each continuation.
        temperature: 0 is greedy; above, the package's position-keyed noise decides.
        seed: key of that noise.

    Raises:
        UsageError: a value is out of range.
    """

    num_future_tokens: int = 5
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_future_tokens < 1:
            raise UsageError(f"num_future_tokens must be >= 1, got {self.num_future_tokens}")
        self.sampling()

    def sampling(self) -> SamplingConfig:
        """Return the settings with which ``generate`` writes the same tokens."""
        return SamplingConfig(temperature=self.temperature, seed=self.seed)


def distil(rows: Sequence[EncodedRow], verifier: Verifier, config: DistilConfig) -> list[EncodedRow]:
    """Give rows the verifier's own continuations at every supervised position: the paper's distilled set.

    The continuation of position t follows the text up to its root x_{t+1}: it is what
    ``AutoregressiveDecoder.generate`` writes for the prompt x_0 .. x_{t+1} with ``config.sampling()``
    and the row's index as its request id.

    Args:
        rows: texts; their order keys the noise.
        verifier: the base.
        config: how many tokens, and how they are chosen.

    Returns:
        The rows with ``continuations``, int64 ``[P, n]``, -1 behind EOS or the context window.

    Raises:
        DataError: a row is longer than the context window.
    """
    distilled = []
    for request, row in enumerate(tqdm(rows, desc="distilled targets", unit="row", disable=len(rows) < 2)):
        positions = token_rows.supervised(torch.tensor(row.loss_mask)).nonzero().flatten()
        continuations = _Branches(row.input_ids, request, verifier, config).continue_from((positions + 2).tolist())
        distilled.append(replace(row, continuations=_padded(continuations, config.num_future_tokens)))
    return distilled


def _padded(continuations: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in continuations]).view(-1, width)


class _Branches:
    """Continuations of one text from many places at once.

    A cut s stands for the prompt of the text's first s tokens. One forward over the text gives the
    first token of every cut. Where that is the text's own next token, what follows is the continuation
    of the next cut; all other cuts grow a branch, a token of all branches per forward.

    Args:
        text: token ids.
        request: key of the noise.
        verifier: the base.
        config: see ``DistilConfig``.
    """

    def __init__(self, text: Sequence[int], request: int, verifier: Verifier, config: DistilConfig) -> None:
        self._text, self._request, self._verifier, self._config = list(text), request, verifier, config
        window = verifier.context_window
        if window is not None and len(self._text) > window:
            raise DataError(
                f"row {request} has {len(self._text)} tokens: expected at most {window}, the context window of "
                f"{verifier.name_or_path}; lower --model_max_length"
            )
        self._window = sys.maxsize if window is None else window
        self._eos = frozenset(verifier.eos_token_ids)
        self._chunk = max(1, min(_LOGITS_AT_ONCE // verifier.vocab_size, _MOST_BRANCHES))

    def continue_from(self, cuts: Sequence[int]) -> list[list[int]]:
        """Return the new tokens after each cut, EOS included if produced, nothing after it.

        Args:
            cuts: rising, in 1..T.
        """
        if not cuts:
            return []
        count, stop = self._config.num_future_tokens, len(self._text) + 1
        reached = sorted({later for cut in cuts for later in range(cut, min(cut + count, stop))})
        cache = self._verifier.new_cache(1, len(self._text) + (count - 1) * min(self._chunk, len(reached)))
        hidden = self._verifier.read([self._text], cache)[0]
        first = self._first_tokens(reached, hidden)
        leaving = {place for cut in cuts if (place := self._leaving(cut, first)) is not None}
        found = self._grow(sorted(leaving), first, cache)
        for cut in reversed(reached):
            if cut not in found:
                found[cut] = self._ended(cut, [first[cut], *found.get(cut + 1, [])])
        return [found[cut] for cut in cuts]

    def _leaving(self, cut: int, first: dict[int, int]) -> int | None:
        """Return the cut at which a continuation leaves the text, None where it ends before."""
        for later in range(cut, min(cut + self._config.num_future_tokens, len(self._text) + 1)):
            if first[later] in self._eos:
                return None
            if self._text[later : later + 1] != [first[later]]:
                return later
        return None

    def _ended(self, cut: int, tokens: Sequence[int]) -> list[int]:
        """Cut new tokens behind EOS, at their number and at the context window, as ``generate`` does."""
        limit = min(self._config.num_future_tokens, self._window - cut)
        end = next((index for index, token in enumerate(tokens) if token in self._eos), len(tokens))
        return list(tokens[: min(end + 1, limit)])

    def _sampler(self, cuts: Sequence[int]) -> Sampler:
        return Sampler(
            self._config.sampling(),
            [self._text[:cut] for cut in cuts],
            [self._request] * len(cuts),
            tuple(self._eos),
            self._verifier.vocab_size,
            self._verifier.device,
        )

    @torch.inference_mode()
    def _first_tokens(self, cuts: Sequence[int], hidden: Tensor) -> dict[int, int]:
        """Pick the token after each cut from the states of the text, ``[T, H]``."""
        first: dict[int, int] = {}
        for start in range(0, len(cuts), self._chunk):
            chunk = cuts[start : start + self._chunk]
            logits = self._verifier.head(hidden[torch.tensor(chunk, device=hidden.device) - 1])
            tokens = self._sampler(chunk).pick(logits, range(len(chunk))).tolist()
            first.update(zip(chunk, tokens, strict=True))
        return first

    def _grow(self, cuts: Sequence[int], first: dict[int, int], cache: VerifierCache) -> dict[int, list[int]]:
        """Write a branch from each cut, given its first token; a chunk's entries leave the cache with it."""
        found = {}
        for start in range(0, len(cuts), self._chunk):
            chunk = cuts[start : start + self._chunk]
            sampler, tokens = self._sampler(chunk), [[first[cut]] for cut in chunk]
            places = torch.tensor([chunk], device=self._verifier.device)
            for depth in range(self._config.num_future_tokens - 1):
                for branch, written in enumerate(tokens):
                    sampler.commit(branch, written[-1])
                last = torch.tensor([[written[-1] for written in tokens]], device=self._verifier.device)
                logits = self._verifier.branch(last, places, depth, cache).logits[0]
                cache.keep([range(len(chunk))])
                for written, token in zip(tokens, sampler.pick(logits, range(len(chunk))).tolist(), strict=True):
                    written.append(token)
            cache.rewind([len(self._text)])
            found.update({cut: self._ended(cut, written) for cut, written in zip(chunk, tokens, strict=True)})
        return found
