#!/usr/bin/env python
"""Our decoders and their peers on the same machine, in the same run, on the same prompts and weights.

All methods answer a prompt in turn, in an order that rotates, for several rounds. Ratios are taken
within a round, prompt by prompt; their median counts, and beside it the ratio of all tokens to all
seconds. Peers with interpreters of their own (vLLM, llama.cpp) and our compiled decoders run in
processes that are stopped while it is another's turn. With --output finished rounds are kept: the same
command goes on with the next one, on the same machine with the same versions.

Example:
  python benchmarks/peers.py --speculator_path DIR --dtype bf16 --output benchmarks/results/peers-bf16.json
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

import harness
from our_decoders import Answer, Batch, OurDecoders
from peer_processes import CompiledDecoders, Worker, start_workers
from peer_rounds import FinishedRounds
from recurrent_drafting import Verifier, cli, plots, report
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.errors import UsageError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.tree_budget import LatencyCurve

_SETTINGS = (
    *("dtype", "temperature", "batch_size", "prompts", "prompt_tokens", "new_tokens", "rounds"),
    *("compile", "variants", "more_transformers", "sampled_too", "max_tree_nodes"),
)
# Of the variant with token recycling: where its gain in tau had levelled off on held-out prompts.
_RECYCLED_NODES = 512


@dataclass
class Method:
    """One way to answer a batch of prompts.

    Args:
        run: prompts in, an answer out.
        temperature: of its texts; methods are compared with those of the same.
        seconds: by batch, then round.
        texts: of the last round, by batch.
        stats: a decoder's own counters of the last round, by batch.
    """

    run: Callable[[Batch], Answer]
    temperature: float
    seconds: list[list[float]] = field(default_factory=list)
    texts: list[list[list[int]]] = field(default_factory=list)
    stats: list[DecodingStats] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Return tokens by batch."""
        return [sum(map(len, texts)) for texts in self.texts]

    def rate(self) -> float:
        """Return all tokens over all seconds."""
        return sum(self.tokens) / sum(statistics.mean(values) for values in self.seconds)

    def take_turn(self, index: int, batch: Batch) -> None:
        """Answer a batch and keep what came of it."""
        answer = self.run(batch)
        self.texts[index] = answer.texts
        self.seconds[index].append(answer.seconds)
        if answer.stats is not None:
            self.stats[index] = answer.stats

    def last_round(self) -> dict[str, Any]:
        """Return what the round that ended last measured, as JSON has it."""
        seconds = [row[-1] for row in self.seconds]
        return {"seconds": seconds, "texts": self.texts, "stats": [asdict(stats) for stats in self.stats]}

    def restore(self, measured: dict[str, Any]) -> None:
        """Take a round over from an earlier run."""
        for row, seconds in zip(self.seconds, measured["seconds"], strict=True):
            row.append(seconds)
        self.texts = measured["texts"]
        self.stats = [DecodingStats(**stats) for stats in measured["stats"]]


@dataclass
class Speculation:
    """A speculative method, with its baseline, and curves of its costs that were timed before each round.

    Args:
        decoders: of both.
        method: name of the method.
        baseline: name of its baseline.
        curves: of each round; none where trees have a fixed size.
    """

    decoders: OurDecoders | CompiledDecoders
    method: str
    baseline: str
    curves: list[LatencyCurve] = field(default_factory=list)

    def time_curve(self) -> None:
        """Time one more curve, so that it sees the machine as the next round does."""
        curve = self.decoders.time_curve()
        if curve is not None:
            self.curves.append(curve)

    def middle_curve(self) -> LatencyCurve | None:
        """Return the medians over the rounds."""
        curves = self.curves
        if not curves:
            return None
        return LatencyCurve(
            nodes=curves[0].nodes,
            seconds=tuple(map(statistics.median, zip(*(curve.seconds for curve in curves), strict=True))),
            depth_seconds=statistics.median(curve.depth_seconds for curve in curves),
            baseline_seconds=statistics.median(curve.baseline_seconds for curve in curves),
        )


def timed(generate: Callable[[Batch], list[list[int]]]) -> Callable[[Batch], Answer]:
    """Add the seconds to what a function returns."""

    def run(batch: Batch) -> Answer:
        start = time.perf_counter()
        texts = generate(batch)
        return Answer(texts, time.perf_counter() - start)

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


def make_methods(
    verifier: Verifier, args: argparse.Namespace, workers: dict[str, Worker]
) -> tuple[dict[str, Method], list[Speculation]]:
    """Build all methods by name, and say which of them speculate."""
    eager = eager_decoders(verifier, args)
    methods, speculations = _pair(eager, "", args, args.temperature)
    pairs = []
    if args.sampled_too is not None:
        pairs.append(_pair(eager, "_sampled", args, args.sampled_too))
    if (worker := workers.get("compiled")) is not None:
        pairs.append(_pair(CompiledDecoders(worker), "_compiled", args, args.temperature))
    for more_methods, more_speculations in pairs:
        methods |= more_methods
        speculations += more_speculations
    return methods | _rivals(verifier, args, workers), speculations


