"""The public contract of ``generate``, for the baseline and for decoders that accept a lot."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from recurrent_drafting import (
    AutoregressiveDecoder,
    BeamConfig,
    Drafter,
    GenerationOutput,
    RecurrentDraftingConfig,
    SamplingConfig,
    SpeculativeDecoder,
    Verifier,
)
from recurrent_drafting.decoding import _Batch
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.errors import DataError, ModelError, UsageError
from recurrent_drafting.sampling import GumbelNoise
from recurrent_drafting.tree_budget import LatencyCurve
from tests.test_identity import left_padded
from tests.tiny import CONFIGS, VOCAB, NoisyOracleDecoder, make_drafter, make_verifier

WINDOW = 128
BEAM = BeamConfig(width=3, length=4)
BLOCK = BEAM.length + 1  # tokens of a step whose drafts are all accepted
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(temperature=1.0, seed=3)
rng = random.Random(0)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(length)] for length in (4, 1, 9, 6, 2, 12, 5)]
DECODERS = ["baseline", "random drafter", "oracle", "noisy oracle"]
Decoder = AutoregressiveDecoder | SpeculativeDecoder


FAMILIES = [pytest.param(family, marks=[pytest.mark.slow] * (family != "llama")) for family in sorted(CONFIGS)]


@pytest.fixture(scope="module", params=FAMILIES)
def verifier(request: pytest.FixtureRequest) -> Verifier:
    return make_verifier(request.param)


@pytest.fixture(scope="module")
def llama() -> Verifier:
    return make_verifier("llama")


def free_text(
    verifier: Verifier, prompts: Sequence[Sequence[int]], count: int, sampling: SamplingConfig = SAMPLED, **options: Any
) -> list[list[int]]:
    """Return what the verifier says token by token when nothing ends it."""
    decoder = AutoregressiveDecoder(verifier)
    output = decoder.generate(prompts, max_new_tokens=count, sampling=sampling, eos_token_ids=(), **options)
    return output.sequences


def make_decoder(kind: str, verifier: Verifier, truth: list[list[int]]) -> Decoder:
    """Make the baseline, or a decoder that accepts almost nothing, everything, or a part."""
    if kind == "baseline":
        return AutoregressiveDecoder(verifier)
    drafter = make_drafter(verifier)
    if kind == "random drafter":
        return SpeculativeDecoder(verifier, drafter, BEAM)
    oracle = NoisyOracleDecoder(verifier, drafter, BEAM, 1.0 if kind == "oracle" else 0.7, seed=0)
    oracle.truth = truth
    return oracle


def check_counts(output: GenerationOutput) -> None:
    """Check the counters against the texts and the steps, by their definitions."""
    stats = output.stats
    steps = [step for row in output.steps for step in row]
    assert stats.rows == len(output.sequences)
    assert stats.tokens == sum(map(len, output.sequences))
    assert stats.prefill_tokens == sum(1 for tokens in output.sequences if tokens)
    for tokens, row in zip(output.sequences, output.steps, strict=True):
        assert sum(step.emitted for step in row) == max(len(tokens) - 1, 0)
        assert all(0 <= step.drafted <= step.emitted <= step.drafted + 1 for step in row)
    assert stats.row_steps == len(steps) == sum(stats.accepted)
    assert stats.forwards == max(map(len, output.steps))
    histogram = Counter(step.drafted for step in steps)
    assert {depth: count for depth, count in enumerate(stats.accepted) if count} == dict(histogram)
    if steps:
        assert stats.tau == sum(step.emitted for step in steps) / len(steps)
    assert sum(stats.phase_seconds.values()) == pytest.approx(stats.seconds)


class Recorder:
    """A streamer that writes down what it gets."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        assert (value.dtype, value.dim()) == (torch.int64, 1)
        self.parts.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


# --- how a reply ends ---


