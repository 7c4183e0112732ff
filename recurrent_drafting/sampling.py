"""One ordered logits pipeline, position-keyed noise, and the pick.

The baseline and the speculative decoder both choose every token with ``Sampler.pick``. A pick is
``argmax_v log p(v) + G[t, v]`` with Gumbel noise keyed by (seed, request, position t, token v):
exact sampling (the Gumbel-max trick) that does not depend on how many tokens a forward yields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.errors import NumericsError

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Read a 64-bit pattern as the int64 that torch stores."""
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """Return the splitmix64 finaliser of a 64-bit integer (Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK64
    return value ^ (value >> 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift int64 bit patterns right without copying the sign bit."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


class GumbelNoise:
    """Standard Gumbel noise as a pure function of (seed, request, position, token).

    >>> noise, again = (GumbelNoise(seed=1, vocab_size=4, device=torch.device("cpu")) for _ in range(2))
    >>> noise.row(request=0, position=7).equal(again.row(request=0, position=7))
    True
    >>> noise.row(request=0, position=7).equal(noise.row(request=0, position=8))
    False

    Args:
        seed: the sampling seed.
        vocab_size: tokens V of a row.
        device: where the rows are made; the integer mix is the same everywhere.
    """

    def __init__(self, seed: int, vocab_size: int, device: torch.device) -> None:
        self._seed = seed
        golden = torch.tensor(_signed(_GOLDEN), device=device)
        self._counters = torch.arange(1, vocab_size + 1, device=device) * golden
        self._rows: dict[int, dict[int, Tensor]] = {}  # by request, then position

    def row(self, request: int, position: int) -> Tensor:
        """Return the noise of one position, float64 ``[V]``."""
        key = 0
        for part in (self._seed, request, position):
            # Mixed before each part enters: (seed 1, request 2) must not be (seed 2, request 1).
            key = _mix((_mix((key + _GOLDEN) & _MASK64) + part) & _MASK64)
        bits = self._counters + _signed(key)
        bits.bitwise_xor_(_shift_right(bits, 30)).mul_(_signed(_MIX_1))
        bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_signed(_MIX_2))
        bits.bitwise_xor_(_shift_right(bits, 31))
        # 53 random bits, centred in their cell; the centre of the last cell would round to 1.
        uniform = _shift_right(bits, 11).double().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-53)
        return uniform.log_().neg_().log_().neg_()

    def rows(self, requests: Sequence[int], positions: Sequence[int], token_ids: Tensor | None = None) -> Tensor:
        """Return the noise of one position per request, float64 ``[R, V]``.

        With ``token_ids`` it is that of some tokens: of the same for all, ``[n] -> [R, n]``, or of each request's
        own, ``[R, ...] -> [R, ...]``.

        Rows are kept until ``forget``: coupled drafting and the pick ask for the same ones.
        """
        found = []
        for index, (request, position) in enumerate(zip(requests, positions, strict=True)):
            kept = self._rows.setdefault(request, {})
            if position not in kept:
                kept[position] = self.row(request, position)
            row = kept[position]
            if token_ids is not None:
                row = row[token_ids if token_ids.dim() == 1 else token_ids[index]]
            found.append(row)
        return torch.stack(found)

    def forget(self, request: int, before: int) -> None:
        """Drop a request's rows of positions below ``before``."""
        kept = self._rows.get(request, {})
        for position in [position for position in kept if position < before]:
            del kept[position]

    def retain(self, requests: Sequence[int]) -> None:
        """Drop the rows of all other requests."""
        self._rows = {request: kept for request, kept in self._rows.items() if request in requests}


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Mask all but the ``top_k`` largest logits ``[R, V]``; ties with the last one kept stay.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0, 2.0]]
    """
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Mask all but the smallest set of most likely tokens whose mass reaches ``top_p``.

    Equally likely tokens enter by rising id.

    >>> kept = keep_top_p(torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log(), 0.8)
    >>> kept.isfinite().tolist()  # 0.5 and 0.25 do not reach 0.8, with one more 0.125 they do
    [[True, True, True, False]]

    Args:
        logits: ``[R, V]``.
        top_p: mass in (0, 1].
    """
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Mask tokens less likely than ``min_p`` times the most likely one, ``[R, V]``.

    >>> kept = keep_min_p(torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log(), 0.4)
    >>> kept.isfinite().tolist()
    [[True, True, False, False]]
    """
    if min_p == 0:
        return logits
    probabilities = logits.softmax(dim=-1)
    threshold = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < threshold, -torch.inf)


def warp(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Apply temperature, top-k, top-p and min-p, in this order, to logits ``[R, V]``."""
    logits = keep_top_k(logits / config.temperature, config.top_k)
    return keep_min_p(keep_top_p(logits, config.top_p), config.min_p)


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest score of ``[R, V]`` and the lowest id that has it, both ``[R]``; NaN is the largest."""
    if scores.device.type != "cpu":
        best, tokens = scores.max(dim=-1)
        return best, tokens
    # NumPy searches with vector instructions, in a tenth of the time.
    tokens = torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.gather(1, tokens.unsqueeze(1)).squeeze(1), tokens


class Sampler:
    """Choose tokens for a batch of requests and remember what the choice depends on.

    Args:
        config: the pipeline's settings.
        prompts: per row the prompt's token ids, without padding.
        request_ids: key of each row's noise.
        eos_token_ids: barred while fewer than ``config.min_new_tokens`` tokens exist.
        vocab_size: the verifier's V.
        device: where logits come from.
        names: what messages call the rows; default their places.
    """

    def __init__(  # noqa: PLR0913 - one more than its callers need
        self,
        config: SamplingConfig,
        prompts: Sequence[Sequence[int]],
        request_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        *,
        names: Sequence[int] | None = None,
    ) -> None:
        self.config = config
        self.noise = None if config.greedy else GumbelNoise(config.seed, vocab_size, device)
        self._eos = list(eos_token_ids)
        count = len(prompts)
        self._names, self._requests, self._prompt_lengths = [0] * count, [0] * count, [0] * count
        self._generated: list[list[int]] = [[] for _ in prompts]
        self._prompt_tails: list[list[int]] = [[] for _ in prompts]
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(count, vocab_size, dtype=torch.bool, device=device)
        if config.presence_penalty != 0 or config.frequency_penalty != 0:
            self._counts = torch.zeros(count, vocab_size, device=device)
        names = range(count) if names is None else names
        for row, (prompt, key, name) in enumerate(zip(prompts, request_ids, names, strict=True)):
            self.replace(row, prompt, key, name)

    def replace(self, row: int, prompt: Sequence[int], request_id: int, name: int) -> None:
        """Let another request take a row's place, with nothing generated yet; see the class for the arguments."""
        self._names[row], self._requests[row] = name, request_id
        self._prompt_lengths[row], self._prompt_tails[row] = len(prompt), self._tail(prompt)
        self._generated[row] = []
        if self._seen is not None:
            self._seen[row] = False
            self._seen[row, list(prompt)] = True
        if self._counts is not None:
            self._counts[row] = 0
        if self.noise is not None:
            self.noise.retain(self._requests)

    def pick(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Choose the next token of each row.

        Args:
            logits: verifier logits at each row's last committed token, ``[R, V]``.
            rows: which row of the batch each belongs to.

        Returns:
            int64 ``[R]``; ties go to the lowest id.

        Raises:
            NumericsError: a logit is NaN or infinite.
        """
        scores = self.process(logits, rows)
        if self.noise is not None:
            positions = [self._prompt_lengths[row] + len(self._generated[row]) for row in rows]
            requests = [self._requests[row] for row in rows]
            scores = scores.double() + self.noise.rows(requests, positions)
        best, tokens = _largest(scores)
        for row, score in zip(rows, best.tolist(), strict=True):
            if not math.isfinite(score):
                place = f"new token {len(self._generated[row])} of row {self._names[row]}"
                raise NumericsError(
                    f"verifier logits are not finite at {place} (request {self._requests[row]}): "
                    f"expected finite numbers, got {score}; "
                    "check the base model's weights or use --dtype fp32"
                )
        return tokens

    def process(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Run the pipeline without the noise: ``[R, V]`` in float32 (float64 stays float64)."""
        config = self.config
        scores = logits if logits.dtype == torch.float64 else logits.float()
        scores = self._penalise(scores, rows)
        scores = self._bar(scores, rows)
        if config.greedy:
            return scores
        return warp(scores, config)

    def commit(self, row: int, token: int) -> None:
        """Append a chosen token to a row's reply."""
        self._generated[row].append(token)
        if self._seen is not None:
            self._seen[row, token] = True
        if self._counts is not None:
            self._counts[row, token] += 1
        if self.noise is not None:
            request = self._requests[row]
            # Branches of one text share its request: what another of them still needs stays.
            rows = [other for other, owner in enumerate(self._requests) if owner == request]
            least = min(self._prompt_lengths[other] + len(self._generated[other]) for other in rows)
            self.noise.forget(request, least)

    def upcoming_noise(
        self, rows: Sequence[int], count: int, skip: int = 0, token_ids: Tensor | None = None
    ) -> Tensor | None:
        """Return the noise of the next positions, float64 ``[R, count, V]``, or None if greedy.

        Args:
            rows: rows of the batch.
            count: positions wanted.
            skip: positions to leave out first.
            token_ids: tokens wanted, int64 ``[n]``, which makes it ``[R, count, n]``, or each row's own, int64
                ``[R, ...]``, which makes it ``[R, count, ...]``; None is all.
        """
        if self.noise is None:
            return None
        steps = []
        for step in range(skip, skip + count):
            positions = [self._prompt_lengths[row] + len(self._generated[row]) + step for row in rows]
            steps.append(self.noise.rows([self._requests[row] for row in rows], positions, token_ids))
        return torch.stack(steps, dim=1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows, in the given order; the others leave the batch."""
        for name in ("_names", "_requests", "_prompt_lengths", "_generated", "_prompt_tails"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])
        index = list(rows)
        self._seen = None if self._seen is None else self._seen[index]
        self._counts = None if self._counts is None else self._counts[index]

    def _penalise(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        config = self.config
        index = list(rows)
        if self._seen is not None:
            penalty = config.repetition_penalty
            penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen[index], penalised, scores)
        if self._counts is not None:
            counts = self._counts[index]
            scores = scores - config.presence_penalty * (counts > 0) - config.frequency_penalty * counts
        return scores

    def _bar(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        barred = [self._barred(row) for row in rows]
        if not any(barred):
            return scores
        scores = scores.clone()
        for index, tokens in enumerate(barred):
            scores[index, tokens] = -torch.inf
        return scores

    def _barred(self, row: int) -> list[int]:
        """List the tokens that may not come next: unfinished bad words, and EOS when too early."""
        tokens = list(self._eos) if len(self._generated[row]) < self.config.min_new_tokens else []
        if self.config.bad_words_ids:
            text = self._prompt_tails[row] + self._generated[row]
            for word in self.config.bad_words_ids:
                prefix = list(word[:-1])
                if not prefix or text[-len(prefix) :] == prefix:
                    tokens.append(word[-1])
        return tokens

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """Keep what a bad word that starts in the prompt can still match."""
        reach = max((len(word) - 1 for word in self.config.bad_words_ids), default=0)
        return list(prompt)[-reach:] if reach else []
