"""Rows 22-24, 27 and 29: runs that end early, go on, or have nothing to learn from."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_speculator
from recurrent_drafting import formats, manifest
from recurrent_drafting.checkpoint import load_drafter
from tests import kill_resume
from tests.faults.common import Capture, Models, little_space, process, refused, train, train_argv
from tests.text_models import save_chats

pytestmark = pytest.mark.slow

SAVED = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture(scope="module")
def begun(models: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A data file, and the output directory of a run with two checkpoints and stored hidden states."""
    folder = tmp_path_factory.mktemp("begun")
    rows = str(save_chats(folder / "chats.jsonl"))
    argv = ["--output_dir", str(folder / "out"), "--hidden_state_cache", str(folder / "states")]
    assert train(models.base, rows, *SAVED, *argv) == 0
    return rows, folder


@pytest.fixture
def copied(begun: tuple[str, Path], place: Path) -> str:
    """Bring the finished run into the current directory; return its data file."""
    for name in ("out", "states"):
        shutil.copytree(begun[1] / name, place / name)
    return begun[0]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--learning_rate", "1"], "learning_rate 0.0005, now 1.0"),
        (["--seed", "7"], "seed 42, now 7"),
        (["--per_device_train_batch_size", "2"], "per_device_train_batch_size 4, now 2"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps 1, now 2"),
        (["--objective", "ce"], "objective 'kl', now 'ce'"),
        (["--depth_decay", "0.5"], "depth_decay 0.9, now 0.5"),
        (["--drafter_num_layers", "1"], "num_draft_layers 2, now 1"),
        (["--drafter_predict_n_tokens", "3"], "drafter_predict_n_tokens 4, now 3"),
        (["--beam_width", "3"], "beam_width 10, now 3"),
        (["--no-rnn"], "rnn True, now False"),
        (["--weight_decay", "0.3"], "weight_decay 0.0, now 0.3"),
        (["--max_steps", "9"], "max_steps 2, now 9"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resuming_with_other_settings(
    models: Models, copied: str, argv: list[str], named: str, capsys: Capture
) -> None:
    more = [*SAVED, "--resume_from_checkpoint", "True", *argv]
    refused(train_speculator.main, train_argv(models.base, copied, *more), 4, capsys, "checkpoint-2", named)


def test_resuming_with_other_data(models: Models, copied: str, tmp_path: Path, capsys: Capture) -> None:
    other = str(save_chats(tmp_path / "other.jsonl", 9))
    argv = train_argv(models.base, other, *SAVED, "--resume_from_checkpoint", "True")
    refused(train_speculator.main, argv, 4, capsys, "checkpoint-2 was begun with data ")


def test_resuming_with_another_world_size(models: Models, copied: str, capsys: Capture) -> None:
    path = Path("out/checkpoint-2/manifest.json")
    record = json.loads(path.read_text())
    record["run"]["world_size"] = 2
    record["manifest_sha256"] = manifest._digest(record)
    path.write_text(json.dumps(record))
    argv = train_argv(models.base, copied, *SAVED, "--resume_from_checkpoint", "True")
    refused(train_speculator.main, argv, 4, capsys, "world_size 2, now 1")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_that_is_named(models: Models, copied: str, name: str, how: str, capsys: Capture) -> None:
    """A training state is unpickled only from a directory whose manifest matches."""
    path = Path("out/checkpoint-2") / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if how == "cut" else raw)
    if how == "gone":
        path.unlink()
    argv = train_argv(models.base, copied, *SAVED, "--resume_from_checkpoint", "out/checkpoint-2")
    refused(train_speculator.main, argv, 4, capsys, f"checkpoint-2/{name}: expected", "found")


@pytest.mark.parametrize("wanted", ["nowhere", "True"])
def test_no_checkpoint_to_go_on_from(models: Models, chats: str, wanted: str, capsys: Capture) -> None:
    argv = train_argv(models.base, chats, *SAVED, "--resume_from_checkpoint", wanted)
    refused(train_speculator.main, argv, 2, capsys, f"--resume_from_checkpoint {wanted}", "found none")


# Stored hidden states


def shard() -> Path:
    return next(Path("states").glob("*.safetensors"))


def flip_last(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip_last,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * 100),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_named_and_rebuilt_on_request(
    models: Models, copied: str, how: str, capsys: Capture
) -> None:
    whole = shard().read_bytes()
    DAMAGES[how](shard())
    argv = ["--hidden_state_cache", "states", "--output_dir", "new"]
    line = refused(train_speculator.main, train_argv(models.base, copied, *argv), 3, capsys, f"{shard()} is damaged")
    assert "--rebuild_cache" in line
    if how == "flipped":
        assert train(models.base, copied, *argv, "--rebuild_cache", "--max_steps", "1") == 0
        assert shard().read_bytes() == whole


@pytest.mark.parametrize("how", ["dtype", "base", "settings"])
def test_states_of_something_else(models: Models, copied: str, how: str, capsys: Capture) -> None:
    base = models.base
    if how == "base":
        base = str(shutil.copytree(models.base, "another"))
    elif how == "settings":
        Path("states/settings.json").write_text("{")
    argv = ["--hidden_state_cache", "states", "--output_dir", "new", *(["--bf16"] if how == "dtype" else [])]
    refused(train_speculator.main, train_argv(base, copied, *argv), 3, capsys, "states/settings.json")


def test_no_space_for_stored_states(models: Models, chats: str, capsys: Capture) -> None:
    """What is there stays, and the next run computes the rest."""
    argv = ["--hidden_state_cache", "states", "--output_dir", "new"]
    with little_space(2000):
        line = refused(train_speculator.main, train_argv(models.base, chats, *argv), 5, capsys, "states/shard-")
    assert "was not written, the disk is full or at its limit" in line and "bytes free" in line
    assert [path.name for path in Path("states").iterdir()] == ["settings.json"]
    assert train(models.base, chats, *argv) == 0


@pytest.mark.parametrize("layout", formats.FORMATS)
def test_no_space_for_an_export(models: Models, layout: str, capsys: Capture) -> None:
    argv = ["export", "--format", layout, models.drafter, "exported"]
    with little_space(2000):
        refused(formats.main, argv, 5, capsys, "exported/model.safetensors was not written, the disk is full")
    assert list(Path("exported").iterdir()) == []
    assert formats.main(argv) == 0


# Nothing to learn from


@pytest.mark.parametrize(
    ("rows", "argv", "named"),
    [
        ([{"prompt": "x", "response": ""}] * 8, ["--model_max_length", "10"], "training needs at least 2 rows"),
        ([{"prompt": "x" * 500, "response": "y"}] * 8, [], "training needs at least 2 rows with a reply, got 0"),
        ([{"turns": ["only", "questions"]}] * 8, [], "training needs at least 2 rows with a reply, got 0"),
        ([{"prompt": "x", "response": "yes indeed"}], [], "training needs at least 2 rows with a reply, got 1"),
        ([{"prompt": "x", "response": "yes indeed"}] * 4, [], "3 training rows are fewer than one batch of 4"),
        ([{"prompt": "x", "response": "yes indeed"}] * 9, ["--max_train_samples", "3"], "fewer than one batch of 4"),
    ],
)
def test_nothing_to_learn_from(models: Models, rows: list[Any], argv: list[str], named: str, capsys: Capture) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(train_speculator.main, train_argv(models.base, "rows.jsonl", *argv), 3, capsys, named)


# Signals, in processes of their own


@pytest.mark.parametrize(
    ("number", "times", "code"),
    [(signal.SIGTERM, 1, 143), (signal.SIGINT, 1, 130), (signal.SIGTERM, 2, 143)],
    ids=["terminated", "interrupted", "twice"],
)
def test_a_signal_ends_a_process_in_good_order(models: Models, chats: str, number: int, times: int, code: int) -> None:
    argv = train_argv(models.base, chats, "--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "1",
                      "--save_total_limit", "2")  # fmt: skip
    started = process("train_speculator.py", argv)
    while not list(Path("out").glob("checkpoint-*")):
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.05)
    for _ in range(times):
        started.send_signal(number)
    _, err = started.communicate(timeout=120)
    assert started.returncode == code, err
    assert "Traceback" not in err
    if times == 1:
        assert "go on with --resume_from_checkpoint True" in err
        newest = max(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        manifest.read(newest)
        load_drafter(str(newest))
        assert not Path("out/.lock").exists() and not Path("out/.partial").exists()


def test_kill_9_inside_a_save_loses_nothing(capsys: Capture) -> None:
    assert kill_resume.main(["--rounds", "1"]) == 0
    assert "1 of 1" in capsys.readouterr().out
