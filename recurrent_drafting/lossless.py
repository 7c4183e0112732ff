"""What "identical" means in floating point, as code.

One forward over n tokens and n forwards over one token round differently, so a tie of two logits
can fall the other way. A difference counts as such a near-tie only if

(a) both decoders give identical texts when that prompt is rerun in float64, and
(b) at the first divergence both picks can be reached by moving the logits within epsilon, where
    epsilon is measured on the plain model: its forward over a whole text against its own
    token-by-token forward, without our tree and without our cache.

Everything else is a structural difference: a bug.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.decoding import AutoregressiveDecoder, SpeculativeDecoder, StopFunction
from recurrent_drafting.errors import NumericsError
from recurrent_drafting.sampling import Sampler
from recurrent_drafting.verifier import Verifier

_RERUN_BATCH = 8


@dataclass(frozen=True)
class Pair:
    """One prompt and what the two decoders made of it, as token ids."""

    prompt: list[int]
    request_id: int
    baseline: list[int]
    speculative: list[int]

    @property
    def divergence(self) -> int:
        """Return the first new token that differs."""
        both = zip(self.baseline, self.speculative, strict=False)
        short = min(len(self.baseline), len(self.speculative))
        return next((i for i, (a, b) in enumerate(both) if a != b), short)


@dataclass(frozen=True)
class Settings:
    """What both decoders were run with."""

    sampling: SamplingConfig
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    stop: StopFunction | None = None


@dataclass
class LosslessReport:
    """Outcome of an audit.

    Args:
        identical: prompts with equal texts.
        near_ties: prompts that differ by rounding.
        structural: prompts that differ otherwise.
        epsilon: largest rounding gap of a logit in the plain model, None if nothing differed.
        details: per differing prompt its request id, position, picks, verdict and reason.
    """

    identical: int = 0
    near_ties: int = 0
    structural: int = 0
    epsilon: float | None = None
    details: list[dict[str, object]] = field(default_factory=list)

    def summary(self) -> str:
        """Return the verdict in one line."""
        return (
            f"{self.identical} identical, {self.near_ties} rounding near-ties, {self.structural} structural"
        )

    def require_lossless(self) -> None:
        """Raise NumericsError if a difference is structural."""
        if self.structural:
            first = next(item for item in self.details if item["verdict"] == "structural")
            raise NumericsError(
                f"speculative text differs structurally from the baseline: {self.summary()}; "
                f"first at request {first['request_id']}, new token {first['position']}: {first['reason']}; "
                "this is a bug, please report it with the settings"
            )


def audit(decoder: SpeculativeDecoder, pairs: Sequence[Pair], settings: Settings) -> LosslessReport:
    """Classify every pair as identical, rounding near-tie or structural difference.

    Args:
        decoder: the speculative decoder that was run; its verifier, drafter and tree are rerun.
        pairs: prompts with both texts.
        settings: what both decoders were run with.
    """
    differing = [pair for pair in pairs if pair.baseline != pair.speculative]
    report = LosslessReport(identical=len(pairs) - len(differing))
    if not differing:
        return report
    exact = decoder.verifier.dtype == torch.float64
    same_in_float64 = [False] * len(differing) if exact else _rerun(decoder, differing, settings)
    steps = [_token_by_token(decoder.verifier, pair) for pair in differing]
    report.epsilon = max(gap for _, gap in steps)
    for pair, same, (logits, _) in zip(differing, same_in_float64, steps, strict=True):
        reason = _structural_reason(decoder.verifier, pair, settings, (logits, report.epsilon), same)
        report.structural += bool(reason)
        report.near_ties += not reason
        report.details.append(
            {
                "request_id": pair.request_id,
                "position": pair.divergence,
                "baseline": pair.baseline[pair.divergence : pair.divergence + 1],
                "speculative": pair.speculative[pair.divergence : pair.divergence + 1],
                "verdict": "structural" if reason else "near-tie",
                "reason": reason or "equal in float64; both picks within epsilon",
            }
        )
    return report


def _rerun(decoder: SpeculativeDecoder, pairs: Sequence[Pair], settings: Settings) -> list[bool]:
    """Tell for each pair whether both decoders agree in float64."""
    verifier = Verifier(copy.deepcopy(decoder.verifier.model).to(torch.float64), decoder.verifier.name_or_path)
    drafted = SpeculativeDecoder(verifier, decoder.drafter, decoder.beam, latency=decoder.latency)
    plain = AutoregressiveDecoder(verifier)
    same = []
    for start in range(0, len(pairs), _RERUN_BATCH):
        batch = pairs[start : start + _RERUN_BATCH]
        texts = [
            item.generate(
                [pair.prompt for pair in batch],
                max_new_tokens=settings.max_new_tokens,
                sampling=settings.sampling,
                eos_token_ids=settings.eos_token_ids,
                stop=settings.stop,
                request_ids=[pair.request_id for pair in batch],
            ).sequences
            for item in (plain, drafted)
        ]
        same += [a == b for a, b in zip(*texts, strict=True)]
    return same


@torch.inference_mode()
def _token_by_token(verifier: Verifier, pair: Pair) -> tuple[Tensor, float]:
    """Run the plain model over a text in one forward and token by token.

    Returns:
        The token-by-token logits at the divergence, ``[V]``, and the largest gap of any logit
        between the two ways, over the positions of the reply.
    """
    model, place = verifier.model, verifier.device
    text = torch.tensor([pair.prompt + pair.baseline], device=place)
    length = len(pair.prompt)
    whole = model(input_ids=text, use_cache=False).logits[0, length - 1 :]
    cache = DynamicCache(config=model.config)
    output = model(input_ids=text[:, :length], past_key_values=cache, use_cache=True)
    rows = [output.logits[0, -1]]
    for index in range(length, text.shape[1]):
        output = model(input_ids=text[:, index : index + 1], past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, -1])
    single = torch.stack(rows)
    return single[pair.divergence], float((single.double() - whole.double()).abs().max())


def _structural_reason(
    verifier: Verifier, pair: Pair, settings: Settings, rounding: tuple[Tensor, float], same_in_float64: bool
) -> str:
    """Name why a difference is no rounding near-tie, or return an empty string."""
    if not same_in_float64:
        return "the texts differ in float64 as well"
    index = pair.divergence
    if index >= len(pair.baseline) or index >= len(pair.speculative):
        return "one text is a prefix of the other"
    picks = (pair.baseline[index], pair.speculative[index])
    for pick, rival in (picks, picks[::-1]):
        if not _reachable(verifier, pair, settings, rounding, (pick, rival)):
            return f"token {pick} cannot be picked by moving the logits within epsilon = {rounding[1]:.3g}"
    return ""


def _reachable(
    verifier: Verifier, pair: Pair, settings: Settings, rounding: tuple[Tensor, float], tokens: tuple[int, int]
) -> bool:
    """Tell whether a token wins for some logits within epsilon of the plain model's.

    Two witnesses suffice: raise the token and lower all others (a lost tie), or lower the rival
    and raise all others (a rival that a top-k, top-p or min-p boundary let in).
    """
    logits, epsilon = rounding
    pick, rival = tokens
    sampler = Sampler(
        settings.sampling, [pair.prompt], [pair.request_id], settings.eos_token_ids, len(logits), logits.device
    )
    for token in pair.baseline[: pair.divergence]:
        sampler.commit(0, token)
    for favoured in (True, False):
        moved = logits.double() + (-epsilon if favoured else epsilon)
        moved[pick] = float(logits[pick]) + epsilon
        if not favoured:
            moved[rival] = float(logits[rival]) - epsilon
        if int(sampler.pick(moved.unsqueeze(0), [0])) == pick:
            return True
    return False
