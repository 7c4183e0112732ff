"""The layout of the speculators library: the round trip, what its tables say, and what is refused.

With that library installed, its own classes read the export too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recurrent_drafting import Drafter, RecurrentDraftingConfig, formats
from recurrent_drafting.checkpoint import config_fields, load_drafter
from recurrent_drafting.errors import ModelError
from tests.test_formats import make

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHAPES: list[dict[str, Any]] = [
    {},
    {"draft_vocab_size": 30},
    {"rnn": False, "emb_norm": True},
    {"exit_dim": 16, "num_draft_layers": 0, "draft_vocab_size": 7},
]


def drafter_of(**overrides: Any) -> Drafter:
    drafter = make(**overrides, beam_width=7, beam_length=3, verifier_name_or_path="base", verifier_fingerprint="abc")
    size, vocab_size = len(drafter.draft_token_ids), drafter.config.vocab_size
    drafter.draft_token_ids.copy_(torch.randperm(vocab_size)[:size].sort().values)
    return drafter


def run(*argv: str) -> int:
    return formats.main([argv[0], "--format", "speculators", *argv[1:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", SHAPES)
def test_out_and_in_again_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    drafter = drafter_of(**overrides).to(dtype)
    drafter.save_pretrained(tmp_path / "ours")
    assert run("export", str(tmp_path / "ours"), str(tmp_path / "theirs")) == 0
    assert run("import", str(tmp_path / "theirs"), str(tmp_path / "back")) == 0
    before, after = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].equal(after[name]) for name in before)
    assert config_fields(load_drafter(str(tmp_path / "back")).config) == config_fields(drafter.config)
    assert run("export", str(tmp_path / "back"), str(tmp_path / "again")) == 0
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_the_files_are_what_the_format_says(tmp_path: Path) -> None:
    drafter = drafter_of(draft_vocab_size=30)
    formats.export_speculators(drafter, tmp_path / "out")
    record = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert record["speculators_model_type"] == "recurrent_drafting"
    assert record["speculators_version"] == "0.9.0"
    assert record["speculators_config"] == {
        "algorithm": "recurrent_drafting",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        ],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": "base", "architectures": []},
    }
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    offsets, mask = tensors["d2t"], tensors["t2d"]
    assert (offsets.dtype, mask.dtype, mask.shape) == (torch.int64, torch.bool, (90,))
    assert [draft + int(offsets[draft]) for draft in range(30)] == drafter.draft_token_ids.tolist()
    assert mask.nonzero().flatten().equal(drafter.draft_token_ids)
    assert tensors["lm_head.weight"].equal(drafter.head.weight)


def test_all_tokens_need_no_tables_and_a_local_base_gives_its_architectures(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / CONFIG).write_text('{"architectures": ["LlamaForCausalLM"]}')
    formats.export_speculators(make(verifier_name_or_path=str(base)), tmp_path / "out")
    assert not {"d2t", "t2d"} & load_file(tmp_path / "out" / WEIGHTS).keys()
    record = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert record["draft_vocab_size"] == 90
    assert record["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / CONFIG).read_text())
    change(record)
    (folder / CONFIG).write_text(json.dumps(record))


def loosen(record: dict[str, Any]) -> None:
    record["speculators_config"]["proposal_methods"][0]["verifier_accept_k"] = 5


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "expected a drafter's config there, got No such file"),
        (lambda folder: (folder / CONFIG).write_text("{"), "does not read as JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "expected the speculators library's weights"),
        (
            lambda folder: configure(folder, lambda record: record.update(speculators_model_type="eagle3")),
            "expected speculators_model_type 'recurrent_drafting' and a speculators_config, got 'eagle3'",
        ),
        (lambda folder: configure(folder, loosen), "accepts tokens that the verifier would not pick"),
        (lambda folder: configure(folder, lambda record: record.pop("rnn")), "missing rnn"),
        (lambda folder: configure(folder, lambda record: record.update(exit_dim=0)), "exit_dim must be"),
        (lambda folder: edit(folder, lambda tensors: tensors.pop("t2d")), "expected both of d2t and t2d"),
        (lambda folder: edit(folder, lambda tensors: tensors["d2t"].add_(1)), "do not name the same 30 of 90 tokens"),
        (lambda folder: edit(folder, lambda tensors: tensors["t2d"].fill_(True)), "do not name the same 30 of 90"),
        (
            lambda folder: configure(folder, lambda record: record.update(draft_vocab_size=90)),
            "expected neither of d2t and t2d with draft_vocab_size 90 of 90, got d2t, t2d",
        ),
        (lambda folder: edit(folder, lambda tensors: tensors.pop("rnn_u.bias")), "missing ['rnn_u.bias']"),
        (
            lambda folder: edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(30, 3)})),
            "expected lm_head.weight of shape [30, 12] by config.json, got [30, 3]",
        ),
        (
            lambda folder: edit(folder, lambda tensors: tensors["rnn_u.bias"].fill_(float("nan"))),
            "rnn_u.bias holds NaN",
        ),
    ],
)
def test_what_is_damaged_or_of_another_kind_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    formats.export_speculators(drafter_of(draft_vocab_size=30), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ModelError) as caught:
        formats.import_speculators(tmp_path / "out")
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("speculators") is None, reason="the speculators library is not installed")
@pytest.mark.parametrize("overrides", SHAPES)
def test_the_library_itself_loads_and_saves_it(tmp_path: Path, overrides: dict[str, Any]) -> None:
    import speculators

    from recurrent_drafting import speculators_registry

    drafter = drafter_of(**overrides)
    formats.export_speculators(drafter, tmp_path / "out")
    loaded = speculators.SpeculatorModel.from_pretrained(str(tmp_path / "out"))
    assert type(loaded) is speculators_registry.RecurrentDraftingSpeculator
    assert isinstance(loaded.config, speculators.SpeculatorModelConfig)
    assert loaded.config.speculators_config.algorithm == "recurrent_drafting"
    context, embeddings = torch.randn(4, 8), torch.randn(4, 3, 8)
    expected = drafter.head(drafter.unroll(context, embeddings))
    assert loaded(context, embeddings).equal(expected)
    loaded.save_pretrained(tmp_path / "saved")
    back = formats.import_speculators(tmp_path / "saved")
    assert config_fields(back.config) == config_fields(drafter.config)
    tensors, others = drafter.state_dict(), back.state_dict()
    assert all(tensors[name].equal(others[name]) for name in tensors.keys() | others.keys())


def test_the_settings_are_those_of_the_drafters_config() -> None:
    assert set(formats._SPECULATORS_KEYS) <= set(RecurrentDraftingConfig.__annotations__)
