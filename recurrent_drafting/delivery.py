"""What becomes of the record of an evaluation or a sweep: files, tracker, and the verdict on its texts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_drafting import answers, evaluation_log, report, result_files
from recurrent_drafting.errors import UsageError
from recurrent_drafting.lossless import LosslessReport


@dataclass(frozen=True)
class DeliverySettings:
    """Where a record goes; each field has the name of its flag.

    Args:
        output_file: JSON; the progress of an evaluation is kept beside it until it is written.
        answer_file: the replies for FastChat's and Spec-Bench's scripts.
        report: HTML.
        use_wandb: send it to Weights & Biases.
        wandb_project: see ``evaluation_tracking.log``.
        verify_lossless: list every text that differs from the baseline's.
    """

    output_file: str | None = None
    answer_file: str | None = None
    report: str | None = None
    use_wandb: bool = False
    wandb_project: str | None = None
    verify_lossless: bool = False

    @property
    def progress(self) -> Path | None:
        """Return where an evaluation keeps what it has finished, None where it keeps nothing."""
        return None if self.output_file is None else evaluation_log.path_for(Path(self.output_file))

    def require_deliverable(self) -> None:
        """Refuse what could not be delivered, before the work is done.

        Raises:
            UsageError: a file that cannot be written, or a tracker that is not installed.
        """
        for name in ("output_file", "answer_file", "report"):
            if (file := getattr(self, name)) is not None:
                _require_writable(f"--{name}", Path(file))
        if self.use_wandb:
            # With it comes the Trainer: only a run that tracks waits for that.
            from recurrent_drafting import tracking

            tracking.require_installed(["wandb"])


def deliver(record: dict[str, Any], settings: DeliverySettings, say: Callable[[str], None]) -> None:
    """Write results and report, tell the tracker, then insist on equal texts.

    Args:
        record: of an evaluation or a sweep.
        settings: where it goes.
        say: told what was written, and where texts differ.

    Raises:
        UsageError: a file cannot be written, or the tracker has no login.
        ResourceError: the disk is full, or memory for the audit was.
        NetworkError: the tracker did not answer.
        NumericsError: a text differs from the baseline's beyond rounding.
    """
    if settings.output_file is not None:
        path = Path(settings.output_file)
        result_files.write_json(record, path)
        evaluation_log.path_for(path).unlink(missing_ok=True)
        say(f"results: {settings.output_file}")
    if settings.answer_file is not None:
        say(f"answers: {', '.join(map(str, answers.write(record, Path(settings.answer_file))))}")
    if settings.report is not None:
        path = Path(settings.report)
        report.write([report.Result.of(path.stem, record)], path)
        say(f"report: {settings.report}")
    if settings.use_wandb:
        from recurrent_drafting import evaluation_tracking

        evaluation_tracking.log(record, settings.wandb_project)
    if "lossless" in record:
        audit = LosslessReport(**record["lossless"])
        if settings.verify_lossless:
            say(audit.listing())
        audit.require_lossless()


def _require_writable(flag: str, path: Path) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{flag} {path} cannot be written: name a file in a writable folder")
