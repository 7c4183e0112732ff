"""Compiled decode forwards: the same texts, no compiling after the first, and one line where it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

import generate_speculator
from recurrent_drafting import AutoregressiveDecoder, BeamConfig, SamplingConfig, SpeculativeDecoder, Verifier
from recurrent_drafting.compiled_forward import CAPACITY, SIZES, CompiledForward
from recurrent_drafting.errors import ModelError
from recurrent_drafting.kv_cache import VerifierCache
from tests.families import FAMILIES
from tests.tiny import NoisyOracleDecoder, make_drafter, make_verifier

SETTINGS = (SamplingConfig(), SamplingConfig(temperature=1.0, seed=5))
PROMPTS = [[1, 5, 9, 33, 2, 8], [4, 4, 7]]


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile less: a tree of 5 nodes is a large one then."""
    for module in ("compiled_forward", "verifier"):
        monkeypatch.setattr(f"recurrent_drafting.{module}.SIZES", (1, 4))


def test_only_one_row_few_nodes_and_a_cache_with_room_run_compiled() -> None:
    compiled = CompiledForward(torch.nn.Identity(), torch.nn.Identity(), "cache", "none")
    assert compiled.capacity(1, 100) == CAPACITY
    assert compiled.capacity(2, 100) == 100
    assert compiled.capacity(1, CAPACITY - 1) == CAPACITY - 1
    cache = VerifierCache(num_layers=1, batch_size=1, capacity=CAPACITY)
    assert compiled.takes(SIZES[-1], cache)
    assert not compiled.takes(SIZES[-1] + 1, cache)
    cache.lengths = [CAPACITY - 70]
    assert not compiled.takes(8, cache)  # its mask would be as wide as the cache
    assert not compiled.takes(1, VerifierCache(num_layers=1, batch_size=2, capacity=CAPACITY))
    assert not compiled.takes(1, VerifierCache(num_layers=1, batch_size=1, capacity=64))
    assert compiled.padded(5, 100) == (8, 128)
    assert compiled.padded(1, 63) == (1, 64)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler
@pytest.mark.parametrize(
    ("family", "windowed", "dtype"), [("llama", False, torch.float32), ("gemma3", True, torch.float64)]
)
def test_compiled_texts_are_the_plain_ones_and_nothing_is_compiled_twice(
    family: str, windowed: bool, dtype: torch.dtype, few_sizes: None
) -> None:
    verifier = Verifier(FAMILIES[family].model(windowed=windowed).to(dtype), family)
    expected = [
        AutoregressiveDecoder(verifier).generate(PROMPTS, max_new_tokens=40, sampling=s).sequences for s in SETTINGS
    ]
    verifier.compile()
    assert verifier.compiles
    assert verifier.compile_seconds > 0
    graphs = counters["stats"]["unique_graphs"]
    drafter = make_drafter(verifier)
    for sampling, texts in zip(SETTINGS, expected, strict=True):
        for row, prompt in enumerate(PROMPTS):
            got = AutoregressiveDecoder(verifier).generate(
                [prompt], max_new_tokens=40, sampling=sampling, request_ids=[row]
            )
            assert got.sequences == [texts[row]]
        for nodes in (2, 4, 5):
            beam = replace(BeamConfig(width=6, length=4), max_nodes=nodes)
            decoder = NoisyOracleDecoder(verifier, drafter, beam, 0.7, seed=nodes)
            decoder.truth = [texts[0]]
            output = decoder.generate(PROMPTS[:1], max_new_tokens=40, sampling=sampling, request_ids=[0])
            assert output.sequences == [texts[0]]
        output = SpeculativeDecoder(verifier, drafter).generate(PROMPTS, max_new_tokens=40, sampling=sampling)
        assert output.sequences == texts  # a batch goes the usual way
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_a_base_that_does_not_compile_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, few_sizes: None
) -> None:
    verifier = make_verifier("llama", dtype=torch.float32)
    layer = verifier.model.model.layers[1]
    forward = layer.forward

    def interrupted(*args: object, **options: object) -> object:
        torch._dynamo.graph_break()
        return forward(*args, **options)

    monkeypatch.setattr(layer, "forward", interrupted)
    with pytest.raises(ModelError, match=r"^tiny-llama does not compile: .*graph_break.*; run without --compile$"):
        verifier.compile()
    assert not verifier.compiles


def test_more_than_one_prompt_at_a_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code = generate_speculator.main(["--eval_mt_bench", "--compile", "--batch_size", "4"])
    assert code == 2
    assert "--compile is for one prompt at a time, got --batch_size 4" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_logits_that_are_off_are_not_used(monkeypatch: pytest.MonkeyPatch, few_sizes: None) -> None:
    verifier = make_verifier("llama", dtype=torch.float32)
    forward = CompiledForward.__call__

    def wrong(self: CompiledForward, ids: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(self, (ids + 1) % verifier.vocab_size, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CompiledForward, "__call__", wrong)
    with pytest.raises(ModelError, match="compiled, a tree of 1 nodes gives logits"):
        verifier.compile()
    assert not verifier.compiles
