#!/usr/bin/env python
"""Does the drafter gain from knowing the noise? Tau on MT-Bench, coupled drafting off and on.

Texts do not depend on the drafter, so every strength decodes the same tokens in fewer or more steps.

Example:
  python benchmarks/coupling.py --speculator_path DIR --output benchmarks/results/coupling.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import harness
from recurrent_drafting import SamplingConfig, Verifier, cli, data, evaluation, prompt_files
from recurrent_drafting.checkpoint import load_drafter

_SETTINGS = (
    *("dtype", "prompts", "new_tokens", "batch_size", "max_tree_nodes"),
    *("lookup_length", "recycled_nodes", "temperatures", "strengths", "seed"),
)


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
    rows: list[dict[str, Any]] = []
    for temperature in args.temperatures:
        for strength in args.strengths if temperature else [0.0]:
            settings = evaluation.RunSettings(
                base_model=args.base_model,
                speculator_path=args.speculator_path,
                max_new_tokens=args.new_tokens,
                batch_size=args.batch_size,
                sampling=SamplingConfig(temperature=temperature, seed=args.seed),
                beam=replace(beam, max_nodes=args.max_tree_nodes, coupling=strength),
            )
            decoder = evaluation.speculative_decoder(verifier, drafter, settings)
            summary = evaluation.run_speculative(decoder, tokenizer, questions, settings)["summary"]
            names = ("tau", "acceptance_by_depth", "tokens", "prompts", "mean_tree_nodes", "phase_seconds")
            rows.append(
                {"temperature": temperature, "coupling": strength, **{name: summary[name] for name in names}},
            )
    return {
        **harness.head(__file__, args, *_SETTINGS),
        "rows": rows,
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
    args = parser.parse_args(argv)
    record = measure(args)
    for row in record["rows"]:
        depths = " ".join(f"{share:.2f}" for share in row["acceptance_by_depth"])
        print(f"temperature {row['temperature']}, coupling {row['coupling']}: tau {row['tau']:.3f}, by depth {depths}")
    harness.write(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
