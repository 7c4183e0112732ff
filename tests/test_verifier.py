"""The verifier adapter: what it refuses, how it loads, and what it says when it cannot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub.constants
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from recurrent_drafting import AutoregressiveDecoder, BeamConfig, Verifier
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.errors import DataError, ModelError, NetworkError, UsageError
from recurrent_drafting.verifier import resolve_device, resolve_dtype
from tests.families import FAMILIES, largest_gap, plain, random_tokens, random_tree
from tests.tiny import VOCAB, NoisyOracleDecoder, llama_config, make_drafter

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def causal(model_type: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return model


def t5() -> PreTrainedModel:
    config = AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)
    return model


def offloaded() -> PreTrainedModel:
    return accelerate.cpu_offload(FAMILIES["llama"].model())  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str, str]] = {
    "encoder-decoder": (t5, "t5", "encoder-decoder"),
    "without a head": (lambda: LlamaModel(llama_config()), "llama", "no LM head"),
    "state-space": (lambda: causal("mamba", state_size=4), "mamba", "recurrent state"),
    "recurrent": (lambda: causal("rwkv", attention_hidden_size=32), "rwkv", "recurrent state"),
    "hybrid": (
        lambda: causal("recurrent_gemma", num_hidden_layers=3, lru_width=32, head_dim=8),
        "recurrent_gemma",
        "recurrent state",
    ),
    "hybrid of attention and state-space": (
        lambda: causal("jamba", num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        "jamba",
        "recurrent state",
    ),
    "convolution": (lambda: causal("lfm2", layer_types=["conv", "full_attention"]), "lfm2", "layers of type conv"),
    "ALiBi without positions": (lambda: causal("bloom", n_layer=2, n_head=4), "bloom", "ALiBi"),
    "ALiBi by setting": (lambda: causal("falcon", alibi=True), "falcon", "ALiBi"),
    "local attention": (
        lambda: causal("gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        "gpt_neo",
        "local attention",
    ),
    "bidirectional": (lambda: causal("bert", is_decoder=False), "bert", "off a plain forward"),
    "an error of its own": (lambda: causal("xlm", emb_dim=32, n_layers=2, n_heads=4), "xlm", "AssertionError"),
    "offloaded": (offloaded, "llama", "without offloading"),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_a_model_that_cannot_verify_a_tree_is_refused_by_name(what: str) -> None:
    build, model_type, reason = REFUSED[what]
    with pytest.raises(ModelError) as refusal:
        Verifier(build(), name_or_path="some/base")
    message = str(refusal.value)
    assert message.startswith(f"some/base ({model_type}) cannot verify a draft tree")
    assert reason in message
    assert "\n" not in message
    assert refusal.value.exit_code == 4


class ScaledLlama(LlamaForCausalLM):
    """Do something after the head that no config names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.03
        return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_unknown_step_after_the_head_is_found_by_the_probe(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="LM head alone"):
        Verifier(ScaledLlama(llama_config()).to(dtype))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float32))],
)
def test_rounding_is_not_taken_for_a_misfit(dtype: torch.dtype) -> None:
    for family in FAMILIES.values():
        Verifier(family.model(windowed=True).to(dtype))


@pytest.mark.parametrize("fits", [True, False])
def test_the_probe_reaches_beyond_the_window_and_leaves_no_trace(fits: bool) -> None:
    # Llama knows no window: one in its config is a claim that its body does not keep.
    model = FAMILIES["mistral"].model(windowed=True) if fits else FAMILIES["llama"].model(sliding_window=100)
    window, hooks = model.config.sliding_window, len(model.get_output_embeddings()._forward_pre_hooks)
    if fits:
        Verifier(model)
    else:
        with pytest.raises(ModelError, match="off a plain forward"):
            Verifier(model)
    assert model.config.sliding_window == window
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("llama", "sliding_window", 8), ("mistral", "layer_types", ["sliding_attention", "full_attention"])],
)
def test_a_setting_that_the_body_does_not_read_can_be_taken_out(name: str, setting: str, value: object) -> None:
    model = FAMILIES[name].model(windowed=True)
    setattr(model.config, setting, value)
    with pytest.raises(ModelError, match="cannot verify a draft tree"):
        Verifier(model)
    setattr(model.config, setting, None)
    Verifier(model)


def test_layer_types_decide_about_the_window_not_a_flag_beside_them() -> None:
    settings = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    verifier = Verifier(FAMILIES["smollm3"].model(**settings, use_sliding_window=False))
    rng = random.Random(0)
    assert largest_gap(verifier, [random_tokens(rng, 20)], rng, steps=2, nodes=9) <= 1e-10


