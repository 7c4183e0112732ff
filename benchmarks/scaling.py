#!/usr/bin/env python
"""How does tau grow with data and compute? The recipe on 1/16, 1/8, ... of the packaged data, tau by real decode.

Each size is a run of train_speculator.py of its own, with the whole learning rate schedule, over the same number of
epochs; so data and compute double together. ``--trained`` adds a drafter that has seen all rows, over the epochs that
its trainer_state.json names. Each is decoded greedily and at temperature 1.0, alone and with copies of the text's
repeats. Nothing is chosen here, so the prompts are MT-Bench's. A size that has its file in the output directory is
skipped, so a run goes on where it stopped.

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
# Name, tokens copied, temperature.
WAYS = (("greedy", 0, 0.0), ("sampled", 0, 1.0), ("greedy_lookup", 16, 0.0), ("sampled_lookup", 16, 1.0))
NODES = "16"


def row_path(args: argparse.Namespace, rows: int, epochs: float) -> Path:
    """Return the file of one size."""
    directory: Path = args.output_dir
    return directory / f"epochs-{epochs:g}-rows-{rows:06d}.json"


def measure(args: argparse.Namespace, rows: int, verifier: Verifier, prompts: list[list[int]]) -> Path:
    """Train on so many rows and decode; return the file."""
    path = row_path(args, rows, args.epochs)
    if path.exists():
        return path
    change = f"{BEST} {args.change} --num_train_epochs {args.epochs:g} --max_train_samples {rows + HELD_OUT_ROWS}"
    recipe = make_recipe(args, change)
    with tempfile.TemporaryDirectory() as scratch:
        drafter = (args.drafters_dir or Path(scratch)) / path.stem
        seconds = train(args, recipe, drafter)
        taus = decode_ways(args, verifier, prompts, drafter)
    figures = {"rows": rows, "epochs": args.epochs, "training_seconds": round(seconds, 1)}
    write_row(args, recipe, {**figures, "prompts": len(prompts), **taus}, path)
    return path


def measure_trained(args: argparse.Namespace, rows: int, verifier: Verifier, prompts: list[list[int]]) -> Path:
    """Decode with a drafter that is there already; return the file."""
    state = json.loads((args.trained / "trainer_state.json").read_text())
    path = row_path(args, rows, state["num_train_epochs"])
    if not path.exists():
        seconds = next(entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry)
        figures = {"rows": rows, "epochs": state["num_train_epochs"], "training_seconds": round(seconds, 1)}
        taus = decode_ways(args, verifier, prompts, args.trained)
        recipe = make_recipe(args, f"{args.trained_with} --num_train_epochs {state['num_train_epochs']}")
        write_row(args, recipe, {**figures, "prompts": len(prompts), **taus}, path)
    return path


def decode_ways(args: argparse.Namespace, verifier: Verifier, prompts: list[list[int]], path: Path) -> dict[str, Any]:
    """Decode greedily and at temperature 1.0, the drafter alone and with copies; return what each found."""
    return {
        name: decode(args, verifier, prompts, path, lookup_length, temperature)
        for name, lookup_length, temperature in WAYS
    }


def slope_of(records: list[dict[str, Any]], way: str) -> float:
    """Return the slope of tau over log2 of the rows, by least squares over all sizes."""
    points = [(math.log2(record["rows"]), record[way][NODES]["tau"]) for record in records]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def shares(record: dict[str, Any]) -> list[float]:
    """Return tau at temperature 1.0 over greedy tau: the drafter alone, and with copies."""
    taus = {way: record[way][NODES]["tau"] for way, _, _ in WAYS}
    return [taus["sampled"] / taus["greedy"], taus["sampled_lookup"] / taus["greedy_lookup"]]


def show(every: list[dict[str, Any]], epochs: float) -> str:
    """Return the sizes, the gain per doubling of the last step and of the line, and what a tenfold would give."""
    ways = [way for way, _, _ in WAYS]
    header = ["epochs", "rows", "seconds", *(way.replace("_", ", ") for way in ways), "sampled / greedy", "with lookup"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for record in every:
        taus = " | ".join(f"{record[way][NODES]['tau']:.3f}" for way in ways)
        alone, lookup = shares(record)
        lines.append(
            f"| {record['epochs']:g} | {record['rows']} | {record['training_seconds']:.0f} | {taus} "
            f"| {alone:.3f} | {lookup:.3f} |"
        )
    records = [record for record in every if record["epochs"] == epochs]
    if len(records) > 1:
        lines += [gain_per_doubling(records, way) for way in ways]
    return "\n".join(lines)


def gain_per_doubling(records: list[dict[str, Any]], way: str) -> str:
    """Return what a doubling of the rows brings, and what ten times of them would."""
    slope = slope_of(records, way)
    before, last = records[-2:]
    tau = last[way][NODES]["tau"]
    recent = (tau - before[way][NODES]["tau"]) / math.log2(last["rows"] / before["rows"])
    return (
        f"{way}, per doubling: {slope:+.3f} over all sizes, {recent:+.3f} over the last; "
        f"ten times the data at the last rate: {tau + recent * math.log2(10):.2f}"
    )


def plot(records: list[dict[str, Any]]) -> str:
    """Draw tau over log2 of the rows as one HTML page: the drafter alone, and with copies."""
    figures = []
    for drafts, ways in (("the drafter alone", WAYS[:2]), ("with copies", WAYS[2:])):
        lines = [
            plots.Line(
                f"{'sampled' if temperature else 'greedy'}, {epochs:g} {'epoch' if epochs == 1 else 'epochs'}",
                [(math.log2(item["rows"]), item[way][NODES]["tau"]) for item in records if item["epochs"] == epochs],
            )
            for epochs in sorted({record["epochs"] for record in records})
            for way, _, temperature in ways
        ]
        drawing = plots.lines(lines, x_label="log2 of training rows")
        title = f"tau on MT-Bench, {NODES} nodes, {drafts}"
        figures.append(report.figure(title, drawing, records[0]["command"], [line.name for line in lines]))
    return report.page("Tau against data and compute", figures)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure the sizes that are missing, print the table and draw the curve."""
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default=DEFAULT_BASE)
    parser.add_argument("--hidden_state_cache", type=Path, required=True, help="one for all; each size adds its states")
    parser.add_argument("--output_dir", type=Path, required=True, help="one JSON per size, and the curve")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], help="shares")
    parser.add_argument("--total_rows", type=int, help="what the shares are of: the first so many packaged rows (all)")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--change", default="", help="further flags of every size's training")
    parser.add_argument("--drafters_dir", type=Path, help="keep the drafter of each size here (default: drop them)")
    parser.add_argument("--trained", type=Path, help="a drafter trained on all rows, decoded beside the sizes")
    parser.add_argument("--prompts", type=int, default=80, help="MT-Bench first turns")
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--trained_with", default=BEST, help="flags of its training beside the base recipe")
    parser.set_defaults(max_tree_nodes=[int(NODES)])
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    verifier, tokenizer = Verifier.from_pretrained(args.base_model, "bf16"), data.load_tokenizer(args.base_model)
    prompts = harness.mt_bench_prompts(args.base_model, args.prompts)
    total = len(self_data.self_rows(verifier, tokenizer, Path(), None)[: args.total_rows]) - HELD_OUT_ROWS
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
