"""Tell a want of memory from other errors, and say how much was wanted and how much is free."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import torch
from torch import nn

# What allocators without an error class of their own say: torch's on the CPU, the system's through other libraries.
_WORDS = ("DefaultCPUAllocator", "Cannot allocate memory", "out of memory")
_UNITS = {"": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error says that memory has run out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in _WORDS)


def describe(error: BaseException) -> str:
    """Return what was wanted and what is free, in bytes, and what to do about it."""
    wanted, free = _wanted(str(error)), free_bytes()
    return (
        f"out of memory: {'an unknown number of' if wanted is None else wanted} bytes were wanted, "
        f"{'an unknown number' if free is None else free} are free; take a smaller batch, a shorter context or "
        "generation length, or a smaller --dtype"
    )


def _wanted(message: str) -> int | None:
    """Read the number of bytes from an allocator's message."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?([KMGT]iB|bytes|)", message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def free_bytes() -> int | None:
    """Return the free bytes of the accelerator in use, else of the machine; None where the system does not say."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.mem_get_info()[0])
    return machine_free_bytes()


def bytes_of(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes that a model's weights take in a dtype."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def machine_free_bytes() -> int | None:
    """Return the bytes that programs can still have of the machine's own memory; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