class Int8Linear(nn.Module):
    """A linear layer whose weights are stored as 8-bit integers with a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features = linear.in_features
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.codes.to(inputs.dtype) * self.scale)


def quantised(*, with_head: bool) -> PreTrainedModel:
    model = FAMILIES["llama"].model()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (with_head or name != "lm_head"):
            model.set_submodule(name, Int8Linear(module))
    return model


def dispatched(*parts: str) -> PreTrainedModel:
    """Place the parts of a model one by one, all of them on the CPU, with accelerate's hooks."""
    model = accelerate.dispatch_model(FAMILIES["llama"].model(), dict.fromkeys(parts, "cpu"), force_hooks=True)
    assert hasattr(model.get_submodule(parts[0]), "_hf_hook")
    return model  # type: ignore[no-any-return]


BUILT: dict[str, Callable[[], PreTrainedModel]] = {
    "placed whole": lambda: dispatched(""),
    "placed in two": lambda: dispatched("model", "lm_head"),
    "placed by layer": lambda: dispatched(
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"
    ),
    "quantised": lambda: quantised(with_head=False),
    "quantised with its head": lambda: quantised(with_head=True),
}


@pytest.mark.parametrize("how", sorted(BUILT))
def test_dispatched_and_quantised_models_verify_like_any_other(how: str) -> None:
    verifier = Verifier(BUILT[how]())
    rng = random.Random(0)
    assert largest_gap(verifier, [random_tokens(rng, length) for length in (4, 9)], rng, steps=3, nodes=9) <= 1e-10
    assert_speculative_text_is_the_baselines(verifier, [random_tokens(rng, 6)], 20)


def test_rows_of_a_quantised_head_are_refused() -> None:
    verifier = Verifier(quantised(with_head=True))
    with pytest.raises(ModelError, match="Int8Linear: expected a plain linear layer"):
        verifier.head(torch.zeros(1, 32, dtype=torch.float64), torch.tensor([3]))


def assert_speculative_text_is_the_baselines(verifier: Verifier, prompts: list[list[int]], count: int) -> list[str]:
    expected = AutoregressiveDecoder(verifier).generate(prompts, max_new_tokens=count)
    decoder = NoisyOracleDecoder(verifier, make_drafter(verifier), BeamConfig(width=3, length=4), 0.9, seed=0)
    decoder.truth = expected.sequences
    got = decoder.generate(prompts, max_new_tokens=count)
    assert decoder.partly_accepted
    assert (got.sequences, got.finish_reasons) == (expected.sequences, expected.finish_reasons)
    return got.finish_reasons


def longrope() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 5.0, 7.0, 9.0],
    }
    return FAMILIES["phi3"].model(
        rope_parameters=rope, original_max_position_embeddings=24, max_position_embeddings=96, eos_token_id=None
    )


def test_longrope_is_used_up_to_where_the_frequencies_change() -> None:
    model = longrope()
    verifier = Verifier(model)
    assert verifier.context_window == 24
    rng = random.Random(0)
    reasons = assert_speculative_text_is_the_baselines(verifier, [random_tokens(rng, 3), random_tokens(rng, 9)], 60)
    assert reasons == ["length", "length"]
    # The reason for the limit: one token more in the forward changes what the tokens before it see.
    tokens = random_tokens(rng, 25)
    assert (plain(model, tokens)[0][:24] - plain(model, tokens[:24])[0]).abs().max() > 0.1


def test_trees_that_reach_past_the_last_position_leave_the_text_alone() -> None:
    # GPT-2 has a table of positions: an index past its end would be an error.
    verifier = Verifier(FAMILIES["gpt2"].model(n_positions=20, eos_token_id=None))
    rng = random.Random(1)
    reasons = assert_speculative_text_is_the_baselines(verifier, [random_tokens(rng, 3), random_tokens(rng, 9)], 60)
    assert reasons == ["length", "length"]


def test_context_is_as_wide_as_what_feeds_the_head() -> None:
    verifier = Verifier(FAMILIES["opt-projected"].model())
    assert verifier.hidden_size == 16
    assert verifier.prefill([[3, 4, 5]], verifier.new_cache(1, 3)).hidden.shape == (1, 1, 16)


def test_embed_is_the_table_without_the_bodys_factor() -> None:
    model = FAMILIES["gemma"].model()
    ids = torch.tensor([[4, 9], [60, 0]])
    assert torch.equal(Verifier(model).embed(ids), model.get_input_embeddings().weight[ids])


@pytest.mark.parametrize(
    ("of_generation", "of_model", "expected"), [(7, 2, (7,)), ([7, 8], 2, (7, 8)), (None, 2, (2,)), (None, None, ())]
)
def test_ends_of_sequence_come_from_the_generation_config_first(
    of_generation: int | list[int] | None, of_model: int | None, expected: tuple[int, ...]
) -> None:
    model = FAMILIES["llama"].model()
    model.generation_config.eos_token_id = of_generation
    model.config.eos_token_id = of_model
    assert Verifier(model).eos_token_ids == expected


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prompts_of_unlike_length_are_run_apart_and_go_on_as_one_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch as wide as its longest prompt would be mostly padding; every row still gives the model's own logits."""
    verifier = Verifier(FAMILIES[name].model())
    prompts = [[3, 4], [5 + i % 7 for i in range(60)], [6], [7 + i % 5 for i in range(58)]]
    shapes: list[tuple[int, ...]] = []
    forward = Verifier._forward

    def watched(self: Verifier, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *rest)

    monkeypatch.setattr(Verifier, "_forward", watched)
    cache = verifier.new_cache(4, 64)
    shapes.clear()  # those of the probe
    logits = verifier.prefill(prompts, cache).logits[:, 0]
    assert shapes == [(2, 2), (2, 60)]
    assert cache.lengths == [2, 60, 1, 58]
    root = torch.tensor([8, 9, 10, 11])
    going_on = verifier.verify(DraftTree.root_only(root), cache).logits[:, 0]
    for row, prompt in enumerate(prompts):
        text = [*prompt, int(root[row])]
        torch.testing.assert_close(logits[row], plain(verifier.model, prompt)[0][-1], rtol=0, atol=1e-9)
        torch.testing.assert_close(going_on[row], plain(verifier.model, text)[0][-1], rtol=0, atol=1e-9)


