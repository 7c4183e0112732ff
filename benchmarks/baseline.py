#!/usr/bin/env python
"""Is the baseline honest? Our autoregressive loop, a bare model loop and transformers' generate, taking turns.

Example:
  python benchmarks/baseline.py --dtype bf16 --output benchmarks/results/baseline-bf16.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache

from recurrent_drafting import AutoregressiveDecoder, Verifier, cli, data, evaluation
from recurrent_drafting.assets import DEFAULT_BASE

Generate = Callable[[list[int], int], list[int]]


def bare_loop(verifier: Verifier) -> Generate:
    """Return greedy decoding as anyone would write it: ``model(...)`` with its cache, one token a time."""

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> list[int]:
        cache = {verifier.cache_argument: DynamicCache(config=verifier.model.config)}
        ids = torch.tensor([prompt], device=verifier.device)
        tokens: list[int] = []
        while len(tokens) < count:
            output = verifier.model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
            ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(int(ids))
            if tokens[-1] in verifier.eos_token_ids:
                break
        return tokens

    return generate


def baseline(verifier: Verifier) -> Generate:
    """Return our own baseline."""
    decoder = AutoregressiveDecoder(verifier)
    return lambda prompt, count: decoder.generate([prompt], max_new_tokens=count).sequences[0]


def transformers_generate(verifier: Verifier) -> Generate:
    """Return transformers' generate."""

    def generate(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt], device=verifier.device)
        output = verifier.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return list(output[0, len(prompt) :].tolist())

    return generate


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Time the three on every prompt in turn; per prompt the median over rounds counts."""
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    tokenizer = data.load_tokenizer(args.base_model)
    questions, _ = evaluation.load_questions("mt-bench", args.prompts, spread=True)
    prompts = [data.render(tokenizer, [{"role": "user", "content": q.turns[0]}], ask=True) for q in questions]
    methods = {
        "bare_loop": bare_loop(verifier),
        "baseline": baseline(verifier),
        "transformers_generate": transformers_generate(verifier),
    }
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in methods}
    texts: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in methods}
    names = list(methods)
    for round_ in tqdm(range(args.rounds + 1), desc="rounds"):
        for index, prompt in enumerate(prompts):
            shift = (round_ + index) % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                texts[name][index] = methods[name](prompt, args.new_tokens)
                if round_:  # the first round warms up
                    seconds[name][index].append(time.perf_counter() - start)
    return _record(args, seconds, texts)


def _record(
    args: argparse.Namespace, seconds: dict[str, list[list[float]]], texts: dict[str, list[list[int]]]
) -> dict[str, object]:
    def slowdowns(name: str) -> list[float]:
        """Return our seconds over another's, round by round on the same prompt."""
        ours, theirs = seconds["baseline"], seconds[name]
        return [a / b for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]

    def spread(values: list[float]) -> dict[str, float]:
        low, _, high = statistics.quantiles(values, n=4)
        return {"median": statistics.median(values), "quartile_low": low, "quartile_high": high}

    return {
        "command": f"python benchmarks/baseline.py --dtype {args.dtype} --prompts {args.prompts} "
        f"--new_tokens {args.new_tokens} --rounds {args.rounds}",
        "base_model": args.base_model,
        "machine": evaluation.machine(),
        "tokens_per_second": {
            name: spread(
                [len(texts[name][i]) / value for i, values in enumerate(seconds[name]) for value in values],
            )
            for name in seconds
        },
        "baseline_seconds_over_bare_loop": spread(slowdowns("bare_loop")),
        "baseline_seconds_over_transformers_generate": spread(slowdowns("transformers_generate")),
        "texts_equal_to_transformers_generate": sum(
            a == b for a, b in zip(texts["baseline"], texts["transformers_generate"], strict=True)
        ),
        "prompts": len(texts["baseline"]),
        "seconds": seconds,
    }


def main() -> int:
    """Parse the command line, measure, print and write."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default=DEFAULT_BASE)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record = measure(args)
    for name in record:
        if name not in ("seconds", "machine"):
            print(f"{name}: {record[name]}")
    if args.output:
        evaluation.write_json(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