@pytest.mark.parametrize("kind", DECODERS)
def test_eos_ends_the_reply_exactly_wherever_it_falls_in_a_block(verifier: Verifier, kind: str) -> None:
    text = free_text(verifier, PROMPTS[:1], 24)[0]
    decoder = make_decoder(kind, verifier, [text])
    places = {text.index(token) for token in text[:12]}
    assert {place % BLOCK for place in places if place} == set(range(BLOCK))
    for place in places:
        output = decoder.generate(PROMPTS[:1], max_new_tokens=24, sampling=SAMPLED, eos_token_ids=[text[place]])
        assert output.sequences == [text[: place + 1]]
        assert output.finish_reasons == ["eos"]
        check_counts(output)


@pytest.mark.parametrize("kind", DECODERS)
def test_rows_leave_the_batch_at_their_own_end(verifier: Verifier, kind: str) -> None:
    texts = free_text(verifier, PROMPTS, 24)
    eos = [texts[0][11], texts[1][3], texts[2][17]]
    decoder = make_decoder(kind, verifier, texts)
    output = decoder.generate(PROMPTS, max_new_tokens=24, sampling=SAMPLED, eos_token_ids=eos)
    ends = [min((text.index(token) for token in eos if token in text), default=23) for text in texts]
    assert output.sequences == [text[: end + 1] for text, end in zip(texts, ends, strict=True)]
    reasons = ["eos" if text[end] in eos else "length" for text, end in zip(texts, ends, strict=True)]
    assert output.finish_reasons == reasons
    assert len(set(ends)) >= 4
    check_counts(output)


def stop_at(pattern: list[int], calls: list[list[int]]) -> Any:
    def stop(tokens: Sequence[int]) -> int | None:
        calls.append(list(tokens))
        return len(tokens) - len(pattern) if list(tokens[-len(pattern) :]) == pattern else None

    return stop


@pytest.mark.parametrize("kind", DECODERS)
def test_stop_cuts_inside_a_block_and_across_blocks(verifier: Verifier, kind: str) -> None:
    """Sequences of 1 to 7 tokens that begin after the first token: the longest reach over three steps."""
    text = free_text(verifier, PROMPTS[:1], 24)[0]
    decoder = make_decoder(kind, verifier, [text])
    for begin, length in [(1, 1), (1, 5), (2, 3), (4, 2), (5, 1), (5, 7), (6, 4), (8, 3), (10, 7), (11, 1)]:
        pattern = text[begin : begin + length]
        first = next(i for i in range(24) if text[i : i + length] == pattern)
        calls: list[list[int]] = []
        output = decoder.generate(
            PROMPTS[:1], max_new_tokens=24, sampling=SAMPLED, eos_token_ids=(), stop=stop_at(pattern, calls)
        )
        assert (output.sequences, output.finish_reasons) == ([text[:first]], ["stop"])
        assert calls == [text[:count] for count in range(1, first + length + 1)]
        check_counts(output)


@pytest.mark.parametrize("length", [1, 2, 12])
@pytest.mark.parametrize("kind", ["baseline", "oracle"])
def test_stop_that_takes_back_the_whole_reply_leaves_no_tokens_in_the_counts(
    llama: Verifier, kind: str, length: int
) -> None:
    text = free_text(llama, PROMPTS[:1], 24)[0]
    decoder = make_decoder(kind, llama, [text])
    stop = stop_at(text[:length], [])
    output = decoder.generate(PROMPTS[:1], max_new_tokens=24, sampling=SAMPLED, eos_token_ids=(), stop=stop)
    assert (output.sequences, output.finish_reasons) == ([[]], ["stop"])
    check_counts(output)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7, 9])
def test_length_limit_cuts_inside_a_block(verifier: Verifier, kind: str, limit: int) -> None:
    texts = free_text(verifier, PROMPTS[:3], 24)
    output = make_decoder(kind, verifier, texts).generate(
        PROMPTS[:3], max_new_tokens=limit, sampling=SAMPLED, eos_token_ids=()
    )
    assert output.sequences == [text[:limit] for text in texts]
    assert output.finish_reasons == ["length"] * 3
    check_counts(output)


