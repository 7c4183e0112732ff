"""From conversations to supervised token rows: tokenizer, chat template, loss mask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from recurrent_drafting import assets, checkpoint, manifest
from recurrent_drafting.errors import DataError, ModelError, first_line
from recurrent_drafting.sources import Conversation, ReadReport
from recurrent_drafting.token_rows import EncodedRow

# What a chat template's own expressions may end in; jinja has a class for its own errors alone.
_TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
# For tokenizers without a chat template. No blank before a reply's first token may belong to the
# prompt: byte-pair vocabularies keep it in the word that follows.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] }}"
    "{{ eos_token if eos_token is defined else '\n' }}"
    "{% else %}{{ message['role'].upper() + ': ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def encode(conversation: Conversation, tokenizer: Any, max_length: int, *, assistant_only: bool = True) -> EncodedRow:
    """Render a conversation through the chat template and mark its replies.

    The template of the tokenizer is used, or ``FALLBACK_TEMPLATE`` where it has none. A reply's
    tokens are those by which the rendering with the reply is longer than the one that asks for it,
    up to the end-of-turn token.

    Args:
        conversation: turns in order; replies alone are plain text.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens kept, from the start.
        assistant_only: supervise replies alone; False supervises every token.

    Raises:
        DataError: the template refuses the roles, or rewrites earlier turns, so that replies
            cannot be located.
    """
    if all(turn.role == "assistant" for turn in conversation):
        ids = [token for turn in conversation for token in tokenizer(turn.content)["input_ids"]]
        return EncodedRow(ids[:max_length], [True] * len(ids[:max_length]), cut=len(ids) > max_length)
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
    full = render(tokenizer, messages)
    mask = [not assistant_only] * len(full)
    special = _special_ids(tokenizer)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = render(tokenizer, messages[:index], ask=True)
        upto = render(tokenizer, messages[: index + 1])
        stop = _end_of_turn(upto, len(start), tokenizer, special)
        if full[: len(start)] != start or full[:stop] != upto[:stop]:
            raise DataError(
                f"turn {index + 1} of a conversation: expected its rendering to continue that of the turns before "
                "it, got other tokens; this chat template rewrites earlier turns, so replies cannot be located; "
                "use --targets regenerated, where each reply is a row of its own"
            )
        mask[len(start) : stop] = [True] * (stop - len(start))
    return EncodedRow(full[:max_length], mask[:max_length], cut=len(full) > max_length)


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    max_length: int,
    *,
    assistant_only: bool = True,
    skip_bad_rows: bool = False,
) -> tuple[list[EncodedRow], ReadReport]:
    """Encode many conversations; see ``encode``.

    Args:
        conversations: what to encode.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens kept per row.
        assistant_only: supervise replies alone.
        skip_bad_rows: leave out and count conversations that the chat template cannot render.

    Raises:
        DataError: a conversation cannot be encoded.
    """
    report, rows = ReadReport(), []
    for conversation in conversations:
        try:
            rows.append(encode(conversation, tokenizer, max_length, assistant_only=assistant_only))
        except DataError:
            if not skip_bad_rows:
                raise
            report.skip("chat template")
    report.read = len(rows)
    return rows, report


def render(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool = False) -> list[int]:
    """Return the token ids of messages; ``ask`` ends with the header of the next reply.

    Raises:
        DataError: the chat template refuses the messages.
    """
    own = bool(getattr(tokenizer, "chat_template", None))
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=ask, tokenize=False, chat_template=None if own else FALLBACK_TEMPLATE
        )
    except _TEMPLATE_FAILURES as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses a conversation of {roles}: {first_line(error)}; expected roles that it "
            "takes; drop system turns or pass --skip_bad_rows"
        ) from error
    # A template writes its own special tokens; the fallback leaves the first one to the tokenizer.
    return list(tokenizer(text, add_special_tokens=not own)["input_ids"])


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}


def _end_of_turn(ids: list[int], start: int, tokenizer: Any, special: set[int]) -> int:
    """Return where a reply ends: before the blanks that a template puts after its last special token."""
    for index in range(len(ids) - 1, start - 1, -1):
        if ids[index] in special:
            return len(ids) if tokenizer.decode(ids[index + 1 :]).strip() else index + 1
    return len(ids)


def load_tokenizer(name_or_path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a base by packaged name, local path or hub id.

    Raises:
        DataError: there is none.
    """
    source = assets.source_of(name_or_path)
    try:
        if (file := Path(source) / "tokenizer.json").exists():
            manifest.read_json(file)
        with _BareException():
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except checkpoint.LOAD_FAILURES as error:
        raise DataError(f"no tokenizer for {name_or_path}: {first_line(error)}; save one beside the model") from error


class _BareException:
    """Turn what is raised as ``Exception`` itself into a ``ValueError``.

    The library behind tokenizers has no class for its errors, and an ``except`` clause for this one would take all.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception:
            raise ValueError(f"tokenizer.json is not a tokenizer: {error}") from error


def bad_words_ids(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of words that are never to be written, at the start of a text and after a space."""
    texts = (text for word in words for text in (word, f" {word}"))
    found = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return tuple(dict.fromkeys(ids for ids in found if ids))


def check_tokenizer(tokenizer: Any, trained_with: str | None, base: str) -> None:
    """Compare a base's vocabulary with the one that a drafter was trained with.

    Args:
        tokenizer: of the base.
        trained_with: the drafter's record, None if unknown.
        base: name for the message.

    Raises:
        ModelError: they differ.
    """
    found = tokenizer_fingerprint(tokenizer)
    if trained_with is not None and found != trained_with:
        raise ModelError(
            f"the drafter was trained with another tokenizer than that of {base}: expected a vocabulary with SHA-256 "
            f"{trained_with}, got {found}; use the base it was trained for, or train a drafter for this one"
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the identity of a vocabulary: the SHA-256 of its tokens with their ids."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
