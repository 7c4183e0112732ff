#!/usr/bin/env python
"""Are path probabilities what they say? Predicted against observed acceptance of every verified node.

Each node of each verified tree is one observation: the probability that the beam search gave its path,
and whether the path was accepted. Observations are put in bins of equal width.

Example:
  python benchmarks/calibration.py --speculator_path DIR --output benchmarks/results/calibration.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

import harness
from recurrent_drafting import (
    SamplingConfig,
    SpeculativeDecoder,
    Verifier,
    acceptance,
    cli,
    plots,
    report,
)
from recurrent_drafting.acceptance import Acceptance
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.sampling import Sampler


class Observer:
    """The walk, and what it says of each node.

    Args:
        bins: bins of predicted probability.
    """

    def __init__(self, bins: int) -> None:
        self.predicted = [0.0] * bins
        self.accepted = [0] * bins
        self.nodes = [0] * bins
        self._walk = acceptance.walk

    def __call__(self, tree: DraftTree, logits: Tensor, sampler: Sampler) -> Acceptance:
        """Walk the trees as decoding does and count."""
        result = self._walk(tree, logits, sampler)
        for probabilities, path in zip(tree.log_probs.exp().tolist(), result.paths, strict=True):
            taken = set(path)
            for node, probability in enumerate(probabilities[1:], start=1):
                place = min(int(probability * len(self.nodes)), len(self.nodes) - 1)
                self.predicted[place] += probability
                self.accepted[place] += node in taken
                self.nodes[place] += 1
        return result

    def summary(self) -> dict[str, Any]:
        """Return the bins, and expected calibration error and bias over all nodes."""
        total = sum(self.nodes)
        gaps = [abs(p - a) for p, a in zip(self.predicted, self.accepted, strict=True)]
        filled = [place for place, count in enumerate(self.nodes) if count]
        return {
            "predicted": [self.predicted[place] / self.nodes[place] for place in filled],
            "accepted": [self.accepted[place] / self.nodes[place] for place in filled],
            "nodes": [self.nodes[place] for place in filled],
            "expected_calibration_error": sum(gaps) / total,
            "accepted_over_predicted": sum(self.accepted) / sum(self.predicted),
        }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Decode the prompts at every temperature and watch the walk."""
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    prompts = harness.mt_bench_prompts(args.base_model, args.prompts)
    drafter = load_drafter(args.speculator_path)
    decoder = SpeculativeDecoder(verifier, drafter, replace(drafter.config.beam, max_nodes=args.max_tree_nodes))
    curves = {}
    for temperature in args.temperatures:
        observer = Observer(args.bins)
        acceptance.walk = observer
        try:
            for start in range(0, len(prompts), args.batch_size):
                decoder.generate(
                    prompts[start : start + args.batch_size],
                    max_new_tokens=args.new_tokens,
                    sampling=SamplingConfig(temperature=temperature, seed=1),
                )
        finally:
            acceptance.walk = observer._walk
        curves[str(temperature)] = observer.summary()
    return {
        **harness.head(__file__, args, "dtype", "prompts", "new_tokens", "max_tree_nodes", "temperatures"),
        "temperatures": curves,
    }


def plot(record: dict[str, Any]) -> str:
    """Draw the reliability curves as one HTML page."""
    lines = [
        plots.Line(f"temperature {name}", list(zip(curve["predicted"], curve["accepted"], strict=True)))
        for name, curve in record["temperatures"].items()
    ]
    lines.append(plots.Line("perfect", [(0.0, 0.0), (1.0, 1.0)]))
    drawing = plots.lines(lines, x_label="predicted probability of the path")
    figure = report.figure("Share of paths accepted", drawing, record["command"], [line.name for line in lines])
    return report.page("Reliability of path probabilities", [figure])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    parser = harness.build_parser(
        __doc__, dtype="auto", prompts=80, new_tokens=64, batch_size=8, max_tree_nodes=41, bins=10
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    args = parser.parse_args(argv)
    record = measure(args)
    for name, curve in record["temperatures"].items():
        print(
            f"temperature {name}: accepted over predicted {curve['accepted_over_predicted']:.3f}, "
            f"expected calibration error {curve['expected_calibration_error']:.4f}"
        )
        for predicted, accepted, nodes in zip(curve["predicted"], curve["accepted"], curve["nodes"], strict=True):
            print(f"  predicted {predicted:.3f}  accepted {accepted:.3f}  nodes {nodes}")
    harness.write(record, args.output, plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
