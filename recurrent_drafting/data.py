"""From sources to supervised token rows: conversations, chat template, loss mask, collator."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from recurrent_drafting import assets
from recurrent_drafting.errors import DataError

# Longer lines are refused before they are parsed.
MAX_LINE_BYTES = 64 * 1024 * 1024
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: role (system, user or assistant) and text."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class EncodedRow:
    """A conversation as token ids, with the tokens that are supervised.

    Args:
        input_ids: T token ids.
        loss_mask: true at the tokens of replies (end-of-turn included), T entries.
    """

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass
class ReadReport:
    """What a reader met: rows read, and rows left out by reason."""

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count a row that was left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


class TokenDataset(Dataset[EncodedRow]):
    """Rows in memory.

    Args:
        rows: encoded conversations.
    """

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        return self.rows[index]

    @property
    def reply_tokens(self) -> int:
        """Return the number of supervised tokens."""
        return sum(sum(row.loss_mask) for row in self.rows)


class Collator:
    """Pad rows on the right; padding is known by the mask, never by its id."""

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Return ``input_ids`` int64, ``attention_mask`` and ``loss_mask`` bool, each ``[B, T]``."""
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.bool),
            "loss_mask": torch.zeros(shape, dtype=torch.bool),
        }
        for index, row in enumerate(rows):
            length = len(row.input_ids)
            batch["input_ids"][index, :length] = torch.tensor(row.input_ids)
            batch["attention_mask"][index, :length] = True
            batch["loss_mask"][index, :length] = torch.tensor(row.loss_mask)
        return batch


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers (from 1) and lines of a UTF-8 text file.

    Raises:
        DataError: not found, not UTF-8, or a line above ``MAX_LINE_BYTES``.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}: line is longer than {MAX_LINE_BYTES} bytes; split it")
                try:
                    yield number, raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: expected UTF-8, got byte {raw[error.start]:#04x} at column {error.start + 1}; "
                        "convert the file"
                    ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error


def read_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, object) for each row of a .jsonl file or of a .json list.

    Raises:
        DataError: the file is empty or a row is not JSON; yields the error instead of raising
            for single malformed lines of a .jsonl file, so that a caller may skip them.
    """
    if path.suffix == ".json":
        text = "\n".join(line for _, line in read_lines(path))
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of rows, got {type(rows).__name__}")
        yield from ((f"{path}: row {index}", row) for index, row in enumerate(rows, start=1))
        return
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                yield where, DataError(f"{where}: malformed JSON: {error.msg}; fix the line or pass --skip_bad_rows")


def parse_conversation(row: Any, where: str) -> Conversation:
    """Read one row in conversation, messages, prompt/response or alpaca form.

    Raises:
        DataError: no known form; the keys found are named.
    """
    if isinstance(row, dict):
        for key, role_key, text_key in (("conversations", "from", "value"), ("messages", "role", "content")):
            if isinstance(row.get(key), list):
                return tuple(_turn(message, role_key, text_key, where) for message in row[key])
        for prompt_key, reply_key in (("prompt", "response"), ("instruction", "output")):
            if isinstance(row.get(prompt_key), str) and isinstance(row.get(reply_key), str):
                extra = row.get("input") or ""
                prompt = f"{row[prompt_key]}\n\n{extra}" if extra else row[prompt_key]
                return (Turn("user", prompt), Turn("assistant", row[reply_key]))
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(
        f"{where}: expected conversations, messages, prompt/response or instruction/output, found {found}; "
        "fix the row or pass --skip_bad_rows"
    )


def _turn(message: Any, role_key: str, text_key: str, where: str) -> Turn:
    if not isinstance(message, dict) or not {role_key, text_key} <= set(message):
        found = sorted(message) if isinstance(message, dict) else type(message).__name__
        raise DataError(f"{where}: expected a message with {role_key!r} and {text_key!r}, found {found}")
    role, content = message[role_key], message[text_key]
    if role not in _ROLES or not isinstance(content, str):
        raise DataError(f"{where}: expected a role among {', '.join(_ROLES)} and a text, found {role!r}")
    return Turn(_ROLES[role], content)


def read_conversations(path: Path, *, skip_bad_rows: bool = False) -> tuple[list[Conversation], ReadReport]:
    """Read a local .json, .jsonl or .txt file (a text file gives one reply per paragraph).

    Args:
        path: the file.
        skip_bad_rows: leave malformed rows out and count them instead of stopping.

    Raises:
        DataError: unreadable, empty or malformed.
    """
    report = ReadReport()
    conversations: list[Conversation] = []
    if path.suffix == ".txt":
        text = "\n".join(line for _, line in read_lines(path))
        conversations = [(Turn("assistant", part.strip()),) for part in re.split(r"\n\s*\n", text) if part.strip()]
    else:
        for where, row in read_json_rows(path):
            try:
                if isinstance(row, DataError):
                    raise row
                conversations.append(parse_conversation(row, where))
            except DataError as error:
                if not skip_bad_rows:
                    raise
                report.skip(str(error).split(": ", 1)[-1].split(",")[0])
    report.read = len(conversations)
    if not conversations:
        raise DataError(f"{path} holds no usable row: expected at least one conversation, skipped {report.skipped}")
    return conversations, report


def encode(conversation: Conversation, tokenizer: Any, max_length: int, *, assistant_only: bool = True) -> EncodedRow:
    """Render a conversation through the chat template and mark its replies.

    The template of the tokenizer is used, or ``FALLBACK_TEMPLATE`` where it has none. A reply's
    tokens are those by which the rendering with the reply is longer than the one that asks for it.

    Args:
        conversation: turns in order.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens kept, from the start.
        assistant_only: supervise replies alone; False supervises every token.

    Raises:
        DataError: the template rewrites earlier turns, so that replies cannot be located.
    """
    if all(turn.role == "assistant" for turn in conversation):
        ids = [token for turn in conversation for token in tokenizer(turn.content)["input_ids"]]
        return EncodedRow(ids[:max_length], [True] * len(ids[:max_length]))
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
    full = render(tokenizer, messages)
    mask = [not assistant_only] * len(full)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = render(tokenizer, messages[:index], ask=True)
        stop = len(_trim_after_eos(render(tokenizer, messages[: index + 1]), len(start), tokenizer))
        if full[: len(start)] != start:
            raise DataError("the chat template rewrites earlier turns, so replies cannot be located by prefix")
        mask[len(start) : stop] = [True] * (stop - len(start))
    return EncodedRow(full[:max_length], mask[:max_length])


def render(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool = False) -> list[int]:
    """Return the token ids of messages; ``ask`` ends with the header of the next reply."""
    template = None if getattr(tokenizer, "chat_template", None) else FALLBACK_TEMPLATE
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=ask, tokenize=True, return_dict=True, chat_template=template
    )
    return list(encoded["input_ids"])


def _trim_after_eos(ids: list[int], start: int, tokenizer: Any) -> list[int]:
    """Cut what a template puts after a reply's end-of-turn token, such as a line break."""
    eos = tokenizer.eos_token_id
    for index in range(len(ids) - 1, start - 1, -1):
        if ids[index] == eos:
            return ids[: index + 1]
    return ids


