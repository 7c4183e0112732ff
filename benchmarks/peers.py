#!/usr/bin/env python
"""Our decoders and their peers on the same machine, in the same run, on the same prompts and weights.

All methods answer a prompt in turn, in an order that rotates, for several rounds. Ratios are taken
within a round, prompt by prompt; their median counts, and beside it the ratio of all tokens to all
seconds. Peers with interpreters of their own (vLLM, llama.cpp) run in processes that are stopped
while it is another's turn.

Example:
  python benchmarks/peers.py --speculator_path DIR --dtype bf16 --output benchmarks/results/peers-bf16.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

import harness
from recurrent_drafting import (
    AutoregressiveDecoder,
    SamplingConfig,
    SpeculativeDecoder,
    Verifier,
    assets,
    cli,
    evaluation,
    plots,
    report,
)
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.errors import ResourceError, UsageError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.tree_budget import LatencyCurve, LatencyTable, batch_sizes

WORKER = Path(__file__).with_name("peer_worker.py")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SETTINGS = (
    *("dtype", "temperature", "batch_size", "prompts", "prompt_tokens", "new_tokens", "rounds"),
    *("compile", "variants", "more_transformers", "max_tree_nodes"),
)
# Of the variant with token recycling: where its gain in tau had levelled off on held-out prompts.
_RECYCLED_NODES = 512
Batch = list[list[int]]
Answer = tuple[list[list[int]], float]


@dataclass
class Method:
    """One way to answer a batch of prompts.

    Args:
        run: prompts in; texts and seconds out.
        seconds: by batch, then round.
        texts: of the last round, by batch.
    """

    run: Callable[[Batch], Answer]
    seconds: list[list[float]] = field(default_factory=list)
    texts: list[list[list[int]]] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Return tokens by batch."""
        return [sum(map(len, texts)) for texts in self.texts]

    def rate(self) -> float:
        """Return all tokens over all seconds."""
        return sum(self.tokens) / sum(statistics.mean(values) for values in self.seconds)


def timed(generate: Callable[[Batch], list[list[int]]]) -> Callable[[Batch], Answer]:
    """Add the seconds to what a function returns."""

    def run(batch: Batch) -> Answer:
        start = time.perf_counter()
        texts = generate(batch)
        return texts, time.perf_counter() - start

    return run


def bare_loop(verifier: Verifier, args: argparse.Namespace) -> Callable[[Batch], list[list[int]]]:
    """Return greedy decoding as anyone would write it: ``model(...)`` with its cache, one token a time."""

    @torch.inference_mode()
    def generate(batch: Batch) -> list[list[int]]:
        cache = {verifier.cache_argument: DynamicCache(config=verifier.model.config)}
        ids = torch.tensor(batch, device=verifier.device)
        tokens: list[int] = []
        while len(tokens) < args.new_tokens:
            output = verifier.model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
            ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(int(ids))
            if tokens[-1] in verifier.eos_token_ids:
                break
        return [tokens]

    return generate


def hf_generate(verifier: Verifier, args: argparse.Namespace, **options: Any) -> Callable[[Batch], list[list[int]]]:
    """Return transformers' generate; so many prompts at a time, padded on the left."""
    if args.temperature:
        options |= {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    else:
        options |= {"do_sample": False}

    def generate(prompts: Batch) -> list[list[int]]:
        size = args.batch_size
        return [text for start in range(0, len(prompts), size) for text in together(prompts[start : start + size])]

    def together(batch: Batch) -> list[list[int]]:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=verifier.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=verifier.device)
        output = verifier.model.generate(
            ids, attention_mask=mask, max_new_tokens=args.new_tokens, pad_token_id=0, **options
        )
        return [_until_eos(row, verifier.eos_token_ids) for row in output[:, width:].tolist()]

    return generate


