"""What the fault tests share: tiny models on disk, and the answer that a refused command must give."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import generate_speculator
import train_speculator
from tests.text_models import Models

ROOT = Path(__file__).resolve().parent.parent.parent
# Made up; it must appear nowhere but in the requests to the hub.
TOKEN = "hf_canaryCanaryCanaryCanary"
Main = Callable[[Sequence[str]], int]
Capture = pytest.CaptureFixture[str]
GENERATE = ("--dtype", "fp32", "--device", "cpu", "--max_tree_nodes", "6", "--max_generation_length", "8")
TRAIN = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no", "--disable_tqdm", "True",
         "--model_max_length", "96", "--max_eval_samples", "1", "--targets", "ground_truth", "--output_dir", "out",
         "--serve_check_prompts", "1")  # fmt: skip


class Pipe(io.TextIOWrapper):
    """Standard input that is no terminal."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")


def outcome(main: Main, argv: Sequence[str]) -> int:
    """Run a script in this process and return its exit code, however it leaves."""
    try:
        return main(list(argv))
    except SystemExit as leave:
        return int(leave.code or 0)


def refused(main: Main, argv: Sequence[str], code: int, capsys: Capture, *named: str) -> str:
    """Insist on an exit code and on one line on stderr that says what the test names."""
    capsys.readouterr()
    assert outcome(main, argv) == code
    return error_line(capsys.readouterr().err, *named)


def error_line(err: str, *named: str) -> str:
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    for part in named:
        assert part in lines[0], lines[0]
    return lines[0]


def generate(models: Models, *argv: str) -> int:
    return outcome(generate_speculator.main, ["--speculator_path", models.drafter, *GENERATE, *argv])


def generate_argv(models: Models, *argv: str) -> list[str]:
    return ["--speculator_path", models.drafter, *GENERATE, *argv]


def train_argv(base: str, data: str, *argv: str) -> list[str]:
    return ["--llm_name_or_path", base, "--dataset_name", data, *TRAIN, *argv]


def train(base: str, data: str, *argv: str) -> int:
    return outcome(train_speculator.main, train_argv(base, data, *argv))


@contextmanager
def little_space(size: int) -> Iterator[None]:
    """Let the system refuse to write a file further than some bytes, as a full disk or a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def process(script: str, argv: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Start a script in a process of its own, in this process's directory."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )
