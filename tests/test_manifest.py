"""Directories that are complete or not there, whatever ends the process that writes them."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recurrent_drafting import manifest
from recurrent_drafting.errors import ModelError, ResourceError
from recurrent_drafting.manifest import MANIFEST, PARTIAL

RECORD = {"fingerprints": {"data": "d4"}}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MANIFEST}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with manifest.whole(tmp_path / "folder", RECORD) as partial:
        write(partial, a="first", b="second")
    return tmp_path / "folder"


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    found = manifest.read(folder)
    assert found["format_version"] == 1 and found["fingerprints"] == {"data": "d4"}
    # The SHA-256 of "first" and "second", from sha256sum.
    assert found["files"] == {
        "a": {"size": 5, "sha256": "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"},
        "b": {"size": 6, "sha256": "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4"},
    }
    assert names(folder) == ["a", "b", MANIFEST]
    assert names(folder.parent) == ["folder"]


@pytest.mark.parametrize("way", [manifest.whole, manifest.files_of])
def test_nothing_has_its_final_name_before_the_end(tmp_path: Path, way: Callable[..., Any]) -> None:
    final = tmp_path / "new" / "folder"
    with way(final, RECORD) as partial:
        write(partial, a="first")
        assert not final.exists()
    assert contents(final) == {"a": "first"}


@pytest.mark.parametrize("way", [manifest.whole, manifest.files_of])
def test_an_error_leaves_what_was_there_and_nothing_else(folder: Path, way: Callable[..., Any]) -> None:
    before = manifest.read(folder)
    with pytest.raises(ZeroDivisionError), way(folder, RECORD) as partial:
        write(partial, a="other")
        raise ZeroDivisionError
    assert manifest.read(folder) == before
    assert names(folder.parent) == ["folder"] and PARTIAL not in names(folder)


def test_a_directory_is_replaced_as_a_whole_and_files_of_one_leave_the_others(folder: Path) -> None:
    with manifest.files_of(folder, RECORD) as partial:
        write(partial, a="newer")
    assert contents(folder) == {"a": "newer", "b": "second"}
    assert list(manifest.read(folder)["files"]) == ["a"]
    with manifest.whole(folder, RECORD) as partial:
        write(partial, c="third")
    assert contents(folder) == {"c": "third"} and names(folder.parent) == ["folder"]


@pytest.mark.parametrize("after", range(3))
def test_files_replaced_by_half_are_torn(folder: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after so many of the three renames."""
    done, replace = list[str](), Path.replace

    def limited(self: Path, target: Path) -> Path:
        if len(done) == after:
            raise Killed
        done.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", limited)
    with pytest.raises(Killed), manifest.files_of(folder, RECORD) as partial:
        write(partial, a="newer", b="newest")
    assert done == [MANIFEST, "a", "b"][:after]
    if after:
        with pytest.raises(ModelError, match=r"expected \d bytes|expected SHA-256"):
            manifest.read(folder)
    else:
        assert contents(folder) == {"a": "first", "b": "second"} and manifest.read(folder)


def test_a_directory_that_is_deleted_by_half_has_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        (path / "a").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(manifest.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            manifest.remove(folder)
    assert names(folder.parent) == [PARTIAL]
    manifest.remove_partial(folder.parent)
    assert names(folder.parent) == []


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: flip(folder / "a", 0), "/a: expected SHA-256 a7937b64b8ca.*, found [0-9a-f]{64}"),
        (lambda folder: (folder / "b").write_text("secon"), "/b: expected 6 bytes, found 5"),
        (lambda folder: (folder / "a").unlink(), "/a: expected 5 bytes, found no file"),
        (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST}: expected a manifest, found none"),
        (lambda folder: (folder / MANIFEST).write_text('{"files"'), f"{MANIFEST}: expected a manifest, found none"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), f"{MANIFEST}: expected a manifest, found none"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "expected format_version 1, found None"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=named):
        manifest.read(folder)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, honest: bool) -> None:
    """Change the manifest; an honest one has the digest of what it says."""
    path = folder / MANIFEST
    record = json.loads(path.read_text())
    change(record)
    if honest:
        record[manifest._OWN] = manifest._digest(record)
    path.write_text(json.dumps(record))


