"""Answer files that FastChat's and Spec-Bench's scripts read: one line for each question, all its turns inside.

FastChat's judge reads question_id, answer_id, model_id, choices[].index, choices[].turns and tstamp; Spec-Bench's
speed script reads category and, of the first choice, turns, new_tokens, wall_time and accept_lengths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurrent_drafting import evaluation, result_files

_ID_LETTERS = 22  # as many as their own


def write(record: dict[str, Any], path: Path) -> list[Path]:
    """Write the answers of an evaluation; those of the baseline beside them if it ran too.

    Args:
        record: of an evaluation.
        path: ``answers.jsonl``; the baseline's are then ``answers-baseline.jsonl``.

    Returns:
        The files that were written.

    Raises:
        UsageError: the path cannot be written.
    """
    kinds = [(path, record["summary"]["method"])]
    if "compared" in record["summary"]:
        kinds.append((path.with_name(f"{path.stem}-baseline{path.suffix}"), "baseline"))
    for file, method in kinds:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in answers(record, method)]
        result_files.write_text("".join(lines), file)
    return [file for file, _ in kinds]


def answers(record: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Return one answer for each question, in the order in which they were asked.

    Args:
        record: of an evaluation.
        method: "speculative" or "baseline"; must have run.
    """
    questions: dict[Any, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        questions.setdefault(row["question_id"], []).append(row)
    model = f"{Path(record['summary']['base_model']).name}-{method}"
    baseline = method != record["summary"]["method"]
    return [_answer(sorted(rows, key=lambda row: int(row["turn"])), model, baseline) for rows in questions.values()]


def _answer(rows: Sequence[dict[str, Any]], model: str, baseline: bool) -> dict[str, Any]:
    turns = [_baseline_turn(row) if baseline else row["choices"][0] for row in rows]
    joined = {name: [item for turn in turns for item in turn[name]] for name in turns[0] if name != "index"}
    identity = json.dumps([model, rows[0]["question_id"], joined["turns"], rows[-1]["tstamp"]])
    return {
        "question_id": rows[0]["question_id"],
        "category": rows[0]["category"],
        "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:_ID_LETTERS],
        "model_id": model,
        "choices": [{"index": 0, **joined}],
        "tstamp": rows[-1]["tstamp"],
    }


def _baseline_turn(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the baseline did: a token in each step after the prefill's."""
    text, tokens = row.get("baseline_text", row["text"]), row["baseline_tokens"]
    return evaluation.choice(text, tokens, row["baseline_seconds"], [1] * max(tokens - 1, 0))
