"""transformers' own generate with the drafter's folder as ``custom_generate``: texts equal to plain generation."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from transformers.generation import GenerateDecoderOnlyOutput

from recurrent_drafting import custom_generate
from recurrent_drafting.decoding import SpeculativeDecoder
from recurrent_drafting.errors import ModelError, UsageError
from tests.text_models import make_tokenizer, save_drafter

PROMPT = torch.tensor([[0, 44, 50, 61, 77]])
PAD = 3


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the copies of scripts that transformers imports out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])


@pytest.fixture(scope="module")
def folder(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter as it is uploaded."""
    folder = save_drafter(tmp_path_factory.mktemp("drafter") / "drafter", base)
    script = folder / custom_generate.PATH
    script.parent.mkdir()
    script.write_text(custom_generate.SCRIPT)
    return folder


@pytest.fixture
def model(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[SpeculativeDecoder]:
    """Record the decoders that a test builds."""
    built: list[SpeculativeDecoder] = []
    create = SpeculativeDecoder.__init__

    def recorded(self: SpeculativeDecoder, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        built.append(self)

    monkeypatch.setattr(SpeculativeDecoder, "__init__", recorded)
    return built


def both(model: Any, folder: Path, ids: torch.Tensor = PROMPT, **arguments: Any) -> tuple[Any, Any]:
    """Generate plainly and with the drafter."""
    plain = model.generate(ids, **arguments)
    return plain, model.generate(ids, custom_generate=str(folder), trust_remote_code=True, **arguments)


def plain_tokens(model: Any, count: int) -> list[int]:
    tokens: list[int] = model.generate(PROMPT, max_new_tokens=count, eos_token_id=None)[0, PROMPT.shape[1] :].tolist()
    return tokens


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 24},
        {"max_length": 19},
        {},
        {"max_new_tokens": 24, "repetition_penalty": 1.7},
        {"max_new_tokens": 24, "do_sample": False, "temperature": 0.3, "top_p": 0.2},
        {"max_new_tokens": 12, "use_cache": False},
    ],
)
def test_greedy_text_is_that_of_plain_generation(
    model: Any, folder: Path, decoders: list[SpeculativeDecoder], arguments: dict[str, Any]
) -> None:
    plain, ours = both(model, folder, **arguments)
    assert ours.equal(plain) and ours.dtype == plain.dtype
    assert len(decoders) == 1 and decoders[0].drafter.config.verifier_name_or_path == model.name_or_path


@pytest.mark.filterwarnings("ignore:.*right-padding")
def test_a_padded_batch_and_rows_that_end_early(model: Any, folder: Path) -> None:
    first, second = plain_tokens(model, 9)[3:9:5]
    ids = torch.cat([torch.tensor([[PAD, PAD, 0, 44, 50]]), PROMPT])
    mask = ids != PAD
    plain, ours = both(
        model, folder, ids, attention_mask=mask, max_new_tokens=30, eos_token_id=[first, second], pad_token_id=PAD
    )
    assert ours.equal(plain)
    # The test means nothing unless a row ended by one of the ids and was filled up.
    assert bool((plain[:, ids.shape[1] :] == PAD).any())


@pytest.mark.parametrize("where", ["model", "argument"])
def test_the_generation_config_is_honoured(model: Any, folder: Path, where: str) -> None:
    tokens = plain_tokens(model, 20)
    settings = {
        "max_new_tokens": 20,
        "eos_token_id": [tokens[9], 1],
        "pad_token_id": PAD,
        "bad_words_ids": [[tokens[4]], tokens[6:8]],
        "min_new_tokens": 6,
    }
    if where == "model":
        model.generation_config = GenerationConfig(**settings)
        plain, ours = both(model, folder)
    else:
        plain, ours = both(model, folder, generation_config=GenerationConfig(**settings))
    assert ours.equal(plain)
    assert plain[0, PROMPT.shape[1] :].tolist() != tokens


def test_sampling_follows_the_global_seed_and_the_settings(model: Any, folder: Path) -> None:
    def draw(seed: int, **settings: Any) -> list[int]:
        torch.manual_seed(seed)
        arguments = {"custom_generate": str(folder), "trust_remote_code": True, "max_new_tokens": 12, **settings}
        tokens: list[int] = model.generate(PROMPT, do_sample=True, **arguments)[0].tolist()
        return tokens

    assert draw(1) == draw(1) != draw(2)
    greedy = model.generate(PROMPT, max_new_tokens=12)[0].tolist()
    assert draw(1) != greedy
    # Settings that leave one token make sampling greedy, whatever the noise.
    assert draw(1, top_k=1) == draw(1, top_p=1e-6) == draw(1, min_p=1.0) == draw(1, temperature=1e-6) == greedy


def test_the_result_can_be_an_object(model: Any, folder: Path) -> None:
    plain, ours = both(model, folder, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(ours, GenerateDecoderOnlyOutput) and ours.sequences.equal(plain.sequences)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_text_streamer_shows_the_same_text(model: Any, folder: Path, skip_prompt: bool) -> None:
    def shown(**arguments: Any) -> str:
        sink = io.StringIO()
        with redirect_stdout(sink):
            streamer = TextStreamer(make_tokenizer(), skip_prompt=skip_prompt)
            model.generate(PROMPT, max_new_tokens=24, streamer=streamer, **arguments)
        return sink.getvalue()

    text = shown(custom_generate=str(folder), trust_remote_code=True)
    assert text == shown() and len(text) > 10


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"no_repeat_ngram_size": 2, "stop_strings": ["a"]}, "no_repeat_ngram_size=2"),
        ({"stop_strings": ["a"]}, "stop_strings=['a']"),
        ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "prefix_allowed_tokens_fn"),
        ({"inputs_embeds": torch.ones(1, 2, 32)}, "inputs_embeds"),
        ({"output_scores": True}, "output_scores=True"),
        ({"max_length": 5}, "max_length 5 leaves no room after 5 prompt tokens"),
        ({"pad_token_id": 44}, "input_ids hold the pad token 44"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample needs a temperature > 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:`temperature`")
def test_what_cannot_be_honoured_is_refused_by_name(
    model: Any, folder: Path, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        model.generate(PROMPT, custom_generate=str(folder), trust_remote_code=True, **arguments)
    assert named in str(caught.value)


def test_the_code_of_a_folder_does_not_run_untrusted(model: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(PROMPT, custom_generate=str(folder), trust_remote_code=False)


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(folder, tmp_path / "other")


def test_a_drafter_that_does_not_fit_is_refused(model: Any, base: str, folder: Path, tmp_path: Path) -> None:
    small = save_drafter(tmp_path / "small", base, hidden_size=16)
    with pytest.raises(ModelError, match="expected hidden_size 32, the drafter has 16"):
        custom_generate.generate(model, inputs=PROMPT, speculator_path=str(small))
    with pytest.raises(UsageError, match="which drafter is not known"):
        custom_generate.generate(model, inputs=PROMPT)


def test_a_drafter_saved_anew_is_loaded_anew(model: Any, base: str, other: Path) -> None:
    arguments: dict[str, Any] = {"inputs": PROMPT, "speculator_path": str(other), "max_new_tokens": 2}
    custom_generate.generate(model, **arguments)
    custom_generate.generate(model, max_tree_nodes=3, **arguments)
    (other / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        custom_generate.generate(model, **arguments)