def truncate(rows: Sequence[EncodedRow], max_length: int) -> tuple[list[EncodedRow], int]:
    """Cut rows at ``max_length`` tokens; drop those without a supervised token left.

    Returns:
        The rows, and how many were cut or dropped.
    """
    cut = sum(len(row.input_ids) > max_length for row in rows)
    short = [EncodedRow(row.input_ids[:max_length], row.loss_mask[:max_length]) for row in rows]
    return [row for row in short if any(row.loss_mask)], cut


def split(rows: Sequence[EncodedRow], max_eval_samples: int | None) -> tuple[TokenDataset, TokenDataset]:
    """Hold out a twentieth of the rows, spread over all, at most ``max_eval_samples``.

    Raises:
        DataError: too few rows to hold out one.
    """
    count = max(1, min(len(rows) // 20, len(rows) if max_eval_samples is None else max_eval_samples))
    if len(rows) < 2:
        raise DataError(f"training needs at least 2 rows with a reply, got {len(rows)}; add data or raise the limits")
    held_out = set(range(0, len(rows), -(-len(rows) // count)))
    return (
        TokenDataset([row for index, row in enumerate(rows) if index not in held_out]),
        TokenDataset([rows[index] for index in sorted(held_out)]),
    )


def load_tokenizer(name_or_path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a base by packaged name, local path or hub id.

    Raises:
        DataError: there is none.
    """
    source = str(assets.model_directory(name_or_path)) if assets.is_asset(name_or_path) else name_or_path
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"no tokenizer for {name_or_path}: {reason}; save one beside the model") from error


def save_packed(rows: Sequence[EncodedRow], path: Path, metadata: dict[str, str]) -> None:
    """Write single-reply rows as token ids in one safetensors file.

    Tensors: ``tokens`` (all rows end to end), ``offsets`` int64 ``[rows + 1]``, ``reply_starts``
    int32 ``[rows]``; a row's reply runs from its start to the row's end.
    """
    lengths = torch.tensor([0] + [len(row.input_ids) for row in rows])
    tokens = torch.tensor([token for row in rows for token in row.input_ids])
    dtype = torch.uint16 if int(tokens.max()) < 2**16 else torch.int32
    starts = [row.loss_mask.index(True) for row in rows]
    tensors = {
        "tokens": tokens.to(dtype),
        "offsets": lengths.cumsum(0),
        "reply_starts": torch.tensor(starts, dtype=torch.int32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)


def load_packed(path: Path) -> tuple[TokenDataset, dict[str, str]]:
    """Read what ``save_packed`` wrote: rows and metadata.

    Raises:
        DataError: not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tokens, offsets, starts = (file.get_tensor(name) for name in ("tokens", "offsets", "reply_starts"))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no packed data set: {error}; make it anew with recurrent_drafting.distillation") from error
    ids, bounds = tokens.long().tolist(), offsets.tolist()
    rows = [
        EncodedRow(ids[low:high], [False] * start + [True] * (high - low - start))
        for low, high, start in zip(bounds[:-1], bounds[1:], starts.tolist(), strict=True)
    ]
    return TokenDataset(rows), metadata


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Return the n-grams of a text's words, case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def shares_ngram(text: str, references: Iterable[set[tuple[str, ...]]], n: int = 13) -> bool:
    """Tell whether a text shares an n-gram of words with any of the references' n-gram sets."""
    own = word_ngrams(text, n)
    return any(own & reference for reference in references)
