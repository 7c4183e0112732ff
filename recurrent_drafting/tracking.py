"""Experiment trackers: Weights & Biases without leaking its settings, and a table in every tracker."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from recurrent_drafting.errors import NetworkError, UsageError, first_line

_TRACKERS = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Args:
        title: its key in the tracker.
        columns: headings.
        rows: as many cells each.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """Return it as text that TensorBoard renders."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def require_installed(trackers: Iterable[str]) -> None:
    """Check that the packages of the trackers are there.

    Raises:
        UsageError: one is not; how to install it.
    """
    for name in trackers:
        if name in _TRACKERS and importlib.util.find_spec(name) is None:
            flag = "use_wandb" if name == "wandb" else f"report_to {name}"
            raise UsageError(f"{flag}: {_TRACKERS[name]} is not installed; run: pip install {name}")


class WandbRun(WandbCallback):
    """The Trainer's own callback, with a project that is an argument, and errors of one line.

    Args:
        project: name of the project; None leaves it to ``WANDB_PROJECT``.
    """

    def __init__(self, project: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._project = project

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Start the run, or go on with the one that is active.

        Raises:
            UsageError: no login.
            NetworkError: the service did not answer.
        """
        with service_errors(), _environment("WANDB_PROJECT", self._project):
            super().setup(*args, **kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def service_errors() -> Iterator[None]:
    """Turn errors of Weights & Biases into ours, of one line.

    Raises:
        UsageError: no login.
        NetworkError: the service did not answer.
    """
    errors = importlib.import_module("wandb.errors")
    keep = "set WANDB_MODE=offline to keep the run on disk"
    try:
        yield
    except errors.CommError as error:
        raise NetworkError(f"Weights & Biases did not answer: {first_line(error).rstrip('.')}; {keep}") from error
    except (errors.UsageError, errors.AuthenticationError) as error:
        raise UsageError(f"Weights & Biases: {first_line(error).rstrip('.')}; run wandb login, or {keep}") from error


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set a variable of the environment for a while; None leaves it alone."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None and before is None:
            del os.environ[name]
        elif value is not None and before is not None:
            os.environ[name] = before


def log_table(callbacks: Iterable[TrainerCallback], table: Table, step: int) -> None:
    """Write a table to the trackers that are active.

    Args:
        callbacks: of the trainer.
        table: what to write.
        step: optimizer steps so far.
    """
    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            wandb = importlib.import_module("wandb")
            if wandb.run is not None:
                data = [list(row) for row in table.rows]
                wandb.log({table.title: wandb.Table(columns=list(table.columns), data=data)})
        elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(table.title, table.markdown(), step)


@contextmanager
def closing(callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """Close the trackers' files when a run ends, in whatever way; a run that was active before goes on."""
    wandb = importlib.import_module("wandb") if any(isinstance(c, WandbCallback) for c in callbacks) else None
    before = None if wandb is None else wandb.run
    failed = True
    try:
        yield
        failed = False
    finally:
        if wandb is not None and wandb.run is not None and wandb.run is not before:
            wandb.finish(exit_code=int(failed))
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.close()
                callback.tb_writer = None
