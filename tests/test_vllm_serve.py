"""``vllm serve`` with the drafter and an OpenAI-style client: streamed, whole and cancelled requests side by side."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm_server
from tests.test_vllm_engine import LENGTH, MAX_MODEL_LEN, Tiny, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
START_SECONDS = 240


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[str]:
    """Start the server as the documentation says; yield its address."""
    options = ["--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
        with vllm_server.serving(tiny.base, tiny.speculator, LENGTH, options, START_SECONDS) as address:
            yield address


def ask(address: str, prompt: list[int], length: int, *, stream: bool) -> Any:
    body = {"model": vllm_server.SERVED_NAME, "prompt": prompt, "max_tokens": length, "stream": stream}
    data = json.dumps({**body, "temperature": 0, "ignore_eos": True, "skip_special_tokens": False}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", data=data, headers=headers)
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
    counted = vllm_server.counters(server)
    assert counted["accepted_tokens"] > 0.3 * counted["drafts"] > 0
