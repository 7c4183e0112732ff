"""What protects a training run from other processes: one run per output directory, and an orderly end on a signal."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from recurrent_drafting import file_lock
from recurrent_drafting.errors import UsageError

LOCK = ".lock"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 1.0


@contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Hold the lock of an output directory; the system releases it when the process ends, however it ends.

    Raises:
        UsageError: another run holds it; names the lock and the process.
    """
    path = directory / LOCK
    descriptor = _acquire(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not file_lock.acquire(descriptor, path):
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UsageError(
                f"--output_dir {path.parent} is in use by another run ({holder}): lock {path}; wait for it, or "
                "name another directory"
            )
        if _is_named(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Tell whether a lock file still has its name; one that a run took along when it ended protects nothing."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class StopOnSignal(transformers.TrainerCallback):
    """Let the step in progress end, save, and stop, when SIGINT or SIGTERM comes; a second one ends the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopped = False
        self._last_seconds: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals inside the block; only the main thread can."""
        self.received, self.stopped, self._last_seconds = None, False, None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler's signature
        last, self._last_seconds = self._last_seconds, time.monotonic()
        # A launcher hands on to its processes the Ctrl-C that the terminal has given them already.
        echo = torch.distributed.is_initialized() and last is not None and self._last_seconds - last < _ECHO_SECONDS
        if last is not None and not echo:
            os._exit(128 + number)
        self.received = signal.Signals(number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002, D102
        if self._any_rank(args):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Keep the end of an epoch, with its evaluation, from an epoch that a signal cut short."""
        if self.stopped:
            control.should_save = ended = float(state.epoch).is_integer()
            control.should_evaluate &= ended
            control.should_log &= ended

    def _any_rank(self, args: Any) -> bool:
        """Tell whether a rank was signalled: all stop at the same step, or they would wait for each other."""
        if args.world_size == 1:
            return self.received is not None
        number = torch.tensor(int(self.received or 0), device=args.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        if int(number):
            self.received = signal.Signals(int(number))
        return bool(number)
