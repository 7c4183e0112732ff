"""Tokens of a reply into text: stop strings, and text token by token without broken characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recurrent_drafting.errors import UsageError

BROKEN = "\ufffd"


class StopStrings:
    """End replies at the first occurrence of one of several strings.

    As a stop function it keeps the tokens up to the one that completes a string, because a string
    may begin or end inside a token; ``cut`` then removes the string and what follows from the text.

    Args:
        tokenizer: of the base.
        strings: none of them empty.

    Raises:
        UsageError: a string is empty.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if not all(strings):
            raise UsageError("--stop must be a non-empty string, got ''")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # A token adds at least a byte, special ones aside; the slack is for those.
        self._reach = 2 * max((len(text.encode()) for text in strings), default=0) + 8

    def __call__(self, tokens: Sequence[int]) -> int | None:
        """Return how many of a reply's tokens to keep once it holds a stop string, else None."""
        tail = decode(self._tokenizer, tokens[-self._reach :])
        if not any(text in tail for text in self.strings):
            return None
        whole = decode(self._tokenizer, tokens)
        return len(tokens) if self.cut(whole) != whole else None

    def cut(self, text: str) -> str:
        """Return the text before the first stop string."""
        found = [place for item in self.strings if (place := text.find(item)) >= 0]
        return text[: min(found, default=len(text))]


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Turn a reply's tokens into text, without special tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Detokenizer:
    """Turn the tokens of a reply into text one by one, without broken characters.

    >>> class Bytes:
    ...     def decode(self, tokens, **options):
    ...         return bytes(tokens).decode("utf-8", "replace")
    >>> detokenizer = Detokenizer(Bytes())
    >>> [detokenizer.push(byte) for byte in "né".encode()]
    ['n', '', 'é']

    Args:
        tokenizer: of the base.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown_from = self._shown_to = 0

    def push(self, token: int) -> str:
        """Take a token; return the text it completes, empty while its bytes form no character yet."""
        self._tokens.append(token)
        known, text = self._texts()
        if len(text) <= len(known) or text.endswith(BROKEN):
            return ""
        self._shown_from, self._shown_to = self._shown_to, len(self._tokens)
        return text[len(known) :]

    def finish(self) -> str:
        """Return what is left; bytes that never became a character are dropped."""
        known, text = self._texts()
        self._shown_from = self._shown_to = len(self._tokens)
        return text.rstrip(BROKEN)[len(known) :]

    def _texts(self) -> tuple[str, str]:
        # Decoding starts at text already shown: tokenizers treat a first token apart.
        known = decode(self._tokenizer, self._tokens[self._shown_from : self._shown_to])
        return known, decode(self._tokenizer, self._tokens[self._shown_from :])


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token of a reply completes; together they are the reply."""
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.push(token) for token in tokens]
    if texts:
        texts[-1] += detokenizer.finish()
    return texts
