"""Evaluations in Weights & Biases: settings by an allowlist, figures, and one table of rows."""

from __future__ import annotations

import importlib
from typing import Any

from recurrent_drafting import tracking
from recurrent_drafting.hub import public_name
from recurrent_drafting.result_files import plain, speedup

DEFAULT_PROJECT = "recurrent-drafting"
# What leaves the machine besides figures. Nothing of the environment, the command line or the code does.
_NAMES = ("base_model", "speculator_path")
_SUMMARY_SETTINGS = ("method", "base_note", "dtype", "device", "batch_size", "temperature")
_SETTINGS = ("max_new_tokens", "max_prompt_length", "turns", "sampling", "stop", "beam", "grid")
_ROW_COLUMNS = ("question_id", "category", "turn", "prompt_tokens", "tokens", "seconds", "tau", "identical", "text")
_POINT_COLUMNS = (
    *("temperature", "width", "length", "max_nodes", "speedup_median", "speedup_min", "speedup_max"),
    *("tokens_per_second", "tau", "mean_tree_nodes", "identical", "compared"),
)


def log(record: dict[str, Any], project: str | None) -> None:
    """Write the record of an evaluation or a sweep as one run of its own.

    Args:
        record: what was measured.
        project: None takes ``WANDB_PROJECT``, else the default project.

    Raises:
        UsageError: no login.
        NetworkError: the service did not answer.
    """
    wandb = importlib.import_module("wandb")
    settings = wandb.Settings(
        disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True, x_save_requirements=False
    )
    kind = "sweep" if "sweep" in record else "evaluation"
    start = {"project": project or settings.project or DEFAULT_PROJECT, "job_type": kind, "settings": settings}
    with tracking.service_errors(), wandb.init(**start, config=config(record)) as run:
        columns, rows = table(record)
        run.log({kind: wandb.Table(columns=list(columns), data=rows)})
        run.summary.update(figures(record))


def config(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are told to the tracker; of a local path its last name only."""
    summary = record.get("summary") or record["sweep"]
    told = {name: summary[name] for name in _SUMMARY_SETTINGS if name in summary}
    for name in _NAMES:
        value = summary.get(name)
        told[name] = public_name(value) if value else value
    told |= {name: record["settings"][name] for name in _SETTINGS if name in record["settings"]}
    return dict(plain(told))


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the run as a whole, flat."""
    if "sweep" in record:
        return {f"recommended_{name}": value for name, value in record["sweep"]["recommended"].items()}
    found: dict[str, Any] = {}
    for name, value in record["summary"].items():
        if name in _SUMMARY_SETTINGS or name in _NAMES:
            continue
        if isinstance(value, dict):
            found |= {f"{name}/{key}": item for key, item in value.items()}
        elif isinstance(value, list):
            found |= {f"{name}/{index}": item for index, item in enumerate(value, 1)}
        else:
            found[name] = value
    return dict(plain(found))


def table(record: dict[str, Any]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Return the columns and rows of an evaluation's prompts or a sweep's points."""
    if "sweep" in record:
        rows = [[point[name] for name in _POINT_COLUMNS] for point in record["sweep"]["points"]]
        return _POINT_COLUMNS, plain(rows)
    rows = [[str(row.get("question_id")), *(row.get(name) for name in _ROW_COLUMNS[1:])] for row in record["rows"]]
    gains = [speedup(row) for row in record["rows"]]
    return (*_ROW_COLUMNS, "speedup"), plain([[*row, gain] for row, gain in zip(rows, gains, strict=True)])
