"""Our answer files, read as FastChat's judge and Spec-Bench's speed script read theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import generate_speculator
from recurrent_drafting import Drafter, SpeculativeDecoder, answers, evaluation, prompt_files
from recurrent_drafting.evaluation import RunSettings
from tests.text_models import Models, load_verifier, make_tokenizer, save_questions

# Every field of their records: name, type. Nothing may be missing, and nothing else is in there.
LINE = {"question_id": int, "category": str, "answer_id": str, "model_id": str, "choices": list, "tstamp": float}
CHOICE = {"index": int, "turns": str, "decoding_steps": int, "new_tokens": int, "wall_time": float}
CHOICE |= {"accept_lengths": int}
SETTINGS = RunSettings(base_model="some/base", speculator_path="drafter", max_new_tokens=12, turns=2)


def check(line: Any, turns: int) -> None:
    """Insist on the fields of Spec-Bench's records, which hold FastChat's."""
    assert {name: type(value) for name, value in line.items()} == LINE
    assert len(line["answer_id"]) == 22
    [choice] = line["choices"]
    assert list(choice) == list(CHOICE) and choice["index"] == 0
    for name, kind in CHOICE.items():
        if name != "index":
            assert {type(item) for item in choice[name]} <= {kind}, name
    assert [len(choice[name]) for name in ("turns", "decoding_steps", "new_tokens", "wall_time")] == [turns] * 4
    assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
    # The first token of a turn comes from the prefill, all others from verifier steps.
    assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) - turns
    assert min(choice["accept_lengths"]) >= 1 and min(choice["wall_time"]) > 0


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def speed(path: Path, task: str) -> tuple[float, float]:
    """Compute tokens per second and mean accepted length from the fields that their speed script takes."""
    speeds, lengths = [], []
    for line in read(path):
        if task in ("overall", line["category"]):
            choice = line["choices"][0]
            speeds.append(sum(choice["new_tokens"]) / sum(choice["wall_time"]))
            lengths += choice["accept_lengths"]
    return fmean(speeds), fmean(lengths)


@pytest.fixture(scope="module")
def decoder(models: Models) -> SpeculativeDecoder:
    return SpeculativeDecoder(load_verifier(models.base, "fp64"), Drafter.from_pretrained(models.drafter))


@pytest.mark.parametrize(("turns", "batch_size"), [(1, 1), (2, 1), (2, 3)])
def test_lines_hold_exactly_their_fields(
    decoder: SpeculativeDecoder, tmp_path: Path, turns: int, batch_size: int
) -> None:
    questions, _ = prompt_files.load_questions(str(save_questions(tmp_path / "q.jsonl")))
    settings = replace(SETTINGS, turns=turns, batch_size=batch_size)
    record = evaluation.compare(decoder.verifier, decoder, make_tokenizer(), questions, settings)
    files = answers.write(record, tmp_path / "a.jsonl")
    assert [path.name for path in files] == ["a.jsonl", "a-baseline.jsonl"]
    for path, model in zip(files, ("base-speculative", "base-baseline"), strict=True):
        lines = read(path)
        for line in lines:
            check(line, turns)
        assert [line["question_id"] for line in lines] == [80, 81, 82]
        assert {line["model_id"] for line in lines} == {model}
        assert len({line["answer_id"] for line in lines}) == 3
    for line in read(files[0]):
        own = [row for row in record["rows"] if row["question_id"] == line["question_id"]]
        assert line["choices"][0]["turns"] == [row["text"] for row in sorted(own, key=lambda row: row["turn"])]
    # The same texts twice: float64.
    texts = [[line["choices"][0]["turns"] for line in read(path)] for path in files]
    assert texts[0] == texts[1]


def test_their_figures_are_ours(decoder: SpeculativeDecoder, tmp_path: Path) -> None:
    questions, _ = prompt_files.load_questions(str(save_questions(tmp_path / "q.jsonl")))
    record = evaluation.compare(decoder.verifier, decoder, make_tokenizer(), questions, SETTINGS)
    ours, baseline = answers.write(record, tmp_path / "a.jsonl")
    _, tau = speed(ours, "overall")
    assert tau == pytest.approx(record["summary"]["tau"])
    assert speed(baseline, "c") == (pytest.approx(speed(baseline, "overall")[0]), 1.0)


def test_a_differing_text_is_the_baselines_own() -> None:
    row = {"question_id": 1, "category": "c", "turn": 1, "text": "ours", "baseline_text": "theirs", "tstamp": 1.0}
    row |= {"baseline_tokens": 3, "baseline_seconds": 0.5, "choices": [evaluation.choice("ours", 3, 0.25, [2])]}
    record = {"summary": {"method": "speculative", "base_model": "b", "compared": 1}, "rows": [row]}
    [plain], [ours] = answers.answers(record, "baseline"), answers.answers(record, "speculative")
    assert plain["choices"][0] == {
        **{"index": 0, "turns": ["theirs"], "decoding_steps": [2], "new_tokens": [3]},
        **{"wall_time": [0.5], "accept_lengths": [1, 1]},
    }
    assert ours["choices"][0]["turns"] == ["ours"] and ours["answer_id"] != plain["answer_id"]


def test_the_script_writes_them_for_every_way_to_decode(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = save_questions(tmp_path / "q.jsonl", 2), tmp_path / "new" / "a.jsonl"
    argv = ["--speculator_path", models.drafter, "--eval_file", str(asked), "--max_generation_length", "8"]
    argv += ["--dtype", "fp32", "--device", "cpu", "--max_tree_nodes", "4", "--turns", "2", "--answer_file", str(out)]
    for mode, files in (([], 1), (["--autoregressive", "--base_model", models.base], 1), (["--compare"], 2)):
        assert generate_speculator.main([*argv, *mode]) == 0
        assert f"answers: {out}" in capsys.readouterr().out
        assert len(list(out.parent.iterdir())) == files
        for line in read(out):
            check(line, 2)
    assert generate_speculator.main([*argv, "--sweep"]) == 2