@pytest.mark.parametrize("kind", DECODERS)
def test_no_new_tokens_wanted_gives_empty_replies(verifier: Verifier, kind: str) -> None:
    recorder = Recorder()
    output = make_decoder(kind, verifier, [[]]).generate(PROMPTS[:1], max_new_tokens=0, streamer=recorder)
    assert (output.sequences, output.finish_reasons) == ([[]], ["length"])
    assert (recorder.parts, recorder.ends) == ([PROMPTS[0]], 1)
    check_counts(output)


@pytest.mark.parametrize("kind", DECODERS)
def test_context_window_ends_a_reply_as_a_length_limit(verifier: Verifier, kind: str) -> None:
    prompts = [[7] * 124, [9, 8] * 50, [5] * 127, [4]]
    texts = free_text(verifier, prompts, 40)
    assert [len(text) for text in texts] == [4, 28, 1, 40]
    output = make_decoder(kind, verifier, texts).generate(
        prompts, max_new_tokens=40, sampling=SAMPLED, eos_token_ids=()
    )
    assert output.sequences == texts
    assert output.finish_reasons == ["length"] * 4
    check_counts(output)


@pytest.mark.parametrize("length", [WINDOW, WINDOW + 2])
def test_prompt_as_long_as_the_window_is_refused_with_both_lengths(verifier: Verifier, length: int) -> None:
    with pytest.raises(DataError, match=rf"row 1 has {length} tokens and the context window .* is {WINDOW}"):
        AutoregressiveDecoder(verifier).generate([[5], [5] * length], max_new_tokens=4)


def test_model_without_a_stated_window_is_limited_by_the_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verifier, "context_window", None)
    assert len(free_text(make_verifier("llama"), [[5] * 120], 20)[0]) == 20


def test_every_eos_id_of_the_model_is_honoured_by_default() -> None:
    verifier = make_verifier("llama")
    text = free_text(verifier, PROMPTS[:1], 24)[0]
    for eos in ([text[9], text[5]], text[5], [text[9]], None):
        verifier.model.generation_config.eos_token_id = eos
        verifier.model.config.eos_token_id = None
        ids = eos if isinstance(eos, list) else [eos]
        end = min((text.index(token) + 1 for token in ids if token is not None), default=24)
        output = make_decoder("oracle", verifier, [text]).generate(PROMPTS[:1], max_new_tokens=24, sampling=SAMPLED)
        assert output.sequences == [text[:end]]


# --- what the text depends on, and what it does not ---


def trimmed(tokens: list[int], eos: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


def test_greedy_baseline_equals_transformers_generate(verifier: Verifier) -> None:
    source = random.Random(5)
    prompts = [[source.randrange(VOCAB) for _ in range(source.randint(1, 30))] for _ in range(19)]
    prompts.append([3] * (WINDOW - 6))  # ends at the window
    eos = [2, 11, 29]
    ends = set()
    for start in range(0, 20, 5):
        part = prompts[start : start + 5]
        ids, mask = left_padded(part)
        limit = min(24, WINDOW - ids.shape[1])
        with torch.no_grad():
            theirs = verifier.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, pad_token_id=0, eos_token_id=eos
            )
        expected = [trimmed(row, eos) for row in theirs[:, ids.shape[1] :].tolist()]
        output = AutoregressiveDecoder(verifier).generate(part, max_new_tokens=limit, eos_token_ids=eos)
        assert output.sequences == expected
        ends.update(output.finish_reasons)
    assert ends == {"eos", "length"}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("pad", "mask_dtype"), [(0, torch.bool), (2, torch.int64), (5, torch.bool), (None, torch.int64)]
)
def test_padding_never_matters(
    verifier: Verifier, sampling: SamplingConfig, pad: int | None, mask_dtype: torch.dtype
) -> None:
    """Whatever the pads hold: zero, the EOS id, a real token, random tokens."""
    expected = AutoregressiveDecoder(verifier).generate(PROMPTS, max_new_tokens=12, sampling=sampling)
    ids, mask = left_padded(PROMPTS)
    filler = torch.randint(VOCAB, ids.shape) if pad is None else torch.full_like(ids, pad)
    ids = torch.where(mask, ids, filler)
    for decoder in (AutoregressiveDecoder(verifier), make_decoder("noisy oracle", verifier, expected.sequences)):
        output = decoder.generate(ids, mask.to(mask_dtype), max_new_tokens=12, sampling=sampling)
        assert output.sequences == expected.sequences
        assert output.finish_reasons == expected.finish_reasons


