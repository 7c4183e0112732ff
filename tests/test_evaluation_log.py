"""Evaluations that are cut off and go on: nothing finished is lost or measured twice, and only the same run goes on."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import generate_speculator
from recurrent_drafting import Drafter, SpeculativeDecoder, evaluation, evaluation_log, prompt_files
from recurrent_drafting.errors import DataError, ModelError, UsageError
from recurrent_drafting.evaluation import RunSettings
from recurrent_drafting.prompt_files import Question
from recurrent_drafting.tree_budget import LatencyCurve, LatencyTable
from tests.text_models import Models, load_verifier, make_tokenizer, save_base, save_drafter, save_questions

SETTINGS = RunSettings(base_model="base", speculator_path="drafter", max_new_tokens=12, turns=2)
CURVE = LatencyCurve((1, 4, 41), (0.01, 0.02, 0.04), 0.001)
TABLE = LatencyTable({1: CURVE})


@pytest.fixture(scope="module")
def decoder(models: Models) -> SpeculativeDecoder:
    return SpeculativeDecoder(
        load_verifier(models.base, "fp64"), Drafter.from_pretrained(models.drafter), latency=TABLE
    )


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return prompt_files.load_questions(str(save_questions(tmp_path / "q.jsonl", 4)))[0]


class InterruptedEvaluation(evaluation.Evaluation):
    """Meets Ctrl-C in the middle of a batch."""

    def __init__(self, *args: Any, after: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._left = after

    def _decode(self, *args: Any) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        super()._decode(*args)


def run(
    decoder: SpeculativeDecoder, questions: Sequence[Question], path: Path | None, settings: RunSettings = SETTINGS
) -> dict[str, Any]:
    return evaluation.compare(decoder.verifier, decoder, make_tokenizer(), questions, settings, path)


def script(folder: Path) -> tuple[list[str], Path]:
    """Make what an evaluation of three questions needs; return its command line and where the results go."""
    base = save_base(folder / "base")
    drafter, asked = save_drafter(folder / "drafter", base), save_questions(folder / "q.jsonl", 3)
    out = folder / "new" / "r.json"
    argv = ["--speculator_path", str(drafter), "--eval_file", str(asked), "--max_generation_length", "8"]
    return [*argv, "--dtype", "fp32", "--device", "cpu", "--output_file", str(out)], out


def interrupt(
    decoder: SpeculativeDecoder, questions: Sequence[Question], path: Path, settings: RunSettings, after: int
) -> None:
    cut_off = InterruptedEvaluation(decoder.verifier, decoder, make_tokenizer(), settings, baseline=True, after=after)
    with pytest.raises(KeyboardInterrupt):
        cut_off.run(questions, path)


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out what no two runs have in common."""
    rows = []
    for row in record["rows"]:
        choices = [{**choice, "wall_time": None} for choice in row["choices"]]
        rows.append({**row, "seconds": 0, "baseline_seconds": 0, "tstamp": 0, "choices": choices})
    same = ("prompts", "tokens", "tau", "acceptance_by_depth", "mean_tree_nodes", "identical", "compared")
    return {"rows": rows, "summary": {name: record["summary"][name] for name in same}}


@pytest.mark.parametrize(
    ("batch_size", "after", "kept"), [(1, 6, 1), pytest.param(1, 8, 2, marks=pytest.mark.slow), (3, 5, 1)]
)
def test_a_run_that_was_cut_off_ends_as_one_in_one_go(
    decoder: SpeculativeDecoder,
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    after: int,
    kept: int,
) -> None:
    monkeypatch.setattr(evaluation, "_CALL_BATCHES", 1)
    path, settings = tmp_path / "p.jsonl", replace(SETTINGS, batch_size=batch_size)
    whole = run(decoder, questions, None, settings)
    interrupt(decoder, questions, path, settings, after)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("batch" in line for line in lines) == kept
    seconds = lines[-1]["batch"]["rows"][0]["outputs"]["speculative"]["seconds"]
    again = run(decoder, questions, path, settings)
    assert untimed(again) == untimed(whole)
    assert (again["sessions"], "sessions" in whole) == (2, False)
    assert seconds in [row["seconds"] for row in again["rows"]]  # measured once, kept
    total = sum(row["seconds"] for row in again["rows"] if batch_size == 1)
    assert batch_size > 1 or again["summary"]["seconds"] == pytest.approx(total)


def test_the_alternation_of_the_decoders_goes_on(
    decoder: SpeculativeDecoder, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, turns=1)
    interrupt(decoder, questions, tmp_path / "p.jsonl", settings, after=2)
    order: list[str] = []
    original = evaluation.Evaluation._decode

    def spy(self: evaluation.Evaluation, name: str, *rest: Any) -> None:
        order.append(name)
        original(self, name, *rest)

    monkeypatch.setattr(evaluation.Evaluation, "_decode", spy)
    run(decoder, questions, tmp_path / "p.jsonl", settings)
    assert order == [*("speculative", "baseline"), *("baseline", "speculative"), *("speculative", "baseline")]


