"""Several processes, one run: the world is checked, rank 0 prepares and speaks, a lost process is named."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed
from transformers import TrainingArguments

from recurrent_drafting.errors import ResourceError, first_line

T = TypeVar("T")
# Writing replies may take days, during which the other ranks wait. A rank that dies meanwhile closes its
# connections, which ends the wait at once; the short timeout of the training group is for ranks that hang.
_PREPARATION = timedelta(days=30)


def begin(training: TrainingArguments) -> None:
    """Start the process group of a run on CPUs, with the run's own timeout.

    The Trainer passes the timeout on for accelerators alone; on CPUs a rank that hangs would be
    noticed after half an hour.

    Raises:
        ResourceError: the other processes do not come.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not (training.use_cpu and launched) or torch.distributed.is_initialized():
        return
    timeout = timedelta(seconds=training.ddp_timeout)
    try:
        torch.distributed.init_process_group(training.ddp_backend or "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"distributed training: expected {os.environ['WORLD_SIZE']} processes within {training.ddp_timeout} s, got "
            f"{first_line(error)}; start all of them with torchrun"
        ) from error


def check_world(training: TrainingArguments) -> None:
    """Compare the processes that found each other with those that the launcher started.

    Raises:
        ResourceError: they differ: each would train a drafter of its own and overwrite the others'.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if training.world_size != launched:
        raise ResourceError(
            f"distributed training: expected the {launched} processes that WORLD_SIZE names, got {training.world_size} "
            "in the process group; without an accelerator pass --use_cpu True, or unset WORLD_SIZE"
        )


def from_first_rank(training: TrainingArguments, make: Callable[[], T]) -> T:
    """Let rank 0 make something and hand it to all ranks; the others wait as long as it takes.

    Args:
        training: of the run.
        make: called on rank 0 alone; its result must pickle.
    """
    if training.world_size == 1:
        return make()
    group = torch.distributed.new_group(backend="gloo", timeout=_PREPARATION)
    made: list[Any] = [make() if training.process_index == 0 else None]
    torch.distributed.broadcast_object_list(made, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    result: T = made[0]
    return result


def gather(training: TrainingArguments, value: T) -> list[T]:
    """Return every rank's value, in the order of ranks; all ranks must call it."""
    if training.world_size == 1:
        return [value]
    values: list[Any] = [None] * training.world_size
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def one_voice(training: TrainingArguments) -> Iterator[None]:
    """Silence the output of all ranks but the first, name the reason when another rank is lost, end the group.

    Raises:
        ResourceError: another process ended; its own message says why.
    """
    with contextlib.ExitStack() as stack:
        if training.process_index:
            sink = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(sink))
        try:
            yield
        except RuntimeError as error:
            if training.world_size == 1 or not _is_loss(error):
                raise
            raise ResourceError(
                f"rank {training.process_index} lost another of the {training.world_size} processes "
                f"({first_line(error)}); the message of that process says why; start all of them again"
            ) from error
        if training.world_size > 1 and torch.distributed.is_initialized():
            # Threads of the group that still run when Python ends can abort a process whose work is done.
            torch.distributed.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    # gloo has no error class of its own.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
