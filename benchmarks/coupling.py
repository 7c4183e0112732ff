#!/usr/bin/env python
"""Does the drafter gain from knowing the noise? Tau on MT-Bench, coupled drafting off and on.

Texts do not depend on the drafter, so every strength decodes the same tokens in fewer or more steps. With trees chosen
by cost their time counts too: the strengths take turns over several rounds.

Example:
  python benchmarks/coupling.py --speculator_path DIR --output benchmarks/results/coupling.json
  python benchmarks/coupling.py --speculator_path DIR --by_cost --batch_size 1 --rounds 3 --strengths 0.83 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import harness
from recurrent_drafting import SamplingConfig, Verifier, cli, data, evaluation, prompt_files
from recurrent_drafting.checkpoint import load_drafter

_SETTINGS = (
    *("dtype", "prompts", "new_tokens", "batch_size", "max_tree_nodes"),
    *("lookup_length", "recycled_nodes", "temperatures", "strengths", "seed", "by_cost", "rounds"),
)
_COUNTERS = ("tau", "acceptance_by_depth", "tokens", "prompts", "mean_tree_nodes", "phase_seconds")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Decode the prompts at every temperature and strength."""
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    tokenizer = data.load_tokenizer(args.base_model)
    drafter = load_drafter(args.speculator_path)
    beam = drafter.config.beam
    for name in ("lookup_length", "recycled_nodes"):
        if getattr(args, name) is not None:
            beam = replace(beam, **{name: getattr(args, name)})
    questions, _ = prompt_files.load_questions("mt-bench", args.prompts, spread=True)
    cases = [(t, strength) for t in args.temperatures for strength in (args.strengths if t else [0.0])]
    runs: dict[tuple[float, float], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for temperature, strength in cases:
            nodes = None if args.by_cost else args.max_tree_nodes
            settings = evaluation.RunSettings(
                base_model=args.base_model,
                speculator_path=args.speculator_path,
                max_new_tokens=args.new_tokens,
                batch_size=args.batch_size,
                sampling=SamplingConfig(temperature=temperature, seed=args.seed),
                beam=replace(beam, max_nodes=nodes, coupling=strength),
            )
            decoder = evaluation.speculative_decoder(verifier, drafter, settings)
            found = evaluation.run_speculative(decoder, tokenizer, questions, settings)["summary"]
            runs[temperature, strength].append(found)
    rows = [_row(*case, found) for case, found in runs.items()]
    return {
        **harness.head(__file__, args, *_SETTINGS),
        "rows": rows,
    }


def _row(temperature: float, strength: float, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the record: counters of the last round, and tokens per second of each."""
    return {
        "temperature": temperature,
        "coupling": strength,
        **{name: rounds[-1][name] for name in _COUNTERS},
        "tokens_per_second": [found["tokens_per_second"] for found in rounds],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    parser = harness.build_parser(
        __doc__, dtype="auto", prompts=80, new_tokens=64, batch_size=8, max_tree_nodes=16, seed=1
    )
    for name in ("lookup_length", "recycled_nodes"):
        parser.add_argument(f"--{name}", type=int, help="default: the drafter's own")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.3, 0.7, 1.0])
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[0.0, 1.0], help="0 is off; else the drafter's error temperature"
    )
    parser.add_argument(
        "--by_cost", action="store_true", help="choose trees by cost instead of --max_tree_nodes, as decoding does"
    )
    parser.add_argument("--rounds", type=int, default=1, help="times that everything is decoded, in turns")
    args = parser.parse_args(argv)
    cli.require_least(args, {"rounds": 1})
    record = measure(args)
    for row in record["rows"]:
        depths = " ".join(f"{share:.2f}" for share in row["acceptance_by_depth"])
        speed = statistics.median(row["tokens_per_second"])
        head = f"temperature {row['temperature']}, coupling {row['coupling']}"
        print(f"{head}: tau {row['tau']:.3f}, by depth {depths}, {speed:.1f} tokens/s")
    harness.write(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