def test_a_torn_last_line_is_measured_again(
    decoder: SpeculativeDecoder, questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    interrupt(decoder, questions, path, SETTINGS, after=8)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert untimed(run(decoder, questions, path)) == untimed(run(decoder, questions, None))
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_other_settings_are_refused_by_name(
    decoder: SpeculativeDecoder, questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    interrupt(decoder, questions, path, SETTINGS, after=5)
    before = path.read_bytes()
    other = replace(SETTINGS, max_new_tokens=9, sampling=replace(SETTINGS.sampling, seed=3))
    with pytest.raises(ModelError) as error:
        run(decoder, questions, path, other)
    assert "settings.max_new_tokens 12, now 9; settings.sampling.seed 0, now 3; repeat" in str(error.value)
    with pytest.raises(ModelError, match=r"with questions\.count 4, now 3; questions\.sha256"):
        run(decoder, questions[:3], path)
    with pytest.raises(ModelError, match=r"with decoders \['baseline', 'speculative'\], now \['speculative'\]; repeat"):
        evaluation.run_speculative(decoder, make_tokenizer(), questions, SETTINGS, path)
    retrained = SpeculativeDecoder(decoder.verifier, decoder.drafter, decoder.beam, latency=TABLE)
    next(retrained.drafter.parameters()).data.add_(1.0)
    with pytest.raises(ModelError, match=r"with drafter '[0-9a-f]{12}', now"):
        run(retrained, questions, path)
    next(retrained.drafter.parameters()).data.sub_(1.0)
    assert path.read_bytes() == before


def test_a_run_that_finished_nothing_does_not_bind_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, out = script(tmp_path)
    assert generate_speculator.main([*argv, "--max_prompt_length", "5"]) == 3
    assert "--max_prompt_length 5 leaves no room" in capsys.readouterr().err
    assert evaluation_log.path_for(out).exists()
    assert generate_speculator.main(argv) == 0
    assert "going on from" not in capsys.readouterr().err
    assert json.loads(out.read_text())["sessions"] == 1

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SpeculativeDecoder, "generate", interrupted)
    assert generate_speculator.main(argv) == 130
    err = capsys.readouterr().err
    assert err.endswith("error: interrupted\n") and "kept in" not in err


def test_tree_sizes_follow_the_curves_of_the_first_session(
    decoder: SpeculativeDecoder, questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    interrupt(decoder, questions, path, SETTINGS, after=5)
    other = SpeculativeDecoder(
        decoder.verifier,
        decoder.drafter,
        decoder.beam,
        latency=LatencyTable({1: LatencyCurve((1, 41), (0.01, 9.0), 0.001)}),
    )
    record = run(other, questions, path)
    assert record["settings"]["latency_curve"]["nodes"] == CURVE.nodes
    assert untimed(record) == untimed(run(decoder, questions, None))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"summary": {}}\n', "its first line names no run"),
        (b"no json\n", "line 1 is no JSON"),
        (b'{"identity": {}}\n5\n', "line 2 is no JSON object"),
        (b"[1]\n", "line 1 is no JSON object"),
    ],
)
def test_files_of_another_kind_are_refused_and_kept(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected), evaluation_log.opened(path, {}):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda batch: batch.pop("stats"), "batch 1 is not what a run writes"),
        (lambda batch: batch["rows"].pop(), "batch 1 is not what a run writes"),
        (lambda batch: batch["rows"][0].update(outputs=5), "batch 1 is not what a run writes"),
        (lambda batch: batch["stats"]["baseline"].update(unknown=1), "batch 1 is not what a run writes"),
    ],
)
def test_a_damaged_batch_is_refused_and_kept(
    decoder: SpeculativeDecoder, questions: list[Question], tmp_path: Path, damage: Any, expected: str
) -> None:
    path = tmp_path / "p.jsonl"
    interrupt(decoder, questions, path, SETTINGS, after=6)
    lines = path.read_text().splitlines()
    place = next(index for index, line in enumerate(lines) if "batch" in json.loads(line))
    entry = json.loads(lines[place])
    damage(entry["batch"])
    lines[place] = json.dumps(entry)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=expected):
        run(decoder, questions, path)
    assert path.read_text().startswith("\n".join(lines))


def test_more_batches_than_the_run_has_are_refused(
    decoder: SpeculativeDecoder, questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    run(decoder, questions, path)
    batch = next(line for line in path.read_text().splitlines() if "batch" in json.loads(line))
    path.write_text(path.read_text() + batch + "\n")
    with pytest.raises(DataError, match="it holds 5 batches, the run has 4"):
        run(decoder, questions, path)


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with evaluation_log.opened(path, {"a": 1}) as log:
        log.append({"rows": []})
        with pytest.raises(UsageError, match="in use by another run"), evaluation_log.opened(path, {"a": 1}):
            pass
    with evaluation_log.opened(path, {"a": 1}) as log:
        assert (log.entries, log.sessions) == ([{"rows": []}], 2)


def test_a_file_system_without_locks_is_said_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    argv, out = script(tmp_path)
    assert generate_speculator.main([*argv, "--max_num_prompts", "1"]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 1
    [message] = [record.getMessage() for record in caplog.records if "lock" in record.getMessage()]
    assert f"{evaluation_log.path_for(out)} cannot be locked (No locks available)" in message


def test_the_script_goes_on_and_removes_the_file_when_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, out = script(tmp_path)
    original = SpeculativeDecoder.generate
    calls: list[int] = []

    def interrupted(self: SpeculativeDecoder, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the warm-up, two questions, and the third
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SpeculativeDecoder, "generate", interrupted)
        assert generate_speculator.main(argv) == 130
    progress = evaluation_log.path_for(out)
    err = capsys.readouterr().err
    assert f"kept in {progress}: run the same command again" in err and err.endswith("error: interrupted\n")
    assert not out.exists()
    assert generate_speculator.main([*argv, "--seed", "5"]) == 4
    assert "settings.sampling.seed 0, now 5" in capsys.readouterr().err
    assert generate_speculator.main(argv) == 0
    assert f"going on from {progress}" in capsys.readouterr().err
    record = json.loads(out.read_text())
    assert (len(record["rows"]), record["sessions"], progress.exists()) == (3, 2, False)
