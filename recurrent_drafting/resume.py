"""What a training run is made of, and the checkpoint it goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_drafting import manifest
from recurrent_drafting.checkpoint import config_fields, config_fingerprints
from recurrent_drafting.config import RecurrentDraftingConfig
from recurrent_drafting.errors import ModelError, UsageError
from recurrent_drafting.token_rows import EncodedRow

PREFIX = "checkpoint-"
_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")

logger = logging.getLogger(__name__)


def data_fingerprint(rows: Sequence[EncodedRow]) -> str:
    """Return the identity of training rows: their tokens, loss masks and distilled targets, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int64(len(row.input_ids)).tobytes())
        digest.update(np.asarray(row.input_ids, dtype=np.int64).tobytes())
        digest.update(np.asarray(row.loss_mask, dtype=np.bool_).tobytes())
        if row.continuations is not None:
            digest.update(np.asarray(row.continuations.shape, dtype=np.int64).tobytes())
            digest.update(row.continuations.numpy().tobytes())
    return digest.hexdigest()


def run_record(
    settings: Mapping[str, Any], world_size: int, config: RecurrentDraftingConfig, data: str | None
) -> dict[str, Any]:
    """Return what a checkpoint's manifest says about its run.

    Args:
        settings: training arguments that decide what the weights become.
        world_size: processes that train together.
        config: the drafter's.
        data: see ``data_fingerprint``; ``None`` for rows of another kind.
    """
    run = {"settings": dict(settings), "world_size": world_size, "drafter": config_fields(config)}
    return {"fingerprints": {**config_fingerprints(config), "data": data}, "run": run}


def checkpoints(directory: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and path of a run's checkpoints, the newest first, complete or not."""
    found = [(match, path) for path in directory.glob(f"{PREFIX}*") if (match := re.fullmatch(r"\d+", path.name[11:]))]
    yield from sorted(((int(match[0]), path) for match, path in found), reverse=True)


def newest_complete(directory: Path) -> Path | None:
    """Return a run's newest checkpoint that is complete; torn ones are named in the log and passed over."""
    for _, path in checkpoints(directory):
        try:
            manifest.read(path)
        except ModelError as error:
            logger.warning("checkpoint %s is torn and was passed over: %s", path, error)
        else:
            return path
    return None


def locate(wanted: str | bool | Path | None, directory: Path) -> Path | None:
    """Return the checkpoint that is meant, ``None`` for a new run; what it holds is not looked at.

    Args:
        wanted: a checkpoint, or true for the newest complete one.
        directory: the run's output directory.

    Raises:
        UsageError: there is none.
    """
    if wanted in (None, False, "", "False", "false"):
        return None
    newest = wanted in (True, "True", "true")
    path = newest_complete(directory) if newest else Path(str(wanted))
    if path is None or not path.is_dir():
        place = f"a complete checkpoint in {directory}" if newest else "a directory"
        raise UsageError(f"--resume_from_checkpoint {wanted}: expected {place}, found none; name one, or drop it")
    return path


def find_checkpoint(wanted: str | bool | Path | None, directory: Path, record: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint to go on from, ``None`` for a new run.

    Args:
        wanted: a checkpoint, or true for the newest complete one.
        directory: the run's output directory.
        record: see ``run_record``, of the run that wants to go on.

    Raises:
        UsageError: there is none.
        ModelError: it is torn, holds no training state or is of another run; names the differences.
    """
    path = locate(wanted, directory)
    if path is not None:
        _require_same_run(path, manifest.read(path), record)
    return path


def _require_same_run(path: Path, found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    lacking = [name for name in _STATE if name not in found["files"]]
    if lacking or "run" not in found:
        raise ModelError(
            f"{path}: expected a training state, found no {', '.join(lacking) or 'record of the run'}; begin a new "
            "run from its drafter with --drafter_name_or_path"
        )
    now = json.loads(json.dumps(record["run"]))
    data, data_now = found["fingerprints"]["data"], record["fingerprints"]["data"]
    parts = (
        (found["run"]["drafter"], now["drafter"]),
        (found["run"]["settings"], now["settings"]),
        ({"world_size": found["run"]["world_size"]}, now),
    )
    changed = [
        *(text for before, after in parts for text in manifest.differences(before, after, known_only=True)),
        *([f"data {data[:12]}, now {data_now[:12]}"] if data and data_now and data != data_now else []),
    ]
    if changed:
        raise ModelError(f"{path} was begun with {'; '.join(changed)}; repeat those or begin a new run")


def rotate(saved: Path, limit: int | None, best: str | None) -> None:
    """Delete a run's checkpoints beyond a limit, the oldest first; the one just saved and the best stay.

    Checkpoints of later steps are older than the one just saved: torn ones, or another run's.

    Args:
        saved: the one just saved.
        limit: how many may stay, ``None`` for all.
        best: the best one so far.
    """
    if limit is None or limit <= 0:
        return
    paths = [path for _, path in checkpoints(saved.parent)]
    newest = paths.index(saved)
    kept = {saved.resolve(), *([Path(best).resolve()] if best else [])}
    protected = [path for path in paths if path.resolve() in kept]
    others = [path for path in paths[newest:] + paths[:newest] if path not in protected]
    for path in others[max(limit - len(protected), 0) :]:
        manifest.remove(path)
