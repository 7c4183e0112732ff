"""What "identical" means in floating point, as code.

One forward over n tokens and n forwards over one token round differently, so a tie of two logits
can fall the other way. A difference counts as such a near-tie only if

(a) both decoders give identical texts when that prompt is rerun in float64, and
(b) at the first divergence both picks can be reached by moving the logits within epsilon, where
    epsilon is measured on the plain model: its forward over a whole text against its own
    token-by-token forward, without our tree and without our cache.

Everything else, and any difference in float64, is a structural difference: a bug.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.decoding import AutoregressiveDecoder, SpeculativeDecoder, StopFunction
from recurrent_drafting.errors import NumericsError, ResourceError
from recurrent_drafting.sampling import Sampler
from recurrent_drafting.verifier import Verifier

logger = logging.getLogger(__name__)

_RERUN_BATCH = 8


@dataclass(frozen=True)
class Pair:
    """One prompt and what the two decoders made of it.

    Args:
        prompt: token ids.
        request_id: key of its noise.
        baseline: the baseline's new token ids.
        speculative: the speculative decoder's.
    """

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
        unaudited: prompts that differ and were not judged, for want of memory for a copy in float64.
        epsilon: largest rounding gap of a logit in the plain model, None if nothing differed.
        details: per differing prompt its request id, position, picks, verdict and reason.
    """

    identical: int = 0
    near_ties: int = 0
    structural: int = 0
    unaudited: int = 0
    epsilon: float | None = None
    details: list[dict[str, object]] = field(default_factory=list)

    def merge(self, other: LosslessReport) -> None:
        """Add what another audit found."""
        self.identical += other.identical
        self.near_ties += other.near_ties
        self.structural += other.structural
        self.unaudited += other.unaudited
        self.epsilon = max((gap for gap in (self.epsilon, other.epsilon) if gap is not None), default=None)
        self.details += other.details

    def summary(self) -> str:
        """Return the verdict in one line."""
        verdicts = f"{self.identical} identical, {self.near_ties} rounding near-ties, {self.structural} structural"
        return f"{verdicts}, {self.unaudited} differing and not judged" if self.unaudited else verdicts

    def listing(self) -> str:
        """Return the verdict, and one line per differing prompt."""
        lines = [
            f"  request {item['request_id']}, new token {item['position']}: baseline "
            f"{item['baseline']}, speculative {item['speculative']}: {item['verdict']}, "
            f"{item['reason']} (epsilon {item['epsilon']:.3g})"
            for item in self.details
        ]
        return "\n".join([f"Lossless audit: {self.summary()}", *lines])

    def require_lossless(self) -> None:
        """Raise NumericsError if a difference is structural, ResourceError if one could not be judged."""
        if self.structural:
            first = next(item for item in self.details if item["verdict"] == "structural")
            raise NumericsError(
                f"speculative text differs structurally from the baseline: {self.summary()}; "
                f"first at request {first['request_id']}, new token {first['position']}: "
                f"{first['reason']}; "
                "this is a bug, please report it with the settings"
            )
        if self.unaudited:
            raise ResourceError(
                f"{self.unaudited} texts differ from the baseline's and were not judged: a copy of the base in float64 "
                "has no room beside it; audit on a machine with more memory, or compare in --dtype fp32"
            )


def audit(decoder: SpeculativeDecoder, pairs: Sequence[Pair], settings: Settings) -> LosslessReport:
    """Classify every pair as identical, rounding near-tie or structural difference.

    Args:
        decoder: the speculative decoder that was run; its verifier, drafter and tree are rerun.
        pairs: prompts with both texts.
        settings: what both decoders were run with.

    Returns:
        Counts and, per differing prompt, where and why.
    """
    differing = [pair for pair in pairs if pair.baseline != pair.speculative]
    report = LosslessReport(identical=len(pairs) - len(differing))
    if not differing:
        return report
    exact = decoder.verifier.dtype == torch.float64
    try:
        same_in_float64 = [False] * len(differing) if exact else _rerun(decoder, differing, settings)
    except ResourceError as error:
        logger.warning("the audit stops: %s", error)
        report.unaudited = len(differing)
        return report
    judged = zip(differing, same_in_float64, strict=True)
    for found, same in tqdm(judged, total=len(differing), desc="audit: rounding", unit="text"):
        pair = _uncut(decoder, found, settings) if settings.stop else found
        judge(report, decoder.verifier, pair, settings, same)
    return report


@dataclass(frozen=True)
class Rounding:
    """The plain model's own rounding over one text.

    Args:
        logits: token by token, at each position of the reply, ``[n + 1, V]``.
        epsilon: the largest gap of any logit between the two ways, in one forward and token by token, over
            those positions.
    """

    logits: Tensor
    epsilon: float

    @classmethod
    @torch.inference_mode()
    def of(cls, verifier: Verifier, prompt: Sequence[int], text: Sequence[int]) -> Rounding:
        """Run the plain model over a prompt and its reply, in one forward and token by token.

        The whole reply is measured, not only what precedes a divergence: kernels often round alike
        over the first few tokens, which says nothing of the model's rounding.
        """
        model = verifier.model
        tokens = torch.tensor([[*prompt, *text]], device=verifier.device)
        length = len(prompt)
        whole = model(input_ids=tokens, use_cache=False).logits[0, length - 1 :]
        cache = {verifier.cache_argument: DynamicCache(config=model.config)}
        output = model(input_ids=tokens[:, :length], **cache, use_cache=True)
        rows = [output.logits[0, -1]]
        for index in range(length, tokens.shape[1]):
            output = model(input_ids=tokens[:, index : index + 1], **cache, use_cache=True)
            rows.append(output.logits[0, -1])
        single = torch.stack(rows)
        return cls(single, float((single.double() - whole.double()).abs().max()))


