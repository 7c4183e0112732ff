"""Our decoders with the base compiled, in a process of their own; reads a request per line, answers as JSON.

Started by ``peers.py``, so that nothing compiled shares a process with the eager decoders.

  python benchmarks/compiled_worker.py BASE DTYPE DRAFTER THREADS MAX_TREE_NODES
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import torch

from our_decoders import OurDecoders
from recurrent_drafting import Verifier
from recurrent_drafting.checkpoint import load_drafter


def answer(decoders: OurDecoders, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks: a ``prompt`` is answered, else curves are timed."""
    if "prompt" not in request:
        curve = decoders.time_curve()
        return {
            "curve": None if curve is None else asdict(curve),
            "beam": decoders.beam,
            "compile_seconds": decoders.speculative.verifier.compile_seconds,
        }
    found = decoders.answer(request["speculative"], [request["prompt"]], request["count"], request["temperature"])
    assert found.stats is not None
    return {"tokens": found.texts[0], "seconds": found.seconds, "stats": asdict(found.stats)}


def main() -> int:
    """Serve until standard input ends."""
    base, dtype, drafter, threads, max_tree_nodes = sys.argv[1:6]
    # Answers go to the real standard output; whatever is printed meanwhile goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    verifier = Verifier.from_pretrained(base, dtype)
    verifier.compile()
    decoders = OurDecoders(verifier, load_drafter(drafter), max_tree_nodes=json.loads(max_tree_nodes))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(decoders, json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