def test_tensor_without_a_mask_is_all_real(llama: Verifier) -> None:
    prompts = [[5, 0, 2], [0, 0, 7]]
    decoder = AutoregressiveDecoder(llama)
    expected = decoder.generate(prompts, max_new_tokens=6).sequences
    assert decoder.generate(torch.tensor(prompts), max_new_tokens=6).sequences == expected


@pytest.mark.parametrize("kind", DECODERS)
def test_text_follows_the_request_id_through_any_batch_and_row_order(verifier: Verifier, kind: str) -> None:
    requests = [80, 3, 41, 7, 99, 0, 12]
    alone = [
        free_text(verifier, [prompt], 14, request_ids=[request])[0]
        for prompt, request in zip(PROMPTS, requests, strict=True)
    ]
    for rows in ([4], [0, 1, 2, 3], [6, 2, 5, 0], list(range(7)), [5, 3, 1, 6, 4, 2, 0]):
        texts = [alone[row] for row in rows]
        output = make_decoder(kind, verifier, texts).generate(
            [PROMPTS[row] for row in rows],
            max_new_tokens=14,
            sampling=SAMPLED,
            eos_token_ids=(),
            request_ids=[requests[row] for row in rows],
        )
        assert output.sequences == texts
        check_counts(output)


def test_request_ids_default_to_the_row_and_key_the_noise_with_the_seed(llama: Verifier) -> None:
    prompts = [[5, 6]] * 3
    by_row = free_text(llama, prompts, 16)
    assert by_row == free_text(llama, prompts, 16, request_ids=[0, 1, 2])
    assert len({tuple(text) for text in by_row}) == 3
    assert (
        free_text(llama, prompts, 16, request_ids=[4, 4, 4])
        == [free_text(llama, prompts[:1], 16, request_ids=[4])[0]] * 3
    )
    others = [free_text(llama, prompts, 16, SamplingConfig(temperature=1.0, seed=seed)) for seed in range(4)]
    assert len({tuple(text) for texts in others for text in texts}) == 12


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafter_of_nan_weights_leaves_the_text_alone(verifier: Verifier, sampling: SamplingConfig) -> None:
    drafter = make_drafter(verifier)
    for parameter in drafter.parameters():
        parameter.data.fill_(torch.nan)
    output = SpeculativeDecoder(verifier, drafter, BEAM).generate(
        PROMPTS, max_new_tokens=12, sampling=sampling, eos_token_ids=()
    )
    assert output.sequences == free_text(verifier, PROMPTS, 12, sampling)
    assert (output.stats.tau, output.stats.accepted) == (1, [7 * 11])


