"""Checkpoints made to do harm: each entry damages a sound copy, and says what the refusal must name."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recurrent_drafting import manifest
from recurrent_drafting.checkpoint import load_drafter, save_drafter

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
Damage = Callable[[Path], object]
# Code of a checkpoint leaves this file in the current directory if it is ever run.
RAN = "the-checkpoint-ran"


class Payload:
    """What a pickle can do: run a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {RAN}",)


def pickled(name: str, *, keep: bool = False) -> Damage:
    def damage(folder: Path) -> None:
        if not keep:
            (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Payload()))

    return damage


def torch_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"head.weight": Payload()}, folder / "pytorch_model.bin")


def pickle_index(folder: Path) -> None:
    """Let an index of pickles stand where safetensors are missing."""
    pickled("pytorch_model-00001-of-00001.bin")(folder)
    index = {"metadata": {}, "weight_map": {"head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def index(shard: str) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))

    return damage


def index_absolute(folder: Path) -> None:
    index(str(folder.parent / "outside.safetensors"))(folder)


def index_to_a_link(folder: Path) -> None:
    index("shard.safetensors")(folder)
    (folder / "shard.safetensors").symlink_to(Path("..") / "outside.safetensors")


def index_to_a_pickle(folder: Path) -> None:
    index("shard.bin")(folder)
    pickled("shard.bin", keep=True)(folder)


def content(name: str, raw: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(raw)


def link(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"outside-{name}")
        (folder / name).symlink_to(Path("..") / f"outside-{name}")

    return damage


def endless(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return damage


def fifo(name: str) -> Damage:
    """Put a pipe without a writer in the place of a file: opening it would wait for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def directory(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def sparse(name: str, size: int) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return damage


def header(record: Any, length: int | None = None, body: bytes = b"") -> Damage:
    raw = record if isinstance(record, bytes) else json.dumps(record).encode()
    return content(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw + body)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"head.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


def cut(keep: float) -> Damage:
    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(raw[: int(len(raw) * keep)])

    return damage


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def own_code(folder: Path) -> None:
    """Name a class of the checkpoint's own for a family that nobody knows."""
    source = f"open({RAN!r}, 'w').close()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(source)
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
    config(model_type="unheard_of", auto_map=classes)(folder)


def sealed(change: Damage) -> Damage:
    """Damage a drafter that was saved with a manifest."""

    def damage(folder: Path) -> None:
        save_drafter(load_drafter(str(folder)), folder)
        change(folder)

    return damage


def manifested(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Forge a manifest, its own checksum included."""

    def forge(folder: Path) -> None:
        path = folder / manifest.MANIFEST
        record = json.loads(path.read_text())
        change(record)
        record["manifest_sha256"] = manifest._digest(record)
        path.write_text(json.dumps(record))

    return sealed(forge)


def flip(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-3] ^= 0x10
    (folder / WEIGHTS).write_bytes(bytes(raw))


DEEP = b"[" * 100_000
# Both kinds of checkpoint: what is wrong, and a word of the refusal.
COMMON: dict[str, tuple[Damage, str]] = {
    "pickle .bin": (pickled("pytorch_model.bin"), "may run code when loaded; convert with"),
    "pickle .pt": (pickled("model.pt"), "may run code when loaded; convert with"),
    "pickle of torch": (torch_pickle, "may run code when loaded; convert with"),
    "pickles by an index": (pickle_index, "may run code when loaded; convert with"),
    "a pickle called safetensors": (pickled(WEIGHTS, keep=True), WEIGHTS),
    "index upwards": (index("../outside.safetensors"), INDEX),
    "index absolute": (index_absolute, INDEX),
    "index to a link": (index_to_a_link, ""),
    "index to a pickle": (index_to_a_pickle, INDEX),
    "index to nothing": (index("gone.safetensors"), ""),
    "index that is a link": (lambda folder: (folder / INDEX).symlink_to("/dev/zero"), INDEX),
    "index without end": (content(INDEX, DEEP), INDEX),
    "index of a gigabyte": (sparse(INDEX, 2**30), INDEX),
    "weights that are a link": (link(WEIGHTS), "found a link to"),
    "config that is a link": (link(CONFIG), "found a link to"),
    "weights without end": (endless(WEIGHTS), "found a link to"),
    "config without end": (endless(CONFIG), ""),
    "weights that are a pipe": (fifo(WEIGHTS), WEIGHTS),
    "config that is a pipe": (fifo(CONFIG), CONFIG),
    "weights that are a directory": (directory(WEIGHTS), WEIGHTS),
    "config that is a directory": (directory(CONFIG), CONFIG),
    "header of an exabyte": (header(b"{}", length=1 << 60), WEIGHTS),
    "header longer than the file": (header(b"{}", length=1000), WEIGHTS),
    "header of a negative length": (header(b"{}", length=(1 << 64) - 1), WEIGHTS),
    "header that is no JSON": (header(b"\xff\xfe{"), WEIGHTS),
    "header nested deeply": (header(b'{"a":' + DEEP), WEIGHTS),
    "tensors of terabytes": (header(tensor(shape=[1 << 40], data_offsets=[0, 1 << 42])), WEIGHTS),
    "shape whose product overflows": (header(tensor(shape=[1 << 40, 1 << 40]), body=b"0" * 16), WEIGHTS),
    "offsets backwards": (header(tensor(data_offsets=[16, 0]), body=b"0" * 16), WEIGHTS),
    "offsets outside": (header(tensor(data_offsets=[1000, 1016]), body=b"0" * 16), WEIGHTS),
    "offsets that overlap": (header({**tensor(), "x": tensor()["head.weight"]}, body=b"0" * 16), WEIGHTS),
    "a negative shape": (header(tensor(shape=[-4]), body=b"0" * 16), WEIGHTS),
    "an unknown dtype": (header(tensor(dtype="X7"), body=b"0" * 16), WEIGHTS),
    "cut weights": (cut(0.7), WEIGHTS),
    "hardly any weights": (cut(0.05), WEIGHTS),
    "no weights at all": (cut(0.0), WEIGHTS),
    "config nested deeply": (content(CONFIG, DEEP), ""),
    "config of a gigabyte": (sparse(CONFIG, 2**30), ""),
    "config that is a list": (content(CONFIG, b"[1]"), ""),
    "config that is no text": (content(CONFIG, b"\xff\xfe"), ""),
    "a huge vocabulary": (config(vocab_size=1 << 40), ""),
    "own code": (own_code, ""),
}
DRAFTERS: dict[str, tuple[Damage, str]] = {
    **COMMON,
    "a billion layers": (config(num_draft_layers=10**9), "declares 1000000000 layers"),
    "sizes of another kind": (config(hidden_size="many"), "hidden_size"),
    "a size below zero": (config(hidden_size=-1), "hidden_size"),
    "NaN": (weights(lambda found: found["head.weight"].view(-1)[7].fill_(float("nan"))), "head.weight hold NaN"),
    "infinity": (weights(lambda found: found["rnn_u.bias"].view(-1)[0].fill_(float("inf"))), "rnn_u.bias hold NaN"),
    "a missing key": (weights(lambda found: found.pop("rnn_w.weight")), "missing keys in model.safetensors: rnn_w"),
    "an extra key": (weights(lambda found: found.update(evil=torch.ones(1))), "unexpected keys in model.safetensors"),
    "tokens outside": (weights(lambda found: found["draft_token_ids"][-1:].fill_(10**6)), "draft_token_ids"),
    "a bit of the weights": (sealed(flip), "expected SHA-256"),
    "another config": (sealed(config(beam_width=3)), CONFIG),
    "a cut manifest": (sealed(lambda folder: os.truncate(folder / manifest.MANIFEST, 40)), manifest.MANIFEST),
    "a manifest nested deeply": (sealed(content(manifest.MANIFEST, DEEP)), manifest.MANIFEST),
    "a manifest that leads out": (
        manifested(lambda record: record["files"].update({"../x": {"size": 1, "sha256": "0"}})),
        "expected file names of its own directory",
    ),
    "a manifest of endless names": (
        manifested(lambda record: record["files"].update({"x" * 5000: {"size": 1, "sha256": "0"}})),
        "expected file names of its own directory",
    ),
    "a manifest of lists": (manifested(lambda record: record.update(files=[1])), "expected files with size"),
    "a manifest without files": (manifested(lambda record: record.pop("files")), "expected files with size"),
    "a manifest of the future": (manifested(lambda record: record.update(format_version=99)), "format_version"),
}
BASES: dict[str, tuple[Damage, str]] = {
    **COMMON,
    "a billion layers": (config(num_hidden_layers=10**9), "declares 1000000000 layers"),
    "NaN": (
        weights(lambda found: found["model.embed_tokens.weight"][200].fill_(float("nan"))),
        "model.embed_tokens.weight hold NaN or infinity",
    ),
    "infinity": (weights(lambda found: found["lm_head.weight"].view(-1)[0].fill_(float("inf"))), "hold NaN"),
    "a missing key": (weights(lambda found: found.pop("lm_head.weight")), "lm_head.weight"),
    "sizes of another kind": (config(hidden_size="many"), ""),
    "a record that is none": (lambda folder: (folder / "asset.json").write_text("[]"), "asset.json"),
}
