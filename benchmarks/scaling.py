#!/usr/bin/env python
"""How does tau grow with data and compute? The recipe on 1/16, 1/8, ... of the packaged data, tau by real decode.

Each size is a run of train_speculator.py of its own, with the whole learning rate schedule, over the same number of
epochs; so data and compute double together. ``--trained`` adds a drafter that has seen all rows, over the epochs that
its trainer_state.json names. Nothing is chosen here, so the prompts are MT-Bench's. A size that has its file in the
output directory is skipped, so a run goes on where it stopped.

Example:
  python benchmarks/scaling.py --hidden_state_cache DIR --output_dir benchmarks/results/scaling
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import harness
from ablations import HELD_OUT_ROWS, decode, make_recipe, train, write_row
from recurrent_drafting import Verifier, cli, data, plots, report, result_files, self_data
from recurrent_drafting.assets import DEFAULT_BASE

# The ablations' best change of their base recipe.
BEST = "--drafter_predict_n_tokens 3"


def row_path(args: argparse.Namespace, rows: int, epochs: float) -> Path:
    """Return the file of one size."""
    directory: Path = args.output_dir
    return directory / f"epochs-{epochs:g}-rows-{rows:06d}.json"


def measure(args: argparse.Namespace, rows: int, verifier: Verifier, prompts: list[list[int]]) -> Path:
    """Train on so many rows and decode; return the file."""
    path = row_path(args, rows, args.epochs)
    if path.exists():
        return path
    change = f"{BEST} --num_train_epochs {args.epochs:g} --max_train_samples {rows + HELD_OUT_ROWS}"
    recipe = make_recipe(args, change)
    with tempfile.TemporaryDirectory() as scratch:
        seconds = train(args, recipe, Path(scratch) / "run")
        tau = decode(args, verifier, prompts, Path(scratch) / "run")
    figures = {"rows": rows, "epochs": args.epochs, "training_seconds": round(seconds, 1)}
    write_row(args, recipe, {**figures, "prompts": len(prompts), "greedy": tau}, path)
    return path


def measure_trained(args: argparse.Namespace, rows: int, verifier: Verifier, prompts: list[list[int]]) -> Path:
    """Decode with a drafter that is there already; return the file."""
    state = json.loads((args.trained / "trainer_state.json").read_text())
    path = row_path(args, rows, state["num_train_epochs"])
    if not path.exists():
        seconds = next(entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry)
        figures = {"rows": rows, "epochs": state["num_train_epochs"], "training_seconds": round(seconds, 1)}
        tau = decode(args, verifier, prompts, args.trained)
        recipe = make_recipe(args, f"{BEST} --num_train_epochs {state['num_train_epochs']}")
        write_row(args, recipe, {**figures, "prompts": len(prompts), "greedy": tau}, path)
    return path


def fit(records: list[dict[str, Any]], nodes: str) -> tuple[float, float]:
    """Return intercept and slope of tau over log2 of the rows, by least squares over all sizes."""
    points = [(math.log2(record["rows"]), record["greedy"][nodes]["tau"]) for record in records]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return mean_y - slope * mean_x, slope


def show(every: list[dict[str, Any]], epochs: float) -> str:
    """Return the sizes, the gain per doubling of the last step and of the line, and what a tenfold would give."""
    lines = ["| epochs | rows | seconds | tau, 16 nodes | tau, all |", "|---|---|---|---|---|"]
    lines += [
        f"| {record['epochs']:g} | {record['rows']} | {record['training_seconds']:.0f} "
        f"| {record['greedy']['16']['tau']:.3f} | {record['greedy']['all']['tau']:.3f} |"
        for record in every
    ]
    records = [record for record in every if record["epochs"] == epochs]
    if len(records) > 1:
        _, slope = fit(records, "16")
        before, last = records[-2:]
        step = math.log2(last["rows"] / before["rows"])
        recent = (last["greedy"]["16"]["tau"] - before["greedy"]["16"]["tau"]) / step
        lines.append(
            f"per doubling, 16 nodes: {slope:+.3f} over all sizes, {recent:+.3f} over the last; "
            f"ten times the data at the last rate: {last['greedy']['16']['tau'] + recent * math.log2(10):.2f}"
        )
    return "\n".join(lines)


def plot(records: list[dict[str, Any]]) -> str:
    """Draw tau over log2 of the rows as one HTML page."""
    lines = [
        plots.Line(
            f"{nodes} nodes, {epochs:g} epochs",
            [(math.log2(item["rows"]), item["greedy"][nodes]["tau"]) for item in records if item["epochs"] == epochs],
        )
        for epochs in sorted({record["epochs"] for record in records})
        for nodes in records[0]["greedy"]
    ]
    drawing = plots.lines(lines, x_label="log2 of training rows")
    figure = report.figure("tau on MT-Bench", drawing, records[-1]["command"], [line.name for line in lines])
    return report.page("Tau against data and compute", [figure])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure the sizes that are missing, print the table and draw the curve."""
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default=DEFAULT_BASE)
    parser.add_argument("--hidden_state_cache", type=Path, required=True, help="shared by all sizes")
    parser.add_argument("--output_dir", type=Path, required=True, help="one JSON per size, and the curve")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], help="shares")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--trained", type=Path, help="a drafter trained on all rows, decoded beside the sizes")
    parser.add_argument("--prompts", type=int, default=80, help="MT-Bench first turns")
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--max_tree_nodes", type=int, nargs="+", default=[8, 16, 0], help="0 is the full tree")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    verifier, tokenizer = Verifier.from_pretrained(args.base_model), data.load_tokenizer(args.base_model)
    prompts = harness.mt_bench_prompts(args.base_model, args.prompts)
    total = len(self_data.self_rows(verifier, tokenizer, Path(), None)) - HELD_OUT_ROWS
    for share in sorted(args.sizes):
        print(measure(args, round(share * total), verifier, prompts), flush=True)
    if args.trained:
        print(measure_trained(args, total, verifier, prompts), flush=True)
    records = [json.loads(path.read_text()) for path in sorted(args.output_dir.glob("epochs-*.json"))]
    print(show(records, args.epochs))
    result_files.write_text(plot(records), args.output_dir / "curve.html")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
