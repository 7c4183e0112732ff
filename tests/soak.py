"""Decode for long and chat for long on a tiny model: memory stays flat, and the text stays the baseline's.

python -m tests.soak [--tokens N] [--turns N]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from recurrent_drafting import AutoregressiveDecoder, BeamConfig, SamplingConfig, SpeculativeDecoder
from recurrent_drafting.chat import Chat, Terminal
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.reply_stream import ReplySettings
from tests.text_models import load_verifier, make_tokenizer, save_base, save_drafter

MOST_GROWTH = 0.02
TOKENS_PER_CALL, WARM_UP = 200, 0.2
# Of a chat: the window drops old turns, so that its prompts stay as long as they are.
TOKENS_PER_TURN = 16


@dataclass
class Growth:
    """Resident memory after the warm-up and at the end, in bytes."""

    before: int
    after: int

    @property
    def share(self) -> float:
        """Return how much it grew, as a share of what it was."""
        return self.after / self.before - 1


def resident() -> int:
    """Return this process's resident memory in bytes, freed memory given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def watched(total: int, step: Callable[[int], int]) -> Growth:
    """Repeat a step until its results add up to a total; the first fifth warms up."""
    done = number = 0
    before: int | None = None
    while done < total:
        done += step(number)
        number += 1
        if before is None and done >= WARM_UP * total:
            before = resident()
    return Growth(before or resident(), resident())


class Soak:
    """A tiny base, a drafter, and both decoders.

    Args:
        folder: scratch directory.
    """

    def __init__(self, folder: Path) -> None:
        base = save_base(folder / "base")
        drafter = load_drafter(str(save_drafter(folder / "drafter", base)))
        verifier = load_verifier(base, "fp64")
        self.differences = 0
        self.baseline = AutoregressiveDecoder(verifier)
        self.speculative = SpeculativeDecoder(
            verifier, drafter, BeamConfig(4, 4, 8, lookup_length=8, recycled_nodes=64)
        )
        self.tokenizer = make_tokenizer()

    def decode(self, number: int) -> int:
        """Decode a prompt of its own with both decoders; return the number of tokens of the speculative one."""
        prompt = self.tokenizer(f"prompt {number}")["input_ids"]
        sampling = SamplingConfig(temperature=0.0 if number % 2 else 1.0, seed=number)
        texts = [
            decoder.generate([prompt], max_new_tokens=TOKENS_PER_CALL, sampling=sampling, eos_token_ids=[]).sequences
            for decoder in (self.speculative, self.baseline)
        ]
        self.differences += texts[0] != texts[1]
        return len(texts[0][0])

    def chat(self, turns: int) -> Growth:
        """Hold one conversation with each decoder, side by side; compare every turn."""
        talks = [self._chat(self.speculative), self._chat(None)]

        def turn(number: int) -> int:
            for talk, sink in talks:
                talk.handle(f"turn {number}, and what do you say?")
                sink.seek(0)
                sink.truncate()
            last = [talk.messages[-2:] for talk, _ in talks]
            self.differences += last[0] != last[1]
            return 1

        return watched(turns, turn)

    def _chat(self, decoder: SpeculativeDecoder | None) -> tuple[Chat, io.StringIO]:
        sink = io.StringIO()
        settings = ReplySettings(TOKENS_PER_TURN, SamplingConfig())
        return Chat(self.baseline, decoder, self.tokenizer, settings, Terminal(io.StringIO(), sink)), sink


def main(argv: Sequence[str] | None = None) -> int:
    """Run both; return 0 if memory stayed flat and every text was the baseline's."""
    parser = argparse.ArgumentParser(description="Decode and chat for long; memory must stay flat.")
    parser.add_argument("--tokens", type=int, default=20_000, help="decoded speculatively (default %(default)s)")
    parser.add_argument("--turns", type=int, default=500, help="of a chat (default %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        soak = Soak(Path(scratch))
        failed = False
        for name, run in (
            ("decoding", lambda: watched(args.tokens, soak.decode)),
            ("chat", lambda: soak.chat(args.turns)),
        ):
            start = time.perf_counter()
            growth = run()
            failed |= growth.share >= MOST_GROWTH
            count = f"{args.tokens} tokens" if name == "decoding" else f"{args.turns} turns"
            print(
                f"{name}: {count}, {time.perf_counter() - start:.0f} s, resident {growth.before / 1e6:.1f} to "
                f"{growth.after / 1e6:.1f} MB ({growth.share:+.2%}), {soak.differences} texts differ",
                flush=True,
            )
    return int(failed or soak.differences > 0)


if __name__ == "__main__":
    raise SystemExit(main())