def _until_eos(tokens: list[int], eos: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


class Ours:
    """One of our decoders; keeps the counters of its timed answers.

    Args:
        decoder: baseline or speculative.
        args: of the run.
    """

    def __init__(self, decoder: AutoregressiveDecoder | SpeculativeDecoder, args: argparse.Namespace) -> None:
        self.decoder = decoder
        self.stats = DecodingStats()
        self._args = args

    def __call__(self, batch: Batch) -> list[list[int]]:
        """Answer a batch and add up what it took."""
        sampling = SamplingConfig(temperature=self._args.temperature, seed=1)
        output = self.decoder.generate(
            batch, max_new_tokens=self._args.new_tokens, sampling=sampling, batch_size=self._args.batch_size
        )
        self.stats.merge(output.stats)
        return output.sequences


class Worker:
    """A peer in a process of its own, stopped while it is not its turn.

    Args:
        command: starts it.
        args: of the run.

    Raises:
        ResourceError: it does not start; its last words are in the message.
    """

    def __init__(self, command: Sequence[str], args: argparse.Namespace) -> None:
        self._args = args
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        if self._answer() != "ready":
            raise ResourceError(f"{' '.join(command)} does not start: expected it to say that it is ready")
        self._signal(signal.SIGSTOP)

    def __call__(self, batch: Batch) -> Answer:
        """Answer the prompts one by one; the seconds are the worker's own."""
        self._signal(signal.SIGCONT)
        texts, seconds = [], 0.0
        for prompt in batch:
            request = {"prompt": prompt, "count": self._args.new_tokens, "temperature": self._args.temperature}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
            texts.append(answer["tokens"])
            seconds += answer["seconds"]
        self._signal(signal.SIGSTOP)
        return texts, seconds

    def close(self) -> None:
        """End the process and those it started."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        self._process.wait(timeout=60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ResourceError(f"the peer {self._process.args!r} ended by itself: see its messages above")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


def start_workers(verifier: Verifier, args: argparse.Namespace, workers: dict[str, Worker]) -> None:
    """Start the peers whose interpreters were given; say of the others that they are left out.

    Args:
        verifier: the base.
        args: of the run.
        workers: takes in each as it starts, so that it can be ended even if the next one fails.
    """
    model = assets.source_of(args.base_model)
    dtype, threads = DTYPES[verifier.dtype], str(torch.get_num_threads())
    commands = {
        "vllm": (args.vllm_python, [model, dtype], "--vllm_python PYTHON"),
        "vllm_ngram": (args.vllm_python if args.ngram else None, [model, dtype], "--vllm_python PYTHON --ngram"),
        "llama_cpp": (args.llama_python if args.gguf else None, [args.gguf, "-"], "--llama_python PYTHON --gguf FILE"),
    }
    for name, (python, words, flags) in commands.items():
        if python is None or args.batch_size > 1:
            print(f"{name}: left out ({'batch 1 only' if python else flags + ' includes it'})")
            continue
        workers[name] = Worker([python, str(WORKER), name, *words, threads], args)


def make_methods(
    verifier: Verifier, args: argparse.Namespace
) -> tuple[dict[str, Method], dict[str, SpeculativeDecoder]]:
    """Build everything that runs in this process; the speculative decoders by the name of their method."""
    drafter = load_drafter(args.speculator_path)

    def decoder(base: Verifier = verifier, **changes: int) -> SpeculativeDecoder:
        beam = replace(drafter.config.beam, max_nodes=args.max_tree_nodes, **changes)
        settings = evaluation.RunSettings(args.base_model, args.speculator_path, batch_size=args.batch_size, beam=beam)
        return evaluation.speculative_decoder(base, drafter, settings)

    speculative = decoder()
    decoders = {"speculative": speculative}
    methods = {
        "baseline": timed(Ours(AutoregressiveDecoder(verifier), args)),
        "speculative": timed(Ours(speculative, args)),
        "transformers_generate": timed(hf_generate(verifier, args)),
    }
    if args.compile:
        compiled = Verifier(verifier.model, verifier.name_or_path, verifier.fingerprint)
        compiled.compile()
        decoders["speculative_compiled"] = decoder(compiled)
        methods["baseline_compiled"] = timed(Ours(AutoregressiveDecoder(compiled), args))
        methods["speculative_compiled"] = timed(Ours(decoders["speculative_compiled"], args))
    if args.variants:
        methods["drafter_alone"] = timed(Ours(decoder(lookup_length=0, recycled_nodes=0), args))
        methods["recycling"] = timed(Ours(decoder(recycled_nodes=_RECYCLED_NODES), args))
    if args.more_transformers and args.batch_size == 1 and not args.temperature:
        methods["bare_loop"] = timed(bare_loop(verifier, args))
        methods["transformers_prompt_lookup"] = timed(hf_generate(verifier, args, prompt_lookup_num_tokens=10))
    return {name: Method(run) for name, run in methods.items()}, decoders


class Curves:
    """Latency curves timed before each round, so that they see the machine as the methods do.

    Args:
        decoders: those whose trees are chosen by cost are timed.
        batch_size: rows of a forward.
    """

    def __init__(self, decoders: dict[str, SpeculativeDecoder], batch_size: int) -> None:
        self._decoders = {name: item for name, item in decoders.items() if isinstance(item.latency, LatencyTable)}
        self._rows = batch_sizes(batch_size)[-1]
        self._curves: dict[str, list[LatencyCurve]] = {name: [] for name in self._decoders}

    def measure(self) -> None:
        """Time one curve of each decoder."""
        for name, decoder in self._decoders.items():
            curve = LatencyCurve.measure(decoder.verifier, decoder.drafter, decoder.beam, batch_size=self._rows)
            self._curves[name].append(curve)

    def middle(self, name: str) -> LatencyCurve | None:
        """Return the medians over the rounds, None of a decoder whose trees have a fixed size."""
        curves = self._curves.get(name)
        if not curves:
            return None
        return LatencyCurve(
            nodes=curves[0].nodes,
            seconds=tuple(map(statistics.median, zip(*(curve.seconds for curve in curves), strict=True))),
            depth_seconds=statistics.median(curve.depth_seconds for curve in curves),
            baseline_seconds=statistics.median(curve.baseline_seconds for curve in curves),
        )


def take_turns(methods: dict[str, Method], batches: list[Batch], rounds: int, before_round: Callable[[], None]) -> None:
    """Let every method answer every batch, in an order that rotates; the round before the first warms up."""
    names = list(methods)
    for method in methods.values():
        method.run(batches[0])
        method.seconds, method.texts = [[] for _ in batches], [[] for _ in batches]
    for round_ in tqdm(range(rounds), desc="rounds"):
        before_round()
        for index, batch in enumerate(batches):
            shift = (round_ + index) % len(names)
            for name in names[shift:] + names[:shift]:
                texts, seconds = methods[name].run(batch)
                methods[name].texts[index] = texts
                methods[name].seconds[index].append(seconds)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles and the number of values."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": middle, "quartile_low": low, "quartile_high": high, "count": len(values)}


def gains(ours: Method, other: Method) -> list[list[float]]:
    """Return how many times faster ours is, in tokens per second, by call and round."""
    return [
        [(our_tokens / a) / (their_tokens / b) for a, b in zip(row, rival, strict=True)]
        for our_tokens, their_tokens, row, rival in zip(
            ours.tokens, other.tokens, ours.seconds, other.seconds, strict=True
        )
    ]


def ratio(ours: Method, other: Method) -> dict[str, float]:
    """Return how many times faster ours is, in tokens per second: median over turns, and in total."""
    turns = [gain for row in gains(ours, other) for gain in row]
    return spread(turns) | {"total": ours.rate() / other.rate()}


def ideal(curve: LatencyCurve, stats: DecodingStats) -> float:
    """Return the speed-up if only forwards took time: tau x t(1) / t(N)."""
    nodes = stats.mean_nodes
    below = max((n for n in curve.nodes if n <= nodes), default=curve.nodes[0])
    above = min((n for n in curve.nodes if n >= nodes), default=curve.nodes[-1])
    share = 0.0 if above == below else (nodes - below) / (above - below)
    seconds = (1 - share) * curve.seconds_of(below) + share * curve.seconds_of(above)
    return stats.tau * curve.baseline_seconds / seconds


def efficiency(
    ours: Method, baseline: Method, curve: LatencyCurve, calls: Sequence[DecodingStats], total: DecodingStats
) -> dict[str, Any]:
    """Compare speed-ups with ideal ones: call by call, each with its own tau and nodes, and over all tokens."""
    bound = ideal(curve, total)
    # A call whose replies end with their first token has no steps.
    shares = [
        statistics.median(row) / ideal(curve, stats)
        for row, stats in zip(gains(ours, baseline), calls, strict=True)
        if stats.row_steps
    ]
    if not shares:
        return {}
    return {
        "ideal_speedup": bound,
        "efficiency": statistics.median(shares),
        "efficiency_total": ratio(ours, baseline)["total"] / bound,
        "latency_curve": asdict(curve),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all methods and compare."""
    if args.compile and args.batch_size > 1:
        raise UsageError(f"--compile is for batch 1, got --batch_size {args.batch_size}: drop one of them")
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    prompts = harness.mt_bench_prompts(args.base_model, args.prompts, args.prompt_tokens)
    # One prompt at a time, or all of them in one call that decodes a batch at a time.
    batches = [prompts] if args.batch_size > 1 else [[prompt] for prompt in prompts]
    workers: dict[str, Worker] = {}
    try:
        start_workers(verifier, args, workers)
        methods, decoders = make_methods(verifier, args)
        methods |= {name: Method(worker) for name, worker in workers.items()}
        curves = Curves(decoders, args.batch_size)
        take_turns(methods, batches, args.rounds, curves.measure)
    finally:
        for worker in workers.values():
            worker.close()
    return _record(args, methods, decoders, batches, curves)


def _record(
    args: argparse.Namespace,
    methods: dict[str, Method],
    decoders: dict[str, SpeculativeDecoder],
    batches: list[Batch],
    curves: Curves,
) -> dict[str, Any]:
    record = {
        **harness.head(__file__, args, *_SETTINGS),
        "tokens_per_second": {
            name: spread(
                [count / s for count, row in zip(m.tokens, m.seconds, strict=True) for s in row],
            )
            | {"total": m.rate()}
            for name, m in methods.items()
        },
        "baseline_over": {
            name: ratio(methods["baseline"], method)
            for name, method in methods.items()
            if name not in ("baseline", "speculative")
        },
        **_speculative_record(args, methods, "speculative", decoders["speculative"], batches, curves),
        "prompts": sum(map(len, batches)),
        "seconds": {name: method.seconds for name, method in methods.items()},
        "tokens": {name: method.tokens for name, method in methods.items()},
    }
    if "speculative_compiled" in decoders:
        decoder = decoders["speculative_compiled"]
        record["compiled"] = {
            "compile_seconds": decoder.verifier.compile_seconds,
            **_speculative_record(args, methods, "speculative_compiled", decoder, batches, curves),
        }
    return record


def _speculative_record(
    args: argparse.Namespace,
    methods: dict[str, Method],
    name: str,
    decoder: SpeculativeDecoder,
    batches: list[Batch],
    curves: Curves,
) -> dict[str, Any]:
    """Compare a speculative method with all others, and with the baseline of its kind."""
    # Counters of one more pass, so that they are those of the texts at hand and not of the warm-up.
    counted, stats = [], DecodingStats()
    for batch in batches:
        answer = Ours(decoder, args)
        answer(batch)
        counted.append(answer.stats)
        stats.merge(answer.stats)
    ours, own_baseline = methods[name], name.replace("speculative", "baseline")
    rivals = {rival: ratio(ours, method) for rival, method in methods.items() if rival != name}
    curve, figures = curves.middle(name), dict[str, Any]()
    if curve is not None:
        figures = efficiency(ours, methods[own_baseline], curve, counted, stats)
    return {
        "speculative_over": rivals,
        "beam": asdict(decoder.beam),
        "tau": stats.tau,
        "mean_tree_nodes": stats.mean_nodes,
        "phase_seconds": stats.phase_seconds,
        **figures,
        "texts_equal_to_baseline": sum(
            a == b
            for mine, other in zip(ours.texts, methods[own_baseline].texts, strict=True)
            for a, b in zip(mine, other, strict=True)
        ),
    }


def show(record: dict[str, Any]) -> str:
    """Lay the figures out as text."""
    lines = []
    for name, rate in record["tokens_per_second"].items():
        lines.append(f"{name:28} {rate['total']:7.1f} tok/s")
        if (gain := record["speculative_over"].get(name)) is not None:
            quartiles = f"[{gain['quartile_low']:.2f}, {gain['quartile_high']:.2f}]"
            lines[-1] += f"   ours speculative x{gain['median']:.2f} {quartiles} total x{gain['total']:.2f}"
    lines += [
        f"baseline over {name}: x{value['median']:.3f} [{value['quartile_low']:.3f}, {value['quartile_high']:.3f}] "
        f"total x{value['total']:.3f}"
        for name, value in record["baseline_over"].items()
    ]
    lines += _lines_of(record, record["prompts"])
    if "compiled" in record:
        compiled = record["compiled"]
        lines.append(f"compiled in {compiled['compile_seconds']:.0f} s:")
        lines += [
            f"compiled speculative over {name}: x{gain['median']:.2f} total x{gain['total']:.2f}"
            for name, gain in compiled["speculative_over"].items()
        ]
        lines += _lines_of(compiled, record["prompts"])
    return "\n".join(lines)


def _lines_of(part: dict[str, Any], prompts: int) -> list[str]:
    """Lay out what one speculative decoder counted."""
    lines = [f"tau {part['tau']:.2f}, {part['mean_tree_nodes']:.1f} nodes a step"]
    if "efficiency" in part:
        figures = (part["ideal_speedup"], part["efficiency"], part["efficiency_total"])
        lines.append("ideal speed-up x{:.2f}, efficiency {:.2f}, of all tokens {:.2f}".format(*figures))
    return [*lines, f"{part['texts_equal_to_baseline']} of {prompts} texts equal the baseline's"]


def plot(record: dict[str, Any]) -> str:
    """Draw tokens per second of all methods as one HTML page."""
    rates = record["tokens_per_second"]
    series = plots.Series(
        "tokens per second",
        [value["median"] for value in rates.values()],
        [(value["quartile_low"], value["quartile_high"]) for value in rates.values()],
    )
    labels = [name.replace("_", " ") for name in rates]
    figure = report.figure("Tokens per second", plots.bars(labels, [series], spec=".1f"), record["command"])
    return report.page("Recurrent drafting and its peers", [figure])


def build_parser() -> cli.ArgumentParser:
    """Describe the command line."""
    parser = harness.build_parser(
        __doc__, dtype="auto", temperature=0.0, batch_size=1, prompts=16, new_tokens=128, rounds=3
    )
    parser.add_argument("--prompt_tokens", type=int, default=0, help="lengthen prompts to at most so many tokens")
    parser.add_argument("--max_tree_nodes", type=int, help="default: chosen by cost")
    parser.add_argument("--compile", action="store_true", help="our decoders with the base compiled too; batch 1")
    parser.add_argument(
        "--variants", action="store_true", help="our decoder with the drafter alone, and with token recycling, too"
    )
    parser.add_argument(
        "--more_transformers",
        action="store_true",
        help="a bare model(...) loop and transformers' prompt lookup too; greedy, batch 1",
    )
    parser.add_argument("--vllm_python", help="interpreter that has vLLM")
    parser.add_argument("--ngram", action="store_true", help="vLLM with its own n-gram drafts too")
    parser.add_argument("--llama_python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--gguf", help="the base in llama.cpp's format")
    return parser


def check_peers(args: argparse.Namespace) -> None:
    """Look for what the peers need before anything is measured.

    Raises:
        UsageError: an interpreter or a file is not there.
    """
    for flag in ("vllm_python", "llama_python"):
        name = getattr(args, flag)
        if name is not None and shutil.which(name) is None:
            raise UsageError(f"--{flag} {name!r}: expected a Python interpreter that can be run, found none there")
    if args.gguf is not None and not Path(args.gguf).is_file():
        raise UsageError(f"--gguf {args.gguf!r}: expected a GGUF file, found none there")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    args = build_parser().parse_args(argv)
    check_peers(args)
    record = measure(args)
    print(show(record))
    harness.write(record, args.output, plot)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
