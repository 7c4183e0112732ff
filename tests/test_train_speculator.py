"""The training script from its command line: a drafter comes out, and every fault has its code."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import train_speculator
from recurrent_drafting import RecurrentDraftingConfig, Verifier, assets, memory, quick_run, run_guard
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.decoding import check_fit
from recurrent_drafting.trainer import DrafterTrainer, TrainingArguments
from tests.html_pages import parse
from tests.text_models import save_chats, save_drafter, save_questions
from train_speculator import main

FAST = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no", "--disable_tqdm", "True"]
SMALL = ["--model_max_length", "96", "--max_eval_samples", "1", "--seed", "3"]
GIVEN = ["--targets", "ground_truth"]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return str(save_chats(tmp_path / "chats.jsonl"))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory; nothing is tried over the network (what HF_HUB_OFFLINE=1 does at start-up)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train_speculator, "SERVE_CHECK_TOKENS", 8)


def run(base: str, data: str, *argv: str) -> int:
    return main(["--llm_name_or_path", base, "--dataset_name", data, "--output_dir", "out", *FAST, *SMALL, *argv])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# Training


@pytest.mark.parametrize("targets", ["ground_truth", "regenerated"])
def test_a_drafter_comes_out_that_fits_its_base(
    base: str, chats: str, targets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, "--targets", targets, "--drafter_num_layers", "1", "--beam_width", "3") == 0
    out = capsys.readouterr().out
    assert "8 conversations from" in out and "left out none" in out
    assert "simulated tau on held-out rows: " in out and "drafter saved: out" in out
    drafter = load_drafter("out")
    config = drafter.config
    assert (config.verifier_name_or_path, config.hidden_size, config.vocab_size) == (base, 32, 258)
    assert (config.num_draft_layers, config.beam_width, config.num_draft_tokens) == (1, 3, 4)
    check_fit(Verifier.from_pretrained(base, "fp32", "cpu"), drafter)
    start = load_drafter(str(save_drafter(Path("start"), Path(base))))
    assert not drafter.head.weight.equal(start.head.weight)
    assert sorted(path.name for path in Path("out").glob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--use_distilled_dataset", "--distill_max_examples", "5"],
        ["--targets", "distilled", "--distill_temperature", "0.7", "--objective", "expected_length"],
        [*GIVEN, "--objective", "expected_length", "--expected_length_share", "0.5", "--kd_alpha", "0.5"],
    ],
    ids=["distilled", "sampled", "mixed"],
)
def test_distilled_targets_and_the_expected_length_train_a_drafter(
    base: str, chats: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, *argv, "--hidden_state_cache", "states") == 0
    out = capsys.readouterr().out
    assert "'eval_expected_length'" in out
    load_drafter("out")
    if "--distill_max_examples" in argv:
        rows = re.findall(r"distilled targets: (\d+) rows, (\d+) positions of 5 tokens", out)
        assert [int(count) for count, _ in rows] == [5, 1]
        assert int(rows[0][1]) > 5 * 10  # "the answer is ..." is longer than 10 characters


def test_training_writes_a_report_that_equals_its_log(
    base: str, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, *GIVEN, "--logging_steps", "1") == 0
    assert "report: out/report.html" in capsys.readouterr().out
    state = json.loads(Path("out/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    held_out = next(entry for entry in state["log_history"] if "eval_loss" in entry)
    root = parse(Path("out/report.html").read_text(encoding="utf-8"))
    marks = [f"training at {step}: {loss:.4g}" for step, loss in enumerate(losses, 1)]
    assert root.marks("Loss") == [*marks, f"held out at 2: {held_out['eval_loss']:.4g}"]
    assert f"{held_out['eval_simulated_tau']:.3f}" in [item.text for item in root.all("dd")]


def test_quick_measures_and_reports_both(
    base: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assets, "fetch", lambda _: save_questions(tmp_path / "q.jsonl"))  # no download
    assert run(base, chats, *GIVEN, "--quick", "--bf16", "False") == 0
    out = capsys.readouterr().out
    assert "report: out/report.html" in out and "results: out/quick_results.json" in out
    tau = json.loads(Path("out/quick_results.json").read_text())["summary"]["tau"]
    root = parse(Path("out/report.html").read_text(encoding="utf-8"))
    assert root.marks("Simulated and served tau")[1] == f"served, quick_results: {tau:.3f}"


def test_the_same_seed_gives_the_same_drafter_and_another_does_not(base: str, chats: str) -> None:
    drafters = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run(base, chats, *GIVEN, "--output_dir", name, "--seed", seed) == 0
        drafters.append(load_drafter(name).state_dict())
    assert all(drafters[0][name].equal(drafters[1][name]) for name in drafters[0])
    assert not all(drafters[0][name].equal(drafters[2][name]) for name in drafters[0])


def test_self_written_data_needs_no_file(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is made to end its turns as often as it writes any other character."""
    ending = Path(shutil.copytree(base, "ending"))
    tensors = load_file(ending / "model.safetensors")
    tensors["lm_head.weight"][1] *= 10
    save_file(tensors, ending / "model.safetensors", {"format": "pt"})
    asked = ("--max_train_samples", "8", "--greedy_share", "0", "--per_device_train_batch_size", "1")
    assert run(str(ending), "self", *asked) == 0
    chunk = json.loads(Path("out/self_data/chunk-00000.json").read_text())
    assert len(chunk["rows"]) + sum(chunk["rejected"].values()) == 8
    assert not any(row["greedy"] for row in chunk["rows"])
    kept = [int(count) for count in re.findall(r"(\d+) (?:training|evaluation) rows", capsys.readouterr().out)]
    assert 2 <= sum(kept) <= len(chunk["rows"])
    load_drafter("out")


