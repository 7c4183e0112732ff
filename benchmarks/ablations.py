#!/usr/bin/env python
"""Which training recipe is best? One row per change, at an equal budget of seconds, tau by real decode.

Every row is a run of train_speculator.py on the packaged data: the base recipe and one change. A short run times a
step; the row then gets as many steps as fit into the budget. Prompts are held-out rows of the self-written data,
never MT-Bench. A row that has its file in the output directory is skipped, so a run goes on where it stopped.

Example:
  python benchmarks/ablations.py --hidden_state_cache DIR --output_dir benchmarks/results/ablations
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recurrent_drafting import (
    BeamConfig,
    SamplingConfig,
    Verifier,
    cli,
    data,
    result_files,
    self_data,
    token_rows,
    train_serve,
)
from recurrent_drafting.assets import DEFAULT_BASE
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.decoding import SpeculativeDecoder
from recurrent_drafting.errors import ResourceError

SCRIPT = Path(__file__).parent.parent / "train_speculator.py"
BASE = (
    "--dataset_name self --bf16 --learning_rate 2e-3 --adam_beta2 0.95 --weight_decay 0 "
    "--lr_scheduler_type cosine --warmup_steps 50 --per_device_train_batch_size 4"
)
# What each row changes; the last of two equal flags counts.
CHANGES = {
    "base": "",
    "depths-3": "--drafter_predict_n_tokens 3",
    "depths-5": "--drafter_predict_n_tokens 5 --beam_length 5",
    "draft-vocabulary-4096": "--draft_vocab_size 4096",
    "draft-vocabulary-16384": "--draft_vocab_size 16384",
    "blocks-1": "--drafter_num_layers 1",
    "blocks-4": "--drafter_num_layers 4",
    "exit-dim-2h": "--exit_dim_multiplier 2",
    "cross-entropy": "--objective ce",
    "expected-length-half": "--objective expected_length --expected_length_share 0.5",
    "equal-depth-weights": "--depth_decay 1",
    "learning-rate-1e-3": "--learning_rate 1e-3",
    "learning-rate-4e-3": "--learning_rate 4e-3",
    "muon": "--drafter_predict_n_tokens 3 --muon",
    "batch-8": "--per_device_train_batch_size 8",
    "no-recurrence": "--no-rnn",
}
TIMED_STEPS = 40
# The training script's own default.
HELD_OUT_ROWS = 64
_BATCH = 16


def make_recipe(args: argparse.Namespace, change: str) -> str:
    """Return the flags of the base recipe and a change to it."""
    return " ".join(f"--llm_name_or_path {args.base_model} {BASE} {change}".split())


def train(args: argparse.Namespace, recipe: str, output: Path) -> float:
    """Run the training script; return the seconds that its steps took."""
    places = ["--output_dir", str(output), "--hidden_state_cache", str(args.hidden_state_cache)]
    quiet = ["--serve_check_prompts", "0", "--save_strategy", "no"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *recipe.split(), *places, *quiet], capture_output=True, text=True, check=False
    )
    found = re.search(r"'train_runtime': '?([0-9.e+]+)", done.stdout)
    if done.returncode or found is None:
        raise ResourceError(f"{recipe} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return float(found.group(1))


def write_row(args: argparse.Namespace, recipe: str, figures: dict[str, Any], path: Path) -> None:
    """Write what a row is, what it took, and on what its tau was measured."""
    common = {"new_tokens": args.new_tokens, "machine": result_files.machine()}
    result_files.write_json({"command": f"python train_speculator.py {recipe}", **figures, **common}, path)


def held_out(args: argparse.Namespace, verifier: Verifier, tokenizer: Any) -> list[list[int]]:
    """Return prompts of the rows that every run leaves out of training."""
    rows, _ = token_rows.truncate(self_data.self_rows(verifier, tokenizer, Path(), None), args.model_max_length)
    return train_serve.prompts_of(token_rows.split(rows, HELD_OUT_ROWS)[1].rows, args.prompts)


def decode(
    args: argparse.Namespace,
    verifier: Verifier,
    prompts: list[list[int]],
    path: Path,
    lookup_length: int = 0,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """Decode the prompts with every tree size, sampling coupled; return tau and acceptance by depth of each."""
    drafter = load_drafter(path)
    found = {}
    for nodes in args.max_tree_nodes:
        width, length = drafter.config.beam_width, drafter.config.beam_length
        beam = BeamConfig(width, length, nodes or None, lookup_length=lookup_length)
        decoder = SpeculativeDecoder(verifier, drafter, beam)
        sampling = SamplingConfig(temperature=temperature, seed=1)
        output = decoder.generate(prompts, max_new_tokens=args.new_tokens, sampling=sampling, batch_size=_BATCH)
        depths = [round(share, 4) for share in output.stats.acceptance_by_depth]
        found[str(nodes or "all")] = {"tau": round(output.stats.tau, 4), "acceptance_by_depth": depths}
    return found


def measure(args: argparse.Namespace, name: str, seed: int, verifier: Verifier, prompts: list[list[int]]) -> Path:
    """Train and decode one row; return its file."""
    path = args.output_dir / f"{name}-seed{seed}.json"
    if path.exists():
        return path
    recipe = make_recipe(args, f"{CHANGES[name]} --seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        if not args.hidden_state_cache.exists():
            # A first run writes the hidden states and is not timed.
            train(args, f"{recipe} --max_steps 2", Path(scratch) / "states")
        step = train(args, f"{recipe} --max_steps {TIMED_STEPS}", Path(scratch) / "timed") / TIMED_STEPS
        steps = max(int(args.seconds / step), TIMED_STEPS)
        start = time.perf_counter()
        seconds = train(args, f"{recipe} --max_steps {steps}", Path(scratch) / "run")
        whole = time.perf_counter() - start
        tau = decode(args, verifier, prompts, Path(scratch) / "run")
    figures = {
        "row": name,
        "seed": seed,
        "steps": steps,
        "training_seconds": round(seconds, 1),
        "whole_seconds": round(whole, 1),
        "budget_seconds": args.seconds,
        "prompts": len(prompts),
        "greedy": tau,
    }
    write_row(args, f"{recipe} --max_steps {steps}", figures, path)
    return path


def table(directory: Path) -> str:
    """Return what the files of a directory hold, best first, with the flags that a row adds to the base recipe."""
    records = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    records.sort(key=lambda record: -float(record["greedy"]["16"]["tau"]))
    lines = [
        "| change | flags | seed | steps | seconds | tau, 8 nodes | 16 nodes | all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        flags = f"`{CHANGES[record['row']]}`" if CHANGES.get(record["row"]) else "-"
        taus = " | ".join(f"{record['greedy'][nodes]['tau']:.3f}" for nodes in ("8", "16", "all"))
        lines.append(
            f"| {record['row']} | {flags} | {record['seed']} | {record['steps']} "
            f"| {record['training_seconds']:.0f} | {taus} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure the rows that are missing, print the table."""
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default=DEFAULT_BASE)
    parser.add_argument("--hidden_state_cache", type=Path, required=True, help="shared by all rows")
    parser.add_argument("--output_dir", type=Path, required=True, help="one JSON per row and seed")
    parser.add_argument("--rows", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=600, help="training steps' time per row")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--max_tree_nodes", type=int, nargs="+", default=[8, 16, 0], help="0 is the full tree")
    parser.add_argument("--model_max_length", type=int, default=512)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    verifier, tokenizer = Verifier.from_pretrained(args.base_model), data.load_tokenizer(args.base_model)
    prompts = held_out(args, verifier, tokenizer)
    for seed in args.seeds:
        for name in args.rows:
            print(measure(args, name, seed, verifier, prompts), flush=True)
    print(table(args.output_dir))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
