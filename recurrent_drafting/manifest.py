"""Directories that are complete or not there: temporary names, sync, rename, and a manifest that proves it.

``manifest.json`` lists every file of the directory with size and SHA-256. It is a promise about the
whole: a file that is missing, cut or changed breaks it, and the directory counts as torn.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from recurrent_drafting.errors import DISK_FULL, ModelError, ResourceError, first_line

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
PARTIAL = ".partial"
_OWN = "manifest_sha256"
_MOST_JSON_BYTES = 64 * 1024 * 1024


@contextmanager
def whole(directory: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """Give a temporary directory that takes the place of ``directory`` when the block ends.

    Args:
        directory: final name; what is there already is replaced as a whole.
        record: goes into the manifest beside the files.

    Raises:
        ResourceError: the disk is full; nothing new is left, what was there stays.
    """
    with _partial(partial_path(directory), directory) as partial:
        yield partial
        _seal(partial, record)
        remove(directory)
        partial.rename(directory)
        _sync(directory.parent)


@contextmanager
def files_of(directory: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """Give a temporary directory whose files move into ``directory`` when the block ends.

    A directory that is new appears as a whole. In one that holds other things the files are
    replaced one by one, the manifest first: stopped in between, it does not match, and nothing
    loads that is half old and half new.

    Args:
        directory: where the files go; it may hold others, which stay.
        record: goes into the manifest beside the files.

    Raises:
        ResourceError: the disk is full; what was there stays.
    """
    if not directory.exists():
        with whole(directory, record) as partial:
            yield partial
        return
    with _partial(directory / PARTIAL / "files", directory) as partial:
        yield partial
        _seal(partial, record)
        for path in sorted(partial.iterdir(), key=lambda path: (path.name != MANIFEST, path.name)):
            path.replace(directory / path.name)
        _sync(directory)


def partial_path(directory: Path) -> Path:
    """Return where ``whole`` collects a directory until it is complete."""
    return directory.parent / PARTIAL / directory.name


def remove(directory: Path) -> None:
    """Delete a directory; it loses its name first, so that no half of it ever bears it."""
    if directory.exists():
        doomed = directory.parent / PARTIAL / f"old-{directory.name}"
        doomed.parent.mkdir(exist_ok=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)
        _tidy(doomed.parent)


def remove_partial(directory: Path) -> None:
    """Delete what a run that was killed left unfinished in a directory."""
    if (directory / PARTIAL).exists():
        shutil.rmtree(directory / PARTIAL)


def read(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory, after comparing every file with it.

    Raises:
        ModelError: no manifest, or a file that is not what it says; names file, expected and found.
    """
    path = directory / MANIFEST
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: expected a manifest, found none that can be read ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ModelError(f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; update the package")
    if (found := _digest(manifest)) != manifest.get(_OWN):
        raise ModelError(f"{path}: expected SHA-256 {manifest.get(_OWN)}, found {found}; the manifest is damaged")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ModelError(f"{path}: expected files with size and SHA-256, found {type(files).__name__}; save it again")
    for name, entry in files.items():
        if not is_plain(name):
            raise ModelError(f"{path}: expected file names of its own directory, found {name!r}")
        _compare(directory / name, entry)
    checked: dict[str, Any] = manifest
    return checked


def is_plain(name: str) -> bool:
    """Tell whether a name is that of a file of a directory itself, on any system."""
    return re.fullmatch(r"(?!\.+$)[\w. -]{1,200}", name, re.ASCII) is not None


def read_json(path: Path) -> Any:
    """Read a JSON file of settings: a regular file of ordinary size, whose values are not nested without end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none.
    """
    if path.exists() and not path.is_file():
        raise ValueError("expected a regular file")
    if (size := path.stat().st_size) > _MOST_JSON_BYTES:
        raise ValueError(f"expected at most {_MOST_JSON_BYTES} bytes, found {size}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("expected flat JSON, found values nested too deeply") from error


def differences(found: Mapping[str, Any], now: Mapping[str, Any], *, known_only: bool = False) -> list[str]:
    """Return what differs between the record of a run and that of another, one text for each value.

    Args:
        found: the record on disk.
        now: of the run that wants to go on.
        known_only: pass over what ``found`` says nothing of, as the record of an older version does.
    """
    compared = {name: value for name, value in now.items() if name in found} if known_only else now
    before, after = dict(_flat(found)), dict(_flat(compared))
    names = dict.fromkeys([*before, *after])
    return [
        f"{name} {before.get(name)!r}, now {after.get(name)!r}" for name in names if before.get(name) != after.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's own content."""
    content = {name: value for name, value in manifest.items() if name != _OWN}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compare(path: Path, entry: dict[str, Any]) -> None:
    """Compare a file with its entry; the size first, which costs nothing."""
    if not path.is_file():
        raise ModelError(f"{path}: expected {entry.get('size')} bytes, found no file; the directory is torn")
    if (size := path.stat().st_size) != entry.get("size"):
        raise ModelError(f"{path}: expected {entry.get('size')} bytes, found {size}; the file is cut or changed")
    if (found := sha256(path)) != entry.get("sha256"):
        raise ModelError(f"{path}: expected SHA-256 {entry.get('sha256')}, found {found}; the file is damaged")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _partial(partial: Path, final: Path) -> Iterator[Path]:
    """Make an empty directory; it is gone afterwards, whatever happened."""
    try:
        with space_for(final):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial)
        _tidy(partial.parent)


@contextmanager
def space_for(path: Path) -> Iterator[None]:
    """Say in one line that a write failed for want of space; other errors stay what they are.

    Args:
        path: final name of what is written under another; the caller removes that one.

    Raises:
        ResourceError: the disk is full, or a quota or a limit of the process is reached.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise ResourceError(
            f"{path} was not written, the disk is full or at its limit: {first_line(error)} "
            f"({shutil.disk_usage(path.parent).free} bytes free); nothing of it was kept, free space and run again"
        ) from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears when it is complete.

    Args:
        tensors: by name, contiguous.
        path: the file; what is there already is replaced. Its directory exists.
        metadata: stored in its header.

    Raises:
        ResourceError: the disk is full; what was there stays.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with space_for(path):
            save_file(dict(tensors), temporary, dict(metadata))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(content: str, path: Path) -> None:
    """Write a text file that appears when it is complete; its directory is made.

    Args:
        content: in UTF-8.
        path: the file; what is there already is replaced.

    Raises:
        OSError: it cannot be written; what was there stays, and nothing is left beside it.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # it may not be there
            temporary.unlink()
        raise


def _tidy(directory: Path) -> None:
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()


def _is_full(error: Exception) -> bool:
    """Tell whether a write failed for want of space; torch and safetensors have no error class for it."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    text = str(error)
    return (
        "inline_container" in text or "PytorchStreamWriter" in text or any(code in text for code in DISK_FULL.values())
    )


def _seal(partial: Path, record: Mapping[str, Any]) -> None:
    """Write the manifest of what is in a directory and bring all of it to the disk."""
    paths = sorted(partial.iterdir())
    (partial / MANIFEST).write_text(text(paths, record), encoding="utf-8")
    for path in (*paths, partial / MANIFEST, partial):
        _sync(path)


def text(paths: Sequence[Path], record: Mapping[str, Any]) -> str:
    """Return the manifest of some files of one directory, as it is written.

    Args:
        paths: the files.
        record: what it says beside them.
    """
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    manifest = {"format_version": FORMAT_VERSION, **record, "files": files}
    manifest[_OWN] = _digest(manifest)
    return json.dumps(manifest, indent=2) + "\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