def test_a_base_that_writes_no_prompt_is_a_data_error(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "self", "--max_train_samples", "2") == 3
    assert "self_data: expected chunks of self-written data with rows, got none" in error_line(capsys)


@pytest.mark.parametrize(("size", "tokens"), [("auto", 258), ("0", 258), ("20", 20)], ids=["auto", "all", "twenty"])
def test_draft_vocabulary_sizes(
    base: str, chats: str, size: str, tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, *GIVEN, "--draft_vocab_size", size) == 0
    assert f"draft vocabulary: {tokens} of 258 tokens" in capsys.readouterr().out
    drafter = load_drafter("out")
    ids = drafter.draft_token_ids.tolist()
    assert len(ids) == tokens == len(drafter.head.weight) and ids == sorted(set(ids))


def test_shape_flags_reach_the_drafter(base: str, chats: str) -> None:
    argv = ["--exit_dim_multiplier", "2", "--no-rnn", "--drafter_predict_n_tokens", "2", "--beam_length", "3"]
    assert run(base, chats, *GIVEN, *argv) == 0
    config = load_drafter("out").config
    assert (config.exit_dim, config.rnn, config.num_draft_tokens, config.beam_length) == (64, False, 2, 3)


def test_training_in_bf16_saves_a_float32_drafter(base: str, chats: str) -> None:
    assert run(base, chats, *GIVEN, "--bf16") == 0
    drafter = load_drafter("out")
    assert drafter.dtype == torch.float32
    assert not drafter.head.weight.equal(drafter.head.weight.bfloat16().float())  # steps below bf16's grid count


def test_training_goes_on_from_a_named_drafter(base: str, chats: str) -> None:
    start = save_drafter(Path("start"), Path(base), beam_width=7)
    argv = ["--drafter_name_or_path", "start", "--learning_rate", "0"]
    assert run(base, chats, *GIVEN, *argv) == 0
    before, after = load_drafter(str(start)), load_drafter("out")
    assert after.config.beam_width == 7
    assert all(before.state_dict()[name].equal(tensor) for name, tensor in after.state_dict().items())


def test_beams_and_copies_of_a_named_drafter_are_changed_where_they_are_given(base: str, chats: str) -> None:
    save_drafter(Path("start"), Path(base), beam_width=7, beam_length=2, num_draft_tokens=2)
    argv = ["--drafter_name_or_path", "start", "--beam_width", "3", "--lookup_length", "5", "--recycled_nodes", "9"]
    assert run(base, chats, *GIVEN, *argv, "--drafter_predict_n_tokens", "3") == 0
    config = load_drafter("out").config
    assert (config.beam_width, config.beam_length, config.num_draft_tokens) == (3, 2, 3)
    assert (config.lookup_length, config.recycled_nodes) == (5, 9)


