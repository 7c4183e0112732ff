"""Drafters on this machine: those trained here and the released ones; one for a base, or the one that was named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_drafting import cli, manifest
from recurrent_drafting.checkpoint import CONFIG, WEIGHTS, is_drafter, load_drafter
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import ModelError, NetworkError

# Where training puts its drafters, and what their names hold behind the base's.
TRAINED, TRAINED_NAME = Path("models"), "-recurrent-drafter"
RELEASED, RELEASED_NAME = Path(__file__).resolve().parent.parent / "models", "-redrafter"


@dataclass(frozen=True)
class LocalDrafter:
    """A drafter on this machine.

    Args:
        path: its directory.
        base: the base it was trained for, as its training named it; None if unknown.
    """

    path: Path
    base: str | None

    @classmethod
    def of(cls, path: Path) -> LocalDrafter:
        """Read whose drafter a directory holds."""
        config: dict[str, Any] = manifest.read_json(path / CONFIG)
        return cls(path, config.get("verifier_name_or_path"))


def find() -> list[LocalDrafter]:
    """List the drafters on this machine: those trained here, newest first, then the released ones."""

    def age(path: Path) -> float:
        return (path / WEIGHTS).stat().st_mtime

    trained = sorted(_usable(TRAINED.glob(f"*{TRAINED_NAME}*")), key=age, reverse=True)
    released = _usable(sorted(RELEASED.glob(f"*{RELEASED_NAME}")))
    return [LocalDrafter.of(path) for path in (*trained, *released)]


def choose(base: str) -> Path:
    """Return the newest drafter trained here for a base, else the released one that bears the base's name alone.

    Raises:
        ModelError: there is none; the others are listed.
    """
    found = find()
    released = RELEASED / f"{Path(base).name}{RELEASED_NAME}"
    # Further released ones, for one use or another, come last: who wants one names it.
    for drafter in sorted(found, key=lambda each: each.path.parent == RELEASED and each.path != released):
        if drafter.base == base or drafter.path == released:
            return drafter.path
    raise ModelError(
        f"no drafter for {base}: {_listed(found)}; train one with train_speculator.py, name one with "
        "--speculator_path, or use --autoregressive"
    )


def load_named(name: str) -> Drafter:
    """Load a drafter from a directory or a hub id; say which others there are if it does not load.

    Raises:
        UsageError: the name begins with a home that is not on this machine.
        ModelError: it is not there, damaged, or of another kind.
        NetworkError: it is no local path, and the hub did not give it.
    """
    path = cli.user_path(name)
    local = name.count("/") != 1 or name.startswith((".", "~")) or path.parent.is_dir()
    if local and not path.exists():
        raise ModelError(f"--speculator_path {name} does not exist; {_listed(find())}")
    try:
        return load_drafter(str(path) if local else name)
    except (ModelError, NetworkError) as error:
        raise type(error)(f"{error}; {_listed(find())}") from error


def _usable(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if is_drafter(path) and (path / WEIGHTS).is_file()]


def _listed(found: Sequence[LocalDrafter]) -> str:
    if not found:
        return "no drafters found"
    return "drafters found: " + ", ".join(f"{drafter.path} (for {drafter.base})" for drafter in found)
