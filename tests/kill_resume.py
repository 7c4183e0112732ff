"""Kill training runs at random moments and resume them: the drafter must come out bit for bit the same.

One run is left alone. Every round starts the same run in a process of its own, ends it with SIGKILL at
a random moment (every second round while a checkpoint is being written), and resumes it with
``--resume_from_checkpoint True`` until it has ended by itself; half of the rounds are killed again
while resuming. A round counts if the final weights, and the last checkpoint's optimizer, scheduler and
random state, are those of the run that was left alone. ``--in_save N`` goes on aiming at saves until N
kills have left a half-written checkpoint behind, and fails if fewer did.

    python -m tests.kill_resume [--rounds N] [--in_save N] [--seed N]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from recurrent_drafting.manifest import PARTIAL
from recurrent_drafting.resume import checkpoints, newest_complete
from recurrent_drafting.run_guard import LOCK
from tests.text_models import save_base, save_chats

STEPS, SAVE_STEPS, ROWS = 24, 1, 20
ROOT = Path(__file__).resolve().parent.parent
RUN = "import sys; from train_speculator import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Round:
    """What happened: the moments of the kills, in words, and whether the drafter is the same."""

    kills: list[str] = field(default_factory=list)
    in_save: int = 0
    same: bool = False
    seconds: float = 0.0


class Bench:
    """A tiny base, a data set, and the run that is left alone.

    Args:
        folder: scratch directory.
    """

    def __init__(self, folder: Path) -> None:
        self._base, self._chats, self._alone = folder / "base", folder / "chats.jsonl", folder / "alone"
        save_base(self._base)
        save_chats(self._chats, ROWS)
        finish(self.start(self._alone))

    def start(self, output: Path) -> subprocess.Popen[str]:
        """Start the run in a process of its own, or resume it if there is a complete checkpoint."""
        argv = ["--llm_name_or_path", str(self._base), "--dataset_name", str(self._chats), "--targets", "ground_truth"]
        argv += ["--output_dir", str(output), "--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS)]
        argv += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_eval_samples", "1"]
        argv += ["--lr_scheduler_type", "cosine", "--save_total_limit", "3", "--disable_tqdm", "True"]
        if output.exists() and newest_complete(output):
            argv += ["--resume_from_checkpoint", "True"]
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def same(self, output: Path) -> bool:
        """Compare a finished run with the one that was left alone."""
        pairs = [(read(self._alone), read(output)), (state(self._alone), state(output))]
        return all(equal(first, second) for first, second in pairs)


def read(output: Path) -> dict[str, torch.Tensor]:
    """Return a finished run's drafter."""
    return load_file(output / "model.safetensors")


def state(output: Path) -> list[Any]:
    """Return optimizer, scheduler and random state of a run's last checkpoint."""
    last = next(path for _, path in checkpoints(output))
    files = [last / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    return [torch.load(file, weights_only=False) for file in files]


def equal(first: Any, second: Any) -> bool:
    """Compare nested values bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    if hasattr(first, "tobytes"):
        return bool(first.tobytes() == second.tobytes())
    return bool(first == second)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a process that must end well."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}:\n{errors}")


def kill_at(process: subprocess.Popen[str], reached: Callable[[], bool], delay: float) -> bool:
    """Send SIGKILL so many seconds after something is true; tell whether the process was still running."""
    while process.poll() is None and not reached():
        time.sleep(0.0005)
    time.sleep(delay)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    finish(process)
    return False


def play(bench: Bench, output: Path, rng: random.Random, during_save: bool) -> Round:
    """Play one round."""
    result, start = Round(), time.perf_counter()
    for _ in range(rng.choice((1, 2))):
        done = step_of(newest_complete(output)) if output.exists() else 0
        step = rng.randrange(done, STEPS + 1)
        if during_save:
            reached = (output / PARTIAL / f"checkpoint-{min(step + 1, STEPS)}").exists
        else:
            reached = (output / f"checkpoint-{step}" if step else output / LOCK).exists
        # A save of this run takes some milliseconds, most of them in the sync of its files.
        killed = kill_at(bench.start(output), reached, rng.uniform(0, 0.004 if during_save else 0.1))
        left = [path.name for path in output.glob(f"{PARTIAL}/*")]
        moment = f"step {max((step for step, _ in checkpoints(output)), default=0)}"
        result.kills.append((moment + "".join(f" in {name}" for name in left)) if killed else "its end")
        if not killed:
            break
        # What is called old is a checkpoint on its way out.
        result.in_save += any(not name.startswith("old-") for name in left)
    else:
        finish(bench.start(output))
    result.same, result.seconds = bench.same(output), time.perf_counter() - start
    return result


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Play the rounds; return 0 if every one gave the same drafter."""
    parser = argparse.ArgumentParser(description="Kill training runs at random moments and resume them.")
    parser.add_argument("--rounds", type=int, default=20, help="(default %(default)s)")
    parser.add_argument("--in_save", type=int, default=0, help="kills that must hit a save (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args(argv)
    same = in_save = 0
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as scratch:
        bench = Bench(Path(scratch))
        for number in range(args.rounds):
            output = Path(scratch) / "killed"
            # Every second round aims at a save, and all of them once the wanted number needs them.
            aims = number % 2 == 1 or args.in_save - in_save >= args.rounds - number
            result = play(bench, output, random.Random(f"{args.seed}/{number}"), during_save=aims)
            same, in_save = same + result.same, in_save + result.in_save
            verdict = "same bits" if result.same else "DIFFERENT"
            print(
                f"round {number + 1}: killed at {'; '.join(result.kills)}: {verdict} {result.seconds:.1f} s", flush=True
            )
            shutil.rmtree(output)
    print(f"{same} of {args.rounds}, {in_save} kills inside a save")
    return int(same < args.rounds or not args.rounds or in_save < args.in_save)


if __name__ == "__main__":
    raise SystemExit(main())
