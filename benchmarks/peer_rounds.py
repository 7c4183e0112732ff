"""The finished rounds of ``peers.py`` on disk, so that a run that was cut off goes on with the next one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrent_drafting import manifest, result_files
from recurrent_drafting.errors import DataError, UsageError, first_line


class FinishedRounds:
    """What the finished rounds of one run measured, one JSON object each.

    Args:
        output: where the run's record will be; the rounds are beside it until then. None keeps nothing.
        identity: what the run is made of, in JSON's own types.

    Raises:
        UsageError: the rounds that are there are of another run.
        DataError: the file does not read.
    """

    def __init__(self, output: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = None if output is None else output.with_name(output.name + ".rounds.json")
        self.rounds: list[dict[str, Any]] = []
        self._identity = json.loads(json.dumps(identity))
        if self.path is not None and self.path.exists():
            self.rounds = self._read(self.path)
            print(f"going on from {self.path}: {len(self.rounds)} finished rounds")

    def add(self, measured: dict[str, Any]) -> None:
        """Keep one more round."""
        self.rounds.append(measured)
        if self.path is not None:
            result_files.write_json({"identity": self._identity, "rounds": self.rounds}, self.path)

    def close(self) -> None:
        """Remove the file: the record holds all of it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            identity, rounds = dict(found["identity"]), list(found["rounds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected the finished rounds of a run, got {first_line(error)}; delete it to begin anew"
            ) from error
        if found := manifest.differences(identity, self._identity):
            raise UsageError(
                f"{path} holds rounds of another run: {'; '.join(found)}; "
                "choose another --output, or delete it to begin anew"
            )
        return rounds
