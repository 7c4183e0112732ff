"""The benchmarks' command lines, and what they share; what they measure needs the real base."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import harness
from recurrent_drafting.errors import UsageError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Not started by a user.
HELPERS = ("harness", "vllm_server", "peer_worker", "peer_processes", "compiled_worker", "our_decoders", "peer_rounds")
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in HELPERS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main(["--help"])
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    assert f"python benchmarks/{name}.py --" in out


def test_the_command_names_what_is_set_and_is_read_back_alike() -> None:
    parser = harness.build_parser("What for?", rows=4, temperature=0.0, dtype="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--quick", action="store_true")
    flags = ("dtype", "rows", "temperature", "sizes", "nodes", "quick")
    args = parser.parse_args(["--speculator_path", "DIR", "--temperature", "0.5"])
    command = "--dtype auto --rows 4 --temperature 0.5 --sizes 1 2"
    assert harness.command(__file__, args, *flags) == f"python benchmarks/test_benchmarks.py {command}"
    args = parser.parse_args(["--speculator_path", "DIR", "--nodes", "0", "--quick", "--sizes", "8"])
    command = harness.command("x.py", args, *flags).removeprefix("python benchmarks/x.py ")
    assert command == "--dtype auto --rows 4 --temperature 0.0 --sizes 8 --nodes 0 --quick"
    assert parser.parse_args(["--speculator_path", "DIR", *command.split()]) == args


def test_a_record_and_its_plot_go_where_output_says(tmp_path: Path) -> None:
    record: dict[str, Any] = harness.head("x.py", argparse.Namespace(base_model="b", rows=3), "rows") | {"tau": 2.5}
    assert list(record) == ["command", "base_model", "machine", "tau"]
    harness.write(record, tmp_path / "new" / "r.json", lambda found: f"<p>{found['tau']}</p>")
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == record
    assert (tmp_path / "new" / "r.html").read_text() == "<p>2.5</p>"
    harness.write(record, None, lambda _: pytest.fail("there is nowhere to draw it"))
    harness.write(record, tmp_path / "alone.json")
    assert not (tmp_path / "alone.html").exists()


def test_a_record_names_the_drafter_and_no_directory_above_it(tmp_path: Path) -> None:
    weights = tmp_path / "mine" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"

    def drafter_of(name: str) -> dict[str, str]:
        args = argparse.Namespace(base_model="b", speculator_path=name)
        found: dict[str, str] = harness.head("x.py", args)["drafter"]
        return found

    assert drafter_of(str(weights.parent)) == {"name": "mine", "weights_sha256": digest}
    assert drafter_of(f"{weights.parent}/.") == drafter_of(str(weights.parent))
    assert drafter_of("someone/theirs") == {"name": "someone/theirs"}


@pytest.mark.parametrize("flag", ["--vllm_python", "--llama_python", "--gguf"])
def test_a_peer_that_is_not_there_is_named_before_anything_is_measured(flag: str, tmp_path: Path) -> None:
    peers = importlib.import_module("peers")
    missing = str(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=rf"{flag} '{missing}': expected .* found none there"):
        peers.main(["--speculator_path", str(tmp_path), flag, missing])