def test_a_text_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for content in ("first", "second \u00e4"):
        manifest.write_text(content, path)
        assert path.read_text(encoding="utf-8") == content
    path.with_name(f"b.txt{PARTIAL}").mkdir()
    with pytest.raises(OSError):
        manifest.write_text("third", path.with_name("b.txt"))
    with pytest.raises(OSError):
        manifest.write_text("third", path / "c.txt")
    assert sorted(item.name for item in path.parent.iterdir()) == ["a.txt", f"b.txt{PARTIAL}"]


def test_differences_name_every_value_of_nested_records() -> None:
    found = {"a": 1, "b": {"c": [1], "d": {}}, "gone": 2}
    now = {"a": 1, "b": {"c": [2], "d": {"e": 3}}, "new": 4}
    changed = ["b.c [1], now [2]", "b.d {}, now None", "gone 2, now None", "b.d.e None, now 3"]
    assert manifest.differences(found, now) == [*changed, "new None, now 4"]
    assert manifest.differences(found, now, known_only=True) == changed
    assert manifest.differences(found, dict(found)) == []


def test_a_manifest_that_was_changed_or_comes_from_the_future(folder: Path) -> None:
    edit(folder, lambda record: record.update(fingerprints={"data": "d5"}), honest=False)
    with pytest.raises(ModelError, match="the manifest is damaged"):
        manifest.read(folder)
    edit(folder, lambda record: record.update(format_version=2), honest=True)
    with pytest.raises(ModelError, match="expected format_version 1, found 2; update the package"):
        manifest.read(folder)


@pytest.mark.parametrize("name", ["../a", "/etc/hostname", "..", "sub/a"])
def test_a_manifest_names_files_of_its_own_directory(folder: Path, name: str) -> None:
    (folder.parent / "a").write_text("first")
    edit(folder, lambda record: record.update(files={name: record["files"]["a"]}), honest=True)
    with pytest.raises(ModelError, match="expected file names of its own directory"):
        manifest.read(folder)


@pytest.fixture
def little_space() -> Iterator[None]:
    """Let the system refuse to write on, as it does when the disk is full; a limit of the process needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("little_space")
@pytest.mark.parametrize("way", [manifest.whole, manifest.files_of])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"a": torch.zeros(1 << 16)}, path),
        lambda path: save_file({"a": torch.zeros(1 << 16)}, path),
        lambda path: path.write_text("a" * (1 << 18)),
    ],
    ids=["torch", "safetensors", "text"],
)
def test_a_disk_that_is_full_is_a_resource_error_and_nothing_is_left(
    folder: Path, way: Callable[..., Any], write: Callable[[Path], object]
) -> None:
    with pytest.raises(ResourceError) as caught, way(folder, RECORD) as partial:
        write(partial / "a")
    message = str(caught.value)
    assert message.startswith(f"{folder} was not written, the disk is full or at its limit: ") and "\n" not in message
    assert "bytes free); nothing of it was kept, free space and run again" in message
    assert contents(folder) == {"a": "first", "b": "second"} and manifest.read(folder)
    assert names(folder.parent) == ["folder"] and PARTIAL not in names(folder)


@pytest.mark.usefixtures("little_space")
def test_tensors_that_the_disk_has_no_room_for_leave_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    manifest.save_tensors({"a": torch.ones(3)}, path, {"of": "a test"})
    before = path.read_bytes()
    with pytest.raises(ResourceError, match=r"tensors\.safetensors was not written, the disk is full or at its limit"):
        manifest.save_tensors({"a": torch.zeros(1 << 16)}, path, {})
    assert path.read_bytes() == before and names(tmp_path) == [path.name]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), manifest.whole(tmp_path / "a", {}):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(RuntimeError, match="size mismatch"), manifest.whole(tmp_path / "a", {}):
        raise RuntimeError("size mismatch")
    with pytest.raises(ResourceError), manifest.whole(tmp_path / "a", {}):
        raise OSError(28, "No space left on device")
