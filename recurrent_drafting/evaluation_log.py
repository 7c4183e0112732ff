"""What an evaluation has finished, on disk: appended as it goes, so that a run that was cut off can go on.

The first line says what the run is made of; every other line is a finished batch, or the start of a
further session. A last line that was torn by a kill is dropped. A log without a finished batch binds nobody: it
begins anew, whatever run it was of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from recurrent_drafting import file_lock, manifest
from recurrent_drafting.errors import DataError, ModelError, UsageError

_SUFFIX = ".progress.jsonl"
# How the line of a finished batch begins.
_BATCH = b'{"batch": '


def path_for(output: Path) -> Path:
    """Return where the progress of a run is kept, from where its results go."""
    return output.with_name(output.name + _SUFFIX)


def holds_batches(path: Path) -> bool:
    """Tell whether there is a log with a finished batch, so that the same run would go on from it."""
    try:
        whole = path.read_bytes().split(b"\n")[:-1]
    except OSError:  # ``opened`` says why
        return False
    return any(line.startswith(_BATCH) for line in whole)


@contextmanager
def announced(path: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Say what a run goes on from, and how to go on with one that is interrupted.

    Args:
        path: of its log, None for a run without one.
        say: told in a line.
    """
    if path is not None and holds_batches(path):
        say(f"going on from {path}")
    try:
        yield
    except KeyboardInterrupt:
        if path is not None and holds_batches(path):
            say(f"finished prompts are kept in {path}: run the same command again to go on")
        raise


class EvaluationLog:
    """The open log of one run.

    Args:
        path: of the log, for messages.
        file: open for reading and appending, locked.
        identity: what the run is made of, as JSON gives it back.
    """

    def __init__(self, path: Path, file: BinaryIO, identity: dict[str, Any]) -> None:
        self.path = path
        self._file = file
        lines = self._whole_lines()
        self.entries: list[dict[str, Any]] = [line["batch"] for line in lines if "batch" in line]
        if not self.entries:
            self._file.truncate(0)
            lines = []
        self._curves: dict[str, Any] | None = next((line["curves"] for line in lines if "curves" in line), None)
        self.sessions = 1 + sum("session" in line for line in lines)
        self.identity = identity
        if not lines:
            self._write({"identity": identity})
            return
        self.identity = self._require_same(lines[0], identity)
        self._write({"session": self.sessions + 1})
        self.sessions += 1

    def append(self, batch: dict[str, Any]) -> None:
        """Keep a finished batch."""
        self._write({"batch": batch})
        self.entries.append(batch)

    def first_curves(self, curves: dict[str, Any]) -> dict[str, Any]:
        """Return the latency curves of the first session; they are these if none are kept yet."""
        if self._curves is None:
            self._curves = curves
            self._write({"curves": curves})
        return self._curves

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        raw = self._file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            self._file.truncate(len(whole))
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
            except ValueError as error:
                raise self.foreign(f"line {number} is no JSON: {error}") from error
            if not isinstance(found, dict):
                raise self.foreign(f"line {number} is no JSON object")
            lines.append(found)
        if lines and "identity" not in lines[0]:
            raise self.foreign("its first line names no run")
        return lines

    def foreign(self, reason: str) -> DataError:
        """Return the error that says why the file is no log of an evaluation."""
        return DataError(f"{self.path} is no progress of an evaluation: {reason}; delete it to begin anew")

    def _require_same(self, first: Mapping[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = first["identity"]
        changed = manifest.differences(found, json.loads(json.dumps(identity)))
        if changed:
            raise ModelError(
                f"{self.path} holds {len(self.entries)} finished batches of a run with {'; '.join(changed)}; repeat "
                "those settings to go on, or delete the file to begin anew"
            )
        return found


@contextmanager
def opened(path: Path, identity: dict[str, Any]) -> Iterator[EvaluationLog]:
    """Open the log of a run, new or begun; the lock goes with the block.

    Args:
        path: see ``path_for``.
        identity: everything that decides what the run measures.

    Raises:
        UsageError: the path cannot be written, or another run holds it.
        DataError: the file is something else.
        ModelError: it is of a run with other settings; the differences are named.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another --output_file") from error
    with file:
        if not file_lock.acquire(file.fileno(), path):
            raise UsageError(f"{path} is in use by another run; wait for it, or name another --output_file")
        yield EvaluationLog(path, file, identity)
