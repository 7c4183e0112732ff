"""Records of what was measured: where, how they are written, and the figures of their rows."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import recurrent_drafting
from recurrent_drafting import manifest
from recurrent_drafting.errors import DISK_FULL, ResourceError, UsageError
from recurrent_drafting.latency_cache import processor


def machine() -> dict[str, Any]:
    """Describe where figures were measured: processor, threads, versions."""
    packages = ("torch", "transformers", "datasets", "accelerate", "safetensors", "tokenizers")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            "recurrent_drafting": recurrent_drafting.__version__,
            **{name: _version(name) for name in packages},
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record whole or not at all; values that JSON has no word for (NaN) become null.

    Raises:
        UsageError: the path cannot be written.
        ResourceError: the disk is full.
    """
    write_text(json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False), path)


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: the path cannot be written.
        ResourceError: the disk is full.
    """
    try:
        manifest.write_text(text, path)
    except OSError as error:
        kind = ResourceError if error.errno in DISK_FULL else UsageError
        raise kind(f"{path} cannot be written: {error.strerror}; name another file") from error


def plain(value: Any) -> Any:
    """Turn a record into what JSON knows: values it has no word for (NaN) become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rate(row: dict[str, Any], prefix: str = "") -> float | None:
    """Return tokens per second of a row of a record, None if it has none; the baseline's with its prefix."""
    tokens, seconds = row.get(f"{prefix}tokens"), row.get(f"{prefix}seconds")
    return tokens / seconds if tokens and seconds else None


def speedup(row: dict[str, Any]) -> float | None:
    """Return how many times faster than the baseline a row of a record was, None if that was not measured."""
    ours, baseline = rate(row), rate(row, "baseline_")
    return ours / baseline if ours and baseline else None
