"""The interactive chat."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recurrent_drafting import (
    AutoregressiveDecoder,
    Drafter,
    SamplingConfig,
    SpeculativeDecoder,
)
from recurrent_drafting.chat import Chat, Terminal
from recurrent_drafting.detokenizer import BROKEN, StopStrings, decode
from recurrent_drafting.reply_stream import Piece, ReplySettings, ReplyStreamer, TextStream
from tests.text_models import load_verifier, make_tokenizer, save_base, save_drafter


class Screen(io.StringIO):
    """A colour terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def decoders(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[AutoregressiveDecoder, SpeculativeDecoder]:
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base", window=160)
    verifier = load_verifier(base, "fp64")
    drafter = Drafter.from_pretrained(save_drafter(folder / "drafter", base))
    return AutoregressiveDecoder(verifier), SpeculativeDecoder(verifier, drafter)


def make_chat(
    decoders: tuple[AutoregressiveDecoder, SpeculativeDecoder | None],
    lines: str = "",
    **settings: Any,
) -> tuple[Chat, io.StringIO]:
    output = io.StringIO()
    terminal = Terminal(io.StringIO(lines), output)
    options = {"max_new_tokens": 10, "sampling": SamplingConfig(), **settings}
    return Chat(*decoders, make_tokenizer(), ReplySettings(**options), terminal), output


def test_a_conversation_ends_with_its_input(decoders: Any) -> None:
    session, output = make_chat(decoders, "hello\nmore\n")
    session.run()
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    assert session.messages[0]["content"] == "hello"
    assert output.getvalue().count("tok/s, tau") == 2
    assert "\x1b" not in output.getvalue()


def test_exit_leaves_at_once(decoders: Any) -> None:
    session, _ = make_chat(decoders, "/exit\nhello\n")
    session.run()
    assert session.messages == []


def test_speculation_does_not_change_the_text(decoders: Any) -> None:
    texts = []
    for mode in ("on", "off"):
        session, _ = make_chat(decoders, f"/speculation {mode}\n/temperature 0.8\nhello\nand\n")
        session.run()
        texts.append(session.messages)
    assert texts[0] == texts[1] and len(texts[0]) == 4


def test_commands(decoders: Any, tmp_path: Path) -> None:
    session, output = make_chat(decoders)
    session.handle("hello")
    session.handle(f"/save {tmp_path / 'c.json'}")
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved == {"messages": session.messages}
    for command in ("/help", "/stats", "/temperature 0.5", "/speculation off", "/reset"):
        session.handle(command)
    assert session.messages == []
    text = output.getvalue()
    for part in ("/temperature X", "1 replies", "temperature 0.5", "speculation off", "forgotten"):
        assert part in text
    assert "error" not in text


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/temperature -1", "temperature must be"),
        ("/temperature hot", "takes a number"),
        ("/temperature nan", "temperature must be"),
        ("/speculation maybe", "takes on or off"),
        ("/save", "takes a file name"),
        ("/save /nowhere/at/all", "cannot be written"),
        ("/save a\0b", "a\0b cannot be written: embedded null byte"),
        ("/save ~no-such-user/x", "~no-such-user/x begins with a home that is not on this machine"),
        ("/save \udcff", "expected UTF-8"),
        ("hello \udcff", "expected UTF-8"),
        ("/helo", "unknown command /helo"),
    ],
)
def test_wrong_commands_are_told_and_the_chat_goes_on(decoders: Any, command: str, expected: str) -> None:
    session, output = make_chat(decoders)
    session.handle(command)
    assert output.getvalue().count("error: ") == 1 and expected in output.getvalue()
    assert output.getvalue().count("\n") == 1 and session.messages == []
    session.handle("hello")
    assert len(session.messages) == 2


def test_a_saved_file_is_not_overwritten(decoders: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("mine")
    session, output = make_chat(decoders)
    session.handle(f"/save {path}")
    assert path.read_text() == "mine" and "error" in output.getvalue()


def test_speculation_without_a_drafter(decoders: Any) -> None:
    session, output = make_chat((decoders[0], None))
    session.handle("/speculation on")
    assert "no drafter" in output.getvalue()


def test_old_turns_leave_a_full_window(decoders: Any) -> None:
    session, output = make_chat(decoders)
    for index in range(5):
        session.handle(f"message number {index} of some length")
    assert "(1 oldest turn dropped to fit the context window of 160 tokens)" in output.getvalue()
    assert session.messages[0]["role"] == "user"
    assert session.messages[-2]["content"].startswith("message number 4")
    assert "error" not in output.getvalue()


def test_a_message_over_the_window_changes_nothing(decoders: Any) -> None:
    session, output = make_chat(decoders)
    session.handle("hello")
    before = list(session.messages)
    session.handle("x" * 5000)
    assert session.messages == before
    assert "context window is 160" in output.getvalue()


def test_an_interrupted_reply_stays_in_the_history(decoders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session, output = make_chat(decoders)
    pieces: list[Piece] = []

    def interrupt(piece: Piece) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session._terminal, "show", interrupt)
        session.handle("hello")
    assert "(stopped)" in output.getvalue()
    partial = "".join(piece.text for piece in pieces)
    assert session.messages[1:] == [{"role": "assistant", "content": partial}]
    session.handle("go on")
    assert len(session.messages) == 4


def test_stop_strings_end_a_reply(decoders: Any) -> None:
    free, _ = make_chat(decoders)
    free.handle("hello")
    text = free.messages[1]["content"]
    string = text[2]
    session, _ = make_chat(decoders, stop=StopStrings(make_tokenizer(), [string]))
    session.handle("hello")
    assert session.messages[1]["content"] == text[: text.index(string)]


def test_drafted_text_is_coloured_on_a_colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    Terminal(io.StringIO(), screen).show(Piece("a\x1b[2J", True))
    assert screen.getvalue() == "\x1b[32ma[2J\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    terminal = Terminal(io.StringIO(), screen)
    terminal.show(Piece("a", True))
    assert not terminal.colour and screen.getvalue() == "a"


def test_messages_of_several_lines() -> None:
    source = io.StringIO('one \\\ntwo\n"""\na\n\nb\n"""\nlast')
    terminal = Terminal(source, io.StringIO())
    assert terminal.message() == "one \ntwo"
    assert terminal.message() == "a\n\nb"
    assert terminal.message() == "last"
    assert terminal.message() is None


def test_stream_equals_plain_decoding(decoders: Any) -> None:
    tokenizer = make_tokenizer()
    shown: list[Piece] = []
    streamer = ReplyStreamer(TextStream(tokenizer), shown.append)
    sampling = replace(SamplingConfig(), temperature=1.5)
    output = decoders[1].generate([[0, 9, 9]], max_new_tokens=60, sampling=sampling, streamer=streamer)
    whole = decode(tokenizer, output.sequences[0])
    assert "".join(piece.text for piece in shown) == whole.rstrip(BROKEN)
    assert streamer.stats().tau == output.stats.tau
