"""One prompt: from the command line, a file or standard input; not empty, not too long, whole UTF-8."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from recurrent_drafting import sources
from recurrent_drafting.errors import DataError

MAX_BYTES = 64 * 1024 * 1024


def checked(text: str, where: str) -> str:
    """Return a prompt without the line feeds at its end.

    Args:
        text: the prompt.
        where: it comes from, for the message.

    Raises:
        DataError: it is empty, or holds bytes that are no text.
    """
    if not text.strip():
        raise DataError(f"{where} is empty: expected a prompt of at least one character")
    place = sources.first_surrogate(text)
    if place is not None:
        raise DataError(f"{where}: expected UTF-8, got a byte that is none at character {place + 1}; convert it")
    return text.rstrip("\n")


def from_file(name: str) -> str:
    """Return the prompt that a file holds.

    Raises:
        DataError: it cannot be read, is empty, too long or not UTF-8.
    """
    try:
        with Path(name).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}; check the path") from error
    return checked(_decoded(raw, name), name)


def from_pipe(stream: TextIO) -> str | None:
    """Return the prompt that is piped into standard input; None at a terminal, or where nothing comes.

    Raises:
        DataError: it is empty, too long or not UTF-8.
    """
    raw = b"" if stream.isatty() else stream.buffer.read(MAX_BYTES + 1)
    return checked(_decoded(raw, "standard input"), "standard input") if raw else None


def _decoded(raw: bytes, where: str) -> str:
    if len(raw) > MAX_BYTES:
        raise DataError(f"{where} holds more than {MAX_BYTES} bytes: shorten the prompt")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}:{line}: expected UTF-8, got byte {raw[error.start]:#04x}; convert it") from error
