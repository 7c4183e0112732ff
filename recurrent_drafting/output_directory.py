"""The output directory of a training run: its usual name, what may be in it, and that one run alone holds it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recurrent_drafting import local_drafters, manifest, run_guard
from recurrent_drafting.errors import UsageError
from recurrent_drafting.self_data import SELF_DATA

# What a killed run leaves behind.
_LEFTOVERS = {manifest.PARTIAL, run_guard.LOCK, SELF_DATA}


def usual(base: str, *, unused: bool = False) -> Path:
    """Return ``models/<base>-recurrent-drafter``.

    Args:
        base: the base model as the user named it.
        unused: where that exists already, add the first number that is free.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(base).name)
    stem = local_drafters.TRAINED / f"{name}{local_drafters.TRAINED_NAME}"
    path, number = stem, 1
    while unused and path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path


@contextmanager
def claim(path: Path, *, goes_on: bool) -> Iterator[None]:
    """Hold the directory for this run alone, and clear what a killed one left half-written.

    Args:
        path: the directory; it is made if it is not there.
        goes_on: it may hold another run's results.

    Raises:
        UsageError: it holds something, cannot be written or belongs to another run.
    """
    _check(path, goes_on)
    with run_guard.only_run(path):
        manifest.remove_partial(path)
        yield


def _check(path: Path, goes_on: bool) -> None:
    """Refuse a directory that holds something besides a killed run's leftovers, or cannot be written."""
    try:
        if path.exists() and {item.name for item in path.iterdir()} - _LEFTOVERS and not goes_on:
            raise UsageError(
                f"--output_dir {path} is not empty: expected a new directory; pass --resume_from_checkpoint, "
                "--overwrite_output_dir or another directory"
            )
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {path} cannot be used: {error.strerror}; name another directory") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--output_dir {path} is read-only; name another directory")
