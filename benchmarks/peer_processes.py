"""Methods that answer from processes of their own, stopped while it is not their turn."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from our_decoders import Answer, Batch
from recurrent_drafting import Verifier, assets
from recurrent_drafting.errors import ResourceError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.tree_budget import LatencyCurve

WORKER = Path(__file__).with_name("peer_worker.py")
COMPILED_WORKER = Path(__file__).with_name("compiled_worker.py")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Worker:
    """A process that answers requests, one JSON line each, and is stopped in between.

    Args:
        command: starts it.

    Raises:
        ResourceError: it does not start; its last words are in the message.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            if self._answer() != "ready":
                raise ResourceError(f"{' '.join(command)} does not start: expected it to say that it is ready")
        except ResourceError:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the answers to requests, made one after the other."""
        self._signal(signal.SIGCONT)
        answers = []
        for request in requests:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answers.append(self._answer())
        self._signal(signal.SIGSTOP)
        return answers

    def answer(self, batch: Batch, **settings: Any) -> Answer:
        """Answer prompts one by one; the seconds are the worker's own."""
        answers = self.ask(*({"prompt": prompt, **settings} for prompt in batch))
        stats = None
        if all("stats" in answer for answer in answers):
            stats = DecodingStats()
            for answer in answers:
                stats.merge(DecodingStats(**answer["stats"]))
        return Answer([a["tokens"] for a in answers], sum(a["seconds"] for a in answers), stats)

    def close(self) -> None:
        """End the process and those it started."""
        with self._process:  # closes the pipes
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


class CompiledDecoders:
    """Our decoders with the base compiled.

    Args:
        worker: runs ``compiled_worker.py``.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.beam: dict[str, Any] = {}
        self.compile_seconds = 0.0

    def answer(self, speculative: bool, prompts: Batch, new_tokens: int, temperature: float) -> Answer:
        """Answer prompts with one of the two."""
        return self._worker.answer(prompts, speculative=speculative, count=new_tokens, temperature=temperature)

    def time_curve(self) -> LatencyCurve | None:
        """Time the costs of trees anew; None where trees have a fixed size."""
        [found] = self._worker.ask({})
        self.beam, self.compile_seconds = found["beam"], found["compile_seconds"]
        return None if found["curve"] is None else LatencyCurve.of(found["curve"])


def start_workers(verifier: Verifier, args: argparse.Namespace, workers: dict[str, Worker]) -> None:
    """Start the peers whose interpreters were given, and ours compiled; say of the others that they are left out.

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
        workers[name] = Worker([python, str(WORKER), name, *words, threads])
    if args.compile:
        words = [args.base_model, args.dtype, args.speculator_path, threads, json.dumps(args.max_tree_nodes)]
        workers["compiled"] = Worker([sys.executable, str(COMPILED_WORKER), *words])
