"""The sweep and the report from the command line of the generation script, and what a tracker gets of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import generate_speculator
from generate_speculator import main
from recurrent_drafting import checkpoint, cli, evaluation_tracking, lossless, manifest
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.config import BeamConfig
from recurrent_drafting.lossless import LosslessReport
from recurrent_drafting.sweep import SweepSettings, format_table, recommend
from tests.html_pages import parse
from tests.text_models import save_drafter, save_questions

FAST = ["--dtype", "fp32", "--device", "cpu", "--max_generation_length", "8"]
GRID = ["--sweep", "--sweep_widths", "1", "3", "--beam_length", "2", "--sweep_nodes", "auto", "4"]


@pytest.fixture(scope="module")
def models(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    drafter = save_drafter(folder / "drafter", base)
    checkpoint.save_drafter(load_drafter(str(drafter)), drafter, {"data": "abc"})
    return str(drafter), str(save_questions(folder / "q.jsonl", 2))


def run(models: tuple[str, str], *argv: str) -> int:
    return main(["--speculator_path", models[0], "--eval_file", models[1], *FAST, *argv])


def point(width: int, nodes: int | None, gain: float) -> dict[str, Any]:
    return {"width": width, "length": 2, "max_nodes": nodes, "speedup_median": gain}


def test_the_best_shape_over_all_temperatures_is_recommended() -> None:
    points = [point(1, None, 2.0), point(4, 8, 1.5), point(1, None, 0.9), point(4, 8, 1.25)]
    assert recommend(points) == (BeamConfig(4, 2, 8), pytest.approx(math.sqrt(1.5 * 1.25)))


def test_a_sweep_prints_writes_draws_and_saves(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "sweep.json", tmp_path / "sweep.html"
    argv = [*GRID, "--sweep_temperatures", "0", "1", "--output_file", str(out), "--report", str(page)]
    assert run(models, *argv, "--save_recommended") == 0
    record = json.loads(out.read_text())
    points, best = record["sweep"]["points"], record["sweep"]["recommended"]
    assert len({(p["width"], p["length"], p["max_nodes"], p["temperature"]) for p in points}) == len(points) == 8
    assert all(p["identical"] == p["compared"] == 2 and p["tokens"] == 16 for p in points)
    assert all(p["speedup_min"] <= p["speedup_median"] <= p["speedup_max"] for p in points)
    chosen, gain = recommend(points)
    assert best == {"width": chosen.width, "length": 2, "max_nodes": chosen.max_nodes, "speedup": pytest.approx(gain)}
    printed = capsys.readouterr().out
    assert format_table(record) in printed and f"recommended: --beam_width {best['width']} --beam_length 2" in printed
    config = load_drafter(models[0]).config  # compares the files with the manifest
    assert (config.beam_width, config.beam_length, config.hidden_size) == (best["width"], 2, 32)
    assert manifest.read(Path(models[0]))["fingerprints"]["data"] == "abc"
    root = parse(page.read_text(encoding="utf-8"))
    assert len(root.all("figure")) == 4 and len(root.all("rect", "best")) == 2
    cells = [line.all("td")[7].text for line in root.all("table")[0].all("tr")[1:]]
    assert sorted(cells) == sorted(f"{p['tau']:.3f}" for p in points)
    # The same point measured alone: texts and steps do not depend on what else is tried.
    alone = ["--beam_width", "3", "--beam_length", "2", "--max_tree_nodes", "4", "--temperature", "1"]
    assert run(models, *alone, "--output_file", str(tmp_path / "one.json")) == 0
    summary = json.loads((tmp_path / "one.json").read_text())["summary"]
    [same] = [p for p in points if (p["width"], p["max_nodes"], p["temperature"]) == (3, 4, 1.0)]
    assert (summary["tau"], summary["acceptance_by_depth"]) == (same["tau"], same["acceptance_by_depth"])


def test_a_sweep_takes_few_prompts_spread_over_the_file(models: tuple[str, str], tmp_path: Path) -> None:
    args = generate_speculator.build_parser().parse_args(["--eval_file", models[1], "--sweep"])
    ten = save_questions(tmp_path / "ten.jsonl", 10)
    args.eval_file = str(ten)
    found = generate_speculator.load_questions(args)
    assert found is not None and [question.question_id for question in found] == [80, 81, 82, 83, 85, 86, 87, 88]


def test_an_evaluation_writes_its_report_and_says_where(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "new" / "r.html", tmp_path / "r.json"
    argv = ["--compare", "--max_tree_nodes", "4", "--max_num_prompts", "2", "--output_file", str(out)]
    assert run(models, *argv, "--report", str(page)) == 0
    assert f"report: {page}" in capsys.readouterr().out
    root = parse(page.read_text(encoding="utf-8"))
    summary = json.loads(out.read_text())["summary"]
    assert f"{summary['tau']:.3f}" in [item.parts[0] for item in root.all("dd")]
    assert f"{summary['identical']}/2" in [item.parts[0] for item in root.all("dd")]


def test_a_structural_difference_is_reported_before_the_exit(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detail = {"request_id": 7, "position": 3, "reason": "because", "verdict": "structural", "epsilon": 0.0}
    detail |= {"baseline": [1], "speculative": [2]}
    monkeypatch.setattr(lossless, "audit", lambda *_: LosslessReport(structural=1, epsilon=0.0, details=[detail]))
    argv = ["--max_num_prompts", "1", "--max_tree_nodes", "4", "--report", str(tmp_path / "r.html")]
    assert run(models, "--compare", *argv) == 6
    assert parse((tmp_path / "r.html").read_text(encoding="utf-8")).all("p", "alarm")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--prompt", "a", "--report", "r.html"], "--report goes with --eval_mt_bench or --eval_file"),
        (["--prompt", "a", "--sweep"], "--sweep goes with --eval_mt_bench or --eval_file"),
        (["--prompt", "a", "--use_wandb"], "--use_wandb goes with --eval_mt_bench or --eval_file"),
        (["--eval_file", "q", "--report", f"{__file__}/r.html"], "--report"),
        (["--eval_file", "q", "--sweep_widths", "1"], "--sweep_widths goes with --sweep"),
        (["--eval_file", "q", "--save_recommended"], "--save_recommended goes with --sweep"),
        (["--eval_file", "q", "--sweep", "--verify_lossless"], "drop --sweep"),
        (["--eval_file", "q", "--sweep", "--sweep_widths", "0"], "beam width must be an integer >= 1"),
        (["--eval_file", "q", "--sweep", "--sweep_temperatures", "-1"], "temperature must be"),
        (["--eval_file", "q", "--sweep", "--max_generation_length", "1"], "--max_generation_length >= 2"),
        (
            ["--eval_file", "q", "--sweep", "--beam_width", "3", "--sweep_widths", "1"],
            "--sweep_widths excludes --beam_width 3",
        ),
        (
            ["--eval_file", "q", "--sweep", "--max_tree_nodes", "auto", "--sweep_nodes", "4"],
            "--max_tree_nodes auto: give",
        ),
        (["--eval_file", "q", "--sweep", "--temperature", "0", "--sweep_temperatures", "1"], "--temperature 0.0: "),
        (["--eval_file", "q", "--sweep", "--greedy_search", "--sweep_temperatures", "1"], "excludes --greedy_search"),
    ],
)
def test_usage_errors(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "nodes", "temperatures"),
    [
        ([], (None, 16), (0.0, 1.0)),
        (["--max_tree_nodes", "6", "--temperature", "0.7"], (6,), (0.7,)),
        (["--max_tree_nodes", "auto", "--temperature", "0"], (None,), (0.0,)),
        (["--greedy_search"], (None, 16), (0.0,)),
        (["--greedy_search", "--temperature", "0"], (None, 16), (0.0,)),
    ],
)
def test_a_flag_of_one_value_fixes_its_axis(
    argv: list[str], nodes: tuple[int | None, ...], temperatures: tuple[float, ...]
) -> None:
    args = generate_speculator.build_parser().parse_args(["--sweep", *argv])
    grid = cli.settings_of(SweepSettings, args).grid()
    assert (grid.nodes, grid.temperatures, grid.widths) == (nodes, temperatures, (1, 4, 10))


@pytest.mark.parametrize("argv", [["--temperature", "0"], ["--greedy_search"]])
def test_a_greedy_sweep_does_not_sample(models: tuple[str, str], tmp_path: Path, argv: list[str]) -> None:
    out = tmp_path / "sweep.json"
    shape = ["--sweep", "--beam_width", "2", "--beam_length", "2", "--max_tree_nodes", "auto"]
    assert run(models, *shape, *argv, "--max_num_prompts", "1", "--output_file", str(out)) == 0
    [point] = json.loads(out.read_text())["sweep"]["points"]
    assert (point["max_nodes"], point["temperature"]) == (None, 0.0)


RECORD: dict[str, Any] = {
    "summary": {"method": "speculative", "base_model": "x", "tau": 1.5, "acceptance_by_depth": [0.5, 0.25]},
    "settings": {"max_new_tokens": 8, "latency_curve": {"nodes": [1]}, "token": "secret"},
    "machine": {"processor": "abacus"},
    "rows": [{"question_id": 1, "tokens": 8, "seconds": 2.0, "baseline_tokens": 8, "baseline_seconds": 4.0}],
}


class TestTracking:
    def test_only_what_is_listed_leaves(self, models: tuple[str, str]) -> None:
        record = {**RECORD, "summary": {**RECORD["summary"], "speculator_path": models[0]}}
        config = evaluation_tracking.config(record)
        assert config == {
            **{"method": "speculative", "base_model": "x", "speculator_path": Path(models[0]).name, "max_new_tokens": 8}
        }
        figures = {"tau": 1.5, "acceptance_by_depth/1": 0.5, "acceptance_by_depth/2": 0.25}
        assert evaluation_tracking.figures(record) == figures
        columns, [row] = evaluation_tracking.table(record)
        assert dict(zip(columns, row, strict=True))["speedup"] == 2.0

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
    def test_an_offline_run_stays_on_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb = pytest.importorskip("wandb")
        for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        evaluation_tracking.log(RECORD, "drafters")
        assert wandb.run is None
        wandb.teardown()  # its own process ends only now, and with it the settings that later runs would take over
        [table] = tmp_path.rglob("evaluation_*.table.json")
        assert json.loads(table.read_text())["data"][0][0] == "1"
        [log] = tmp_path.rglob("*.wandb")
        assert b"drafters" in log.read_bytes() and b"secret" not in log.read_bytes()