def eager_decoders(verifier: Verifier, args: argparse.Namespace, **changes: int) -> OurDecoders:
    """Return our decoders of this process; ``changes`` are of the drafter's beam."""
    options = {"batch_size": args.batch_size, "max_tree_nodes": args.max_tree_nodes, **changes}
    return OurDecoders(verifier, load_drafter(args.speculator_path), **options)


def _pair(
    ours: OurDecoders | CompiledDecoders, ending: str, args: argparse.Namespace, temperature: float
) -> tuple[dict[str, Method], list[Speculation]]:
    names = f"baseline{ending}", f"speculative{ending}"
    methods = {name: _method(ours, index == 1, args, temperature) for index, name in enumerate(names)}
    return methods, [Speculation(ours, names[1], names[0])]


def _method(
    ours: OurDecoders | CompiledDecoders, speculative: bool, args: argparse.Namespace, temperature: float
) -> Method:
    return Method(lambda batch: ours.answer(speculative, batch, args.new_tokens, temperature), temperature)


def _rivals(verifier: Verifier, args: argparse.Namespace, workers: dict[str, Worker]) -> dict[str, Method]:
    """Build the methods that ours is compared with: other drafts, transformers, and those of other processes."""
    runs = {"transformers_generate": timed(hf_generate(verifier, args))}
    if args.more_transformers and args.batch_size == 1 and not args.temperature:
        runs["bare_loop"] = timed(bare_loop(verifier, args))
        runs["transformers_prompt_lookup"] = timed(hf_generate(verifier, args, prompt_lookup_num_tokens=10))
    for name in (name for name in workers if name != "compiled"):
        runs[name] = _of_worker(workers[name], args)
    methods = {name: Method(run, args.temperature) for name, run in runs.items()}
    if args.variants:
        alone = eager_decoders(verifier, args, lookup_length=0, recycled_nodes=0)
        recycling = eager_decoders(verifier, args, recycled_nodes=_RECYCLED_NODES)
        methods["drafter_alone"] = _method(alone, True, args, args.temperature)
        methods["recycling"] = _method(recycling, True, args, args.temperature)
    return methods


def _of_worker(worker: Worker, args: argparse.Namespace) -> Callable[[Batch], Answer]:
    return lambda batch: worker.answer(batch, count=args.new_tokens, temperature=args.temperature)


def take_turns(
    methods: dict[str, Method],
    batches: list[Batch],
    rounds: int,
    speculations: Sequence[Speculation],
    finished: FinishedRounds,
) -> None:
    """Let every method answer every batch, in an order that rotates; the round before the first warms up."""
    names = list(methods)
    for method in methods.values():
        method.run(batches[0])
        method.seconds, method.texts = [[] for _ in batches], [[] for _ in batches]
        method.stats = [DecodingStats() for _ in batches]
    _restore(methods, speculations, finished.rounds)
    done = len(finished.rounds)
    for round_ in tqdm(range(done, rounds), desc="rounds", initial=done, total=rounds):
        for speculation in speculations:
            speculation.time_curve()
        for index, batch in enumerate(batches):
            shift = (round_ + index) % len(names)
            for name in names[shift:] + names[:shift]:
                methods[name].take_turn(index, batch)
        curves = {s.method: asdict(s.curves[-1]) if s.curves else None for s in speculations}
        finished.add({"methods": {name: methods[name].last_round() for name in names}, "curves": curves})


def _restore(methods: dict[str, Method], speculations: Sequence[Speculation], rounds: Sequence[dict[str, Any]]) -> None:
    """Take the rounds of an earlier run over."""
    for measured in rounds:
        for name, method in methods.items():
            method.restore(measured["methods"][name])
        for speculation in speculations:
            if (curve := measured["curves"][speculation.method]) is not None:
                speculation.curves.append(LatencyCurve.of(curve))
    for speculation in speculations if rounds else ():
        speculation.decoders.time_curve()  # with a curve, which is not kept, compiled decoders tell their beam


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


