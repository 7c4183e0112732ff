"""A reply while it is decoded: text that never has to be taken back, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.decoding import AutoregressiveDecoder, GenerationOutput, SpeculativeDecoder
from recurrent_drafting.detokenizer import Detokenizer, StopStrings
from recurrent_drafting.metrics import DecodingStats


@dataclass(frozen=True)
class ReplySettings:
    """What replies are made with.

    Args:
        max_new_tokens: per reply.
        sampling: the pipeline's settings.
        stop: strings that end a reply, or None.
    """

    max_new_tokens: int
    sampling: SamplingConfig
    stop: StopStrings | None = None


@dataclass(frozen=True)
class Piece:
    """Text that is ready to be shown, and whether its last token was drafted."""

    text: str
    drafted: bool


class TextStream:
    """Turn tokens into text that never has to be taken back.

    Held back are bytes that do not form a character yet, and text that may be the beginning of a
    stop string.

    Args:
        tokenizer: of the base.
        stop: strings that end the reply, or None.
    """

    def __init__(self, tokenizer: Any, stop: StopStrings | None = None) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._held: list[Piece] = []
        self._stopped = False

    def push(self, token: int, drafted: bool) -> list[Piece]:
        """Take one token; return what can be shown now."""
        text = self._detokenizer.push(token)
        if not text:
            return []
        self._held.append(Piece(text, drafted))
        return self._release(final=False)

    def finish(self) -> list[Piece]:
        """Return what is left; bytes that never became a character are dropped."""
        if text := self._detokenizer.finish():
            self._held.append(Piece(text, drafted=False))
        return self._release(final=True)

    def _release(self, *, final: bool) -> list[Piece]:
        """Return the text that nothing to come can change; none behind a stop string."""
        if self._stopped:
            return []
        text = "".join(piece.text for piece in self._held)
        if self._stop is None:
            return self._take(len(text))
        safe = len(self._stop.cut(text))
        self._stopped = safe < len(text)
        if not self._stopped and not final:
            safe -= _longest_prefix_at_end(text, self._stop.strings)
        return self._take(safe)

    def _take(self, count: int) -> list[Piece]:
        """Move the first ``count`` characters out of what is held."""
        taken = []
        while count and self._held:
            piece = self._held.pop(0)
            if len(piece.text) > count:
                self._held.insert(0, replace(piece, text=piece.text[count:]))
                piece = replace(piece, text=piece.text[:count])
            taken.append(piece)
            count -= len(piece.text)
        return taken


def _longest_prefix_at_end(text: str, strings: Sequence[str]) -> int:
    """Return how many last characters of a text may begin one of the strings."""
    return max(
        (size for item in strings for size in range(1, min(len(item), len(text) + 1)) if text.endswith(item[:size])),
        default=0,
    )


class ReplyStreamer:
    """Show a reply while it is decoded and count what it took.

    Args:
        stream: turns tokens into text.
        show: gets each piece of text.
    """

    def __init__(self, stream: TextStream, show: Callable[[Piece], None]) -> None:
        self.text = ""
        self._stream = stream
        self._show = show
        self._started = time.perf_counter()
        self._prompt_seen = False
        self._stats = DecodingStats(rows=1)

    def put(self, value: Tensor) -> None:
        """Take the prompt, then the prefill's token, then the tokens of each verifier step, int64 ``[n]``."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        tokens = value.tolist()
        if self._stats.tokens:
            self._stats.count_step(len(tokens) - 1)
        else:
            self._stats.prefill_tokens = len(tokens)
        self._stats.tokens += len(tokens)
        for index, token in enumerate(tokens):
            # The last token of a step is the verifier's own.
            self._emit(self._stream.push(token, drafted=index + 1 < len(tokens)))

    def end(self) -> None:
        """Show what was held back; also called after an interruption."""
        self._emit(self._stream.finish())

    def stats(self) -> DecodingStats:
        """Return the counters of what was shown so far."""
        self._stats.close(time.perf_counter() - self._started)
        return self._stats

    def _emit(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.text += piece.text
            self._show(piece)


def write(
    decoder: AutoregressiveDecoder | SpeculativeDecoder,
    prompt: list[int],
    settings: ReplySettings,
    streamer: ReplyStreamer,
    request_id: int = 0,
) -> GenerationOutput:
    """Decode the reply to one prompt and show it meanwhile.

    Args:
        decoder: writes the reply.
        prompt: token ids.
        settings: of the reply; its stop strings are those of the streamer.
        streamer: shows and counts the tokens.
        request_id: key of the reply's noise.
    """
    return decoder.generate(
        [prompt],
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        stop=settings.stop,
        request_ids=[request_id],
        streamer=streamer,
    )


def format_stats(stats: DecodingStats) -> str:
    """Return tokens, seconds, speed and tau in one line."""
    tau = f", tau {stats.tau:.2f}" if stats.row_steps else ""
    return f"{stats.tokens} tokens, {stats.seconds:.2f} s, {stats.tokens_per_second:.1f} tok/s{tau}"
