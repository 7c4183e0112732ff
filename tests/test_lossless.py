"""The audit: what counts as rounding and what as a bug."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from recurrent_drafting import (
    AutoregressiveDecoder,
    BeamConfig,
    SamplingConfig,
    SpeculativeDecoder,
    lossless,
    memory,
)
from recurrent_drafting.errors import NumericsError, ResourceError
from recurrent_drafting.lossless import LosslessReport, Pair, Settings
from recurrent_drafting.sampling import Sampler
from tests.tiny import make_drafter, make_verifier

PROMPT = [3, 9, 27, 14]


def make_decoder(dtype: torch.dtype = torch.float32) -> SpeculativeDecoder:
    verifier = make_verifier("llama", dtype=dtype)
    return SpeculativeDecoder(verifier, make_drafter(verifier), BeamConfig(width=3, length=3))


def run_baseline(decoder: SpeculativeDecoder, settings: Settings) -> list[int]:
    output = AutoregressiveDecoder(decoder.verifier).generate(
        [PROMPT],
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        eos_token_ids=settings.eos_token_ids,
        stop=settings.stop,
        request_ids=[5],
    )
    return output.sequences[0]


def settings_for(**sampling: object) -> Settings:
    return Settings(SamplingConfig(**sampling), max_new_tokens=12, eos_token_ids=[])


def replaced(tokens: list[int], index: int, token: int) -> list[int]:
    return [*tokens[:index], token, *tokens[index + 1 :]]


def test_equal_texts_are_identical() -> None:
    decoder, settings = make_decoder(), settings_for()
    text = run_baseline(decoder, settings)
    report = lossless.audit(decoder, [Pair(PROMPT, 5, text, list(text))], settings)
    assert report.summary() == "1 identical, 0 rounding near-ties, 0 structural"
    report.require_lossless()


def test_without_memory_for_float64_a_difference_is_counted_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, settings = make_decoder(torch.float32), settings_for()
    text = run_baseline(decoder, settings)
    pairs = [Pair(PROMPT, 5, text, list(text)), Pair(PROMPT, 5, text, replaced(text, 3, 1))]
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    report = lossless.audit(decoder, pairs, settings)
    assert (report.identical, report.near_ties, report.structural, report.unaudited) == (1, 0, 0, 1)
    assert "1 differing and not judged" in report.summary()
    with pytest.raises(ResourceError, match="1 texts differ"):
        report.require_lossless()


def test_audits_add_up_with_all_that_they_found() -> None:
    total = LosslessReport(identical=2, near_ties=1, epsilon=0.1, details=[{"position": 3}])
    total.merge(LosslessReport(identical=4, unaudited=5))
    total.merge(LosslessReport(structural=6, epsilon=0.01, details=[{"position": 7}]))
    assert total == LosslessReport(6, 1, 6, 5, 0.1, [{"position": 3}, {"position": 7}])
    empty = LosslessReport()
    empty.merge(LosslessReport())
    assert empty == LosslessReport()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_text_is_structural(temperature: float) -> None:
    decoder, settings = make_decoder(), settings_for(temperature=temperature)
    text = run_baseline(decoder, settings)
    wrong = replaced(text, 4, (text[4] + 17) % 61)
    report = lossless.audit(decoder, [Pair(PROMPT, 5, text, wrong)], settings)
    assert (report.identical, report.near_ties, report.structural) == (0, 0, 1)
    assert "within epsilon" in str(report.details[0]["reason"])
    assert "structural" in report.listing()
    with pytest.raises(NumericsError, match="request 5, new token 4"):
        report.require_lossless()


def test_a_short_text_is_structural() -> None:
    decoder, settings = make_decoder(), settings_for()
    text = run_baseline(decoder, settings)
    report = lossless.audit(decoder, [Pair(PROMPT, 5, text, text[:-2])], settings)
    assert report.structural == 1
    assert "prefix" in str(report.details[0]["reason"])


def tied_pair(decoder: SpeculativeDecoder, settings: Settings, gap: float) -> Pair:
    """Give two tokens the same logits but for a relative gap, and swap one for the other."""
    text = run_baseline(decoder, settings)
    pick = text[3]
    rival = next(token for token in range(3, 61) if token not in [*text, *PROMPT])
    head = decoder.verifier.model.get_output_embeddings().weight.data
    head[rival] = head[pick] * (1 - gap)
    text = run_baseline(decoder, settings)
    index = next(i for i, token in enumerate(text) if token in (pick, rival))
    other = rival if text[index] == pick else pick
    return Pair(PROMPT, 5, text, replaced(text, index, other))


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "min_new_tokens": 3}])
def test_a_tie_of_two_tokens_is_rounding(sampling: dict[str, object]) -> None:
    decoder, settings = make_decoder(), settings_for(**sampling)
    pair = tied_pair(decoder, settings, gap=0.0)
    report = lossless.audit(decoder, [pair], settings)
    assert (report.near_ties, report.structural) == (1, 0), report.details
    assert report.epsilon is not None and report.epsilon < 1e-3


def test_noise_tells_tied_logits_apart() -> None:
    decoder, settings = make_decoder(), settings_for(temperature=0.7, top_p=0.9)
    pair = tied_pair(decoder, settings, gap=0.0)
    assert lossless.audit(decoder, [pair], settings).structural == 1


def test_a_gap_far_above_rounding_is_structural() -> None:
    decoder, settings = make_decoder(), settings_for()
    pair = tied_pair(decoder, settings, gap=0.01)
    assert lossless.audit(decoder, [pair], settings).structural == 1


def test_a_tie_that_differs_in_float64_too_is_structural(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, settings = make_decoder(), settings_for()
    pair = tied_pair(decoder, settings, gap=0.0)
    monkeypatch.setattr(lossless, "_rerun", lambda *_: [False])
    report = lossless.audit(decoder, [pair], settings)
    assert report.structural == 1
    assert "float64" in str(report.details[0]["reason"])


def test_any_difference_of_a_float64_verifier_is_structural() -> None:
    decoder, settings = make_decoder(torch.float64), settings_for()
    pair = tied_pair(decoder, settings, gap=0.0)
    assert lossless.audit(decoder, [pair], settings).structural == 1


def test_tokens_at_a_top_k_boundary_are_reachable_within_epsilon_only() -> None:
    """Token 3 is shut out by top-k 2 until token 2 falls below it."""
    sampling = SamplingConfig(temperature=1.0, top_k=2, seed=1)
    logits = torch.tensor([0.0, 5.0, 4.0, 4.0 - 1e-4])
    settings = Settings(sampling, max_new_tokens=1, eos_token_ids=[])
    # A request whose noise would draw token 3 if it were in the running, and 2 if not.
    request = next(r for r in range(500) if draws(logits, sampling, r) == (3, 2))
    pair = Pair([1], request, [2], [3])
    assert lossless._structural_reason(pair, settings, logits, 1e-4) == ""
    assert "token 3" in lossless._structural_reason(pair, settings, logits, 1e-6)


def draws(logits: torch.Tensor, sampling: SamplingConfig, request: int) -> tuple[int, int]:
    """Return the draw without top-k and with it."""
    picks = []
    for config in (replace(sampling, top_k=0), sampling):
        sampler = Sampler(config, [[1]], [request], [], len(logits), logits.device)
        picks.append(int(sampler.pick(logits.unsqueeze(0), [0])))
    return picks[0], picks[1]


def test_a_broken_decoder_is_caught() -> None:
    """A decoder whose cache keeps the wrong rows writes another text, in float64 as well."""
    decoder, settings = make_decoder(), settings_for()
    text = run_baseline(decoder, settings)
    broken = copy.copy(decoder)
    verifier = copy.copy(decoder.verifier)
    verifier._tree_mask = lambda *args: _blind(decoder.verifier._tree_mask(*args))  # type: ignore[method-assign]
    broken.verifier = verifier
    wrong = broken.generate([PROMPT], max_new_tokens=12, eos_token_ids=[]).sequences[0]
    assert wrong != text
    report = lossless.audit(decoder, [Pair(PROMPT, 5, text, wrong)], settings)
    assert report.structural == 1


def _blind(masks: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    allowed, positions = masks
    allowed = allowed.clone()
    allowed[..., :2] = False
    return allowed, positions


def test_what_a_stop_function_hid_is_given_back() -> None:
    decoder = make_decoder()
    settings = settings_for()
    text = run_baseline(decoder, settings)
    stopping = replace(settings, stop=lambda tokens: len(tokens) - 1 if len(tokens) == 6 else None)
    pair = lossless._uncut(decoder, Pair(PROMPT, 5, text[:5], text[:7]), stopping)
    assert pair.baseline == text and pair.speculative == text
