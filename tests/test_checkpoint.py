"""Saving and loading drafters: the round trip, and every way a directory can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from recurrent_drafting import Drafter, RecurrentDraftingConfig
from recurrent_drafting.checkpoint import is_drafter, load_drafter
from recurrent_drafting.errors import ModelError, NetworkError

SIZES: dict[str, Any] = {"hidden_size": 8, "vocab_size": 20, "num_draft_layers": 1}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "drafter"
    torch.manual_seed(0)
    Drafter(RecurrentDraftingConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "drafter")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_HUB_OFFLINE=1 does at start-up."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def cut_weights(folder: Path, keep: float) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: int(len(raw) * keep)])


def flip_header(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[8] ^= 0xFF
    (folder / WEIGHTS).write_bytes(bytes(raw))


def declare_huge(folder: Path) -> None:
    """Write a header of a few bytes that promises tensors of 4 TB."""
    size = 1 << 42
    header = {"head.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    raw = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw)


def pickle_only(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def index_outside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    index = {"metadata": {}, "weight_map": {"head.weight": f"../{WEIGHTS}"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def fill(name: str, value: float) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"draft_vocab_size": 5, "rnn": False}, {"exit_dim": 16, "beam_width": 3}])
def test_a_saved_drafter_loads_to_the_same_bits(tmp_path: Path, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    torch.manual_seed(1)
    drafter = Drafter(RecurrentDraftingConfig(**SIZES, verifier_name_or_path="base", **overrides)).to(dtype)
    if "draft_vocab_size" in overrides:
        drafter.draft_token_ids.copy_(torch.tensor([1, 4, 9, 13, 19]))
    drafter.save_pretrained(tmp_path / "drafter")
    assert is_drafter(tmp_path / "drafter")
    loaded = load_drafter(str(tmp_path / "drafter"))
    before, after = drafter.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].equal(after[name]) for name in before)
    for name in ("exit_dim", "rnn", "draft_vocab_size", "beam_width", "beam_length", "verifier_name_or_path"):
        assert getattr(loaded.config, name) == getattr(drafter.config, name)
    context, embeddings = torch.randn(3, 8, dtype=dtype), torch.randn(3, 4, 8, dtype=dtype)
    assert loaded.unroll(context, embeddings).equal(drafter.unroll(context, embeddings))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / CONFIG).unlink(), CONFIG),
        (lambda folder: (folder / CONFIG).write_text('{"model_type": '), CONFIG),
        (lambda folder: (folder / CONFIG).write_text("[1, 2]"), CONFIG),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), CONFIG),
        (lambda folder: edit_config(folder, model_type="llama"), "model_type 'recurrent_drafting_drafter'"),
        (lambda folder: edit_config(folder, hidden_size="many"), "hidden_size must be an integer >= 1, got 'many'"),
        (lambda folder: edit_config(folder, draft_vocab_size=21), "draft_vocab_size must be in 1..vocab_size (20)"),
        (lambda folder: edit_config(folder, hidden_size=16, exit_dim=16), "rnn_w.weight"),
        (lambda folder: edit_config(folder, vocab_size=1 << 40), "head.weight"),
        (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
        (pickle_only, f"{WEIGHTS}: found pytorch_model.bin, which may run code when loaded; convert with"),
        (index_outside, WEIGHTS),
        (lambda folder: cut_weights(folder, 0.9), WEIGHTS),
        (lambda folder: cut_weights(folder, 0.1), WEIGHTS),
        (lambda folder: cut_weights(folder, 0.0), WEIGHTS),
        (flip_header, WEIGHTS),
        (declare_huge, WEIGHTS),
        (lambda folder: edit_weights(folder, lambda tensors: tensors.pop("head.weight")), f"{WEIGHTS}: head.weight"),
        (
            lambda folder: edit_weights(folder, lambda tensors: tensors.update(surplus=torch.ones(2))),
            f"unexpected keys in {WEIGHTS}: surplus",
        ),
        (fill("rnn_u.weight", float("nan")), "rnn_u.weight hold NaN or infinity"),
        (fill("head.weight", float("-inf")), "head.weight hold NaN or infinity"),
        (fill("draft_token_ids", 20), "draft_token_ids"),
        (fill("draft_token_ids", 0), "draft_token_ids"),
    ],
)
def test_a_damaged_directory_is_refused_by_name(folder: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_drafter(str(folder))
    message = str(caught.value)
    assert str(folder) in message and named in message


def test_a_file_is_no_drafter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not is_drafter(tmp_path / "file")
    with pytest.raises(ModelError, match="file is no drafter"):
        load_drafter(str(tmp_path / "file"))


def test_code_that_a_config_names_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    load_drafter(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["nobody/no-such-drafter", "no-such-drafter", "./no/such/place"])
def test_a_name_that_is_nowhere_is_a_network_error(name: str) -> None:
    with pytest.raises(NetworkError, match=r"is no local path and the hub did not give it: .*check the name") as caught:
        load_drafter(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