SHAPES: list[tuple[dict[str, Any], dict[str, Any], float]] = [
    ({"max_nodes": 1}, {}, 1),
    ({"max_nodes": 6}, {}, 6),
    ({"max_nodes": None}, {}, 13),
    ({"max_nodes": 500, "coupling": 0.0}, {}, 13),
    ({"max_nodes": None}, {"latency": LatencyCurve((1, 3), (1.0, 100.0))}, 1),
    ({"max_nodes": None}, {"latency": LatencyCurve((1, 5), (1.0, 1.0))}, 5),
    ({"max_nodes": 4}, {"latency": LatencyCurve((1, 5), (1.0, 1.0))}, 4),
    # A depth costs more than all its tokens are worth: nothing is drafted.
    ({"max_nodes": None}, {"latency": LatencyCurve((1, 13), (1.0, 1.0), depth_seconds=1e9)}, 1),
    ({"max_nodes": None}, {"latency": LatencyCurve((1, 13), (1.0, 1.0), depth_seconds=0.0)}, 13),
]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("beam", "options", "nodes"), SHAPES)
def test_tree_budget_sets_the_nodes_but_not_the_text(
    llama: Verifier, beam: dict[str, Any], options: dict[str, Any], nodes: float, sampling: SamplingConfig
) -> None:
    decoder = SpeculativeDecoder(llama, make_drafter(llama), BeamConfig(width=3, length=4, **beam), **options)
    output = decoder.generate(PROMPTS[:3], max_new_tokens=12, sampling=sampling, eos_token_ids=())
    assert output.sequences == free_text(llama, PROMPTS[:3], 12, sampling)
    assert output.stats.mean_nodes == nodes


def test_decoder_says_once_that_drafting_does_not_pay_and_goes_on_as_the_baseline(
    llama: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    costly = LatencyCurve((1, 13), (1.0, 50.0), depth_seconds=50.0)
    decoder = SpeculativeDecoder(llama, make_drafter(llama), BeamConfig(width=3, length=4), latency=costly)
    for _ in range(2):
        output = decoder.generate(PROMPTS[:3], max_new_tokens=12, eos_token_ids=())
        assert output.sequences == free_text(llama, PROMPTS[:3], 12, GREEDY)
        assert output.stats.mean_nodes == output.stats.tau == 1
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "drafting does not pay here (3 rows at a time)"
    ]


# --- counters and streaming ---


@pytest.mark.parametrize(
    ("limit", "accepted", "tau"),
    [(21, [0, 0, 0, 0, 4], 5), (20, [0, 0, 0, 0, 4], 4.75), (19, [0, 0, 0, 1, 3], 4.5), (17, [0, 1, 0, 0, 3], 4)],
)
def test_perfect_drafts_of_four_give_five_tokens_a_step_and_cuts_take_from_the_last(
    llama: Verifier, limit: int, accepted: list[int], tau: float
) -> None:
    """21 tokens are one of the prefill and four blocks of 4 + 1; shorter limits cut the fourth block."""
    texts = free_text(llama, PROMPTS[:1], 40)
    output = make_decoder("oracle", llama, texts).generate(
        PROMPTS[:1], max_new_tokens=limit, sampling=SAMPLED, eos_token_ids=()
    )
    assert (output.stats.accepted, output.stats.tau, output.stats.row_steps) == (accepted, tau, 4)


def test_baseline_emits_one_token_a_step(llama: Verifier) -> None:
    output = AutoregressiveDecoder(llama).generate(PROMPTS[:4], max_new_tokens=9, eos_token_ids=())
    stats = output.stats
    assert (stats.tau, stats.accepted, stats.forwards, stats.nodes) == (1, [32], 8, 32)
    check_counts(output)


@pytest.mark.parametrize("kind", DECODERS)
def test_streamer_gets_the_prompt_and_then_every_token_in_order(verifier: Verifier, kind: str) -> None:
    text = free_text(verifier, PROMPTS[:1], 24)[0]
    for eos, end in ((), 24), ((text[13],), text.index(text[13]) + 1), ((text[0],), 1):
        recorder = Recorder()
        decoder = make_decoder(kind, verifier, [text])
        output = decoder.generate(
            PROMPTS[:1], max_new_tokens=24, sampling=SAMPLED, eos_token_ids=eos, streamer=recorder
        )
        assert recorder.parts[0] == PROMPTS[0]
        assert [token for part in recorder.parts[1:] for token in part] == output.sequences[0] == text[:end]
        assert len(recorder.parts) == 2 + len(output.steps[0])  # the prompt, the first token, one part a step
        assert recorder.ends == 1


