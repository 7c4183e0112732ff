"""The decoding twin: the same numbers as the model, and never those of weights that have changed since."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from recurrent_drafting import AutoregressiveDecoder, BeamConfig, SpeculativeDecoder, Verifier, packed_model
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.packed_model import PackedLinear, decoding_twin, pack
from tests.tiny import CONFIGS, NoisyOracleDecoder, llama_config, make_drafter, make_verifier

PROMPTS = [[1, 5, 9, 33, 2, 8], [4, 4, 7]]
needs_packing = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no packed kernels"
)


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_packed_layer_computes_what_the_layer_computes(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias)
    x = torch.randn(2, rows, 48)
    with torch.inference_mode():
        got, expected = PackedLinear(linear)(x), linear(x)
    assert got.shape == (2, rows, 80)
    torch.testing.assert_close(got, expected)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_a_widened_layer_multiplies_in_float32_and_rounds_once(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        got = PackedLinear(linear, torch.float32)(x)
        exact = copy.deepcopy(linear).double()(x.double())
    assert got.dtype == torch.bfloat16
    # Half a unit in the last of bf16's eight bits, and the little that float32 sums lose.
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)


@needs_packing
@pytest.mark.parametrize("lengths", [[3, 2, 400, 390], [400, 3, 390, 2], [5, 4, 3, 6]])
def test_rows_of_unlike_length_are_attended_apart_and_give_the_models_own_logits(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row sees its own slots; those up to the longest row's are left out where they are many."""
    torch.manual_seed(0)
    config = llama_config()
    config.max_position_embeddings = 512
    verifier = Verifier(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    seen: list[tuple[int, int]] = []
    attend = packed_model._attend

    def watched(query: torch.Tensor, key: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((len(key), key.shape[2]))
        return attend(query, key, *rest)  # type: ignore[arg-type]

    rng = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 60, (length,), generator=rng).tolist() for length in lengths]
    cache = verifier.new_cache(len(texts), 410)
    verifier.prefill(texts, cache)
    monkeypatch.setattr(packed_model, "_attend", watched)
    root = torch.tensor([7, 8, 9, 10])
    with torch.inference_mode():
        logits = verifier.verify(DraftTree.root_only(root), cache).logits[:, 0]
        for row, text in enumerate(texts):
            expected = verifier.model(torch.tensor([[*text, int(root[row])]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    runs = {(3, 2, 400, 390): [(2, 4), (2, 401)], (400, 3, 390, 2): [(3, 401), (1, 3)]}
    assert seen == runs.get(tuple(lengths), [(4, 7)]) * config.num_hidden_layers


@needs_packing
def test_a_bf16_model_is_widened_where_the_processor_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recurrent_drafting.packed_model.product_dtype", lambda _: torch.float32)
    verifier = make_verifier("llama", dtype=torch.bfloat16)
    verifier.new_cache(1, 4)
    body, head = verifier.decoding_modules()
    assert isinstance(head, PackedLinear) and head.widened and packed_layers(body) > 0
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        got, expected = head(body(input_ids=ids)[0]), verifier.model(ids).logits
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@needs_packing
def test_the_twin_shares_all_but_the_packed_weights_and_leaves_the_model_alone() -> None:
    model = make_verifier("llama", dtype=torch.float32).model
    before = {name: type(module) for name, module in model.named_modules()}
    twin = pack(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"
    assert packed_layers(twin) == sum(kind is nn.Linear for kind in before.values())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in twin.parameters()} == own


@needs_packing
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_decoding_runs_the_twin_and_writes_what_float64_writes(family: str) -> None:
    verifier = make_verifier(family, dtype=torch.float32)
    exact = Verifier(copy.deepcopy(verifier.model).double())
    expected = AutoregressiveDecoder(exact).generate(PROMPTS, max_new_tokens=24).sequences
    assert AutoregressiveDecoder(verifier).generate(PROMPTS, max_new_tokens=24).sequences == expected
    decoder = NoisyOracleDecoder(verifier, make_drafter(verifier), BeamConfig(width=3, length=3), 0.7, seed=1)
    decoder.truth = expected
    output = decoder.generate(PROMPTS, max_new_tokens=24)
    assert output.sequences == expected
    assert output.stats.tau > 1.3
    body, head = verifier.decoding_modules()
    assert isinstance(head, PackedLinear)
    assert packed_layers(exact.decoding_modules()[0]) == 0  # float64 stays the plain model
    assert body is not verifier.model.base_model


@needs_packing
@pytest.mark.parametrize("change", ["in place", "replaced", "behind its back"])
def test_changed_weights_are_packed_anew(change: str) -> None:
    verifier = make_verifier("llama", dtype=torch.float32)
    other = make_verifier("llama", seed=5, dtype=torch.float32)
    decoder = AutoregressiveDecoder(verifier)
    before = decoder.generate(PROMPTS, max_new_tokens=12).sequences
    for own, new in zip(verifier.model.parameters(), other.model.parameters(), strict=True):
        if change == "in place":
            with torch.no_grad():
                own.copy_(new)
        elif change == "behind its back":  # as adapters are merged: no version changes
            own.data.copy_(new.data)
        else:
            own.data = new.data.clone()
    expected = AutoregressiveDecoder(other).generate(PROMPTS, max_new_tokens=12).sequences
    assert expected != before
    assert decoder.generate(PROMPTS, max_new_tokens=12).sequences == expected


@needs_packing
def test_a_drafter_that_is_still_trained_is_packed_anew() -> None:
    verifier = make_verifier("llama", dtype=torch.float32)
    drafter, other = make_drafter(verifier), make_drafter(verifier, seed=3)
    decoder = SpeculativeDecoder(verifier, drafter, BeamConfig(width=3, length=3))
    decoder.generate(PROMPTS, max_new_tokens=24, eos_token_ids=())
    with torch.no_grad():
        for own, new in zip(drafter.parameters(), other.parameters(), strict=True):
            own.copy_(new)
    got = decoder.generate(PROMPTS, max_new_tokens=24, eos_token_ids=()).steps
    assert (
        got
        == SpeculativeDecoder(verifier, other, decoder.beam)
        .generate(PROMPTS, max_new_tokens=24, eos_token_ids=())
        .steps
    )


def test_what_cannot_be_packed_is_its_own_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    double = make_verifier("llama").model
    assert decoding_twin(double) is double
    hooked = make_verifier("llama", dtype=torch.float32).model
    hooked.model.layers[0]._hf_hook = "weights that come and go"
    assert decoding_twin(hooked) is hooked
    large = make_verifier("llama", dtype=torch.float32).model
    monkeypatch.setattr("recurrent_drafting.memory.machine_free_bytes", lambda: 1000)
    assert decoding_twin(large) is large


@needs_packing
def test_a_twin_that_differs_from_its_model_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    verifier = make_verifier("llama", dtype=torch.float32)
    exact = Verifier(copy.deepcopy(verifier.model).double())
    plain = AutoregressiveDecoder(exact).generate(PROMPTS, max_new_tokens=12).sequences
    other = pack(make_verifier("llama", seed=5, dtype=torch.float32).model)
    monkeypatch.setattr("recurrent_drafting.verifier.decoding_twin", lambda _: other)
    for _ in range(2):
        assert AutoregressiveDecoder(verifier).generate(PROMPTS, max_new_tokens=12).sequences == plain
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@needs_packing
def test_a_twin_is_made_once_for_a_model_and_goes_with_it() -> None:
    model = make_verifier("llama", dtype=torch.float32).model
    twin = decoding_twin(model)
    assert decoding_twin(model) is twin
    assert Verifier(model).new_cache(1, 4) is not None
    assert decoding_twin(model) is twin
    gone = weakref.ref(twin)
    del twin, model
    gc.collect()
    assert gone() is None


@needs_packing
def test_a_layer_with_a_hook_of_its_own_is_not_packed() -> None:
    model = make_verifier("llama", dtype=torch.float32).model
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    decoder = AutoregressiveDecoder(Verifier(model))
    decoder.generate(PROMPTS, max_new_tokens=1)
    seen.clear()
    decoder.generate(PROMPTS, max_new_tokens=3, eos_token_ids=())
    assert len(seen) == 3


@pytest.mark.parametrize("nodes", [1, 5])
def test_grouped_attention_equals_copied_heads(nodes: int) -> None:
    pack(make_verifier("llama", dtype=torch.float32).model)  # registers it
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, nodes, 8), torch.randn(2, 2, 11, 8)
    value = torch.randn(2, 2, 11, 8)
    mask = torch.zeros(2, 1, nodes, 11).masked_fill(torch.rand(2, 1, nodes, 11) < 0.3, torch.finfo(torch.float32).min)
    layer = nn.Module()
    layer.num_key_value_groups = 3  # type: ignore[assignment]
    functions = AttentionInterface()
    expected, _ = functions["sdpa"](layer, query, key, value, mask, scaling=0.3)
    got, _ = functions["recurrent_drafting_grouped_sdpa"](layer, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, expected)
