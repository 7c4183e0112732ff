"""Rows 1-5, 20, 25, 26 and 35: what the command line itself can get wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import generate_speculator
import huggingface_deployment
import train_speculator
from recurrent_drafting import distillation, formats, report, run_guard
from tests.faults.common import Capture, Main, Models, generate, generate_argv, refused, train, train_argv
from tests.text_models import save_drafter

SCRIPTS: dict[str, tuple[Main, list[str]]] = {
    "generate": (generate_speculator.main, []),
    "train": (train_speculator.main, []),
    "deploy": (huggingface_deployment.main, ["--model_path", "d", "--repo_name", "a/b"]),
    "distillation": (distillation.main, ["--output_dir", "d"]),
    "checkpoint": (formats.main, ["export", "--format", "apple", "a", "b"]),
    "report": (report.main, ["out.html", "r.json"]),
}


@pytest.mark.parametrize(
    ("script", "flag", "nearest"),
    [
        ("generate", "--beam_widht", "--beam_width"),
        ("generate", "--promt", "--prompt"),
        ("generate", "--temperture", "--temperature"),
        ("generate", "--eval-mt-bench", "--eval_mt_bench"),
        ("generate", "--maxtree_nodes", "--max_tree_nodes"),
        ("train", "--learnin_rate", "--learning_rate"),
        ("train", "--quik", "--quick"),
        ("train", "--drafter_num_layer", "--drafter_num_layers"),
        ("train", "--hiden_state_cache", "--hidden_state_cache"),
        ("deploy", "--privat", "--private"),
        ("deploy", "--dry-run", "--dry_run"),
        ("distillation", "--num_row", "--num_rows"),
        ("distillation", "--greedy_shre", "--greedy_share"),
        ("checkpoint", "--debgu", "--debug"),
        ("report", "--debg", "--debug"),
    ],
)
def test_a_misspelt_flag_names_the_nearest(script: str, flag: str, nearest: str, capsys: Capture) -> None:
    main, usual = SCRIPTS[script]
    refused(main, [*usual, flag], 2, capsys, f"unknown argument {flag}", f"did you mean {nearest}?")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_like_none_is_refused_too(script: str, capsys: Capture) -> None:
    main, usual = SCRIPTS[script]
    refused(main, [*usual, "--qqqqqq"], 2, capsys, "unknown argument --qqqqqq", "--help")


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("temperature", "-1", "temperature must be a finite number >= 0"),
        ("temperature", "nan", "temperature must be a finite number >= 0"),
        ("temperature", "inf", "temperature must be a finite number >= 0"),
        ("temperature", "-inf", "temperature must be a finite number >= 0"),
        ("top_p", "0", "top_p must be in (0, 1]"),
        ("top_p", "-0.5", "top_p must be in (0, 1]"),
        ("top_p", "1.01", "top_p must be in (0, 1]"),
        ("top_p", "nan", "top_p must be in (0, 1]"),
        ("min_p", "-0.1", "min_p must be in [0, 1]"),
        ("min_p", "1.5", "min_p must be in [0, 1]"),
        ("min_p", "nan", "min_p must be in [0, 1]"),
        ("top_k", "-1", "top_k must be an integer >= 0"),
        ("top_k", "2.5", "invalid int value: '2.5'"),
        ("repetition_penalty", "0", "repetition_penalty must be a finite number > 0"),
        ("repetition_penalty", "nan", "repetition_penalty must be a finite number > 0"),
        ("presence_penalty", "inf", "presence_penalty must be a finite number"),
        ("frequency_penalty", "nan", "frequency_penalty must be a finite number"),
        ("min_new_tokens", "-1", "min_new_tokens must be an integer >= 0"),
    ],
)
@pytest.mark.parametrize("mode", [["--prompt", "a"], ["--eval_file", "q.jsonl"]], ids=["prompt", "file"])
def test_sampling_out_of_range(flag: str, value: str, named: str, mode: list[str], capsys: Capture) -> None:
    refused(generate_speculator.main, [*mode, f"--{flag}={value}"], 2, capsys, named, value.strip("-"))


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("distill_temperature", "-1", "must be >= 0 and finite"),
        ("distill_temperature", "nan", "must be >= 0 and finite"),
        ("kd_temperature", "0", "kd_temperature must be > 0 and finite"),
        ("kd_temperature", "inf", "kd_temperature must be > 0 and finite"),
        ("kd_alpha", "-0.1", "kd_alpha must be in [0, 1]"),
        ("kd_alpha", "nan", "kd_alpha must be in [0, 1]"),
        ("learning_rate", "inf", "learning_rate must be >= 0 and finite"),
        ("depth_decay", "nan", "depth_decay must be > 0 and finite"),
    ],
)
def test_training_settings_out_of_range(flag: str, value: str, named: str, capsys: Capture) -> None:
    refused(train_speculator.main, train_argv("base", "rows.jsonl", f"--{flag}={value}"), 2, capsys, named)


@pytest.mark.parametrize(
    ("main", "flag", "value"),
    [
        (generate_speculator.main, "--beam_width", "0"),
        (generate_speculator.main, "--beam_width", "-3"),
        (generate_speculator.main, "--beam_length", "0"),
        (generate_speculator.main, "--beam_length", "-1"),
    ],
)
def test_no_beam(main: Main, flag: str, value: str, capsys: Capture) -> None:
    refused(main, ["--prompt", "a", flag, value], 2, capsys, f"{flag} must be >= 1, got {value}")


@pytest.mark.parametrize("name", ["lookup_length", "recycled_nodes"])
def test_copies_and_nodes_below_nothing(name: str, models: Models, chats: str, capsys: Capture) -> None:
    refused(generate_speculator.main, ["--prompt", "a", f"--{name}", "-1"], 2, capsys, f"--{name} must be >= 0")
    argv = train_argv(models.base, chats, f"--{name}", "-1")
    refused(train_speculator.main, argv, 2, capsys, f"{name} must be an integer >= 0, got -1")


@pytest.mark.parametrize("flag", ["--beam_width", "--beam_length"])
def test_no_beam_in_training(models: Models, chats: str, flag: str, capsys: Capture) -> None:
    argv = train_argv(models.base, chats, flag, "0")
    refused(train_speculator.main, argv, 2, capsys, "must be an integer >= 1, got 0")


@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8"]], ids=["greedy", "sampled"])
def test_a_width_above_the_draft_vocabulary_is_cut_with_a_warning(
    models: Models, tmp_path: Path, sampling: list[str], caplog: pytest.LogCaptureFixture, capsys: Capture
) -> None:
    few = Models(models.base, str(save_drafter(tmp_path / "few", Path(models.base), draft_vocab_size=5)))
    assert generate(few, "--prompt", "hello", "--autoregressive", "--base_model", models.base, *sampling) == 0
    expected = capsys.readouterr().out
    assert generate(few, "--prompt", "hello", "--beam_width", "9", *sampling) == 0
    assert capsys.readouterr().out == expected
    assert caplog.messages == ["beam width 9 is cut to the draft vocabulary of 5 tokens"]
    caplog.clear()
    assert generate(few, "--prompt", "hello", "--beam_width", "5", *sampling) == 0
    assert caplog.messages == []


@pytest.mark.parametrize("more", [[], ["--autoregressive"], ["--temperature", "1"], ["--stop", "x"]])
def test_no_new_tokens_is_an_empty_reply(models: Models, more: list[str], capsys: Capture) -> None:
    argv = ["--prompt", "hello", "--max_generation_length", "0", "--base_model", models.base, *more]
    assert generate(models, *argv) == 0
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("more", [[], ["--autoregressive"], ["--compare"], ["--batch_size", "3", "--turns", "2"]])
def test_no_new_tokens_in_an_evaluation(models: Models, questions: Path, more: list[str], capsys: Capture) -> None:
    argv = ["--eval_file", str(questions), "--max_generation_length", "0", "--base_model", models.base, *more]
    assert generate(models, *argv) == 0
    assert "Evaluation summary" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (
            [],
            "no mode was chosen: expected one of --prompt, --prompt_file, --interactive, --eval_mt_bench, --eval_file",
        ),
        (["--prompt", "a", "--interactive"], "not allowed with argument --prompt"),
        (["--prompt", "a", "--eval_mt_bench"], "not allowed with argument --prompt"),
        (["--eval_file", "f", "--interactive"], "not allowed with argument"),
        (["--eval_file", "f", "--compare", "--autoregressive"], "not allowed with argument"),
        (["--eval_file", "f", "--sweep", "--compare"], "not allowed with argument"),
        (["--eval_file", "f", "--verify_lossless", "--autoregressive"], "drop --autoregressive"),
        (["--prompt", "a", "--sweep"], "--sweep goes with --eval_mt_bench or --eval_file"),
        (["--interactive", "--report", "r.html"], "--report goes with --eval_mt_bench or --eval_file"),
        (["--prompt", "a", "--greedy_search", "--temperature", "1"], "give one"),
        (["--eval_file", "f", "--sweep", "--sweep_widths", "1", "--beam_width", "2"], "give one"),
        (["--eval_file", "f", "--save_recommended"], "--save_recommended goes with --sweep"),
    ],
)
def test_modes(argv: list[str], named: str, capsys: Capture) -> None:
    refused(generate_speculator.main, argv, 2, capsys, named)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--phase", "eval"], "name it with --drafter_name_or_path"),
        (["--targets", "distilled", "--objective", "kl"], "use --objective ce"),
        (["--bf16", "--fp16"], "fp16"),
    ],
)
def test_modes_of_training(models: Models, chats: str, argv: list[str], named: str, capsys: Capture) -> None:
    refused(train_speculator.main, train_argv(models.base, chats, *argv), 2, capsys, named)


@pytest.mark.parametrize(
    ("flag", "value", "choices"),
    [
        ("--device", "abacus", "expected one of auto, cpu"),
        ("--device", "cuda:99", "expected one of auto, cpu"),
        ("--device", "", "expected one of auto, cpu"),
        ("--device", "mps", "noise in float64, which Apple's GPUs do not have; expected one of auto, cpu"),
        ("--dtype", "int3", "expected one of auto, fp32, bf16, fp16, fp64"),
        ("--dtype", "float32", "expected one of auto, fp32, bf16, fp16, fp64"),
    ],
)
def test_a_device_or_dtype_that_is_not_here(flag: str, value: str, choices: str, capsys: Capture) -> None:
    refused(generate_speculator.main, ["--prompt", "a", flag, value], 2, capsys, repr(value), choices)


@pytest.mark.parametrize("kind", ["file", "below a file", "not empty", "proc"])
def test_an_output_directory_that_cannot_be_used(models: Models, chats: str, kind: str, capsys: Capture) -> None:
    Path("taken").write_text("mine")
    Path("full").mkdir()
    Path("full/precious").write_text("mine")
    paths = {"file": "taken", "below a file": "taken/x", "not empty": "full", "proc": "/proc/no/such"}
    argv = train_argv(models.base, chats, "--output_dir", paths[kind])
    refused(train_speculator.main, argv, 2, capsys, f"--output_dir {paths[kind]}")
    assert Path("taken").read_text() == Path("full/precious").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--output_file", "--report"])
@pytest.mark.parametrize("where", ["/dev/null/r.json", "taken/r.json", "folder"])
def test_a_result_file_that_cannot_be_written(flag: str, where: str, capsys: Capture) -> None:
    Path("taken").write_text("mine")
    Path("folder").mkdir()
    refused(generate_speculator.main, ["--eval_file", "q", flag, where], 2, capsys, f"{flag} {where} cannot be written")


@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "True"]])
def test_two_runs_on_one_directory(models: Models, chats: str, more: list[str], capsys: Capture) -> None:
    Path("out").mkdir()
    with run_guard.only_run(Path("out")):
        argv = train_argv(models.base, chats, *more)
        refused(train_speculator.main, argv, 2, capsys, "lock out/.lock", f"process {os.getpid()}")
        assert [path.name for path in Path("out").iterdir()] == [".lock"]


@pytest.mark.parametrize("script", ["train", "generate"])
def test_wandb_that_is_not_installed(
    models: Models, chats: str, script: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    main, argv = {
        "train": (train_speculator.main, train_argv(models.base, chats, "--use_wandb", "True")),
        "generate": (generate_speculator.main, generate_argv(models, "--eval_file", "q", "--use_wandb")),
    }[script]
    refused(main, argv, 2, capsys, "pip install wandb")
    assert train(models.base, chats) == 0  # without it the same run works


@pytest.mark.parametrize("script", ["generate", "checkpoint"])
def test_a_traceback_comes_only_with_debug(script: str, capsys: Capture) -> None:
    main, argv = {
        "generate": (generate_speculator.main, ["--prompt", "a", "--temperature", "-1"]),
        "checkpoint": (formats.main, ["import", "--format", "apple", "nowhere", "out"]),
    }[script]
    refused(main, argv, 2 if script == "generate" else 4, capsys)
    assert main([*argv, "--debug"]) == (2 if script == "generate" else 4)
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.rstrip().splitlines()[-1].startswith("error: ")