def test_tokens_that_a_stop_drops_are_not_streamed_with_their_step(llama: Verifier) -> None:
    text = free_text(llama, PROMPTS[:1], 24)[0]
    recorder = Recorder()
    make_decoder("oracle", llama, [text]).generate(
        PROMPTS[:1],
        max_new_tokens=24,
        sampling=SAMPLED,
        eos_token_ids=(),
        stop=lambda tokens: 8 if len(tokens) == 9 else None,
        streamer=recorder,
    )
    assert recorder.parts == [PROMPTS[0], text[:1], text[1:6], text[6:8]]


# --- more prompts than are decoded at a time ---

QUEUE_SETTINGS = {
    "greedy": SamplingConfig(min_new_tokens=3),
    "sampled": SamplingConfig(temperature=0.9, top_p=0.9, seed=3),
    "penalties": SamplingConfig(
        temperature=1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3
    ),
    "bad words": SamplingConfig(bad_words_ids=((7, 9), (3,)), temperature=1.0, seed=2),
}


@pytest.mark.parametrize("kind", [*DECODERS, "recycling"])
@pytest.mark.parametrize("settings", QUEUE_SETTINGS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_prompt_that_takes_the_place_of_another_gets_the_text_it_has_alone(
    llama: Verifier, kind: str, settings: str, batch_size: int
) -> None:
    sampling, count = QUEUE_SETTINGS[settings], 17
    keys = [31, 7, 7, 0, 12, 5, 40]  # two requests of one key
    text = free_text(llama, PROMPTS, count, sampling, request_ids=keys)
    eos = (text[0][4], text[2][0], text[5][9])  # places free at different steps, one of them at its prefill
    options: dict[str, Any] = {"max_new_tokens": count, "sampling": sampling, "eos_token_ids": eos}
    alone = [
        AutoregressiveDecoder(llama).generate([prompt], request_ids=[key], **options)
        for prompt, key in zip(PROMPTS, keys, strict=True)
    ]
    if kind == "recycling":
        beam = BeamConfig(width=3, length=4, lookup_length=5, recycled_nodes=8)
        decoder: Decoder = SpeculativeDecoder(llama, make_drafter(llama), beam)
    else:
        decoder = make_decoder(kind, llama, text)
    output = decoder.generate(PROMPTS, request_ids=keys, batch_size=batch_size, **options)
    assert output.sequences == [single.sequences[0] for single in alone]
    assert output.finish_reasons == [single.finish_reasons[0] for single in alone]
    assert output.stats.tokens == sum(map(len, output.sequences))
    assert output.stats.row_steps == sum(map(len, output.steps)) <= batch_size * output.stats.forwards


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_each_row_may_have_its_own_limit(llama: Verifier, kind: str, batch_size: int | None) -> None:
    text = free_text(llama, PROMPTS, 9)
    limits = [3, 0, 9, 1, 0, 5, 2]
    decoder = make_decoder(kind, llama, text)
    output = decoder.generate(PROMPTS, max_new_tokens=limits, sampling=SAMPLED, eos_token_ids=(), batch_size=batch_size)
    assert output.sequences == [tokens[:limit] for tokens, limit in zip(text, limits, strict=True)]
    assert set(output.finish_reasons) == {"length"}


def test_as_many_prompts_are_decoded_at_a_time_as_wanted(llama: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    live = []
    verify = Verifier.verify
    monkeypatch.setattr(
        Verifier, "verify", lambda self, tree, cache: live.append(len(cache.lengths)) or verify(self, tree, cache)
    )
    decoder = AutoregressiveDecoder(llama)
    decoder.generate(PROMPTS[:5], max_new_tokens=4, eos_token_ids=(), batch_size=2)
    assert live == [2] * 6 + [1] * 3  # 5 replies of 3 tokens besides the first
    decoder.generate(PROMPTS[:5], max_new_tokens=4, eos_token_ids=(), batch_size=8)
    assert live[9:] == [5] * 3


def test_a_place_that_is_given_away_keeps_no_noise_of_the_request_before(llama: Verifier) -> None:
    kept: list[int] = []

    class Watching(AutoregressiveDecoder):
        def _step(self, batch: _Batch, stats: Any) -> list[int]:
            assert batch.sampler.noise is not None
            kept.append(len(batch.sampler.noise._rows))
            return super()._step(batch, stats)

    Watching(llama).generate(PROMPTS, max_new_tokens=3, sampling=SAMPLED, eos_token_ids=(), batch_size=2)
    assert max(kept) <= 2


# --- what the drafter is told: a mistake here would cost speed and show in no text ---


class Watcher(NoisyOracleDecoder):
    """Write down what each step could draft from: row, tokens so far, context, root and coupled noise."""

    def __init__(self, verifier: Verifier, truth: list[list[int]]) -> None:
        drafter = make_drafter(verifier, draft_vocab_size=20)
        super().__init__(verifier, drafter, BEAM, 0.7, seed=1)
        self.truth = truth
        self.seen: list[tuple[int, int, Tensor, int, Tensor]] = []
        self.allowances: list[float] = []

    def _propose(self, batch: _Batch) -> DraftTree:
        coupling = self._coupling(batch)
        assert coupling is not None
        self.allowances.append(coupling.temperature)
        for index, reply in enumerate(batch.replies):
            noise = torch.stack([coupling.noise(depth)[index] for depth in range(BEAM.length)]).float()
            state = (batch.context[index], int(batch.root[index]), noise)
            self.seen.append((reply.row, len(reply.tokens), *state))
        return super()._propose(batch)


def test_drafter_gets_the_last_committed_state_the_root_and_the_noise_to_come(verifier: Verifier) -> None:
    texts = free_text(verifier, PROMPTS[:3], 24, request_ids=[8, 5, 6])
    decoder = Watcher(verifier, texts)
    decoder.generate(PROMPTS[:3], max_new_tokens=24, sampling=SAMPLED, eos_token_ids=(), request_ids=[8, 5, 6])
    assert decoder.partly_accepted > 3
    noise = GumbelNoise(SAMPLED.seed, VOCAB, torch.device("cpu"))
    for row, count, context, root, coupled in decoder.seen:
        committed = torch.tensor([PROMPTS[row] + texts[row][: count - 1]])
        hidden = verifier.hidden_states(committed, torch.ones_like(committed, dtype=torch.bool))
        torch.testing.assert_close(context, hidden[0, -1], rtol=1e-9, atol=1e-9)
        assert root == texts[row][count - 1]
        ahead = [noise.row([8, 5, 6][row], committed.shape[1] + 1 + depth) for depth in range(BEAM.length)]
        expected = torch.stack(ahead)[:, decoder.drafter.draft_token_ids].float()
        assert torch.equal(coupled, expected)


def test_coupling_allows_for_an_error_of_the_drafters_logits_before_the_requests_temperature(
    verifier: Verifier,
) -> None:
    decoder = Watcher(verifier, [[5] * 6])
    decoder.generate(PROMPTS[:1], max_new_tokens=6, sampling=SamplingConfig(temperature=0.25), eos_token_ids=())
    assert set(decoder.allowances) == {4.0}


def test_coupling_allows_for_more_error_where_trees_are_chosen_by_cost(verifier: Verifier) -> None:
    decoder = Watcher(verifier, [[5] * 6])
    decoder.latency = LatencyCurve((1, 8), (1.0, 1.0))
    decoder.generate(PROMPTS[:1], max_new_tokens=6, sampling=SamplingConfig(temperature=0.25), eos_token_ids=())
    assert set(decoder.allowances) == {4.8}


# --- arguments and fit ---


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[5]],), {"max_new_tokens": -1}, UsageError, "max_new_tokens must be >= 0, got -1"),
        (([],), {}, DataError, "at least one prompt, got none"),
        (([[5], []],), {}, DataError, "row 1 has no tokens"),
        ((torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]])), {}, DataError, "row 1 has no tokens"),
        (([[5]], torch.ones(1, 1)), {}, UsageError, "attention_mask goes with a tensor"),
        ((torch.ones(3).long(),), {}, UsageError, r"must both be [B, T], got (3,) and None"),
        ((torch.ones(2, 3).long(), torch.ones(2, 2)), {}, UsageError, r"got (2, 3) and (2, 2)"),
        (([[5], [6]],), {"request_ids": [1]}, UsageError, "each of the 2 prompts, got 1"),
        (([[5], [6]],), {"streamer": Recorder()}, UsageError, "a streamer takes one prompt, got 2"),
        (([[5], [6]],), {"max_new_tokens": [4]}, UsageError, "one number or one for each of 2 prompts, got 1"),
        (([[5], [6]],), {"max_new_tokens": [4, -2]}, UsageError, "max_new_tokens must be >= 0, got -2"),
        (([[5], [6]],), {"batch_size": 0}, UsageError, "batch_size must be >= 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    llama: Verifier, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        AutoregressiveDecoder(llama).generate(*arguments, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 16, "vocab_size": VOCAB}, r"expected hidden_size 32, the drafter has 16"),
        ({"hidden_size": 32, "vocab_size": 50}, r"expected vocab_size 61, the drafter has 50"),
    ],
)
@pytest.mark.parametrize("allow", [False, True])
def test_drafter_of_other_sizes_is_always_refused_with_both(
    llama: Verifier, sizes: dict[str, int], message: str, allow: bool
) -> None:
    drafter = Drafter(RecurrentDraftingConfig(**sizes))
    with pytest.raises(ModelError, match=message):
        SpeculativeDecoder(llama, drafter, allow_base_mismatch=allow)


