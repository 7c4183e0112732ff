#!/usr/bin/env python
"""How a step grows with the context and the batch, beside the verifier's own bare forward of the same nodes.

A decoder that copies its cache, or walks over the whole text in every step, grows faster than its verifier; one
that does not keeps its distance from the bare forward.

Example:
  python benchmarks/growth.py --speculator_path DIR --dtype bf16 --output benchmarks/results/growth-bf16.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import harness
from profile_step import load, profile
from recurrent_drafting import cli, plots, report


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Profile every length and batch size."""
    verifier, decoder = load(args)
    rows = []
    for length in args.prompt_tokens:
        prompts = harness.mt_bench_prompts(args.base_model, args.prompts, length)
        for size in args.batch_sizes:
            found = profile(args, size, (verifier, decoder, prompts))
            rows.append({"prompt_tokens": round(statistics.mean(map(len, prompts))), "batch_size": size, **found})
    flags = ("dtype", "temperature", "batch_sizes", "prompt_tokens", "max_tree_nodes", "prompts", "new_tokens")
    return {**harness.head(__file__, args, *flags), "rows": rows}


def table(record: dict[str, Any]) -> str:
    """Lay the milliseconds out as text."""
    lines = ["batch  context  method        step ms  bare forward ms  step / bare"]
    for row in record["rows"]:
        for name in ("baseline", "speculative"):
            step, bare = row[name]["step_ms"], row[name]["bare_forward_ms"]
            lines.append(
                f"{row['batch_size']:5}  {row['prompt_tokens']:7}  {name:12}  {step:7.1f}"
                f"  {bare:15.1f}  {step / bare:11.2f}"
            )
    return "\n".join(lines)


def plot(record: dict[str, Any]) -> str:
    """Draw steps and bare forwards over the context as one HTML page."""
    series = [
        plots.Line(
            f"{label}, batch {size}",
            [(row["prompt_tokens"], row["speculative"][field]) for row in record["rows"] if row["batch_size"] == size],
        )
        for size in dict.fromkeys(row["batch_size"] for row in record["rows"])
        for label, field in (("step", "step_ms"), ("bare forward", "bare_forward_ms"))
    ]
    drawing = plots.lines(series, x_label="tokens of the prompt", spec=".0f")
    names = [line.name for line in series]
    figure = report.figure("Milliseconds of a speculative step", drawing, record["command"], names)
    return report.page("How a step grows", [figure])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    parser = harness.build_parser(__doc__, dtype="auto", temperature=0.0, max_tree_nodes=8, prompts=8, new_tokens=32)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[128, 512, 1024, 2048], help="at most so many")
    args = parser.parse_args(argv)
    record = measure(args)
    print(table(record))
    harness.write(record, args.output, plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