def judge(
    report: LosslessReport,
    verifier: Verifier,
    pair: Pair,
    settings: Settings,
    same_in_float64: bool,
    rounding: Rounding | None = None,
) -> None:
    """Classify one pair of differing texts and add the verdict to a report.

    Args:
        report: what is added to.
        verifier: wrote both texts.
        pair: the texts; the first of them token by token.
        settings: what both were written with.
        same_in_float64: whether they are equal when both are written in float64.
        rounding: of the first text, where it is known already; otherwise it is measured.
    """
    rounding = rounding or Rounding.of(verifier, pair.prompt, pair.baseline)
    logits, epsilon = rounding.logits[pair.divergence], rounding.epsilon
    reason = "the texts differ in float64 as well"
    if same_in_float64:
        reason = _structural_reason(pair, settings, logits, epsilon)
    report.structural += bool(reason)
    report.near_ties += not reason
    report.epsilon = max(report.epsilon or 0.0, epsilon)
    report.details.append(
        {
            "request_id": pair.request_id,
            "position": pair.divergence,
            "baseline": pair.baseline[pair.divergence : pair.divergence + 1],
            "speculative": pair.speculative[pair.divergence : pair.divergence + 1],
            "epsilon": epsilon,
            "verdict": "structural" if reason else "near-tie",
            "reason": reason or "equal in float64; both picks within epsilon",
        }
    )


def _rerun(decoder: SpeculativeDecoder, pairs: Sequence[Pair], settings: Settings) -> list[bool]:
    """Tell for each pair whether both decoders agree in float64."""
    verifier = decoder.verifier.converted(torch.float64)
    exact = SpeculativeDecoder(
        verifier, decoder.drafter, decoder.beam, latency=decoder.latency, allow_base_mismatch=True
    )
    same = []
    for start in tqdm(range(0, len(pairs), _RERUN_BATCH), desc="audit: float64", unit="batch"):
        plain, drafted = _texts(exact, pairs[start : start + _RERUN_BATCH], settings)
        same += [a == b for a, b in zip(plain, drafted, strict=True)]
    return same


def _texts(
    decoder: SpeculativeDecoder, pairs: Sequence[Pair], settings: Settings
) -> tuple[list[list[int]], list[list[int]]]:
    """Run the baseline and the decoder over the prompts of some pairs."""
    plain, drafted = (
        item.generate(
            [pair.prompt for pair in pairs],
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            eos_token_ids=settings.eos_token_ids,
            stop=settings.stop,
            request_ids=[pair.request_id for pair in pairs],
        ).sequences
        for item in (AutoregressiveDecoder(decoder.verifier), decoder)
    )
    return plain, drafted


def _uncut(decoder: SpeculativeDecoder, pair: Pair, settings: Settings) -> Pair:
    """Give back the picks that a stop function took away, where they hide the divergence."""
    if pair.divergence < min(len(pair.baseline), len(pair.speculative)):
        return pair
    plain, drafted = _texts(decoder, [pair], replace(settings, stop=None))
    return replace(pair, baseline=plain[0], speculative=drafted[0])


def _structural_reason(pair: Pair, settings: Settings, logits: Tensor, epsilon: float) -> str:
    """Name why a difference is no rounding near-tie, or return an empty string."""
    index = pair.divergence
    if index >= min(len(pair.baseline), len(pair.speculative)):
        return "one text is a prefix of the other"
    picks = (pair.baseline[index], pair.speculative[index])
    for pick, rival in (picks, picks[::-1]):
        sampler = _sampler_at(pair, settings, logits)
        witnesses = (_moved(logits, epsilon, pick, item) for item in (None, rival))
        if not any(int(sampler.pick(item, [0])) == pick for item in witnesses):
            return f"token {pick} cannot be picked by moving the logits within epsilon = {epsilon:.3g}"
    return ""


def _sampler_at(pair: Pair, settings: Settings, logits: Tensor) -> Sampler:
    """Put a sampler at the divergence: same text, penalties and noise as both decoders had."""
    sampler = Sampler(
        settings.sampling,
        [pair.prompt],
        [pair.request_id],
        settings.eos_token_ids,
        vocab_size=len(logits),
        device=logits.device,
    )
    for token in pair.baseline[: pair.divergence]:
        sampler.commit(0, token)
    return sampler


def _moved(logits: Tensor, epsilon: float, pick: int, rival: int | None) -> Tensor:
    """Move logits ``[V]`` by at most epsilon in favour of a token; return ``[1, V]`` in float32.

    Two witnesses decide whether a token can win: all others fall (a lost tie, or a token kept out
    by top-k, top-p or min-p), or one rival falls and all others rise (a rival that such a boundary
    let in).
    """
    moved = logits.double() + (-epsilon if rival is None else epsilon)
    moved[pick] = float(logits[pick]) + epsilon
    if rival is not None:
        moved[rival] = float(logits[rival]) - epsilon
    moved = moved.float()
    # Exactly epsilon is still within epsilon: the pick wins a tie.
    moved[pick] = torch.nextafter(moved[pick], moved.new_tensor(torch.inf))
    return moved.unsqueeze(0)
