"""The interactive chat: its terminal, its commands, and the conversation."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from recurrent_drafting import cli, data, reply_stream, sources
from recurrent_drafting.decoding import AutoregressiveDecoder, SpeculativeDecoder
from recurrent_drafting.errors import DataError, RecurrentDraftingError, UsageError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.reply_stream import Piece, ReplySettings, ReplyStreamer, TextStream, format_stats

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_FENCE = '"""'
# Control characters of a model must not steer the terminal; tab and line feed may pass.
_CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))
HELP = """\
/help                this list
/reset               forget the conversation
/stats               figures of the session
/temperature X       0 is greedy
/speculation on|off  the text stays the same, the speed does not
/save FILE           write the conversation as JSON
/exit                leave (so does end of input)
Ctrl-C stops a reply and keeps what was said. A line that ends with \\ goes on in the next one;
lines between two lines of \"\"\" are one message."""


class Terminal:
    """Where a chat reads and writes.

    Args:
        source: lines of the user.
        sink: what the user sees.
    """

    def __init__(self, source: TextIO, sink: TextIO) -> None:
        self._source = source
        self._sink = sink
        self._asks = source.isatty() and sink.isatty()
        dumb = os.environ.get("TERM") == "dumb"
        self.colour = sink.isatty() and not os.environ.get("NO_COLOR") and not dumb
        self._input = _line_editor() if self._asks and source.fileno() == 0 else None

    @classmethod
    def standard(cls) -> Terminal:
        """Return this process's standard input and output."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A byte that is no text would end the stream, and with it the lines behind it; so the chat gets it and
            # refuses its message alone. A pipe is UTF-8 in every locale, as one that brings a prompt is.
            encoding = None if sys.stdin.isatty() else "utf-8"
            sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
        return cls(sys.stdin, sys.stdout)

    def write(self, text: str) -> None:
        """Write and flush."""
        self._sink.write(text)
        self._sink.flush()

    def line(self, text: str = "") -> None:
        """Write a line."""
        self.write(text + "\n")

    def show(self, piece: Piece) -> None:
        """Write a piece of a reply; drafted text is coloured where there is colour."""
        text = piece.text.translate(_CONTROL)
        self.write(f"{_GREEN}{text}{_PLAIN}" if piece.drafted and self.colour else text)

    def message(self) -> str | None:
        """Read one message of one or more lines; None at the end of the input."""
        lines: list[str] = []
        fenced = False
        while True:
            line = self._read("> " if not lines and not fenced else ". ")
            if line is None:
                return "\n".join(lines) if lines else None
            if line.strip() == _FENCE:
                if fenced:
                    return "\n".join(lines)
                fenced = True
            elif not fenced and line.endswith("\\"):
                lines.append(line[:-1])
            else:
                lines.append(line)
                if not fenced:
                    return "\n".join(lines)

    def _read(self, prompt: str) -> str | None:
        if self._input is not None:
            try:
                return self._input(prompt)
            except EOFError:
                return None
        if self._asks:
            self.write(prompt)
        line = self._source.readline()
        return line.rstrip("\r\n") if line else None


def _line_editor() -> Callable[[str], str]:
    """Return ``input`` with history and whole-paste reading, where Python has readline."""
    try:
        import readline
    except ImportError:
        return input
    readline.parse_and_bind("set enable-bracketed-paste on")
    return input


class Chat:
    """A conversation with the base, drafted or not.

    Args:
        baseline: decodes while speculation is off; holds the base.
        speculative: decodes while it is on, None if no drafter is loaded.
        tokenizer: of the base.
        settings: of the replies.
        terminal: where the user is.
    """

    def __init__(
        self,
        baseline: AutoregressiveDecoder,
        speculative: SpeculativeDecoder | None,
        tokenizer: Any,
        settings: ReplySettings,
        terminal: Terminal,
    ) -> None:
        self.messages: list[dict[str, str]] = []
        self._baseline = baseline
        self._speculative = speculative
        self._decoder: AutoregressiveDecoder | SpeculativeDecoder = speculative or baseline
        self._tokenizer = tokenizer
        self._settings = settings
        self._terminal = terminal
        self._session = DecodingStats()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._terminal.line(HELP),
            "/reset": self._reset,
            "/stats": self._show_stats,
            "/temperature": self._set_temperature,
            "/speculation": self._set_speculation,
            "/save": self._save,
        }

    def run(self) -> None:
        """Talk until ``/exit`` or the end of the input."""
        self._terminal.line("/help lists the commands; Ctrl-C stops a reply; /exit leaves")
        if self._terminal.colour and self._speculative is not None:
            self._terminal.line(f"{_GREEN}drafted tokens{_PLAIN}, the base's own tokens")
        while True:
            try:
                message = self._terminal.message()
                if message is None or message.strip() == "/exit":
                    return
                self.handle(message)
            except KeyboardInterrupt:
                self._terminal.line("\n(/exit leaves)")

    def handle(self, message: str) -> None:
        """Carry out a command, or answer; an error is told and the chat goes on."""
        name, _, argument = message.strip().partition(" ")
        try:
            if not sources.is_unicode(message):
                raise DataError(
                    "the message holds bytes that are no text: expected UTF-8; the conversation is unchanged, convert "
                    "the message and send it again"
                )
            if name in self._commands:
                self._commands[name](argument.strip())
            elif name.startswith("/") and name[1:].isalpha():
                raise UsageError(f"unknown command {name}: expected one of {', '.join(self._commands)}")
            elif message.strip():
                self._answer(message)
        except RecurrentDraftingError as error:
            self._terminal.line(f"error: {error}")

    def _answer(self, message: str) -> None:
        """Reply to a message; the history takes both, or neither if nothing was said."""
        history = [*self.messages, {"role": "user", "content": message}]
        stream = TextStream(self._tokenizer, self._settings.stop)
        streamer = ReplyStreamer(stream, self._terminal.show)
        note = ""
        try:
            history, prompt = self._fit(history)
            reply_stream.write(self._decoder, prompt, self._settings, streamer, request_id=self._session.rows)
        except KeyboardInterrupt:
            streamer.end()
            note = " (stopped)"
        stats = streamer.stats()
        self._session.merge(stats)
        self._terminal.line(f"\n[{format_stats(stats)}]{note}")
        if stats.tokens:
            self.messages = [*history, {"role": "assistant", "content": streamer.text}]

    def _fit(self, history: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """Drop the oldest turns until the prompt and half a window's reply fit.

        Raises:
            UsageError: the last message alone is too long.
        """
        window = self._baseline.verifier.context_window
        prompt = data.render(self._tokenizer, history, ask=True)
        if window is None:
            return history, prompt
        room = min(self._settings.max_new_tokens, window // 2)
        dropped = 0
        while len(prompt) + room > window and len(history) > 2:
            history = history[2:]
            dropped += 1
            prompt = data.render(self._tokenizer, history, ask=True)
        if len(prompt) >= window:
            raise UsageError(
                f"the message makes a prompt of {len(prompt)} tokens and the context window is "
                f"{window}: shorten it; the conversation is unchanged"
            )
        if dropped:
            turns = "turns" if dropped > 1 else "turn"
            self._terminal.line(f"({dropped} oldest {turns} dropped to fit the context window of {window} tokens)")
        return history, prompt

    def _reset(self, _: str) -> None:
        self.messages = []
        self._terminal.line("conversation forgotten")

    def _show_stats(self, _: str) -> None:
        session = self._session
        mode = "on" if self._decoder is self._speculative else "off"
        temperature = self._settings.sampling.temperature
        depths = " ".join(f"{share:.2f}" for share in session.acceptance_by_depth)
        self._terminal.line(
            f"{session.rows} replies, {format_stats(session)}, "
            f"acceptance by depth {depths or '-'}; "
            f"speculation {mode}, temperature {temperature}"
        )

    def _set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError as error:
            raise UsageError(f"/temperature takes a number >= 0, got {text!r}") from error
        sampling = replace(self._settings.sampling, temperature=value)
        self._settings = replace(self._settings, sampling=sampling)
        self._terminal.line(f"temperature {value}")

    def _set_speculation(self, text: str) -> None:
        if text not in ("on", "off"):
            raise UsageError(f"/speculation takes on or off, got {text!r}")
        if text == "on" and self._speculative is None:
            raise UsageError("no drafter is loaded: start without --autoregressive")
        self._decoder = self._speculative if text == "on" and self._speculative else self._baseline
        self._terminal.line(f"speculation {text}")

    def _save(self, text: str) -> None:
        if not text:
            raise UsageError("/save takes a file name")
        path = cli.user_path(text)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump({"messages": self.messages}, file, indent=2, ensure_ascii=False)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{text} cannot be written: {reason}; name another file") from error
        self._terminal.line(f"saved {text}")
