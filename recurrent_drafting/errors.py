"""Exception family of the package: one class per exit code of the command-line scripts.

A message says what happened, where, what was expected, what was found and what to do next,
in one line. Scripts print that line on stderr and leave with ``exit_code``.
"""

from __future__ import annotations

import errno

# What the system says where no more can be written: no space, a quota, a limit of file sizes; and as Rust writes it.
DISK_FULL = {errno.ENOSPC: "os error 28", errno.EDQUOT: "os error 122", errno.EFBIG: "os error 27"}


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class RecurrentDraftingError(Exception):
    """Root of every error that the package raises on purpose."""

    exit_code = 1


class UsageError(RecurrentDraftingError, ValueError):
    """Report an argument or setting that cannot be used (exit code 2)."""

    exit_code = 2


class DataError(RecurrentDraftingError, ValueError):
    """Report a prompt, data set or cache that cannot be read or used (exit code 3)."""

    exit_code = 3


class ModelError(RecurrentDraftingError):
    """Report a verifier, drafter or checkpoint that does not load or does not fit (exit code 4)."""

    exit_code = 4


class ResourceError(RecurrentDraftingError):
    """Report missing memory, disk space or processes (exit code 5)."""

    exit_code = 5


class NumericsError(RecurrentDraftingError):
    """Report non-finite values, structural differences and train/serve gaps (exit code 6)."""

    exit_code = 6


class NetworkError(RecurrentDraftingError):
    """Report a registry, hub or login that did not answer as needed (exit code 7)."""

    exit_code = 7


class InterruptionError(RecurrentDraftingError):
    """Report a run that a signal ended in good order (exit code 128 + signal: 130, 143).

    Args:
        message: what was saved and how to go on.
        signal_number: of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
