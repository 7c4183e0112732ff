"""Engines that continue prompts with the verifier, batch by batch, and the end of replies that loop."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from recurrent_drafting import assets
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.decoding import AutoregressiveDecoder
from recurrent_drafting.errors import UsageError
from recurrent_drafting.verifier import Verifier, resolve_dtype

# Requests that transformers decode together.
REPLY_BATCH = 32


@dataclass(frozen=True)
class Request:
    """One text to be written.

    Args:
        prompt: token ids.
        seed: key of its randomness; the same request always gives the same text.
        temperature: 0 is greedy.
        min_p: least probability, as a share of the most likely token's.
    """

    prompt: list[int]
    seed: int
    temperature: float
    min_p: float = 0.0


class Engine(Protocol):
    """Something that continues prompts with the verifier.

    Args:
        name: as in ``make_engine``.
        dtype: what it was asked to compute in, as in ``make_engine``.
    """

    name: str
    dtype: str

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""


class VllmEngine:
    """The vLLM engine; several times faster than batches of transformers.

    Args:
        model_directory: local model.
        max_model_len: longest prompt and reply together, in tokens.
        dtype: auto (bfloat16), bf16, fp16 or fp32.
    """

    name = "vllm"

    def __init__(self, model_directory: str, max_model_len: int = 1024, dtype: str = "auto") -> None:
        self.dtype = dtype
        wanted = resolve_dtype("bf16" if dtype == "auto" else dtype, torch.device("cpu"))
        # An optional package: nothing else here may need it.
        self._vllm = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            model_directory,
            dtype=str(wanted).removeprefix("torch."),
            max_model_len=max_model_len,
            max_num_seqs=128,
            max_num_batched_tokens=8 * max_model_len,
            # vLLM 0.32 on a CPU dies when a request with a seed has its prompt split over steps.
            enable_chunked_prefill=False,
            enforce_eager=True,
            disable_log_stats=True,
        )

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""
        parameters = [
            self._vllm.SamplingParams(
                temperature=item.temperature,
                min_p=item.min_p,
                seed=item.seed,
                max_tokens=max_new_tokens,
                detokenize=False,
            )
            for item in requests
        ]
        prompts: list[Any] = [{"prompt_token_ids": item.prompt} for item in requests]
        results = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


class TransformersEngine:
    """The package's own baseline decoder.

    Args:
        verifier: the model that writes.
        batch_size: requests decoded at a time.
        max_length: longest prompt and text together, in tokens; a prompt of that length has no text.
        dtype: what the verifier was asked to be loaded in.
    """

    name = "transformers"

    def __init__(
        self,
        verifier: Verifier,
        batch_size: int = REPLY_BATCH,
        max_length: int = sys.maxsize,
        dtype: str = "auto",
    ) -> None:
        self.dtype = dtype
        self._decoder = AutoregressiveDecoder(verifier)
        self._batch_size = batch_size
        self._max_length = max_length

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""
        texts: list[list[int]] = [[] for _ in requests]
        for temperature, min_p in sorted({(item.temperature, item.min_p) for item in requests}):
            group = [i for i, item in enumerate(requests) if (item.temperature, item.min_p) == (temperature, min_p)]
            output = self._decoder.generate(
                [requests[i].prompt for i in group],
                max_new_tokens=[min(max_new_tokens, self._room(requests[i])) for i in group],
                sampling=SamplingConfig(temperature=temperature, min_p=min_p),
                request_ids=[requests[i].seed for i in group],
                batch_size=self._batch_size,
            )
            for i, tokens in zip(group, output.sequences, strict=True):
                texts[i] = tokens
        return texts

    def _room(self, request: Request) -> int:
        return max(self._max_length - len(request.prompt), 0)


def make_engine(name: str, model: str, dtype: str = "auto") -> Engine:
    """Build an engine.

    Args:
        name: auto (vLLM where it is installed), vllm or transformers.
        model: the base, by packaged name or path.
        dtype: as for ``Verifier.from_pretrained``, but auto is bfloat16 in vLLM.

    Raises:
        UsageError: vLLM is asked for and not installed, or there is no such dtype.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UsageError("--engine vllm: vLLM is not installed; install it or use --engine transformers")
    if name == "transformers" or not installed:
        return TransformersEngine(Verifier.from_pretrained(model, dtype), dtype=dtype)
    return VllmEngine(assets.source_of(model), dtype=dtype)


def cut_loop(tokens: list[int], reach: int = 128, novelty: float = 0.1, keep: int = 64) -> list[int]:
    """Shorten a reply that ends in a loop, exact or nearly so, and keep the loop's beginning.

    A token is novel if the 4-gram that it ends did not end within the ``reach`` tokens before. The
    loop is the longest end of the reply with at most a share ``novelty`` of such tokens; its first
    ``keep`` tokens stay, because the verifier loops when it serves as well, and the drafter must
    follow it into the loop.

    Args:
        tokens: a reply.
        reach: tokens looked back.
        novelty: share of novel tokens in a loop.
        keep: tokens of the loop that stay.
    """
    last: dict[tuple[int, ...], int] = {}
    novel = []
    for index in range(len(tokens)):
        gram = tuple(tokens[max(index - 3, 0) : index + 1])
        novel.append(index - last.get(gram, -reach - 1) > reach)
        last[gram] = index
    start, count = len(tokens), 0
    for index in range(len(tokens) - 1, -1, -1):
        count += novel[index]
        if not novel[index] and count <= novelty * (len(tokens) - index):
            start = index
    return tokens[: start + keep]