@pytest.mark.parametrize(
    "flag", [["--no-rnn"], ["--draft_vocab_size=9"], ["--exit_dim_multiplier", "2"], ["--drafter_num_layers", "1"]]
)
def test_a_named_drafter_keeps_its_shape(
    base: str, chats: str, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_drafter(Path("start"), Path(base))
    assert run(base, chats, *GIVEN, "--drafter_name_or_path", "start", *flag) == 2
    assert "shapes a new drafter, and start has its shape" in error_line(capsys)


def test_rows_without_a_prompt_train_all_the_same(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("\n\n".join(f"line {index} of a book" for index in range(12)))
    assert run(base, "book.txt", *GIVEN) == 0
    assert "not compared: no evaluation row has a prompt" in capsys.readouterr().out
    assert Path("out/report.html").exists()


def test_a_base_too_large_for_its_copy_is_trained_and_not_compared(
    base: str, chats: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    assert run(base, chats, *GIVEN, "--bf16") == 0
    assert "not compared: a copy of" in capsys.readouterr().out


def test_what_a_killed_run_had_its_base_write_is_gone_on_with(base: str, chats: str) -> None:
    Path("out/self_data").mkdir(parents=True)
    assert run(base, chats, *GIVEN) == 0


def test_not_resuming_is_no_leave_to_overwrite(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/precious").write_text("mine")
    assert run(base, chats, *GIVEN, "--resume_from_checkpoint", "False") == 2
    assert "is not empty" in error_line(capsys)


def test_a_tracker_is_taken_in_either_spelling(tmp_path: Path) -> None:
    for argv in (["--report_to", "tensorboard"], ["--report_to=tensorboard"]):
        assert train_speculator.parse_arguments([*argv, "--output_dir", str(tmp_path)])[1].report_to == ["tensorboard"]
    assert not train_speculator.parse_arguments(["--output_dir", str(tmp_path)])[1].report_to


def test_quick_leaves_bf16_out_where_fp16_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recurrent_drafting.verifier.resolve_dtype", lambda *_: torch.bfloat16)
    assert not train_speculator._bf16_pays(["--quick", "--fp16"]) and train_speculator._bf16_pays(["--quick"])


def test_evaluation_alone_takes_a_drafter_where_training_left_it(base: str, chats: str) -> None:
    shutil.copytree(base, "base")
    assert main(["--llm_name_or_path", "base", "--dataset_name", chats, *FAST, *SMALL, *GIVEN]) == 0
    before = sorted(Path("models/base-recurrent-drafter").rglob("*"))
    argv = ["--phase", "eval", "--drafter_name_or_path", "models/base-recurrent-drafter"]
    assert main(["--llm_name_or_path", "base", "--dataset_name", chats, *FAST, *SMALL, *GIVEN, *argv]) == 0
    assert sorted(Path("models/base-recurrent-drafter").rglob("*")) == before


def test_evaluation_alone_trains_and_writes_nothing(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_drafter(Path("start"), Path(base))
    before = (Path("start") / "model.safetensors").read_bytes()
    assert run(base, chats, *GIVEN, "--phase", "eval", "--drafter_name_or_path", "start") == 0
    out = capsys.readouterr().out
    metrics = json.loads(out[out.index("{\n") :])
    assert {"eval_simulated_tau", "eval_top1_depth_1", "eval_top5_depth_4"} <= metrics.keys()
    assert metrics["eval_simulated_tau"] >= 1
    assert (Path("start") / "model.safetensors").read_bytes() == before
    assert not list(Path("out").glob("*.safetensors"))


def test_resuming_gives_what_an_uninterrupted_run_gives(base: str, chats: str) -> None:
    argv = [*GIVEN, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    assert run(base, chats, *argv) == 0
    whole = load_drafter("out").state_dict()
    shutil.copytree("out/checkpoint-2", "parts/checkpoint-2")
    assert run(base, chats, *argv, "--output_dir", "parts", "--resume_from_checkpoint", "parts/checkpoint-2") == 0
    parts = load_drafter("parts").state_dict()
    assert all(whole[name].equal(parts[name]) for name in whole)


def steps(folder: str) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


def test_resuming_takes_the_newest_complete_checkpoint(
    base: str, chats: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*GIVEN, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"]
    assert run(base, chats, *argv) == 0
    whole = load_drafter("out").state_dict()
    (Path("out/checkpoint-4") / "optimizer.pt").write_bytes(b"")
    (Path("out/checkpoint-3") / "manifest.json").unlink()
    shutil.copytree("out/checkpoint-2", "out/.partial/checkpoint-5")  # of a run that was killed
    Path("out/model.safetensors").unlink()
    caplog.clear()
    assert run(base, chats, *argv, "--resume_from_checkpoint", "True") == 0
    assert all(whole[name].equal(tensor) for name, tensor in load_drafter("out").state_dict().items())
    lines = [record.getMessage() for record in caplog.records if "torn" in record.getMessage()]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert "checkpoint-4 is torn and was passed over" in lines[0] and "optimizer.pt: expected" in lines[0]
    assert "checkpoint-3 is torn and was passed over" in lines[1] and "manifest.json" in lines[1]
    assert steps("out") == [1, 2, 3, 4] and not Path("out/.partial").exists()
    (Path("out/checkpoint-3") / "optimizer.pt").write_bytes(b"")
    capsys.readouterr()
    assert run(base, chats, *argv, "--resume_from_checkpoint", "out/checkpoint-3") == 4
    assert "checkpoint-3/optimizer.pt: expected" in error_line(capsys)


def test_resuming_where_no_checkpoint_is_complete(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, chats, *GIVEN, "--resume_from_checkpoint", "True") == 2
    assert "expected a complete checkpoint in out, found none" in error_line(capsys)


def test_resuming_needs_a_training_state(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, chats, *GIVEN) == 0
    assert run(base, chats, *GIVEN, "--resume_from_checkpoint", "out") == 4
    assert "out: expected a training state, found no trainer_state.json, optimizer.pt" in error_line(capsys)


def test_resuming_another_run_names_every_difference(
    base: str, chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*GIVEN, "--save_strategy", "steps", "--save_steps", "2"]
    assert run(base, chats, *argv) == 0
    other = str(save_chats(tmp_path / "other.jsonl", 9))
    argv += ["--resume_from_checkpoint", "True", "--learning_rate", "1", "--beam_width", "3"]
    assert run(base, other, *argv) == 4
    line = error_line(capsys)
    for expected in ("beam_width 10, now 3", "learning_rate 0.0005, now 1.0", "data "):
        assert expected in line


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Let something happen in the middle of the script's run."""
    make = train_speculator.make_trainer

    def make_and_add(*args: Any) -> DrafterTrainer:
        trainer = make(*args)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(train_speculator, "make_trainer", make_and_add)


class SignalInSecondStep(TrainerCallback):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_in_training_saves_and_resuming_goes_on(
    base: str, chats: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*GIVEN, "--max_steps", "4"]
    assert run(base, chats, *argv, "--output_dir", "whole") == 0
    with monkeypatch.context() as patch:
        with_callback(patch, SignalInSecondStep(number))
        assert run(base, chats, *argv) == code
    line = error_line(capsys)
    assert "at step 2, which is complete: saved in out/checkpoint-2, go on with --resume_from_checkpoint True" in line
    assert [path.name for path in Path("out").iterdir()] == ["checkpoint-2"]
    assert run(base, chats, *argv, "--resume_from_checkpoint", "True") == 0
    whole = load_drafter("whole").state_dict()
    assert all(whole[name].equal(tensor) for name, tensor in load_drafter("out").state_dict().items())


class LittleSpace(TrainerCallback):
    """Let the system refuse files beyond 100 bytes from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("save_strategy", ["steps", "no"], ids=["checkpoint", "drafter"])
def test_a_full_disk_keeps_what_was_saved(
    base: str, chats: str, save_strategy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with_callback(monkeypatch, LittleSpace(2))
    try:
        assert run(base, chats, *GIVEN, "--save_strategy", save_strategy, "--save_steps", "1") == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = error_line(capsys)
    torn = "out/checkpoint-2" if save_strategy == "steps" else "out"
    assert f"{torn} was not written, the disk is full or at its limit" in line and "bytes free" in line
    assert [path.name for path in Path("out").iterdir()] == ["checkpoint-1"] * (save_strategy == "steps")


def test_the_best_drafter_by_simulated_tau_comes_out(base: str, chats: str) -> None:
    argv = ["--max_steps", "3", "--save_strategy", "steps", "--eval_strategy", "steps", "--learning_rate", "0.3"]
    argv += ["--save_steps", "1", "--eval_steps", "1", "--load_best_model_at_end", "True"]
    assert run(base, chats, *GIVEN, *argv, "--max_eval_samples", "3") == 0
    state = json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())
    measured = [entry["eval_simulated_tau"] for entry in state["log_history"] if "eval_simulated_tau" in entry]
    assert len(measured) == 3 and state["best_metric"] == max(measured)
    best = load_drafter(state["best_model_checkpoint"]).state_dict()
    assert all(best[name].equal(tensor) for name, tensor in load_drafter("out").state_dict().items())


# The output directory


def test_a_second_run_in_the_same_directory(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    with run_guard.only_run(Path("out")):
        assert run(base, chats, *GIVEN) == 2
    line = error_line(capsys)
    assert "--output_dir out is in use by another run" in line and "lock out/.lock" in line and str(os.getpid()) in line
    # What a killed run leaves is not in the way: a lock that nobody holds, and something half-written.
    Path("out/.lock").write_text("process 1")
    Path("out/.partial/checkpoint-2").mkdir(parents=True)
    assert run(base, chats, *GIVEN) == 0
    assert not Path("out/.lock").exists() and not Path("out/.partial").exists()


def test_a_directory_that_is_not_empty_needs_a_word(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/precious").write_text("mine")
    assert run(base, chats, *GIVEN) == 2
    line = error_line(capsys)
    assert "--output_dir out is not empty" in line and "--overwrite_output_dir" in line
    assert [path.name for path in Path("out").iterdir()] == ["precious"]
    assert run(base, chats, *GIVEN, "--overwrite_output_dir") == 0
    load_drafter("out")
    assert Path("out/precious").read_text() == "mine"


def test_a_path_that_is_taken_or_below_a_file(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("mine")
    for path in ("file", "file/below"):
        assert run(base, chats, *GIVEN, "--output_dir", path) == 2
        assert f"--output_dir {path} cannot be used" in error_line(capsys)
    assert Path("file").read_text() == "mine"


def test_a_read_only_directory(
    base: str, chats: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The superuser may write anywhere, so the system's own answer is given in its place."""
    answer = os.access
    monkeypatch.setattr(os, "access", lambda path, *args: str(path) != "out" and answer(path, *args))
    assert run(base, chats, *GIVEN) == 2
    assert "--output_dir out is read-only" in error_line(capsys)


# Usage


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--drafter_num_layer", "2"], "did you mean --drafter_num_layers?"),
        (["--learnin_rate", "1"], "did you mean --learning_rate?"),
        (["--quik"], "did you mean --quick?"),
        (["--phase", "nap"], "invalid choice: 'nap'"),
        (["--targets", "none"], "invalid choice: 'none'"),
        (["--beam_width", "wide"], "invalid int value: 'wide'"),
    ],
)
def test_parse_errors(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(argv)
    assert leave.value.code == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--objective", "mse"], "objective must be one of"),
        (["--kd_alpha", "2"], "kd_alpha must be in [0, 1]"),
        (["--drafter_predict_n_tokens", "0"], "drafter_predict_n_tokens must be > 0"),
        (["--drafter_num_layers", "-1"], "--drafter_num_layers must be >= 0, got -1"),
        (["--beam_width", "0"], "beam width must be an integer >= 1"),
        (["--beam_length", "0"], "beam length must be an integer >= 1"),
        (["--exit_dim_multiplier", "0"], "--exit_dim_multiplier must be > 0 and finite, got 0.0"),
        (["--exit_dim_multiplier", "nan"], "--exit_dim_multiplier must be > 0 and finite, got nan"),
        (["--lookup_length", "-1"], "lookup_length must be an integer >= 0"),
        (["--recycled_nodes", "-1"], "recycled_nodes must be an integer >= 0"),
        (["--resume_from_checkpoint", "True"], "expected a complete checkpoint in out, found none"),
        (["--draft_vocab_size", "259"], "draft_vocab_size must be auto or in 0..258, got '259'"),
        (["--draft_vocab_size", "some"], "--draft_vocab_size must be auto or a number >= 0, got 'some'"),
        (["--model_max_length", "0"], "model_max_length"),
        (["--max_train_samples", "-1"], "max_train_samples"),
        (["--max_eval_samples", "-1"], "max_eval_samples"),
        (["--expected_length_share", "1.5"], "expected_length_share must be in [0, 1]"),
        (["--distill_temperature", "-1"], "--distill_temperature must be >= 0 and finite, got -1.0"),
        (["--distill_temperature", "inf"], "--distill_temperature must be >= 0 and finite, got inf"),
        (["--dataset_name", "self", "--greedy_share", "1.5"], "--greedy_share must be in [0, 1], got 1.5"),
        (["--dataset_name", "self", "--greedy_share", "nan"], "--greedy_share must be in [0, 1], got nan"),
        (["--dataset_name", "alpaca", "--greedy_share", "0.5"], "got --dataset_name alpaca: leave it out"),
        (["--distill_max_examples", "0"], "--distill_max_examples must be >= 1"),
        (["--distill_num_future_tokens", "0"], "--distill_num_future_tokens must be >= 1"),
        (["--dataset_name", "sharegtp"], "did you mean sharegpt?"),
        (["--bf16", "--fp16"], "fp16"),
        (["--per_device_train_batch_size", "0"], "batch"),
        (["--learning_rate", "nan"], "learning"),
        (["--seed", "-1"], "eed"),
        (["--phase", "eval"], "--drafter_name_or_path"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(
    base: str, chats: str, argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, *GIVEN, *argv) == 2
    assert expected in error_line(capsys)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--distill_num_future_tokens", "3"], "must be >= --drafter_predict_n_tokens (4), got 3"),
        (["--objective", "kl"], "use --objective ce"),
        (["--use_knowledge_distillation"], "use --objective ce"),
        (["--objective", "expected_length", "--expected_length_share", "0.5"], "use --objective ce"),
    ],
)
def test_usage_errors_of_distilled_targets(
    base: str, chats: str, argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, "--targets", "distilled", *argv) == 2
    assert expected in error_line(capsys)


def test_accepted_spellings_of_targets_and_objective(capsys: pytest.CaptureFixture[str]) -> None:
    args, training = train_speculator.parse_arguments(["--use_distilled_dataset"])
    assert (args.targets, training.objective) == ("distilled", "ce")
    args, training = train_speculator.parse_arguments(["--targets=distilled", "--objective", "expected_length"])
    assert (args.targets, training.objective) == ("distilled", "expected_length")
    argv = ["--use_knowledge_distillation", "--kd_temperature", "2", "--kd_alpha", "0.5"]
    args, training = train_speculator.parse_arguments(argv)
    assert (args.targets, training.objective, training.kd_temperature, training.kd_alpha) == (
        "regenerated",
        "kl",
        2,
        0.5,
    )
    for pair in (
        ["--targets", "ground_truth", "--use_distilled_dataset"],
        ["--objective", "ce", "--use_knowledge_distillation"],
    ):
        with pytest.raises(SystemExit) as leave:
            train_speculator.parse_arguments(pair)
        assert leave.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_wandb_that_is_missing_is_a_usage_error(
    base: str, chats: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(base, chats, *GIVEN, "--use_wandb", "True") == 2
    assert "pip install wandb" in error_line(capsys)


def test_defaults_are_those_of_the_classes(base: str) -> None:
    args, training = train_speculator.parse_arguments(["--llm_name_or_path", base])
    assert args.output_dir == "models/base-recurrent-drafter"
    assert (args.beam_width, args.beam_length, args.rnn) == (
        RecurrentDraftingConfig.beam_width,
        RecurrentDraftingConfig.beam_length,
        RecurrentDraftingConfig.rnn,
    )
    usual = TrainingArguments(output_dir="x")
    for name in ("learning_rate", "objective", "drafter_predict_n_tokens", "num_train_epochs"):
        assert getattr(training, name) == getattr(usual, name)


def test_quick_sets_defaults_and_gives_way_to_flags() -> None:
    args, training = train_speculator.parse_arguments(["--quick", "--max_steps", "7", "--dataset_name", "x.jsonl"])
    assert (args.llm_name_or_path, args.dataset_name) == (DEFAULT_BASE, "x.jsonl")
    assert (training.max_steps, training.learning_rate) == (7, quick_run.SETTINGS["learning_rate"])


def test_a_second_quick_run_gets_a_directory_of_its_own() -> None:
    names = []
    for _ in range(3):
        args, _training = train_speculator.parse_arguments(["--quick"])
        names.append(args.output_dir)
        Path(args.output_dir).mkdir(parents=True)
    stem = f"models/{DEFAULT_BASE}-recurrent-drafter"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]


def test_warmup_as_a_share_of_the_steps() -> None:
    _, training = train_speculator.parse_arguments(["--warmup_ratio", "0.25"])
    assert training.get_warmup_steps(200) == 50


# Data


def test_a_missing_data_file(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "nowhere.jsonl") == 3
    assert "nowhere.jsonl cannot be read" in error_line(capsys)


def test_a_malformed_line_is_named_or_skipped_and_counted(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_chats(tmp_path / "bad.jsonl", extra='{"prompt": "cut\n{"prompt": "no reply"}\n')
    assert run(base, str(path), *GIVEN) == 3
    line = error_line(capsys)
    assert f"{path}:9" in line and "malformed JSON" in line
    assert not [item for item in Path("out").rglob("*") if item.is_file()]
    assert run(base, str(path), *GIVEN, "--skip_bad_rows") == 0
    out = capsys.readouterr().out
    assert "8 conversations" in out and "'malformed JSON': 1" in out and "'missing field': 1" in out


@pytest.mark.parametrize(
    ("count", "argv", "expected"),
    [
        (0, [], "expected at least one conversation, got an empty file"),
        (1, [], "training needs at least 2 rows"),
        (8, ["--max_train_samples", "1"], "training needs at least 2 rows"),
        (8, ["--per_device_train_batch_size", "100"], "100"),
        (8, ["--model_max_length", "8"], "training needs at least 2 rows with a reply, got 0"),
    ],
)
def test_too_little_data(
    base: str, tmp_path: Path, count: int, argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, str(save_chats(tmp_path / "few.jsonl", count)), *GIVEN, *argv) == 3
    assert expected in error_line(capsys)


# Models


def test_a_base_that_is_nowhere(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("nobody/no-such-base", chats) == 7
    line = error_line(capsys)
    assert "nobody/no-such-base" in line and DEFAULT_BASE in line


def test_a_base_with_missing_weights(base: str, tmp_path: Path, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(base, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert run(str(folder), chats) == 4
    assert "model.layers.1.mlp.up_proj.weight" in error_line(capsys)


def test_a_base_that_does_not_load(tmp_path: Path, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(str(tmp_path / "empty"), chats) == 4
    assert str(tmp_path / "empty") in error_line(capsys)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"hidden_size": 16}, "expected hidden_size 32, the drafter has 16"),
        ({"vocab_size": 300}, "expected vocab_size 258, the drafter has 300"),
    ],
)
def test_a_drafter_of_another_base(
    base: str, chats: str, overrides: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_drafter(Path("other"), Path("elsewhere"), **overrides)
    assert run(base, chats, *GIVEN, "--drafter_name_or_path", "other") == 4
    assert expected in error_line(capsys)


def test_a_drafter_that_is_missing(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert run(base, chats, *GIVEN, "--drafter_name_or_path", "empty") == 4
    assert "empty is no drafter" in error_line(capsys)


def test_resuming_from_a_checkpoint_that_is_not_there(
    base: str, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, *GIVEN, "--resume_from_checkpoint", "nowhere") in (2, 4)
    assert "nowhere" in error_line(capsys)


def test_resuming_with_another_shape_names_the_difference(
    base: str, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*GIVEN, "--save_strategy", "steps", "--save_steps", "2"]
    assert run(base, chats, *argv) == 0
    capsys.readouterr()
    assert run(base, chats, *argv, "--resume_from_checkpoint", "out/checkpoint-2", "--drafter_num_layers", "3") == 4
    line = error_line(capsys)
    assert "num_draft_layers" in line or "drafter_num_layers" in line


def test_a_non_finite_loss_keeps_the_last_checkpoint(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*GIVEN, "--max_steps", "30", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]
    assert run(base, chats, *argv, "--learning_rate", "1e38", "--max_grad_norm", "0", "--optim", "sgd") == 6
    assert "the optimizer was not stepped" in error_line(capsys)
    last = max(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] >= 1
    load_drafter(str(last))
