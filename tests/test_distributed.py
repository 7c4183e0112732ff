"""Two processes train one drafter: the one that a single process trains; whatever fails ends all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from recurrent_drafting import TrainingArguments, distributed
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.errors import ResourceError
from tests.text_models import save_base

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
# The training script, with a fault in rank 1's third step.
FAULTY = """
import os, signal, sys, time
import train_speculator
from recurrent_drafting.trainer import DrafterTrainer

compute_loss = DrafterTrainer.compute_loss

def faulty(self, *args, **kwargs):
    if self.state.global_step == 2 and os.environ["RANK"] == "1":
        {fault}
    return compute_loss(self, *args, **kwargs)

DrafterTrainer.compute_loss = faulty
sys.exit(train_speculator.main())
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_base(folder / "base")
    # 40 rows in batches of four end with an epoch; some replies are too short to supervise anything.
    replies = ["x" if index % 5 == 0 else f"the answer is {index * 7}" for index in range(42)]
    rows = [{"prompt": f"question {index}", "response": reply} for index, reply in enumerate(replies)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def argv(folder: Path, output: str, batch: int, *more: str) -> list[str]:
    usual = f"""--llm_name_or_path {folder}/base --dataset_name {folder}/chats.jsonl --output_dir {folder}/{output}
        --targets ground_truth --max_steps {STEPS} --model_max_length 96 --max_eval_samples 1 --logging_steps 1
        --save_strategy steps --save_steps {STEPS} --disable_tqdm True --seed 3 --per_device_train_batch_size {batch}"""
    return [*usual.split(), *more]


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--num_machines", "1", "--num_processes")  # fmt: skip


def launch(
    script: Path, arguments: Sequence[str], processes: int = 2, launcher: Sequence[str] = TORCHRUN
) -> tuple[int, str, str, float]:
    """Start the script by a launcher; return code, output, errors and seconds."""
    command = [sys.executable, "-m", *launcher, str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    done = subprocess.run(
        [*command, str(script), *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


def history(folder: Path, output: str) -> list[dict[str, float]]:
    state = json.loads((folder / output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def both(folder: Path) -> dict[str, str]:
    """Train with one process and with two, whose batches together are the single one's; return what they print."""
    printed = {}
    for name, processes in (("one", 1), ("two", 2)):
        cache = ["--hidden_state_cache", str(folder / f"{name}-states")]
        found = launch(ROOT / "train_speculator.py", argv(folder, name, 4 // processes, *cache), processes)
        assert found[0] == 0, found[2]
        printed[name] = found[1]
    return printed


def test_two_processes_train_what_one_trains(folder: Path, both: dict[str, str]) -> None:
    one, two = history(folder, "one"), history(folder, "two")
    assert len(one) == len(two) == STEPS
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            # The Trainer's sum over ranks passes through float32, and so do the weights.
            assert second[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    drafters = [load_drafter(str(folder / name)).state_dict() for name in ("one", "two")]
    assert all(drafters[0][name].allclose(drafters[1][name], atol=1e-5) for name in drafters[0])
    assert len({entry["loss"] for entry in one}) == STEPS  # so that equality says something of the order


def test_one_rank_speaks_and_every_evaluation_row_counts_once(both: dict[str, str]) -> None:
    """There is one evaluation row, so the second rank has none."""

    def lines(text: str) -> list[str]:
        kept = ("base:", "data:", "draft vocabulary:", "drafter:", "simulated tau", "train equals serve:")
        return [line for line in text.splitlines() if line.startswith(kept)]

    assert lines(both["one"]) == lines(both["two"])
    assert len(lines(both["two"])) == 8 and both["two"].count("drafter saved") == 1


def test_accelerate_starts_one_process(folder: Path, both: dict[str, str]) -> None:
    arguments = argv(folder, "accelerate", 4, "--hidden_state_cache", str(folder / "one-states"))
    code, _, err, _ = launch(ROOT / "train_speculator.py", arguments, 1, ACCELERATE)
    assert code == 0, err[-3000:]
    drafters = [load_drafter(str(folder / name)).state_dict() for name in ("one", "accelerate")]
    assert all(drafters[0][name].allclose(drafters[1][name], atol=1e-5) for name in drafters[0])


@pytest.mark.parametrize(
    ("fault", "more", "cause"),
    [
        ("self.drafter.head.weight.data.fill_(float('nan'))", [], "error: training loss is nan at step 2"),
        ("os.kill(os.getpid(), signal.SIGKILL)", [], "Signal 9 (SIGKILL)"),
        ("time.sleep(600)", ["--ddp_timeout", "5"], "error: rank 0 lost another of the 2 processes"),
    ],
    ids=["not finite", "killed", "hangs"],
)
def test_what_befalls_one_rank_ends_all(folder: Path, tmp_path: Path, fault: str, more: list[str], cause: str) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(fault=fault))
    code, _, err, seconds = launch(script, argv(folder, f"faulty-{tmp_path.name}", 2, *more))
    assert code != 0
    assert cause in err, err[-3000:]
    assert seconds < 60 + 30  # a minute after the fault, which comes after some seconds of start
    assert not (folder / f"faulty-{tmp_path.name}" / "model.safetensors").exists()


def test_a_world_of_another_size_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingArguments(output_dir=str(tmp_path))
    distributed.check_world(training)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="expected the 2 processes that WORLD_SIZE names, got 1") as caught:
        distributed.check_world(training)
    assert caught.value.exit_code == 5
    assert (training.use_cpu, training.ddp_timeout) == (True, 60)
