"""``vllm serve`` with the drafter and an OpenAI-style client: streamed, whole and cancelled requests side by side."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.test_vllm_engine import LENGTH, MAX_MODEL_LEN, PROPOSER, Tiny, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
START_SECONDS = 240


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server as the documentation says; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    speculation = json.dumps({"model": PROPOSER, "num_speculative_tokens": LENGTH})
    command = [
        *serve(tiny.base),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--speculative-config", speculation]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "RECURRENT_DRAFTING_SPECULATOR": tiny.speculator}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def serve(base: str) -> list[str]:
    """Return the start of the command: the command line tool of the package for CPUs does not find its own version."""
    if "vllm" in {item.name for item in importlib.metadata.distributions()}:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", base]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base]


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start in {START_SECONDS} s: {log.read_text()[-3000:]}")


def ask(address: str, prompt: list[int], length: int, *, stream: bool) -> Any:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": length, "temperature": 0, "stream": stream}
    data = json.dumps({**body, "ignore_eos": True, "skip_special_tokens": False}).encode()
    request = urllib.request.Request(address, data=data, headers={"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def whole(address: str, prompt: list[int], length: int) -> str:
    with ask(address, prompt, length, stream=False) as response:
        return str(json.load(response)["choices"][0]["text"])


def streamed(address: str, prompt: list[int], length: int, leave_after: int | None = None) -> str:
    """Return the text of a stream; ``leave_after`` so many events the connection is closed."""
    text, events = "", 0
    with ask(address, prompt, length, stream=True) as response:
        for line in response:
            event = line.decode().strip().removeprefix("data: ")
            if event == "[DONE]" or events == leave_after:
                break
            if event:
                text, events = text + json.loads(event)["choices"][0]["text"], events + 1
    return text


def words(tokens: list[int]) -> list[str]:
    return [f"t{token}" for token in tokens]


def split(text: str) -> list[str]:
    return [f"t{number}" for number in text.replace("t", " ").split()]


def test_each_text_is_its_own_with_and_without_streaming_and_beside_cancelled_ones(tiny: Tiny, server: str) -> None:
    asked = prompts(24, seed=12, length=6)
    lengths = [5 + 4 * (index % 12) for index in range(len(asked))]

    def one(index: int) -> str:
        prompt, length = asked[index], lengths[index]
        if index % 4 == 3:
            return streamed(server, prompt, 90, leave_after=2)
        return (streamed if index % 2 else whole)(server, prompt, length)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(len(asked))))
    for index, (prompt, length, text) in enumerate(zip(asked, lengths, texts, strict=True)):
        if index % 4 == 3:
            assert split(text) == words(tiny.text(prompt, 90))[: len(split(text))] != []
        else:
            assert split(text) == words(tiny.text(prompt, length))
    counted = counters(server.replace("/v1/completions", "/metrics"))
    assert counted["accepted_tokens"] > 0.3 * counted["drafts"] > 0


def counters(address: str) -> dict[str, float]:
    """Return the server's counts of drafts."""
    prefix = "vllm:spec_decode_num_"
    with urllib.request.urlopen(address, timeout=30) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith(prefix)]
    found = (line.removeprefix(prefix).split("_total{") for line in lines if "_total{" in line)
    return {name: float(rest.split()[-1]) for name, rest in found}
