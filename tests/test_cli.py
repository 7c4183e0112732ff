"""What the scripts share: exit codes, one line per error, nearest flags, and a reader that leaves."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import generate_speculator
import huggingface_deployment
import train_speculator
from recurrent_drafting import cli, distillation, errors, formats

ROOT = Path(__file__).resolve().parent.parent
# Exit codes: 2 usage, 3 data, 4 model, 5 resources, 6 numerics, 7 network.
CODES = {
    "RecurrentDraftingError": 1,
    "UsageError": 2,
    "DataError": 3,
    "ModelError": 4,
    "ResourceError": 5,
    "NumericsError": 6,
    "NetworkError": 7,
}
WRITER = """
import sys
from recurrent_drafting import cli

def body():
    print("x" * int(sys.argv[1]))
    return 0

sys.exit(cli.run(body, False))
"""


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def body() -> NoReturn:
        raise error

    return body


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="tool.py")
    parser.add_argument("--beam_width", type=int, default=10, help="beams kept")
    parser.add_argument("--beam_length", type=int, help="tokens drafted")
    parser.add_argument("--quick", action="store_true", help="small run")
    return parser


def parse_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as leave:
        make_parser().parse_args(argv)
    assert leave.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_every_error_class_has_its_code() -> None:
    # A signal's code is 128 and its number, which only the error itself knows.
    classes = {name: item for name, item in vars(errors).items() if isinstance(item, type)}
    assert classes.pop("InterruptionError")("stopped", 15).exit_code == 143
    assert {name: item.exit_code for name, item in classes.items()} == CODES


@pytest.mark.parametrize("name", CODES)
def test_an_error_is_one_line_and_its_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = getattr(errors, name)("what went wrong:\n  expected 1,\n  got 2")
    assert cli.run(raising(error), debug=False) == CODES[name]
    assert capsys.readouterr() == ("", "error: what went wrong: expected 1, got 2\n")


def exhaust_memory() -> NoReturn:
    torch.empty(1 << 60, dtype=torch.uint8)
    raise AssertionError("this machine has an exbibyte of memory")


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (raising(KeyboardInterrupt()), 130, "interrupted"),
        (raising(MemoryError()), 5, "out of memory"),
        (exhaust_memory, 5, "memory"),
        (raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors")), 5, "No space left"),
        (raising(OSError(errno.EFBIG, os.strerror(errno.EFBIG), "out/report.html")), 5, "File too large"),
    ],
    ids=["interrupt", "memory", "torch-memory", "disk", "limit"],
)
def test_what_the_machine_ends_has_a_code_too(
    body: Callable[[], int], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(body, debug=False) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and err.count("\n") == 1


def test_the_bodys_own_code_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    assert [cli.run(lambda code=code: code, debug=False) for code in (0, 3)] == [0, 3]
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_dressed_up_as_an_answer() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), debug=False)


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(raising(errors.DataError("no rows")), debug=True) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "in body" in err and err.endswith("\nerror: no rows\n")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--beam_widht", "3"], "unknown argument --beam_widht; did you mean --beam_width?"),
        (["--beam-width=3"], "unknown argument --beam-width=3; did you mean --beam_width?"),
        (["--qick"], "unknown argument --qick; did you mean --quick?"),
        (["--zzzzz"], "unknown argument --zzzzz ("),
        (["--beam"], "unknown argument --beam"),  # no abbreviation is guessed
        (["stray"], "unknown argument stray"),
        (["--beam_width", "wide"], "argument --beam_width: invalid int value: 'wide'"),
        (["--beam_width"], "argument --beam_width: expected one argument"),
    ],
)
def test_parse_errors_name_the_nearest_flag(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = parse_error(argv, capsys)
    assert line.startswith(f"error: {expected}") and line.endswith("(see tool.py --help)\n")


@pytest.mark.parametrize(("text", "number"), [("auto", None), ("7", 7), ("-1", -1)])
def test_a_number_or_auto(text: str, number: int | None) -> None:
    assert cli.fixed_number(cli.auto_or_int(text)) == number
    with pytest.raises(argparse.ArgumentTypeError, match="expected auto or a number, got 'some'"):
        cli.auto_or_int("some")


def test_settings_take_the_flags_that_have_the_names_of_their_fields() -> None:
    def settings(rows: int, steps: int = 3, debug: str = "") -> tuple[int, int, str]:
        return rows, steps, debug

    assert cli.settings_of(settings, argparse.Namespace(rows=1, other=2, debug=True)) == (1, 3, "")


def test_a_value_below_its_least_is_named() -> None:
    values = argparse.Namespace(rows=1, steps=None)
    cli.require_least(values, {"rows": 1, "steps": 5})
    with pytest.raises(errors.UsageError, match="--rows must be >= 2, got 1"):
        cli.require_least(values, {"steps": 5, "rows": 2})


def test_help_shows_the_defaults_that_say_something() -> None:
    text = " ".join(make_parser().format_help().split())
    assert "beams kept (default: 10)" in text
    assert text.count("(default:") == 1  # neither None nor an unset switch


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_script_quietly() -> None:
    """One line that stays in the buffer until the end, and more than any buffer holds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, size], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, env=environment
        )
        for size in ("10", "1000000")
    ]
    os.close(writer)
    answers = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert answers == [(b"", 0)] * 2


@pytest.mark.parametrize(
    "build_parser",
    [
        train_speculator.build_parser,
        generate_speculator.build_parser,
        huggingface_deployment.build_parser,
        distillation.build_parser,
        formats.build_parser,
    ],
    ids=lambda function: function.__module__,
)
def test_every_flag_says_what_it_does(build_parser: Callable[[], cli.ArgumentParser]) -> None:
    parsers: list[argparse.ArgumentParser] = [build_parser()]
    silent = []
    while parsers:
        for action in parsers.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif not action.help:
                silent.append(action.dest)
    assert silent == []
