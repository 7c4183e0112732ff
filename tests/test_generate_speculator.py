"""The script from its command line: modes, exit codes, drafter resolution."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import generate_speculator
from generate_speculator import main
from recurrent_drafting import SamplingConfig, local_drafters, lossless
from recurrent_drafting.lossless import LosslessReport
from tests.faults.common import Pipe
from tests.text_models import Models, save_drafter, save_questions

FAST = ["--dtype", "fp32", "--device", "cpu", "--max_tree_nodes", "6"]


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, without released drafters, with nothing on standard input."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(local_drafters, "RELEASED", tmp_path / "released")
    monkeypatch.setattr("sys.stdin", Pipe(b""))


def run(models: Models, *argv: str) -> int:
    return main(["--speculator_path", models.drafter, "--max_generation_length", "8", *FAST, *argv])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no mode was chosen: expected one of --prompt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be"),
        (["--prompt", "a", "--top_p", "0"], "top_p must be"),
        (["--prompt", "a", "--beam_width", "0"], "--beam_width must be >= 1"),
        (["--prompt", "a", "--max_tree_nodes", "0"], "max_nodes must be"),
        (["--prompt", "a", "--max_generation_length", "-1"], "must be >= 0"),
        (["--prompt", "a", "--compare"], "--compare goes with --eval_mt_bench"),
        (["--prompt", "a", "--output_file", "r.json"], "--output_file goes with"),
        (["--prompt", "a", "--greedy_search", "--temperature", "1"], "--greedy_search excludes"),
        (["--prompt", "a", "--stop", ""], "non-empty"),
        (["--prompt", "a", "--device", "abacus"], "'abacus' is not on this machine"),
        (["--prompt", "a", "--dtype", "int3"], "'int3' is unknown"),
        (["--eval_file", "q", "--verify_lossless", "--autoregressive"], "drop --autoregressive"),
        (["--eval_file", "q", "--output_file", f"{__file__}/r.json"], "cannot be written"),
    ],
)
def test_usage_errors(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--prompt", "a", "--interactive"], "not allowed with argument"),
        (["--eval_mt_bench", "--compare", "--autoregressive"], "not allowed with argument"),
        (["--prmpt", "a"], "did you mean --prompt?"),
        (["--prompt", "a", "--max_tree_nodes", "some"], "expected auto or a number"),
    ],
)
def test_parse_errors(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(argv)
    assert leave.value.code == 2
    assert expected in capsys.readouterr().err


def test_defaults_are_those_of_the_classes() -> None:
    args = generate_speculator.build_parser().parse_args([])
    assert generate_speculator.sampling_config(args) == SamplingConfig()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"ok\n\xff", "p.txt:2: expected UTF-8")],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert main(["--prompt_file", str(tmp_path / "p.txt")]) == 3
    assert expected in capsys.readouterr().err


def test_a_missing_prompt_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt_file", "nowhere.txt"]) == 3
    assert "cannot be read" in capsys.readouterr().err


def test_the_three_one_shot_ways_and_the_baseline_agree(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "p.txt").write_text("hello\n")
    monkeypatch.setattr("sys.stdin", Pipe(b"hello\n"))
    texts = []
    for argv in (
        ["--prompt", "hello"],
        ["--prompt_file", str(tmp_path / "p.txt")],
        [],
        ["--prompt", "hello", "--autoregressive", "--base_model", models.base],
    ):
        assert run(models, *argv) == 0
        captured = capsys.readouterr()
        assert "8 tokens" in captured.err
        texts.append(captured.out)
    assert len(set(texts)) == 1 and len(texts[0].strip()) > 0


def test_no_new_tokens_and_stop_strings(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, "--prompt", "hello", "--max_generation_length", "0") == 0
    assert capsys.readouterr().out == "\n"
    assert run(models, "--prompt", "hello") == 0
    text = capsys.readouterr().out.rstrip("\n")
    assert run(models, "--prompt", "hello", "--stop", text[3:5]) == 0
    assert capsys.readouterr().out == text[: text.index(text[3:5])] + "\n"
    assert run(models, "--prompt", "hello", "--bad_words", text[0]) == 0
    assert not capsys.readouterr().out.startswith(text[0])


def test_a_prompt_over_the_window(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, "--prompt", "x" * 2000) == 3
    err = capsys.readouterr().err
    assert "context window" in err and "512" in err


def test_interactive_ends_with_its_input(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Pipe(b"hello\n/stats\n"))
    assert run(models, "--interactive") == 0
    assert "1 replies, 8 tokens" in capsys.readouterr().out


def test_compare_writes_results(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, results = save_questions(tmp_path / "q.jsonl"), tmp_path / "r.json"
    argv = ["--eval_file", str(questions), "--max_num_prompts", "9", "--turns", "2"]
    assert run(models, *argv, "--verify_lossless", "--output_file", str(results)) == 0
    captured = capsys.readouterr()
    assert "9 were asked for" in captured.err
    for part in ("Evaluation summary", "Against the baseline", "Lossless audit: "):
        assert part in captured.out
    record = json.loads(results.read_text())
    assert record["summary"]["compared"] == 6 and record["summary"]["structural"] == 0
    assert record["summary"]["speculator_path"] == models.drafter
    assert record["summary"]["base_model"] == models.base


def test_evaluation_with_a_measured_tree_and_of_the_baseline(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = str(save_questions(tmp_path / "q.jsonl", 1))
    assert run(models, "--eval_file", questions, "--max_tree_nodes", "auto") == 0
    assert "method speculative" in capsys.readouterr().out
    assert run(models, "--eval_file", questions, "--autoregressive", "--base_model", models.base) == 0
    assert "drafter none" in capsys.readouterr().out


def test_a_structural_difference_exits_6_after_the_results(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    detail = {"request_id": 7, "position": 3, "reason": "because", "verdict": "structural"}
    detail |= {"baseline": [1], "speculative": [2], "epsilon": 0.0}
    report = LosslessReport(identical=0, structural=1, epsilon=0.0, details=[detail])
    monkeypatch.setattr(lossless, "audit", lambda *_: report)
    questions, results = save_questions(tmp_path / "q.jsonl", 1), tmp_path / "r.json"
    argv = ["--eval_file", str(questions), "--compare", "--output_file", str(results)]
    assert run(models, *argv) == 6
    assert "1 structural; first at request 7, new token 3: because" in capsys.readouterr().err
    assert json.loads(results.read_text())["summary"]["structural"] == 1


class TestDrafterResolution:
    def test_the_newest_drafter_of_the_base_is_taken_and_named(
        self, models: Models, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for age, name in enumerate(("base-recurrent-drafter-2", "base-recurrent-drafter")):
            folder = save_drafter(Path("models") / name, Path(models.base))
            os.utime(folder / "model.safetensors", (1000 - age, 1000 - age))
        save_drafter(Path("models/other-recurrent-drafter"), Path("other"))
        argv = ["--base_model", models.base, "--prompt", "a", "--max_generation_length", "2", *FAST]
        assert main(argv) == 0
        assert "drafter: models/base-recurrent-drafter-2" in capsys.readouterr().err

    def test_the_released_drafter_comes_last(self, models: Models, capsys: pytest.CaptureFixture[str]) -> None:
        released = save_drafter(local_drafters.RELEASED / "base-redrafter", Path("name"))
        argv = ["--base_model", models.base, "--prompt", "a", "--max_generation_length", "2", *FAST]
        assert main(argv) == 0
        assert str(released) in capsys.readouterr().err

    def test_of_released_drafters_the_one_with_the_bases_name_alone_is_taken(self, models: Models) -> None:
        base = Path(models.base)
        special = save_drafter(local_drafters.RELEASED / "a-special-redrafter", base)
        assert local_drafters.choose(models.base) == special
        plain = save_drafter(local_drafters.RELEASED / f"{base.name}-redrafter", base)
        assert local_drafters.choose(models.base) == plain
        trained = save_drafter(Path("models/z-recurrent-drafter"), base)
        assert local_drafters.choose(models.base) == trained

    def test_no_drafter_lists_those_found(self, models: Models, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--base_model", models.base, "--prompt", "a"]) == 4
        assert "no drafters found" in capsys.readouterr().err
        save_drafter(Path("models/other-recurrent-drafter"), Path("other"))
        assert main(["--base_model", models.base, "--prompt", "a"]) == 4
        assert "models/other-recurrent-drafter (for other)" in capsys.readouterr().err
        assert main(["--speculator_path", "./nope", "--prompt", "a"]) == 4
        assert "other-recurrent-drafter" in capsys.readouterr().err

    def test_pickled_or_missing_weights_and_other_bases_are_refused(
        self, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "d"
        shutil.copytree(models.drafter, folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert run(Models(models.base, str(folder)), "--prompt", "a") == 4
        assert "pytorch_model.bin" in capsys.readouterr().err
        other = save_drafter(tmp_path / "e", Path(models.base), hidden_size=16)
        assert run(Models(models.base, str(other)), "--prompt", "a") == 4
        assert "expected hidden_size 32, the drafter has 16" in capsys.readouterr().err
