#!/usr/bin/env python
"""Where the time of a decoding step goes: draft, verify, sample, cache, other, and what a bare forward costs.

Overhead is the step's time minus a bare forward of the same number of nodes, timed in turn with the
decoder: the packed body and head alone on tokens, mask and positions that are ready.

Example:
  python benchmarks/profile_step.py --speculator_path DIR --output benchmarks/results/profile-step-bf16.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

import harness
from recurrent_drafting import (
    AutoregressiveDecoder,
    SamplingConfig,
    SpeculativeDecoder,
    Verifier,
    cli,
    plots,
    report,
)
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.metrics import PHASES, DecodingStats

STEP_PHASES = tuple(name for name in PHASES if name != "prefill")
_BARE_FORWARDS = 8
# The base, the decoder, and the prompts.
Tools = tuple[Verifier, SpeculativeDecoder, list[list[int]]]


@torch.inference_mode()
def bare_forward(verifier: Verifier, rows: int, nodes: int, prefix: int) -> float:
    """Return median seconds of a forward over ``nodes`` tokens behind a prefix, with nothing around it."""
    cache = verifier.new_cache(rows, prefix + nodes)
    verifier.prefill([[1] * prefix] * rows, cache)
    ids = torch.ones(rows, nodes, dtype=torch.long, device=verifier.device)
    positions = (prefix + torch.arange(nodes, device=verifier.device)).expand(rows, -1)
    mask = torch.zeros(rows, 1, nodes, prefix + nodes, dtype=verifier.dtype, device=verifier.device)
    body, head = verifier.decoding_modules()
    arguments = {"attention_mask": mask, "position_ids": positions, verifier.cache_argument: cache}
    seconds = []
    for _ in range(_BARE_FORWARDS):
        start = time.perf_counter()
        logits = head(body(input_ids=ids, use_cache=True, **arguments).last_hidden_state)
        logits[0, 0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def load(args: argparse.Namespace) -> tuple[Verifier, SpeculativeDecoder]:
    """Return the base, and the decoder of a drafter whose trees have ``--max_tree_nodes``."""
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    drafter = load_drafter(args.speculator_path)
    return verifier, SpeculativeDecoder(verifier, drafter, replace(drafter.config.beam, max_nodes=args.max_tree_nodes))


def profile(args: argparse.Namespace, rows: int, tools: Tools) -> dict[str, Any]:
    """Decode some prompts ``rows`` at a time, baseline and speculative in turn, and split a step's time."""
    verifier, decoder, prompts = tools
    batches = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
    sampling = SamplingConfig(temperature=args.temperature, seed=1)
    methods = {"baseline": AutoregressiveDecoder(verifier), "speculative": decoder}
    stats = {name: DecodingStats() for name in methods}
    bare: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method.generate(batches[0], max_new_tokens=4, sampling=sampling)
    for batch in tqdm(batches, desc=f"batch {rows}"):
        prefix = max(map(len, batch)) + args.new_tokens // 2
        for name, method in methods.items():
            # Without an end of text, so that the batch stays full and a step means the same throughout.
            output = method.generate(batch, max_new_tokens=args.new_tokens, sampling=sampling, eos_token_ids=())
            stats[name].merge(output.stats)
            nodes = 1 if name == "baseline" else round(output.stats.mean_nodes)
            bare[name].append(bare_forward(verifier, len(batch), nodes, prefix))
    return {name: _split(stats[name], statistics.median(bare[name])) for name in methods}


def _split(stats: DecodingStats, bare: float) -> dict[str, Any]:
    """Turn sums into milliseconds of a step."""
    phases = {name: 1000 * stats.phase_seconds[name] / stats.forwards for name in STEP_PHASES}
    step = sum(phases.values())
    return {
        "step_ms": step,
        "bare_forward_ms": 1000 * bare,
        "overhead_ms": step - 1000 * bare,
        "phases_ms": phases,
        "share_beside_verify": 1 - phases["verify"] / step,
        "mean_nodes": stats.mean_nodes,
        "tau": stats.tau,
        "steps": stats.forwards,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Profile every batch size."""
    tools = (*load(args), harness.mt_bench_prompts(args.base_model, args.prompts))
    return {
        **harness.head(
            __file__, args, "dtype", "temperature", "batch_sizes", "max_tree_nodes", "prompts", "new_tokens"
        ),
        "batches": {str(rows): profile(args, rows, tools) for rows in args.batch_sizes},
    }


def table(record: dict[str, Any]) -> str:
    """Lay the milliseconds out as text."""
    head = ["batch", "method", *STEP_PHASES, "step", "bare", "overhead", "nodes", "tau"]
    lines = [head]
    for rows, methods in record["batches"].items():
        for name, item in methods.items():
            cells = [*item["phases_ms"].values(), item["step_ms"], item["bare_forward_ms"], item["overhead_ms"]]
            cells += [item["mean_nodes"], item["tau"]]
            lines.append([rows, name, *(f"{value:.2f}" for value in cells)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot(record: dict[str, Any]) -> str:
    """Draw the phases of each batch size as one HTML page."""
    labels = [f"{name} {rows}" for rows, methods in record["batches"].items() for name in methods]
    items = [item for methods in record["batches"].values() for item in methods.values()]
    series = [plots.Series(name, [item["phases_ms"][name] for item in items]) for name in STEP_PHASES]
    series.append(plots.Series("bare forward", [item["bare_forward_ms"] for item in items]))
    drawing = plots.bars(labels, series, spec=".1f")
    names = [item.name for item in series]
    figure = report.figure("Milliseconds of a step, by method and batch size", drawing, record["command"], names)
    return report.page("Where a decoding step's time goes", [figure])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    parser = harness.build_parser(__doc__, dtype="auto", temperature=0.0, max_tree_nodes=16, prompts=8, new_tokens=48)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    args = parser.parse_args(argv)
    record = measure(args)
    print(table(record))
    harness.write(record, args.output, plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
