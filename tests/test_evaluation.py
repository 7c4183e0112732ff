"""Prompt files, runs, the comparison, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recurrent_drafting import (
    Drafter,
    SpeculativeDecoder,
    Verifier,
    detokenizer,
    evaluation,
    prompt_files,
    result_files,
)
from recurrent_drafting.detokenizer import StopStrings
from recurrent_drafting.errors import DataError, UsageError
from recurrent_drafting.evaluation import RunSettings
from recurrent_drafting.prompt_files import Question
from tests.text_models import Models, load_verifier, make_tokenizer, save_questions

SETTINGS = RunSettings(base_model="base", speculator_path="drafter", max_new_tokens=12)


@pytest.fixture(scope="module")
def decoder(models: Models) -> SpeculativeDecoder:
    return SpeculativeDecoder(load_verifier(models.base, "fp64"), Drafter.from_pretrained(models.drafter))


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return prompt_files.load_questions(str(save_questions(tmp_path / "q.jsonl")))[0]


def test_more_prompts_than_there_are_gives_all_and_says_so(tmp_path: Path) -> None:
    path = str(save_questions(tmp_path / "q.jsonl", 4))
    found, note = prompt_files.load_questions(path, 9)
    assert len(found) == 4 and "has 4 prompts, 9 were asked for" in note
    found, note = prompt_files.load_questions(path, 2, spread=True)
    assert [question.question_id for question in found] == [80, 82] and note == ""
    for usual, expected in ((2, [80, 82]), (9, [80, 81, 82, 83])):
        found, note = prompt_files.load_questions(path, usual=usual, spread=True)
        assert [question.question_id for question in found] == expected and note == ""
    assert len(prompt_files.load_questions(path, 3, usual=2)[0]) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no question"),
        (b'{"question_id": 1, "turns": ["a"]}\n{"question_id": 2}\n', r"q.jsonl:2: .*question_id"),
        (b'{"question_id": 1, "turns": []}\n', "q.jsonl:1"),
        (b'{"question_id": 1, "turns": [3]}\n', "q.jsonl:1"),
        (b"[1]\n", "q.jsonl:1: .*list"),
        (b'{"question_id": 1\n', "q.jsonl:1: malformed JSON"),
        (b'{"question_id": 1, "turns": ["a\xff"]}\n', "q.jsonl:1: .*UTF-8"),
    ],
)
def test_bad_prompt_files_name_file_and_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        prompt_files.load_questions(str(path))


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 1, "turns": ["a"]}\nnonsense\n{"turns": ["a"]}\n')
    found, note = prompt_files.load_questions(str(path), 5, skip_bad_rows=True)
    assert len(found) == 1
    assert note.startswith("2 bad rows skipped; ") and "5 were asked for" in note


def test_request_ids_differ_by_question_and_turn() -> None:
    rows = [Question(81, "", ("a", "b")), Question(82, "", ("a", "b")), Question("x", "", ("a",))]
    ids = [row.request_id(turn) for row in rows for turn in range(2)]
    assert len(set(ids)) == len(ids)
    assert Question("x", "", ("a",)).request_id(0) == rows[2].request_id(0)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_compare_reports_what_it_measured(
    decoder: SpeculativeDecoder, questions: list[Question], batch_size: int
) -> None:
    settings = replace(SETTINGS, batch_size=batch_size, turns=2)
    record = evaluation.compare(decoder.verifier, decoder, make_tokenizer(), questions, settings)
    summary = record["summary"]
    assert summary["compared"] == summary["identical"] == summary["prompts"] == 6
    assert summary["tokens"] == sum(row["tokens"] for row in record["rows"])
    assert summary["speedup_min"] <= summary["speedup_median"] <= summary["speedup_max"]
    steps = sum(sum(row["accepted"]) for row in record["rows"])
    assert summary["tau"] == pytest.approx((summary["tokens"] - 6) / steps)
    assert [row["turn"] for row in record["rows"][:2]] == ([1, 2] if batch_size == 1 else [1, 1])
    for row in record["rows"]:
        choice = row["choices"][0]
        assert sum(choice["accept_lengths"]) == row["tokens"] - 1
        assert choice["turns"] == [row["text"]] and choice["new_tokens"] == [row["tokens"]]
    text = evaluation.format_summary(summary)
    assert "Evaluation summary" in text and "identical outputs 6/6" in text


def test_summary_has_the_promised_keys(decoder: SpeculativeDecoder, questions: list[Question]) -> None:
    promised = [
        "method",
        "base_model",
        "speculator_path",
        "dtype",
        "device",
        "batch_size",
        "temperature",
        "prompts",
        "tokens",
        "seconds",
        "tokens_per_second",
        "tau",
        "acceptance_by_depth",
        "mean_tree_nodes",
        "phase_seconds",
    ]
    compared = [
        "baseline_tokens_per_second",
        "speculative_tokens_per_second",
        "speedup_median",
        "speedup_min",
        "speedup_max",
        "identical",
        "compared",
        "near_ties",
        "structural",
    ]
    tokenizer, verifier = make_tokenizer(), decoder.verifier
    alone = evaluation.run_speculative(decoder, tokenizer, questions, SETTINGS)["summary"]
    assert set(promised) <= set(alone) and not set(compared) & set(alone)
    both = evaluation.compare(verifier, decoder, tokenizer, questions, SETTINGS)["summary"]
    assert {*promised, *compared} <= set(both)
    baseline = evaluation.run_baseline(verifier, tokenizer, questions, SETTINGS)["summary"]
    assert baseline["method"] == "baseline" and baseline["speculator_path"] is None
    assert baseline["tau"] == 1.0


def test_texts_do_not_depend_on_the_batch(decoder: SpeculativeDecoder, questions: list[Question]) -> None:
    texts = []
    for batch_size in (1, 3):
        sampling = replace(SETTINGS.sampling, temperature=1.0)
        settings = replace(SETTINGS, batch_size=batch_size, sampling=sampling)
        rows = evaluation.run_speculative(decoder, make_tokenizer(), questions, settings)["rows"]
        texts.append([row["text"] for row in rows])
    assert texts[0] == texts[1]


def test_orders_alternate(
    decoder: SpeculativeDecoder, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    original = evaluation.Evaluation._decode

    def spy(self: evaluation.Evaluation, name: str, *rest: Any) -> None:
        order.append(name)
        original(self, name, *rest)

    monkeypatch.setattr(evaluation.Evaluation, "_decode", spy)
    monkeypatch.setattr(evaluation, "_CALL_BATCHES", 1)
    settings = replace(SETTINGS, batch_size=2)
    evaluation.compare(decoder.verifier, decoder, make_tokenizer(), questions, settings)
    assert order == ["baseline", "speculative", "speculative", "baseline"]


def test_a_long_prompt_is_cut_and_keeps_the_header_of_the_reply(
    decoder: SpeculativeDecoder,
) -> None:
    tokenizer = make_tokenizer()
    settings = replace(SETTINGS, max_prompt_length=40, turns=2)
    run = evaluation.Evaluation(decoder.verifier, decoder, tokenizer, settings, baseline=False)
    record = run.run([Question(1, "", ("word " * 50, "second turn"))])
    assert record["summary"]["cut_prompts"] == 2
    assert [row["prompt_tokens"] <= 40 for row in record["rows"]] == [True, True]
    ids, cut = run._encode([{"role": "user", "content": "word " * 50}])
    assert cut and tokenizer.decode(ids).endswith("</s><s>assistant:")
    tiny = replace(settings, max_prompt_length=5)
    run = evaluation.Evaluation(decoder.verifier, decoder, tokenizer, tiny, baseline=False)
    with pytest.raises(DataError, match="max_prompt_length 5"):
        run._encode([{"role": "user", "content": "word"}])


def test_no_new_tokens_is_no_error(decoder: SpeculativeDecoder, questions: list[Question], tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_new_tokens=0)
    record = evaluation.compare(decoder.verifier, decoder, make_tokenizer(), questions, settings)
    assert [row["text"] for row in record["rows"]] == ["", "", ""]
    evaluation.format_summary(record["summary"])
    result_files.write_json(record, tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text())["summary"]["tau"] is None


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        result_files.write_json({}, tmp_path / "r.json")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="cannot be written"):
        result_files.write_json({}, tmp_path / "file" / "r.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "r.json"]


class TestStopStrings:
    def test_tokens_up_to_the_string_are_kept_and_the_text_is_cut(self) -> None:
        tokenizer = make_tokenizer()
        stop = StopStrings(tokenizer, ["END", "é!"])
        for text, cut in (("abc END def", "abc "), ("caf é! x", "caf "), ("no end", "no end")):
            ids = tokenizer(text)["input_ids"]
            kept = next((k for n in range(1, len(ids) + 1) if (k := stop(ids[:n]))), None)
            whole = detokenizer.decode(tokenizer, ids[:kept])
            assert stop.cut(whole) == cut
            if kept is not None:
                assert whole.endswith(("END", "é!"))

    def test_an_empty_string_is_refused(self) -> None:
        with pytest.raises(UsageError):
            StopStrings(make_tokenizer(), [""])

    def test_a_reply_ends_at_the_string_for_both_decoders(
        self, decoder: SpeculativeDecoder, questions: list[Question]
    ) -> None:
        tokenizer = make_tokenizer()
        verifier: Verifier = decoder.verifier
        free = evaluation.run_baseline(verifier, tokenizer, questions, SETTINGS)["rows"][0]
        string = next(c for c in free["text"][2:] if c != "\ufffd")
        settings = replace(SETTINGS, stop=StopStrings(tokenizer, [string]))
        record = evaluation.compare(verifier, decoder, tokenizer, questions, settings)
        assert record["summary"]["identical"] == 3
        row = record["rows"][0]
        assert row["finish_reason"] == "stop"
        assert row["text"] == free["text"][: free["text"].index(string)]
