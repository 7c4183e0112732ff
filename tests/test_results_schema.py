"""Result files against docs/results.schema.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import generate_speculator
from tests.text_models import Models, save_questions

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8"))
KINDS: dict[str, tuple[type, ...]] = {
    **{"object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float)},
    **{"boolean": (bool,), "null": (type(None),)},
}
KNOWN = {"type", "properties", "required", "additionalProperties", "items", "enum", "minimum", "$ref", "oneOf"}


def problems(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Return where a value breaks the schema; knows the words that ours uses, and fails at any other."""
    unknown = set(schema) - KNOWN - {"description", "title", "$schema", "$defs"}
    assert not unknown, f"schema says {unknown}"
    if "$ref" in schema:
        return problems(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], place)
    if "oneOf" in schema:
        found = [problems(value, item, place) for item in schema["oneOf"]]
        return [] if [] in found else min(found, key=len)
    if "enum" in schema and value not in schema["enum"]:
        return [f"{place}: {value!r} is none of {schema['enum']}"]
    kinds = schema.get("type", list(KINDS))
    allowed = [kind for name in ([kinds] if isinstance(kinds, str) else kinds) for kind in KINDS[name]]
    if type(value) not in allowed:
        return [f"{place}: {value!r} is no {kinds}"]
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        return [f"{place}: {value} is below {schema['minimum']}"]
    return _members(value, schema, place)


def _members(value: Any, schema: dict[str, Any], place: str) -> list[str]:
    found: list[str] = []
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{place}[{index}]")
    if isinstance(value, dict):
        own, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{place}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if name in own:
                found += problems(item, own[name], f"{place}.{name}")
            elif others is False:
                found.append(f"{place}: {name} is not in the schema")
            elif isinstance(others, dict):
                found += problems(item, others, f"{place}.{name}")
    return found


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write the result file of every kind of run."""
    folder = tmp_path_factory.mktemp("results")
    asked = save_questions(folder / "q.jsonl", 2)
    common = ["--speculator_path", models.drafter, "--eval_file", str(asked), "--max_generation_length", "6"]
    common += ["--dtype", "fp32", "--device", "cpu"]
    kinds = {
        "compare": ["--compare", "--turns", "2", "--stop", "zz", "--bad_words", "b"],
        "alone": ["--max_tree_nodes", "4", "--temperature", "1", "--batch_size", "2"],
        "baseline": ["--autoregressive", "--base_model", models.base],
        "empty": ["--compare", "--max_generation_length", "0", "--max_tree_nodes", "4"],
        "sweep": ["--sweep", "--sweep_widths", "2", "--sweep_lengths", "2", "--sweep_nodes", "auto", "4"],
    }
    found = {}
    for name, argv in kinds.items():
        path = folder / f"{name}.json"
        assert generate_speculator.main([*common, *argv, "--output_file", str(path)]) == 0
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["compare", "alone", "baseline", "empty", "sweep"])
def test_files_hold_what_the_schema_says_and_nothing_else(results: dict[str, Any], name: str) -> None:
    assert problems(results[name], SCHEMA) == []
    versions = results[name]["machine"]["versions"]
    assert all(versions[package] for package in ("recurrent_drafting", "torch", "transformers", "tokenizers"))


def test_every_part_of_the_schema_is_used(results: dict[str, Any]) -> None:
    assert set(SCHEMA["$defs"]["summary"]["properties"]) == set(results["compare"]["summary"])
    own = {"quick_seconds"}
    assert set(SCHEMA["$defs"]["evaluation"]["properties"]) - own == set(results["compare"])
    seen = {name for record in results.values() for row in record.get("rows", []) for name in row}
    assert set(SCHEMA["$defs"]["row"]["properties"]) - {"baseline_text"} == seen - {"baseline_text"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda record: record["summary"].pop("tau"), ".summary: tau is missing"),
        (lambda record: record["summary"].update(tokens=-1), ".summary.tokens: -1 is below 0"),
        (lambda record: record["rows"][0].update(turn="1"), ".rows[0].turn: '1' is no integer"),
        (lambda record: record["rows"][1].update(extra=1), ".rows[1]: extra is not in the schema"),
        (lambda record: record["rows"][0].update(finish_reason="eof"), "'eof' is none of"),
        (lambda record: record["machine"]["versions"].pop("torch"), ".machine.versions: torch is missing"),
        (lambda record: record["rows"][0]["choices"][0].update(wall_time=None), "wall_time: None is no array"),
    ],
)
def test_what_breaks_the_schema_is_found(results: dict[str, Any], change: Any, expected: str) -> None:
    record = copy.deepcopy(results["compare"])
    change(record)
    [problem] = problems(record, SCHEMA)
    assert expected in problem
