"""Replies as they are streamed: whole characters, stop strings held back, drafted tokens told from the base's own."""

from __future__ import annotations

import pytest
import torch

from recurrent_drafting.detokenizer import StopStrings
from recurrent_drafting.reply_stream import Piece, ReplyStreamer, TextStream
from tests.text_models import make_tokenizer


def stream_text(text: str, stop: list[str] | None = None) -> list[str]:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer, StopStrings(tokenizer, stop) if stop else None)
    pieces = [stream.push(token, False) for token in tokenizer(text)["input_ids"]]
    return [piece.text for step in [*pieces, stream.finish()] for piece in step]


def test_characters_come_whole() -> None:
    pieces = stream_text("aé漢😀b")
    assert pieces == ["a", "é", "漢", "😀", "b"]


def test_an_unfinished_character_is_never_shown() -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer("a😀")["input_ids"][:-1]
    shown = [piece.text for token in ids for piece in stream.push(token, False)]
    assert "".join(shown + [piece.text for piece in stream.finish()]) == "a"


def test_special_tokens_are_not_shown() -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    ids = [0, *tokenizer("hi")["input_ids"], 1]
    shown = [piece.text for token in ids for piece in stream.push(token, False)]
    assert "".join(shown) == "hi"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("abc STOP def", "abc "), ("abc STO", "abc STO"), ("SSTOP", "S"), ("STSTO-", "STSTO-")],
)
def test_a_stop_string_is_held_back_until_it_is_known(text: str, shown: str) -> None:
    pieces = stream_text(text, ["STOP"])
    assert "".join(pieces) == shown
    assert not any("STOP".startswith(piece) and len(piece) < 4 and shown == "abc " for piece in pieces)


def test_the_last_token_of_a_step_is_the_bases_own() -> None:
    tokenizer = make_tokenizer()
    shown: list[Piece] = []
    streamer = ReplyStreamer(TextStream(tokenizer), shown.append)
    ids = tokenizer("abcdef")["input_ids"]
    for part in ([0, 5], ids[:1], ids[1:4], ids[4:5], ids[5:]):
        streamer.put(torch.tensor(part))
    streamer.end()
    assert [(piece.text, piece.drafted) for piece in shown] == [
        ("a", False), ("b", True), ("c", True), ("d", False), ("e", False), ("f", False)
    ]  # fmt: skip
    stats = streamer.stats()
    assert (stats.tokens, stats.row_steps, stats.accepted) == (6, 3, [2, 0, 1])
    assert stats.tau == pytest.approx(5 / 3)
