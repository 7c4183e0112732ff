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

from recurrent_drafting import Drafter, RecurrentDraftingConfig, manifest
from recurrent_drafting.checkpoint import config_fingerprints, is_drafter, load_drafter, save_drafter
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


def index_beside(folder: Path) -> None:
    """Leave the weights in place: the index must not even be looked into."""
    index = {"metadata": {}, "weight_map": {"head.weight": "/etc/hostname"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def link_outside(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"outside-{name}")
        (folder / name).symlink_to(Path("..") / f"outside-{name}")

    return damage


def index_is_a_link(folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").symlink_to("/no/such/index")


def declare_huge_header(folder: Path) -> None:
    """Promise a header of 2^60 bytes."""
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


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
        (index_outside, f"{WEIGHTS}.index.json: expected one {WEIGHTS}, found an index of shards"),
        (index_beside, f"{WEIGHTS}.index.json: expected one {WEIGHTS}, found an index of shards"),
        (index_is_a_link, f"{WEIGHTS}.index.json: expected one {WEIGHTS}, found an index of shards"),
        (link_outside(WEIGHTS), f"{WEIGHTS}: expected a file of its own directory, found a link to"),
        (link_outside(CONFIG), f"{CONFIG}: expected a file of its own directory, found a link to"),
        (lambda folder: cut_weights(folder, 0.9), WEIGHTS),
        (lambda folder: cut_weights(folder, 0.1), WEIGHTS),
        (lambda folder: cut_weights(folder, 0.0), WEIGHTS),
        (flip_header, WEIGHTS),
        (declare_huge, WEIGHTS),
        (declare_huge_header, WEIGHTS),
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


def test_saving_writes_a_manifest_that_loading_checks(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = Drafter(RecurrentDraftingConfig(**SIZES, verifier_fingerprint="a1", tokenizer_fingerprint="b2"))
    second = Drafter(RecurrentDraftingConfig(**{**SIZES, "num_draft_layers": 2}))
    for drafter in (first, second):  # the second replaces the first
        save_drafter(drafter, tmp_path / "drafter", {"data": "d4"})
        assert sorted(path.name for path in (tmp_path / "drafter").iterdir()) == [CONFIG, "manifest.json", WEIGHTS]
        loaded, before = load_drafter(str(tmp_path / "drafter")).state_dict(), drafter.state_dict()
        assert before.keys() == loaded.keys() and all(before[name].equal(loaded[name]) for name in before)
        found = manifest.read(tmp_path / "drafter")["fingerprints"]
        assert (found["verifier"], found["tokenizer"]) == (
            drafter.config.verifier_fingerprint,
            drafter.config.tokenizer_fingerprint,
        )
        assert found["data"] == "d4" and len(found["configuration"]) == 64
    assert config_fingerprints(first.config)["configuration"] != found["configuration"]
    assert config_fingerprints(second.config)["configuration"] == found["configuration"]


def flip_one_weight(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_one_weight, f"{WEIGHTS}: expected SHA-256 [0-9a-f]+, found [0-9a-f]+"),
        (lambda folder: cut_weights(folder, 0.9), rf"{WEIGHTS}: expected \d+ bytes, found \d+"),
        (lambda folder: edit_config(folder, beam_width=3), rf"{CONFIG}: expected \d+ bytes, found \d+"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: expected a manifest"),
        (link_outside("manifest.json"), "manifest.json: expected a file of its own directory"),
    ],
)
def test_what_the_manifest_does_not_say_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    folder = tmp_path / "drafter"
    save_drafter(Drafter(RecurrentDraftingConfig(**SIZES)), folder)
    damage(folder)
    with pytest.raises(ModelError, match=named) as caught:
        load_drafter(str(folder))
    assert str(folder) in str(caught.value)


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(saved: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(saved / name, blobs / f"{name}-hash")
        (snapshot / name).symlink_to(Path("../../blobs") / f"{name}-hash")
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert load_drafter(str(path)).head.weight.equal(load_drafter(str(saved)).head.weight)


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
