"""Trackers: what an offline Weights & Biases run and TensorBoard hold after training, and that nothing leaks."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recurrent_drafting import DrafterTrainer, TrainingArguments, tracking
from recurrent_drafting.errors import NetworkError, UsageError
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset
from recurrent_drafting.tracking import Table
from tests.test_train_speculator import GIVEN, error_line, run
from tests.text_models import save_chats
from tests.tiny import make_drafter, make_verifier

wandb = pytest.importorskip("wandb")
wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
TABLE = Table("evaluation", ("depth", "loss"), [(1, 0.123456), (2, 2.0)])


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(save_chats(tmp_path / "chats.jsonl"))


@dataclass
class Runs:
    """The offline runs of one test: a directory that all tests share, and what was in it before."""

    folder: Path
    before: set[Path]

    def only(self) -> Path:
        """Return the directory of the one run since."""
        [path] = set(self.folder.glob("wandb/offline-run-*")) - self.before
        return path


@pytest.fixture
def offline(wandb_folder: Path) -> Runs:
    return Runs(wandb_folder, set(wandb_folder.glob("wandb/offline-run-*")))


@pytest.fixture(scope="module")
def wandb_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let runs stay on disk; a process has one directory for them, which its first run chooses."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            patch.delenv(name)
        for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(folder)}.items():
            patch.setenv(f"WANDB_{name}", value)
        yield folder


def records(runs: Runs) -> dict[str, list[Any]]:
    """Read the transaction log of the run: its records by kind."""
    [path] = runs.only().glob("run-*.wandb")
    deadline = time.monotonic() + 30
    found: dict[str, list[Any]] = {}
    # Its background process closes the file a moment after the run is finished.
    while "exit" not in found and time.monotonic() < deadline:
        found = {}
        for data in framed(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
        time.sleep(0.05)
    return found


def framed(log: bytes) -> Iterator[bytes]:
    """Split a log in LevelDB's format: blocks of 32 KiB, a record in one or more pieces."""
    block, head = 32768, struct.Struct("<IHB")
    place, parts = 7, b""
    while place < len(log):
        if block - place % block < head.size:
            place += block - place % block
            continue
        _, size, kind = head.unpack_from(log, place)
        parts += log[place + head.size : place + head.size + size]
        place += head.size + size
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def logged(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the curves of a run: the values of each name in order."""
    curves: dict[str, list[Any]] = {}
    for entry in found["history"]:
        for item in entry.item:
            name = item.key or ".".join(item.nested_key)
            curves.setdefault(name, []).append(json.loads(item.value_json))
    return curves


@QUIET
def test_an_offline_run_holds_config_curves_and_the_evaluation_table(
    base: str,
    chats: str,
    offline: Runs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    more = ["--use_wandb", "True", "--wandb_project", "drafters", "--wandb_run_name", "first", "--logging_steps", "1"]
    assert run(base, chats, *GIVEN, *more) == 0
    os.environ.pop("WANDB_SERVICE", None)  # the address of its own background process, which it leaves
    assert dict(os.environ) == before and wandb.run is None
    found = records(offline)
    [start] = [item for item in found["run"] if item.project]
    assert (start.project, start.display_name) == ("drafters", "first")
    config = {item.key: json.loads(item.value_json) for entry in found["config"] for item in entry.update}
    assert (config["drafter_predict_n_tokens"], config["hidden_size"], config["objective"]) == (4, 32, "kl")
    curves = logged(found)
    assert len(curves["train/loss"]) == 2 and len(curves["train/loss_depth_4"]) == 2
    assert curves["eval/simulated_tau"][-1] >= 1
    [path] = offline.only().glob("files/media/table/evaluation_*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["depth", "loss", "top1", "top5", "served acceptance"]
    assert [row[0] for row in table["data"]] == [1, 2, 3, 4]
    assert [row[1] for row in table["data"]] == [curves[f"eval/loss_depth_{depth}"][-1] for depth in (1, 2, 3, 4)]
    assert "train equals serve: 1 prompts" in capsys.readouterr().out
    assert found["exit"][0].exit_code == 0


@QUIET
def test_the_documented_arguments_train(offline: Runs, tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        drafter_predict_n_tokens=4,
        drafter_num_layers=2,
        use_wandb=True,
    )
    verifier = make_verifier("llama")
    rows = TokenDataset([EncodedRow([5, 6, 7 + index, 8, 9, 10], [False] * 2 + [True] * 4) for index in range(16)])
    drafter = make_drafter(verifier, num_draft_layers=args.drafter_num_layers)
    trainer = DrafterTrainer(drafter, verifier, args, train_dataset=rows, data_collator=Collator())
    with tracking.closing(trainer.callback_handler.callbacks):
        trainer.train()
    assert trainer.state.global_step == 6
    found = records(offline)
    config = {item.key: json.loads(item.value_json) for entry in found["config"] for item in entry.update}
    assert (config["learning_rate"], config["num_draft_layers"], config["num_train_epochs"]) == (5e-4, 2, 3)
    assert found["exit"][0].exit_code == 0


@QUIET
def test_a_run_that_fails_is_closed_as_failed(base: str, chats: str, offline: Runs) -> None:
    argv = ["--use_wandb", "True", "--max_steps", "30", "--learning_rate", "1e38", "--max_grad_norm", "0"]
    assert run(base, chats, *GIVEN, *argv, "--optim", "sgd") == 6
    assert wandb.run is None
    assert records(offline)["exit"][0].exit_code == 1


@QUIET
def test_a_run_that_was_active_before_goes_on(base: str, chats: str, offline: Runs) -> None:
    own = wandb.init(project="mine")
    try:
        assert run(base, chats, *GIVEN, "--use_wandb", "True", "--wandb_project", "other") == 0
        assert wandb.run is own and own.project == "mine"
    finally:
        own.finish()


@QUIET
@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (wandb.errors.UsageError("No API key configured. Use `wandb login` to log in."), 2, "No API key configured"),
        (wandb.errors.CommError("no route\nlong story"), NetworkError.exit_code, "no route; set WANDB_MODE=offline"),
    ],
    ids=["no login", "no answer"],
)
def test_a_service_that_takes_no_run_is_one_line(
    base: str,
    chats: str,
    offline: Runs,
    error: Exception,
    code: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    assert run(base, chats, *GIVEN, "--use_wandb", "True") == code
    assert named in (line := error_line(capsys)) and "WANDB_MODE=offline" in line


def test_tensorboard_holds_config_curves_and_the_evaluation_table(base: str, chats: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(base, chats, *GIVEN, "--report_to", "tensorboard", "--logging_steps", "1") == 0
    [folder] = Path("out/runs").iterdir()
    found = EventAccumulator(str(folder))
    found.Reload()
    assert len(found.Scalars("train/loss")) == 2
    assert found.Scalars("eval/simulated_tau")[-1].value >= 1
    texts = {name: found.Tensors(name)[-1].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}
    assert json.loads(texts["model_config/text_summary"])["hidden_size"] == 32
    assert json.loads(texts["args/text_summary"])["drafter_predict_n_tokens"] == 4
    heading, _, *rows = texts["evaluation/text_summary"].splitlines()
    assert heading == "| depth | loss | top1 | top5 | served acceptance |" and len(rows) == 4
    loss = found.Scalars("eval/loss_depth_1")[-1].value
    assert float(rows[0].split("|")[2]) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_missing_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"pip install {name}"):
        TrainingArguments(output_dir=str(tmp_path), report_to=name)


def test_trackers_add_up(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_wandb=True, report_to=["tensorboard"])
    assert args.report_to == ["tensorboard", "wandb"]
    assert TrainingArguments(output_dir=str(tmp_path), wandb_run_name="x").run_name == "x"


def test_a_table_as_text() -> None:
    assert TABLE.markdown() == "| depth | loss |\n| --- | --- |\n| 1 | 0.1235 |\n| 2 | 2 |"
