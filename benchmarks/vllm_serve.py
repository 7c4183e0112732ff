#!/usr/bin/env python
"""The drafter behind a vLLM server: many requests side by side, some cut off, each text against its solo run.

Requests have MT-Bench prompts of mixed length and limits of mixed length; half of them stream, and every fifth is left
after a few tokens. Afterwards every request that was not left is asked again, alone. Needs vLLM and the openai client
that comes with it.

Example:
  python benchmarks/vllm_serve.py --speculator_path DIR --dtype fp32 --output benchmarks/results/vllm-serve-fp32.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

import harness
import vllm_server
from recurrent_drafting import assets, cli
from vllm_server import DTYPES

_LIMITS = (8, 24, 48, 96)
_LEFT_AFTER = 5


@dataclass(frozen=True)
class Request:
    """One completion that is asked for.

    Args:
        prompt: token ids.
        limit: most new tokens.
        stream: take it token by token.
        leave: close the connection after a few tokens.
    """

    prompt: list[int]
    limit: int
    stream: bool
    leave: bool


def make_requests(args: argparse.Namespace) -> list[Request]:
    """Take MT-Bench's prompts round and round, with limits that do not go round with them."""
    texts = harness.mt_bench_prompts(args.base_model, None)
    return [
        Request(
            prompt=texts[index % len(texts)],
            limit=_LIMITS[index * 7 % 11 % 4],
            stream=index % 2 == 0 or index % 5 == 4,
            leave=index % 5 == 4,
        )
        for index in range(args.requests)
    ]


def complete(client: Any, request: Request) -> str:
    """Ask for one completion; return what came of it."""
    response = client.completions.create(
        model=vllm_server.SERVED_NAME,
        prompt=request.prompt,
        max_tokens=request.limit,
        temperature=0,
        stream=request.stream,
    )
    if not request.stream:
        return str(response.choices[0].text)
    parts: list[str] = []
    with response:
        for event in response:
            parts.append(event.choices[0].text)
            if request.leave and len(parts) == _LEFT_AFTER:
                break
    return "".join(parts)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Send all requests side by side, then each alone, and compare."""
    import openai

    model, requests = assets.source_of(args.base_model), make_requests(args)
    options = ["--dtype", DTYPES[args.dtype], "--max-model-len", "1024", "--max-num-seqs", str(args.concurrency)]
    with vllm_server.serving(model, args.speculator_path, args.drafts, options, args.start_seconds) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.concurrency) as pool:
            together = list(
                tqdm(pool.map(lambda r: complete(client, r), requests), total=len(requests), desc="side by side")
            )
        seconds = time.perf_counter() - start
        kept = [index for index, request in enumerate(requests) if not request.leave]
        alone = {index: complete(client, requests[index]) for index in tqdm(kept, desc="alone")}
        counts = vllm_server.counters(address)
    left = [text for text, request in zip(together, requests, strict=True) if request.leave]
    return {
        **harness.head(__file__, args, "dtype", "requests", "concurrency", "drafts"),
        "vllm": importlib.metadata.version(vllm_server.package()),
        "openai": openai.__version__,
        "requests": len(requests),
        "left_early": len(left),
        "compared": len(kept),
        "identical_to_solo": sum(together[index] == alone[index] for index in kept),
        "differing": [
            {"request": index, "together": together[index], "alone": alone[index]}
            for index in kept
            if together[index] != alone[index]
        ],
        "seconds": seconds,
        "drafts": counts,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    parser = harness.build_parser(__doc__, requests=200, concurrency=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--drafts", type=int, default=3, help="num_speculative_tokens")
    parser.add_argument("--start_seconds", type=float, default=300, help="how long the server may take to start")
    args = parser.parse_args(argv)
    record = measure(args)
    print(
        f"{record['requests']} requests, {record['left_early']} left early, {record['identical_to_solo']} of "
        f"{record['compared']} others equal their solo run; {record['seconds']:.0f} s, drafts {record['drafts']}"
    )
    harness.write(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
