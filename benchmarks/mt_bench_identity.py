#!/usr/bin/env python
"""Is the drafter lossless on the real base? MT-Bench at several sampling settings, batched and one by one.

A setting that the output file already holds is not run again, so an interrupted run goes on.

Example:
  python benchmarks/mt_bench_identity.py --speculator_path DIR --output benchmarks/results/mt-bench-identity.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import harness
from recurrent_drafting import SamplingConfig, Verifier, cli, data, evaluation, prompt_files
from recurrent_drafting.checkpoint import load_drafter

SETTINGS = {
    "greedy": SamplingConfig(),
    "temperature 0.3": SamplingConfig(temperature=0.3, seed=1),
    "temperature 0.7, top-p 0.9": SamplingConfig(temperature=0.7, top_p=0.9, seed=1),
    "temperature 1": SamplingConfig(temperature=1.0, seed=1),
    "temperature 1, repetition penalty 1.2": SamplingConfig(temperature=1.0, repetition_penalty=1.2, seed=1),
}


@dataclass(frozen=True)
class Case:
    """One run: a setting, and how many prompts are decoded, how many of them together."""

    name: str
    prompts: int
    batch_size: int

    @property
    def key(self) -> str:
        """Return what names the case in the output file."""
        return f"{self.name}; {self.prompts} prompts, batch {self.batch_size}"


def cases(args: argparse.Namespace) -> list[Case]:
    """List every setting with all prompts in batches, then with a few one by one."""
    batched = [Case(name, args.prompts, args.batch_size) for name in SETTINGS]
    return batched + [Case(name, args.prompts_alone, 1) for name in SETTINGS]


def run(case: Case, args: argparse.Namespace, verifier: Verifier, tokenizer: Any, drafter: Any) -> dict[str, Any]:
    """Decode a case's prompts with both decoders and audit the texts."""
    questions, _ = prompt_files.load_questions("mt-bench", case.prompts, spread=True)
    settings = evaluation.RunSettings(
        base_model=args.base_model,
        speculator_path=args.speculator_path,
        max_new_tokens=args.new_tokens,
        batch_size=case.batch_size,
        sampling=SETTINGS[case.name],
        # A fixed size: where drafting does not pay, a tree chosen by cost would hold the root alone and prove nothing.
        beam=replace(drafter.config.beam, max_nodes=args.max_tree_nodes),
    )
    decoder = evaluation.speculative_decoder(verifier, drafter, settings)
    record = evaluation.compare(verifier, decoder, tokenizer, questions, settings)
    names = ("prompts", "tokens", "seconds", "tau", "acceptance_by_depth", "mean_tree_nodes", "dtype", "batch_size")
    verdict = {name: record["summary"][name] for name in names}
    return {**verdict, "sampling": asdict(settings.sampling), **record["lossless"]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the cases that the output file does not hold yet; write it after each."""
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    tokenizer = data.load_tokenizer(args.base_model)
    drafter = load_drafter(args.speculator_path)
    record: dict[str, Any] = {
        **harness.head(
            __file__, args, "dtype", "prompts", "batch_size", "prompts_alone", "new_tokens", "max_tree_nodes"
        ),
        "cases": {},
    }
    if args.output and args.output.exists():
        found = json.loads(args.output.read_text())
        if found["command"] == record["command"]:
            record["cases"] = found["cases"]
    for case in cases(args):
        if case.prompts and case.key not in record["cases"]:
            record["cases"][case.key] = run(case, args, verifier, tokenizer, drafter)
            harness.write(record, args.output)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run, print; fail on a structural difference."""
    parser = harness.build_parser(__doc__, dtype="fp32", prompts=80, batch_size=8, new_tokens=128, max_tree_nodes=8)
    parser.add_argument("--prompts_alone", type=int, default=16, help="prompts decoded one by one as well")
    record = measure(parser.parse_args(argv))
    structural = 0
    for key, case in record["cases"].items():
        structural += case["structural"]
        counts = f"{case['identical']} identical, {case['near_ties']} near-ties, {case['structural']} structural"
        print(f"{key}: {counts}; tau {case['tau']:.3f}")
    return 6 if structural else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