def test_drafter_of_another_base_is_refused_with_both_unless_allowed(llama: Verifier) -> None:
    drafter = make_drafter(llama, verifier_fingerprint="aaaa", verifier_name_or_path="its/base")
    other = Verifier(llama.model, name_or_path="this/base", fingerprint="bbbb")
    with pytest.raises(ModelError, match=r"expected its/base \(aaaa\), got this/base \(bbbb\)"):
        SpeculativeDecoder(other, drafter)
    decoder = SpeculativeDecoder(other, drafter, BEAM, allow_base_mismatch=True)
    output = decoder.generate(PROMPTS, max_new_tokens=8, sampling=SAMPLED, eos_token_ids=())
    assert output.sequences == free_text(llama, PROMPTS, 8)


@pytest.mark.parametrize(("theirs", "ours"), [(None, "bbbb"), ("aaaa", None), ("aaaa", "aaaa"), (None, None)])
def test_unknown_or_equal_fingerprints_fit(llama: Verifier, theirs: str | None, ours: str | None) -> None:
    drafter = make_drafter(llama, verifier_fingerprint=theirs)
    assert SpeculativeDecoder(Verifier(llama.model, fingerprint=ours), drafter).drafter is drafter


def test_beam_defaults_to_the_drafters_own(llama: Verifier) -> None:
    drafter = make_drafter(llama, beam_width=2, beam_length=3)
    assert SpeculativeDecoder(llama, drafter).beam == BeamConfig(width=2, length=3)


def test_drafter_of_another_dtype_is_copied_and_stays_as_it_is(llama: Verifier) -> None:
    drafter = make_drafter(llama, draft_vocab_size=20).float().train()
    decoder = SpeculativeDecoder(llama, drafter, BEAM)
    assert (decoder.drafter.dtype, drafter.dtype, drafter.training) == (torch.float64, torch.float32, True)
    assert torch.equal(decoder.drafter.draft_token_ids, drafter.draft_token_ids)
    output = decoder.generate(PROMPTS, max_new_tokens=8, sampling=SAMPLED, eos_token_ids=())
    assert output.sequences == free_text(llama, PROMPTS, 8)
