"""One prompt, however it comes; what the script says of bad ones is in tests/faults."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from recurrent_drafting import single_prompt
from recurrent_drafting.errors import DataError


class Terminal(io.TextIOWrapper):
    """Standard input with somebody at it."""

    def isatty(self) -> bool:
        return True


def test_a_prompt_is_the_same_however_it_comes(tmp_path: Path) -> None:
    content = "one\ntwo \n\n"
    (tmp_path / "p.txt").write_text(content)
    pipe = io.TextIOWrapper(io.BytesIO(content.encode()), encoding="ascii")
    found = {
        single_prompt.checked(content, "--prompt"),
        single_prompt.from_file(str(tmp_path / "p.txt")),
        single_prompt.from_pipe(pipe),
    }
    assert found == {"one\ntwo "}


def test_a_terminal_and_an_empty_pipe_bring_none() -> None:
    assert single_prompt.from_pipe(Terminal(io.BytesIO(b"x"))) is None
    assert single_prompt.from_pipe(io.TextIOWrapper(io.BytesIO(b""))) is None


def test_a_limit_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_prompt, "MAX_BYTES", 3)
    assert single_prompt.from_pipe(io.TextIOWrapper(io.BytesIO(b"abc"))) == "abc"
    with pytest.raises(DataError, match="standard input holds more than 3 bytes"):
        single_prompt.from_pipe(io.TextIOWrapper(io.BytesIO(b"abcd")))
