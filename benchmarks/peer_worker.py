#!/usr/bin/env python
"""One peer in a process of its own: reads a prompt per line, answers with tokens and seconds.

Started by ``peers.py`` with the interpreter that has the peer installed; imports nothing of this project.

  python benchmarks/peer_worker.py vllm MODEL DTYPE THREADS
  python benchmarks/peer_worker.py vllm_ngram MODEL DTYPE THREADS
  python benchmarks/peer_worker.py llama_cpp FILE.gguf - THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[int], int, float], list[int]]


def vllm(model: str, dtype: str, _threads: int, speculation: dict[str, object] | None = None) -> Generate:
    """Start vLLM."""
    from vllm import LLM, SamplingParams, TokensPrompt

    options = {"speculative_config": speculation} if speculation else {}
    engine = LLM(model, dtype=dtype, max_model_len=4096, max_num_seqs=1, enforce_eager=False, **options)

    def generate(prompt: list[int], count: int, temperature: float) -> list[int]:
        parameters = SamplingParams(temperature=temperature, max_tokens=count, seed=1)
        [output] = engine.generate([TokensPrompt(prompt_token_ids=prompt)], parameters, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    return generate


def vllm_ngram(model: str, dtype: str, threads: int) -> Generate:
    """Start vLLM with its own n-gram drafts."""
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    return vllm(model, dtype, threads, speculation)


def llama_cpp(model: str, _dtype: str, threads: int) -> Generate:
    """Start llama.cpp by its Python binding."""
    from llama_cpp import Llama

    engine = Llama(model, n_ctx=4096, n_threads=threads, verbose=False)

    def generate(prompt: list[int], count: int, temperature: float) -> list[int]:
        engine.reset()
        tokens: list[int] = []
        for token in engine.generate(prompt, temp=temperature, top_k=0, top_p=1.0, repeat_penalty=1.0):
            tokens.append(int(token))
            if len(tokens) == count or token == engine.token_eos():
                break
        return tokens

    return generate


def main() -> int:
    """Serve until standard input ends."""
    kind, model, dtype, threads = sys.argv[1:5]
    # Answers go to the real standard output; whatever a peer prints goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate = {"vllm": vllm, "vllm_ngram": vllm_ngram, "llama_cpp": llama_cpp}[kind](model, dtype, int(threads))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        tokens = generate(request["prompt"], request["count"], request["temperature"])
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - start}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
