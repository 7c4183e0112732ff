"""Latency tables on disk: measured once for each verifier, drafter shape, dtype, device and number of threads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recurrent_drafting import assets
from recurrent_drafting.config import BeamConfig
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.errors import ResourceError
from recurrent_drafting.tree_budget import LatencyCurve, LatencyTable, batch_sizes
from recurrent_drafting.verifier import Verifier

logger = logging.getLogger(__name__)

_FORMAT = 6
_DRAFTER_SHAPE = ("hidden_size", "exit_dim", "num_draft_layers", "draft_vocab_size", "vocab_size", "rnn", "emb_norm")


def latency_table(
    verifier: Verifier, drafter: Drafter, beam: BeamConfig, batch_size: int = 1, *, repeats: int = 5
) -> LatencyTable:
    """Return the costs of batches up to ``batch_size`` rows; what is not on disk yet is measured and kept there.

    Args:
        verifier: the base model.
        drafter: in the verifier's dtype and on its device.
        beam: shape of the beams.
        batch_size: most rows of a forward.
        repeats: timed forwards per size; a curve on disk that had fewer is measured again.
    """
    key = _key(verifier, drafter, beam)
    path = _path(key)
    kept = _read(path, key)
    curves = {}
    fresh = False
    for rows in batch_sizes(batch_size):
        entry = kept.get(str(rows))
        if entry is None or entry["repeats"] < repeats:
            curve = LatencyCurve.measure(verifier, drafter, beam, batch_size=rows, repeats=repeats)
            kept[str(rows)] = {"repeats": repeats, **asdict(curve)}
            fresh = True
        else:
            curve = LatencyCurve.of(entry)
        curves[rows] = curve
    if fresh and path is not None:
        _write(path, {"key": key, "curves": kept})
    return LatencyTable(curves)


def processor() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _key(verifier: Verifier, drafter: Drafter, beam: BeamConfig) -> dict[str, Any]:
    """Name everything that a curve depends on."""
    device = verifier.device
    config = verifier.model.config.to_json_string(use_diff=False)
    return {
        "format": _FORMAT,
        "verifier": hashlib.sha256(config.encode()).hexdigest(),
        "attention": verifier.model.config._attn_implementation,
        "compiled": verifier.compiles,
        "dtype": str(verifier.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {processor()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "beam": [beam.width, beam.length, beam.recycled_nodes],
        "drafter": {name: getattr(drafter.config, name) for name in _DRAFTER_SHAPE},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _path(key: dict[str, Any]) -> Path | None:
    """Return the file of a key, None for a user without a home."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    try:
        return assets.cache_directory() / "latency" / f"{digest}.json"
    except ResourceError:
        return None


def _read(path: Path | None, key: dict[str, Any]) -> dict[str, Any]:
    """Return the curves in a file by batch size, none if the file is absent, damaged or of another key."""
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["curves"] if content["key"] == key else {}
        return {rows: entry for rows, entry in known.items() if _is_curve(entry)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("latency curves in %s cannot be read (%s): they are measured again", path, error)
        return {}


def _is_curve(entry: Any) -> bool:
    nodes, seconds = entry["nodes"], entry["seconds"]
    narrow = [value for pair in entry["narrow"] for value in pair]
    values = [entry["depth_seconds"], entry["baseline_seconds"], entry["repeats"], *nodes, *seconds, *narrow]
    return bool(nodes) and len(nodes) == len(seconds) and all(type(value) in (int, float) for value in values)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Put the file in its place whole; a cache that cannot be written only costs the next run its measurement."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("latency curves are not kept: %s cannot be written (%s)", path, error.strerror)
