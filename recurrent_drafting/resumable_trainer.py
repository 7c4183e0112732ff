"""A Trainer whose checkpoints are complete or not there, and that goes on from them to the same bits."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import transformers
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from recurrent_drafting import manifest, resume
from recurrent_drafting.errors import InterruptionError
from recurrent_drafting.run_guard import StopOnSignal


class ResumableTrainer(transformers.Trainer):
    """The base class with safe checkpoints; arguments as for ``transformers.Trainer``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._run_dir: Path | None = None
        self._stop = StopOnSignal()
        super().__init__(*args, **kwargs)
        self.add_callback(self._stop)

    def run_record(self) -> dict[str, Any]:
        """Return what the manifests of this run's checkpoints say about it, see ``resume.run_record``."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the start or from a complete checkpoint of the same run.

        Args:
            resume_from_checkpoint: a checkpoint, or true for the newest complete one of the output directory.
            *args: as for ``transformers.Trainer``.
            **kwargs: likewise.

        Raises:
            UsageError: there is no such checkpoint.
            ModelError: it is torn, or was begun with other settings, data or world size.
            InterruptionError: SIGINT or SIGTERM came; the step was finished and saved.
            ResourceError: the disk is full; the checkpoints before stay.
        """
        directory = Path(str(self.args.output_dir))
        path = None
        if resume_from_checkpoint not in (None, False):
            path = resume.find_checkpoint(resume_from_checkpoint, directory, self.run_record())
        with self._stop.listening():
            output = super().train(None if path is None else str(path), *args, **kwargs)
        if self._stop.received is not None:
            self._end_of(self._stop.received, directory)
        return output

    def _end_of(self, received: signal.Signals, directory: Path) -> NoReturn:
        """End a run that a signal stopped: within it, or after its last step."""
        step, saved = self.state.global_step, f"the drafter is in {directory}"
        if self._stop.stopped:
            saved = f"saved in {directory / resume.PREFIX}{step}, go on with --resume_from_checkpoint True"
        else:
            self.save_model()
        raise InterruptionError(f"{received.name} at step {step}, which is complete: {saved}", received)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch; the base class would take one step too many after resuming at the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the drafter; its files appear when all of them are on the disk."""
        if _internal_call or not self.args.should_save:
            super().save_model(output_dir, _internal_call)
            return
        directory = Path(str(output_dir or self.args.output_dir))
        record = {"fingerprints": self.run_record()["fingerprints"]}
        with manifest.files_of(directory, record) as partial:
            super().save_model(str(partial), _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the base class write under a temporary name; the last one appears when all ranks are done."""
        directory = Path(self._get_output_dir(trial))
        final = directory / f"{resume.PREFIX}{self.state.global_step}"
        partial = manifest.partial_path(final)
        with manifest.whole(final, self.run_record()) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()
            self._run_dir = partial.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._run_dir = None
            if self.state.best_model_checkpoint == str(partial):
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            resume.rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._run_dir is None else str(self._run_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing where the base class calls it: the checkpoint is pushed when it has its final name."""

    def _load_best_model(self) -> None:
        manifest.read(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()