def test_prefill_refuses_an_empty_prompt_and_verify_a_full_cache() -> None:
    verifier = Verifier(FAMILIES["llama"].model())
    cache = verifier.new_cache(2, 4)
    with pytest.raises(DataError, match="empty prompt"):
        verifier.prefill([[3], []], cache)
    with pytest.raises(DataError, match="empty prompt"):
        verifier.prefill([], cache)
    with pytest.raises(DataError, match="empty prompt"):
        verifier.prefill([[3] * 100, []], cache)
    verifier.prefill([[3, 4, 5], [6]], cache)
    with pytest.raises(IndexError, match="holds 4 tokens per row, asked to write up to 5"):
        verifier.verify(random_tree(random.Random(0), batch=2, nodes=2), cache)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    FAMILIES["llama"].model().to(torch.float32).save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_comes_back_frozen_in_its_dtype(saved: Path) -> None:
    verifier = Verifier.from_pretrained(str(saved), dtype="fp64", device="cpu")
    original = FAMILIES["llama"].model().to(torch.float32).to(torch.float64)
    assert verifier.dtype == torch.float64
    assert verifier.device == torch.device("cpu")
    assert not any(parameter.requires_grad for parameter in verifier.model.parameters())
    torch.testing.assert_close(plain(verifier.model, [3, 4])[0], plain(original, [3, 4])[0], rtol=0, atol=1e-12)
    assert Verifier.from_pretrained(str(saved), dtype="bf16", device="cpu").dtype == torch.bfloat16


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
    "an unknown family": (lambda folder: edit_config(folder, model_type="unheard_of"), "unheard_of"),
    "a family without a causal LM": (lambda folder: edit_config(folder, model_type="vit"), "ViTConfig"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "cut-off weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x40" + b"\0" * 9), "header"),
    "weights of another size": (lambda folder: edit_config(folder, intermediate_size=64), "mismatch"),
    "weights of fewer layers": (lambda folder: edit_config(folder, num_hidden_layers=3), "model.layers.2"),
    "an encoder-decoder model": (lambda folder: t5().save_pretrained(folder), "encoder-decoder"),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_a_base_that_does_not_load_is_named_with_the_reason(what: str, saved: Path) -> None:
    damage, reason = BROKEN[what]
    damage(saved)
    with pytest.raises(ModelError) as error:
        Verifier.from_pretrained(str(saved), dtype="fp32", device="cpu")
    assert str(saved) in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_id_without_a_network_names_what_is_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=r"'no-one/nothing' is no local path.*packaged model") as error:
        Verifier.from_pretrained("no-one/nothing", dtype="fp32", device="cpu")
    assert error.value.exit_code == 7


def test_a_hub_model_that_is_here_but_unknown_is_no_network_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--some--one"
    for path, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", '{"model_type": "unheard_of"}')):
        (stored / path).parent.mkdir(parents=True)
        (stored / path).write_text(text)
    with pytest.raises(ModelError, match=r"base model some/one does not load.*unheard_of"):
        Verifier.from_pretrained("some/one", dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        ("int8", "cpu", "expected one of auto, fp32, bf16, fp16, fp64"),
        ("fp32", "cuda:99", "expected one of auto, cpu"),
        ("fp32", "abacus", "expected one of auto, cpu"),
    ],
)
def test_an_unknown_dtype_or_device_lists_those_there_are(saved: Path, dtype: str, device: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        Verifier.from_pretrained(str(saved), dtype=dtype, device=device)
    assert error.value.exit_code == 2


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(str(resolve_device("auto"))) == resolve_device("auto")


def test_an_apple_gpu_is_not_taken_and_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == torch.device("cpu")
    for name in ("mps", "mps:0"):
        with pytest.raises(UsageError, match=r"noise in float64.*expected one of auto, cpu$"):
            resolve_device(name)


def test_dtypes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, other = torch.device("cpu"), torch.device("xpu")
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    assert {name: resolve_dtype(name, cpu) for name in named} == named
    for capable, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda capable=capable: capable)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_dtype("auto", cpu) == expected
        assert resolve_dtype("auto", other) == torch.float32
