#!/usr/bin/env python
"""The drafter in the real vLLM engine: text, acceptance and tokens per second against vLLM without it.

Engines of one process take turns on the same prompts: plain vLLM, vLLM's n-gram method, this drafter without and with
prompt lookup. Counters of drafts are those of the last one. Greedy texts that differ from plain vLLM's are judged: both
picks must lie within the base's own rounding where the texts part. That the texts are equal without rounding is for a
run with ``--dtype fp32`` to show.
Needs vLLM (``pip install -e ".[vllm]"``).

Example:
  python benchmarks/vllm_engine.py --speculator_path DIR --dtype fp32 --output benchmarks/results/vllm-fp32.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

import harness
from recurrent_drafting import Verifier, assets, cli
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.lossless import LosslessReport, Pair, Rounding, Settings, judge
from vllm_server import DTYPES, PROPOSER

ENGINES = ("plain", "ngram", "drafter_alone", "drafter")
_SETTINGS = ("dtype", "prompts", "new_tokens", "concurrency", "rounds", "drafts", "temperature", "seed")


@dataclass
class Run:
    """One engine and what it did, round by round."""

    engine: Any
    texts: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def go(self, prompts: list[dict[str, list[int]]], parameters: Any) -> None:
        """Decode all prompts once and note texts and time."""
        start = time.perf_counter()
        outputs = self.engine.generate(prompts, parameters, use_tqdm=False)
        self.seconds.append(time.perf_counter() - start)
        self.texts = [list(output.outputs[0].token_ids) for output in outputs]

    def drafted(self) -> dict[str, Any]:
        """Return vLLM's own counters of drafts, since the engine began.

        They are the process's: an engine that starts takes them over, so they are those of the last one.
        """
        prefix = "vllm:spec_decode_"
        found = [metric for metric in self.engine.get_metrics() if metric.name.startswith(prefix)]
        return {
            metric.name.removeprefix(prefix): getattr(metric, "value", getattr(metric, "values", None))
            for metric in found
        }


def make_engines(args: argparse.Namespace) -> dict[str, Run]:
    """Start the engines."""
    import vllm

    os.environ["RECURRENT_DRAFTING_SPECULATOR"] = args.speculator_path
    speculation: dict[str, Any] = {
        "plain": None,
        "ngram": {"method": "ngram", "num_speculative_tokens": args.drafts, "prompt_lookup_max": 3},
        "drafter_alone": {"model": PROPOSER, "num_speculative_tokens": args.drafts},
        "drafter": {"model": PROPOSER, "num_speculative_tokens": args.drafts},
    }
    options = {
        "dtype": DTYPES[args.dtype],
        "max_model_len": 1024,
        "max_num_seqs": args.concurrency,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    runs = {}
    for name, config in speculation.items():
        if name in args.engines:
            more: dict[str, Any] = {"speculative_config": config} if config else {}
            if name == "drafter_alone":
                more["additional_config"] = {"lookup": False}
            runs[name] = Run(vllm.LLM(assets.source_of(args.base_model), **options, **more))
    return runs


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Let the engines take turns; the first round warms up."""
    import vllm

    rendered = harness.mt_bench_prompts(args.base_model, args.prompts)
    prompts = [{"prompt_token_ids": ids} for ids in rendered]
    parameters = vllm.SamplingParams(
        temperature=args.temperature, seed=args.seed, max_tokens=args.new_tokens, detokenize=False
    )
    runs = make_engines(args)
    for run in runs.values():
        run.go(prompts[: args.concurrency], parameters)
        run.seconds.clear()
    before = runs[list(runs)[-1]].drafted()
    for round_ in range(args.rounds):
        names = list(runs)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            runs[name].go(prompts, parameters)
    return _record(args, runs, before, rendered)


def near_ties(args: argparse.Namespace, prompts: list[list[int]], runs: dict[str, Run]) -> dict[str, int]:
    """Count for each engine the texts that part from plain vLLM's within the base's own rounding."""
    if args.temperature or "plain" not in runs:
        return {}
    verifier = Verifier.from_pretrained(args.base_model, dtype=args.dtype)
    settings = Settings(SamplingConfig(), args.new_tokens, verifier.eos_token_ids)
    reports = {name: LosslessReport() for name in runs}
    for index, plain in enumerate(tqdm(runs["plain"].texts, desc="judging", unit="text")):
        rounding = None
        for name, run in runs.items():
            if run.texts[index] != plain:
                rounding = rounding or Rounding.of(verifier, prompts[index], plain)
                pair = Pair(prompts[index], index, plain, run.texts[index])
                judge(reports[name], verifier, pair, settings, same_in_float64=True, rounding=rounding)
    return {name: report.near_ties for name, report in reports.items()}


def _record(
    args: argparse.Namespace, runs: dict[str, Run], before: dict[str, Any], prompts: list[list[int]]
) -> dict[str, Any]:
    import vllm

    plain = runs["plain"].texts if "plain" in runs else None
    ties = near_ties(args, prompts, runs)
    engines, last = {}, list(runs)[-1]
    now = runs[last].drafted()
    counts = {key: _difference(now[key], before.get(key)) for key in now}
    for name, run in runs.items():
        tokens = sum(map(len, run.texts))
        engines[name] = {
            "tokens": tokens,
            "seconds": run.seconds,
            "tokens_per_second": tokens / statistics.median(run.seconds),
            "identical_to_plain": None if plain is None else sum(a == b for a, b in zip(run.texts, plain, strict=True)),
            "near_ties": ties.get(name),
            "drafts": counts if name == last else None,
        }
    return {
        **harness.head(__file__, args, *_SETTINGS, "engines"),
        "vllm": vllm.__version__,
        "prompts": args.prompts,
        "engines": engines,
    }


def _difference(now: Any, before: Any) -> Any:
    if isinstance(now, list):
        return [a - b for a, b in zip(now, before or [0] * len(now), strict=True)]
    return now - (before or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    parser = harness.build_parser(
        __doc__, prompts=80, new_tokens=128, concurrency=32, rounds=3, temperature=0.0, seed=1
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--drafts", type=int, default=3, help="num_speculative_tokens")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    args = parser.parse_args(argv)
    record = measure(args)
    for name, engine in record["engines"].items():
        print(
            f"{name}: {engine['tokens_per_second']:.1f} tok/s, identical to plain "
            f"{engine['identical_to_plain']}/{args.prompts}, near-ties {engine['near_ties']}, drafts {engine['drafts']}"
        )
    harness.write(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
