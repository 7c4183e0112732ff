"""Uploads to and downloads from a stand-in hub: one commit, what goes wrong, and the card's figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from huggingface_deployment import main
from recurrent_drafting import Drafter, RecurrentDraftingConfig, custom_generate, hub
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.errors import NetworkError
from tests.hub_server import CUT, Fault, HubServer, standing_in
from tests.text_models import save_base, save_drafter

# The hub's client sends files by an argument that newer versions of its HTTP library deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_secretOfTheTest"
REPO = "someone/my-drafter"
SUMMARY: dict[str, Any] = {
    "method": "speculative",
    "base_model": "smollm2-135m-instruct",
    "base_note": "a note on the base",
    "speculator_path": "/home/someone/drafter",
    "dtype": "bfloat16",
    "device": "cpu",
    "batch_size": 1,
    "temperature": 0.0,
    "prompts": 16,
    "tokens": 1024,
    "seconds": 40.0,
    "tokens_per_second": 25.61,
    "tau": 1.6205787781350482,
    "acceptance_by_depth": [0.4935, 0.0964],
    "baseline_tokens_per_second": 22.0,
    "speculative_tokens_per_second": 25.61,
    "speedup_median": 1.1238,
    "speedup_min": 0.98,
    "speedup_max": 1.38,
    "identical": 5,
    "compared": 16,
}
UPLOADED = ["README.md", "config.json", custom_generate.PATH, "manifest.json", "model.safetensors"]
UPLOADED += ["quick_results.json"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    with standing_in(TOKEN, tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "drafter"
    save_drafter(folder, Path("smollm2-135m-instruct"), beam_width=7)
    (folder / "quick_results.json").write_text(json.dumps({"summary": SUMMARY, "machine": {"processor": "a CPU"}}))
    (folder / "optimizer.pt").write_bytes(b"not for others")
    return folder


def deploy(folder: Path, *argv: str) -> int:
    return main(["--model_path", str(folder), "--repo_name", REPO, *argv])


def metadata_of(card: str) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return metadata


def test_all_files_arrive_in_one_commit(server: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy(folder) == 0
    repository = server.repositories[REPO]
    assert not repository.private and len(repository.branches["main"]) == 2
    files = repository.files("main") or {}
    assert sorted(files) == sorted(UPLOADED)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert files[custom_generate.PATH] == (folder / custom_generate.PATH).read_bytes()
    assert files["README.md"] == (folder / "README.md").read_bytes()
    assert json.loads(files["quick_results.json"]) == {
        "summary": {**SUMMARY, "speculator_path": REPO},
        "machine": {"processor": "a CPU"},
    }
    out, err = capsys.readouterr()
    assert out.startswith(f"{server.url}/{REPO}/commit/") and err == ""


def test_the_card_says_what_the_evaluation_says(server: HubServer, folder: Path) -> None:
    assert deploy(folder) == 0
    card = (folder / "README.md").read_text()
    metadata = metadata_of(card)
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "recurrent_drafting"
    assert "speculative-decoding" in metadata["tags"]
    assert metadata["metrics"] == ["tau", "tokens_per_second", "speedup_median", "identical"]
    [entry] = metadata["model-index"]
    measured = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert measured == {name: SUMMARY[name] for name in metadata["metrics"]}
    for text in (
        "1.621",
        "0.493, 0.096",
        "25.6",
        "1.12 (median; 0.98 to 1.38)",
        "5 of 16",
        "a CPU",
        "a note on the base",
    ):
        assert text in card
    assert "/home/someone" not in card


def test_a_second_upload_changes_what_changed_and_an_equal_one_nothing(server: HubServer, folder: Path) -> None:
    assert deploy(folder) == deploy(folder) == 0
    commits = server.repositories[REPO].branches["main"]
    assert len(commits) == 2
    summary = {**SUMMARY, "tau": 1.75}
    (folder / "quick_results.json").write_text(json.dumps({"summary": summary}))
    assert deploy(folder) == 0
    assert len(commits) == 3 and b"1.750" in commits[-1]["README.md"]
    assert server.count("PUT /lfs/") == 1


def test_private_and_revision(server: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy(folder, "--private", "--revision", "v2") == 0
    repository = server.repositories[REPO]
    assert repository.private
    assert repository.files("main") == {} and sorted(repository.files("v2") or {}) == sorted(UPLOADED)
    assert deploy(folder, "--private", "--revision", "v2") == 0
    repository.private = False
    assert deploy(folder, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err
    assert repository.files("main") == {}


def test_a_card_of_the_users_own_stays(server: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "---\nlicense: mit\n---\nMine.\n"
    (folder / "README.md").write_text(own)
    assert deploy(folder) == 0
    assert "is your own" in capsys.readouterr().err
    assert (
        (server.repositories[REPO].files("main") or {})["README.md"].decode()
        == own
        == (folder / "README.md").read_text()
    )


def test_a_dry_run_shows_all_and_touches_nothing(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert deploy(folder, "--dry_run") == 0
    out = capsys.readouterr().out
    assert metadata_of(out)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert re.findall(r"bytes  (\S+)", out) == sorted(UPLOADED)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in out
    assert server.seen == [] and {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("fault", "named", "tries"),
    [
        (Fault("POST", "/repos/create", 401), "refuses this token for someone/my-drafter: run `hf auth login`", 1),
        pytest.param(Fault("POST", "/commit/", 403), "refuses this token", 1, marks=pytest.mark.slow),
        (Fault("POST", "/preupload/", 404), "has no someone/my-drafter that this token may see", 1),
        (Fault("POST", "/commit/", 429, headers={"Retry-After": "7"}), "takes no more requests for now", 3),
        pytest.param(Fault("POST", "/commit/", 503), "the hub answered 503", 3, marks=pytest.mark.slow),
        pytest.param(Fault("POST", "/repos/create", CUT), "was not reached or cut off", 3, marks=pytest.mark.slow),
        (Fault("POST", "/commit/", CUT), "was not reached or cut off", 3),
        pytest.param(Fault("PUT", "/lfs/", CUT), "was not reached or cut off", None, marks=pytest.mark.slow),
        pytest.param(Fault("PUT", "/lfs/", 403), "refuses this token", 1, marks=pytest.mark.slow),
        (Fault("POST", "/validate-yaml", 400), "refuses README.md", 1),
    ],
)
def test_failures_leave_the_repository_as_it_was(
    server: HubServer,
    folder: Path,
    waits: list[float],
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
    named: str,
    tries: int | None,
) -> None:
    server.faults = [fault]
    assert deploy(folder) == (3 if "yaml" in fault.path else 7)
    out, err = capsys.readouterr()
    assert named in err and err.count("\n") == 1 and out == ""
    assert TOKEN not in err
    assert REPO not in server.repositories or server.repositories[REPO].branches == {"main": [{}]}
    if tries is not None:
        assert server.count(f"{fault.method} .*{fault.path}") == tries
    assert fault.action != 429 or waits == [7, 7]
    # Once the fault is gone the same command brings all.
    server.faults = []
    assert deploy(folder) == 0
    assert sorted(server.repositories[REPO].files("main") or {}) == sorted(UPLOADED)
    assert len(server.repositories[REPO].branches["main"]) == 2


def test_an_upload_that_was_cut_off_goes_on_where_it_was(server: HubServer, folder: Path, waits: list[float]) -> None:
    server.faults = [Fault("POST", "/commit/", CUT)]
    assert deploy(folder) == 7
    assert server.repositories[REPO].files("main") == {} and len(server.blobs) == 1
    server.faults = []
    sent = server.count("PUT /lfs/")
    assert deploy(folder) == 0
    assert server.count("PUT /lfs/") == sent == 1


def test_a_fault_that_passes_is_waited_out(server: HubServer, folder: Path, waits: list[float]) -> None:
    server.faults = [
        Fault("POST", "/repos/create", 500, times=2),
        Fault("POST", "/commit/", CUT, times=1),
        Fault("PUT", "/lfs/", CUT, times=1),
    ]
    assert deploy(folder) == 0
    assert len(server.repositories[REPO].branches["main"]) == 2 and waits[:2] == [1, 4]


def test_no_hub_no_login_and_offline(
    server: HubServer,
    folder: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert deploy(folder) == 7
    assert "unset HF_HUB_OFFLINE" in capsys.readouterr().err and waits == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert deploy(folder) == 7
    assert "http://127.0.0.1:9 was not reached" in capsys.readouterr().err and waits == [1, 4]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(folder / "no-tokens"))
    assert deploy(folder) == 7
    assert "not logged in to the hub" in capsys.readouterr().err
    assert server.seen == []


@pytest.mark.parametrize(
    ("change", "argv", "code", "named"),
    [
        ({}, ["--repo_name", "no-user"], 2, "expected user/name"),
        ({}, ["--repo_name", "a/b/c"], 2, "--repo_name 'a/b/c'"),
        ({}, ["--model_path", "nowhere"], 4, "nowhere is no directory"),
        ({"model.safetensors": b"torn"}, [], 4, "model.safetensors"),
        ({"quick_results.json": None}, [], 2, "no evaluation in"),
        ({"quick_results.json": b"{"}, [], 3, "does not read as JSON"),
        ({"quick_results.json": b'{"summary": {"tau": 1}}'}, [], 3, "its summary lacks base_model, dtype"),
        ({}, ["--results", "gone.json"], 3, "gone.json"),
        (
            {"quick_results.json": json.dumps({"summary": {**SUMMARY, "base_model": "gpt2"}}).encode()},
            [],
            3,
            "measured on another base: expected smollm2-135m-instruct, got gpt2",
        ),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_network(
    server: HubServer,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, bytes | None],
    argv: list[str],
    code: int,
    named: str,
) -> None:
    for name, content in change.items():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    capsys.readouterr()
    assert deploy(folder, *argv) == code
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1
    assert server.seen == []


SWEEP = {"sweep": {"method": "speculative", "points": []}}
BASELINE = {
    "summary": {**SUMMARY, "method": "baseline", "speculator_path": None, "tau": 1.0, "acceptance_by_depth": []}
}
OTHERS = {"sweep": (SWEEP, "got 'a sweep'"), "baseline": (BASELINE, "got 'baseline'")}


@pytest.mark.parametrize("what", OTHERS)
def test_results_that_evaluate_no_drafter_are_left_out_and_refused_by_name(
    server: HubServer, folder: Path, what: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    record, got = OTHERS[what]
    other = folder / f"{what}_results.json"
    other.write_text(json.dumps(record))
    assert deploy(folder, "--dry_run") == 0
    out = capsys.readouterr().out
    assert re.findall(r"bytes  (\S+)", out) == sorted(UPLOADED) and out.count("| tau (tokens per verifier step)") == 1
    assert caplog.messages == [f"{other} evaluates no drafter: it is left out"]
    assert deploy(folder, "--results", str(other)) == 3
    assert f"{other} is no evaluation of a drafter: expected a summary of method" in (err := capsys.readouterr().err)
    assert got in err and err.count("\n") == 1
    (folder / "quick_results.json").unlink()
    assert deploy(folder) == 2
    assert "no evaluation in" in capsys.readouterr().err
    assert server.seen == []


@pytest.mark.parametrize(
    ("names", "replaced"),
    [
        (["a/results.json", "b/results.json"], "a/results.json"),
        (["a/results.json", "a/results.json"], "a/results.json"),
        (["a/config.json"], "the drafter's own file"),
    ],
)
def test_evaluations_that_would_replace_another_file_are_refused(
    server: HubServer, folder: Path, tmp_path: Path, names: list[str], replaced: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((folder / "quick_results.json").read_text())
    assert deploy(folder, "--results", *(str(tmp_path / name) for name in names)) == 2
    err = capsys.readouterr().err
    assert f"--results {tmp_path / names[-1]} would replace" in err and f"{replaced} in the upload" in err
    assert err.count("\n") == 1 and server.seen == []


def test_what_is_not_known_is_not_stated_and_local_paths_stay_here(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(folder)
    save_drafter(folder, folder)
    (folder / "quick_results.json").write_text(json.dumps({"summary": {**SUMMARY, "base_model": base}}))
    capsys.readouterr()
    assert deploy(folder, "--dry_run") == 0
    out, err = capsys.readouterr()
    assert not {"base_model", "license"} & metadata_of(out).keys()
    assert "does not state what --base_model and --license would" in err and base not in out
    assert deploy(folder, "--dry_run", "--base_model", "user/base", "--license", "mit") == 0
    metadata = metadata_of(capsys.readouterr().out)
    assert (metadata["base_model"], metadata["license"]) == ("user/base", "mit")


def test_drafters_load_straight_from_the_hub(server: HubServer, folder: Path) -> None:
    assert deploy(folder, "--revision", "v2") == 0
    expected = load_file(folder / "model.safetensors")
    loaded = (
        Drafter.from_pretrained(REPO, revision="v2"),
        AutoModel.from_pretrained(REPO, revision="v2"),
        load_drafter(REPO, "v2"),
    )
    for drafter in loaded:
        assert type(drafter) is Drafter and drafter.config.beam_width == 7
        assert all(drafter.state_dict()[name].equal(tensor) for name, tensor in expected.items())
    config = AutoConfig.from_pretrained(REPO, revision="v2")
    assert type(config) is RecurrentDraftingConfig and config.hidden_size == 32
    with pytest.raises(NetworkError, match="the hub did not give it"):
        load_drafter(REPO)
    with pytest.raises(NetworkError, match="the hub did not give it"):
        load_drafter("someone/else")


def test_a_private_drafter_needs_the_token(
    server: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deploy(folder, "--private") == 0
    load_drafter(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_anotherToken")
    with pytest.raises(NetworkError) as caught:
        load_drafter(REPO)
    assert "hf_anotherToken" not in str(caught.value)


def test_the_uploaded_script_decodes_with_the_uploaded_drafter(server: HubServer, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = save_drafter(tmp_path / "drafter", base)
    (folder / "results.json").write_text(json.dumps({"summary": {**SUMMARY, "base_model": str(base)}}))
    assert deploy(folder) == 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    ids = torch.tensor([[0, 44, 50]])
    plain = model.generate(ids, max_new_tokens=12)
    for place in (REPO, str(folder)):
        assert model.generate(ids, max_new_tokens=12, custom_generate=place, trust_remote_code=True).equal(plain)
    assert server.count("GET .*model.safetensors") == 1


@pytest.mark.slow
def test_the_script_as_a_process(server: HubServer, folder: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "huggingface_deployment.py", "--model_path", str(folder), "--repo_name", REPO]
    done = subprocess.run(command, check=False, cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(server.repositories[REPO].files("main") or {}) == sorted(UPLOADED)


def test_the_card_takes_only_its_own_file(folder: Path) -> None:
    assert hub.own_card(folder) is None
    hub.write_files(folder, hub._MARK)
    assert hub.own_card(folder) is None


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/model", "owner/model"),
        ("gone-model", "gone-model"),
        ("/data/models/base", "base"),  # of a machine that is not this one
        ("~/models/base", "base"),
        ("~nobody-of-that-name/models/base", "base"),
    ],
)
def test_a_name_tells_nothing_of_any_machines_directories(name: str, public: str) -> None:
    assert hub.public_name(name) == public


def test_a_path_from_here_is_told_by_its_last_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "drafter").mkdir(parents=True)
    assert hub.public_name("out/drafter") == "drafter"