def efficiency(ours: Method, baseline: Method, curve: LatencyCurve) -> dict[str, Any]:
    """Compare speed-ups with ideal ones: call by call, each with its own tau and nodes, and over all tokens."""
    bound = ideal(curve, total(ours))
    # A call whose replies end with their first token has no steps.
    shares = [
        statistics.median(row) / ideal(curve, stats)
        for row, stats in zip(gains(ours, baseline), ours.stats, strict=True)
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


def total(method: Method) -> DecodingStats:
    """Add up the counters of a method's last round."""
    stats = DecodingStats()
    for of_batch in method.stats:
        stats.merge(of_batch)
    return stats


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], FinishedRounds]:
    """Run all methods and compare; the finished rounds are to be closed when the record is written."""
    if args.compile and args.batch_size > 1:
        raise UsageError(f"--compile is for batch 1, got --batch_size {args.batch_size}: drop one of them")
    if args.sampled_too is not None and (args.sampled_too <= 0 or args.temperature):
        raise UsageError(
            f"--sampled_too is a temperature above 0 beside greedy text, got {args.sampled_too:g} beside "
            f"--temperature {args.temperature:g}"
        )
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    prompts = harness.mt_bench_prompts(args.base_model, args.prompts, args.prompt_tokens)
    # One prompt at a time, or all of them in one call that decodes a batch at a time.
    batches: list[Batch] = [prompts] if args.batch_size > 1 else [[prompt] for prompt in prompts]
    workers: dict[str, Worker] = {}
    try:
        start_workers(verifier, args, workers)
        methods, speculations = make_methods(verifier, args, workers)
        head = harness.head(__file__, args, *_SETTINGS)
        finished = FinishedRounds(args.output, {**head, "methods": list(methods)})
        take_turns(methods, batches, args.rounds, speculations, finished)
    finally:
        for worker in workers.values():
            worker.close()
    return _record(head, args, methods, speculations, len(prompts)), finished


def _record(
    head: dict[str, Any],
    args: argparse.Namespace,
    methods: dict[str, Method],
    speculations: Sequence[Speculation],
    prompts: int,
) -> dict[str, Any]:
    first, *others = (_of_speculation(methods, speculation) for speculation in speculations)
    record = {
        **head,
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
            if name not in ("baseline", "speculative") and method.temperature == args.temperature
        },
        **first,
        "prompts": prompts,
        "seconds": {name: method.seconds for name, method in methods.items()},
        "tokens": {name: method.tokens for name, method in methods.items()},
    }
    for speculation, figures in zip(speculations[1:], others, strict=True):
        record[speculation.method.removeprefix("speculative_")] = figures
    if "sampled" in record:
        mine, greedy = record["sampled"]["speculative_over"]["baseline_sampled"], first["speculative_over"]["baseline"]
        record["sampled"]["share_of_speedup"] = {name: mine[name] / greedy[name] for name in ("median", "total")}
    return record


def _of_speculation(methods: dict[str, Method], speculation: Speculation) -> dict[str, Any]:
    """Compare a speculative method with all others of its temperature, and with the baseline of its kind."""
    ours, baseline = methods[speculation.method], methods[speculation.baseline]
    rivals = {
        name: ratio(ours, method)
        for name, method in methods.items()
        if method is not ours and method.temperature == ours.temperature
    }
    stats, curve, decoders = total(ours), speculation.middle_curve(), speculation.decoders
    return {
        "temperature": ours.temperature,
        **({"compile_seconds": decoders.compile_seconds} if isinstance(decoders, CompiledDecoders) else {}),
        "speculative_over": rivals,
        "beam": decoders.beam,
        "tau": stats.tau,
        "mean_tree_nodes": stats.mean_nodes,
        "phase_seconds": stats.phase_seconds,
        **({} if curve is None else efficiency(ours, baseline, curve)),
        "texts_equal_to_baseline": sum(
            a == b
            for mine, other in zip(ours.texts, baseline.texts, strict=True)
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
    for kind in ("compiled", "sampled"):
        if kind in record:
            part = record[kind]
            lines.append(f"{kind}, temperature {part['temperature']:g}:")
            lines += [
                f"{kind} speculative over {name}: x{gain['median']:.2f} total x{gain['total']:.2f}"
                for name, gain in part["speculative_over"].items()
            ]
            lines += _lines_of(part, record["prompts"])
    return "\n".join(lines)


def _lines_of(part: dict[str, Any], prompts: int) -> list[str]:
    """Lay out what one speculative decoder counted."""
    lines = [f"tau {part['tau']:.2f}, {part['mean_tree_nodes']:.1f} nodes a step"]
    if "efficiency" in part:
        figures = (part["ideal_speedup"], part["efficiency"], part["efficiency_total"])
        lines.append("ideal speed-up x{:.2f}, efficiency {:.2f}, of all tokens {:.2f}".format(*figures))
    if "compile_seconds" in part:
        lines.append(f"compiled in {part['compile_seconds']:.0f} s")
    if "share_of_speedup" in part:
        share = part["share_of_speedup"]
        lines.append(f"{share['median']:.0%} of the speed-up of greedy text, of all tokens {share['total']:.0%}")
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
    parser.add_argument(
        "--sampled_too", type=float, metavar="T", help="our two decoders at temperature T too, in turn with the others"
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
    record, finished = measure(args)
    print(show(record))
    harness.write(record, args.output, plot)
    finished.close()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
