"""From sources to supervised token rows: conversations, chat template, loss mask, collator."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from recurrent_drafting import assets, checkpoint, manifest
from recurrent_drafting.errors import DataError, ModelError, NetworkError, UsageError, first_line

# Longer lines are refused before they are parsed.
MAX_LINE_BYTES = 64 * 1024 * 1024
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
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
    "system": "system",
}
_MESSAGE_FORMS = (("conversations", "from", "value"), ("messages", "role", "content"))
_PAIR_FORMS = (("prompt", "response"), ("instruction", "output"))
_FORMS = "conversations, messages, prompt/response, instruction/output, turns or text"
# For tokenizers without a chat template. No blank before a reply's first token may belong to the
# prompt: byte-pair vocabularies keep it in the word that follows.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] }}"
    "{{ eos_token if eos_token is defined else '\n' }}"
    "{% else %}{{ message['role'].upper() + ': ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
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
        cut: the conversation was longer than the row.
        greedy: the verifier wrote the reply at temperature 0; None where it is not its own text.
        hidden: the verifier's hidden states where they are stored, ``[T, H]``.
        continuations: distilled targets, int64 ``[P, n]``: what the verifier says after the root of each
            of the P positions that ``supervised`` names; -1 behind the end of a continuation.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    cut: bool = False
    greedy: bool | None = None
    hidden: Tensor | None = None
    continuations: Tensor | None = None


def supervised(loss_mask: Tensor) -> Tensor:
    """Tell which positions t are supervised: those whose root t + 1 and first target t + 2 belong to a reply.

    Args:
        loss_mask: bool ``[..., T]``.

    Returns:
        bool ``[..., T - 2]``.
    """
    return loss_mask[..., 1:-1] & loss_mask[..., 2:]


@dataclass
class ReadReport:
    """What a reader met: rows read, and rows left out by reason."""

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count rows that were left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count


class BadRowError(DataError):
    """Report one row that cannot be used; the others may.

    Args:
        where: file and line.
        reason: short name of the fault, under which it is counted.
        detail: what was expected and found.
    """

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {reason}: {detail}; fix the row or pass --skip_bad_rows")
        self.reason = reason


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
        """Return ``input_ids`` int64, ``attention_mask`` and ``loss_mask`` bool, each ``[B, T]``.

        Where the rows bring hidden states, ``hidden`` ``[B, T, H]`` as well; where they bring distilled
        targets, ``continuations`` int64 ``[B, P, n]``, -1 behind a row's own P.
        """
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
        states = [row.hidden for row in rows if row.hidden is not None]
        if states:
            batch["hidden"] = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        branches = [row.continuations for row in rows if row.continuations is not None]
        if branches:
            batch["continuations"] = torch.nn.utils.rnn.pad_sequence(branches, batch_first=True, padding_value=-1)
        return batch


# Reading


def read_lines(path: Path) -> Iterator[tuple[str, str | BadRowError]]:
    """Yield (file and line number from 1, line) of a UTF-8 text file.

    A line that is not UTF-8 or above ``MAX_LINE_BYTES`` comes as an error in its place, so that a
    caller may skip it; it is never held in memory as a whole.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where, size = f"{path}:{number}", len(raw)
                while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES + 1)
                    size += len(raw)
                if size > MAX_LINE_BYTES:
                    yield (
                        where,
                        BadRowError(where, "line too long", f"expected at most {MAX_LINE_BYTES} bytes, got {size}"),
                    )
                else:
                    yield where, _decode(raw, where)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error


def _decode(raw: bytes, where: str) -> str | BadRowError:
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        found = f"got byte {raw[error.start]:#04x} at byte {error.start + 1}"
        return BadRowError(where, "invalid UTF-8", f"expected UTF-8 text, {found}")


def read_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, object) for each row of a .jsonl file, or of a .json file with a list or lines.

    A single bad line comes as a ``BadRowError`` in its place, so that a caller may skip it.

    Raises:
        DataError: the file cannot be read, or its one list cannot be parsed.
    """
    if path.suffix == ".json" and _starts_with_list(path):
        rows = _parse_list(path)
        yield from ((f"{path}: row {index}", row) for index, row in enumerate(rows, start=1))
        return
    for where, line in read_lines(path):
        if isinstance(line, BadRowError):
            yield where, line
        elif line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                detail = f"expected one JSON object per line, got {error.msg} at column {error.colno}"
                yield where, BadRowError(where, "malformed JSON", detail)
            except ValueError as error:  # a number of thousands of digits
                yield where, BadRowError(where, "malformed JSON", f"expected one JSON object per line, got {error}")
            except RecursionError:
                yield where, BadRowError(where, "malformed JSON", "expected a flat row, got one nested too deeply")


def _starts_with_list(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4096).lstrip().startswith(b"[")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error


def _parse_list(path: Path) -> list[Any]:
    raw = path.read_bytes()
    try:
        rows = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: expected UTF-8 text, got byte {raw[error.start]:#04x}; convert the file"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: malformed JSON: expected a list of rows, got {error.msg} at column "
            f"{error.colno}; fix it, or write one row per line (.jsonl) so that --skip_bad_rows can pass over it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON: expected a list of flat rows, got {first_line(error)}") from error
    return list(rows)


def parse_conversation(row: Any, where: str) -> Conversation:
    """Read one row in conversation, messages, prompt/response, alpaca, question or text form.

    Blanks around a message are dropped, and so is a reply before the first user turn. A text is one
    reply without a prompt.

    Args:
        row: parsed JSON.
        where: file and line, for messages.

    Raises:
        BadRowError: no known form; the keys found are named.
    """
    if isinstance(row, dict):
        for key, role_key, text_key in _MESSAGE_FORMS:
            if isinstance(row.get(key), list):
                return _conversation([_turn(item, role_key, text_key, where) for item in row[key]], where)
        for prompt_key, reply_key in _PAIR_FORMS:
            if prompt_key in row and reply_key in row:
                prompt, extra = _text(row, prompt_key, where), row.get("input") or ""
                prompt = f"{prompt}\n\n{extra}" if extra else prompt
                return (Turn("user", prompt), Turn("assistant", _text(row, reply_key, where)))
        if isinstance(row.get("turns"), list):
            return tuple(Turn("user", _text({"turns": turn}, "turns", where)) for turn in row["turns"])
        if "text" in row:
            return (Turn("assistant", _text(row, "text", where)),)
    found = f"the keys {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
    raise BadRowError(where, "missing field", f"expected {_FORMS}, found {found}")


def _conversation(turns: list[Turn], where: str) -> Conversation:
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise BadRowError(where, "no user turn", f"expected a user turn, found {[turn.role for turn in turns]}")
    return tuple(turn for index, turn in enumerate(turns) if index >= first or turn.role == "system")


def _turn(message: Any, role_key: str, text_key: str, where: str) -> Turn:
    if not isinstance(message, dict) or not {role_key, text_key} <= set(message):
        found = f"the keys {sorted(map(str, message))}" if isinstance(message, dict) else type(message).__name__
        raise BadRowError(
            where, "missing field", f"expected a message with {role_key!r} and {text_key!r}, found {found}"
        )
    role = message[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRowError(
            where, "unknown role", f"expected {role_key!r} to be one of {', '.join(_ROLES)}, found {role!r}"
        )
    return Turn(_ROLES[role], _text(message, text_key, where))


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise BadRowError(where, "field is no text", f"expected {key!r} to be a text, found {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"expected {key!r} to be valid Unicode, found half a surrogate pair at character {error.start + 1}"
        raise BadRowError(where, "field is no text", detail) from error
    return value.strip()


def is_unicode(text: str) -> bool:
    """Tell whether a text can be encoded: it has no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_conversations(path: Path, *, skip_bad_rows: bool = False) -> tuple[list[Conversation], ReadReport]:
    """Read a local .json, .jsonl, .parquet or .txt file (a text file gives one reply per paragraph).

    Args:
        path: the file.
        skip_bad_rows: leave malformed rows out and count them instead of stopping.

    Returns:
        The conversations, and how many rows were read and left out.

    Raises:
        DataError: unreadable, empty or malformed.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.suffix == ".txt":
        rows = _read_paragraphs(path)
    elif path.suffix in (".json", ".jsonl"):
        rows = read_json_rows(path)
    else:
        raise DataError(f"{path}: expected a .json, .jsonl, .parquet or .txt file, got {path.suffix or 'no suffix'}")
    return collect(rows, str(path), skip_bad_rows=skip_bad_rows)


def collect(
    rows: Iterator[tuple[str, Any]], source: str, *, skip_bad_rows: bool = False
) -> tuple[list[Conversation], ReadReport]:
    """Parse rows of a source into conversations.

    Args:
        rows: (where, row or the error in its place).
        source: name for messages.
        skip_bad_rows: leave malformed rows out and count them instead of stopping.

    Raises:
        DataError: malformed, or nothing usable in it.
    """
    report = ReadReport()
    conversations: list[Conversation] = []
    for where, row in rows:
        try:
            if isinstance(row, BadRowError):
                raise row
            conversations.append(parse_conversation(row, where))
        except BadRowError as error:
            if not skip_bad_rows:
                raise
            report.skip(error.reason)
    report.read = len(conversations)
    if not conversations:
        found = f"{report.skipped} left out" if report.skipped else "an empty file"
        raise DataError(f"{source}: expected at least one conversation, got {found}; name a file with rows")
    return conversations, report


def _read_paragraphs(path: Path) -> Iterator[tuple[str, Any]]:
    first, lines = "", list[str]()
    for where, line in read_lines(path):
        if isinstance(line, BadRowError):
            yield where, line
        elif line.strip():
            first = first if lines else where
            lines.append(line)
        elif lines:
            yield first, {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield first, {"text": "\n".join(lines)}


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"{path}: reading parquet needs pyarrow; run: pip install pyarrow")
    parquet, arrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {first_line(error)}; check the file") from error


# Named sources


@dataclass(frozen=True)
class HubSource:
    """A public data set on the model hub.

    Args:
        repository: hub id.
        split: split that is read by default.
        configuration: configuration name, if the set has several.
        data_files: file of the repository, if it has no loading information.
    """

    repository: str
    split: str = "train"
    configuration: str | None = None
    data_files: str | None = None


HUB_SOURCES = {
    "sharegpt": HubSource(
        "anon8231489123/ShareGPT_Vicuna_unfiltered", data_files="ShareGPT_V3_unfiltered_cleaned_split.json"
    ),
    "alpaca": HubSource("tatsu-lab/alpaca"),
    "ultrachat": HubSource("HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "wikitext": HubSource("Salesforce/wikitext", configuration="wikitext-2-raw-v1"),
}
PACKAGED_SOURCES = {"mtbench": "mt-bench", "mt-bench": "mt-bench"}
_ALTERNATIVE = "use --dataset_name self (written by the base itself) or a local .json/.jsonl/.parquet/.txt file"


def load_dataset_by_name(
    name: str, *, split: str | None = None, max_rows: int | None = None, skip_bad_rows: bool = False
) -> tuple[list[Conversation], ReadReport]:
    """Load conversations from a local file, the packaged MT-Bench prompts, or a named set on the hub.

    The name ``self`` is made by ``distillation.self_rows``, which needs the verifier.

    Args:
        name: a path, ``mtbench``, or a key of ``HUB_SOURCES``; a path that exists wins.
        split: split of a hub set; the set's usual one by default.
        max_rows: rows that are read; None reads all. A part of a hub set is streamed, so that the
            rest is not downloaded.
        skip_bad_rows: leave malformed rows out and count them instead of stopping.

    Raises:
        UsageError: no such name, or the ``datasets`` package is missing.
        DataError: see ``read_conversations``; a hub set whose files cannot be read.
        NetworkError: the hub did not answer.
    """
    if Path(name).is_file() or Path(name).suffix in (".json", ".jsonl", ".parquet", ".txt"):
        conversations, report = read_conversations(Path(name), skip_bad_rows=skip_bad_rows)
    elif name in PACKAGED_SOURCES:
        path = assets.fetch(PACKAGED_SOURCES[name])
        conversations, report = read_conversations(path, skip_bad_rows=skip_bad_rows)
    elif name in HUB_SOURCES:
        rows = _hub_rows(name, HUB_SOURCES[name], split, max_rows)
        return collect(rows, name, skip_bad_rows=skip_bad_rows)
    else:
        known = ["self", *HUB_SOURCES, *PACKAGED_SOURCES]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"--dataset_name {name}: expected {', '.join(known)} or a local file, found neither{hint}")
    return conversations[:max_rows], report


def _hub_rows(name: str, source: HubSource, split: str | None, max_rows: int | None) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(f"--dataset_name {name} comes from the hub: run pip install datasets, or {_ALTERNATIVE}")
    datasets = importlib.import_module("datasets")
    wanted = split or source.split
    # A slice of a split ("train[:1%]") cannot be streamed.
    streaming = max_rows is not None and "[" not in wanted
    what, number = f"--dataset_name {name} ({source.repository}, split {wanted})", 0
    try:
        rows = datasets.load_dataset(
            source.repository,
            source.configuration,
            data_files=source.data_files,
            split=wanted,
            streaming=streaming,
        )
        for number, row in enumerate(islice(rows, max_rows), start=1):
            if row.get("text") != "":
                yield f"{name}: row {number}", row
    except (OSError, ValueError, checkpoint.HTTP_ERROR) as error:
        raise NetworkError(
            f"{what} did not load from the hub after {number} rows: {first_line(error)}; check the network and the "
            f"split, or {_ALTERNATIVE}"
        ) from error
    except datasets.exceptions.DatasetsError as error:  # its own message says nothing of the cause
        raise DataError(
            f"{what} came from the hub and does not read as rows: {first_line(error.__cause__ or error)}; delete it "
            f"from the cache of datasets and run again, or {_ALTERNATIVE}"
        ) from error


# Encoding


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


def truncate(rows: Sequence[EncodedRow], max_length: int) -> tuple[list[EncodedRow], int]:
    """Cut rows at ``max_length`` tokens; drop those without a supervised token left.

    Returns:
        The rows, and how many were cut here or before.
    """
    short = [
        EncodedRow(
            row.input_ids[:max_length],
            row.loss_mask[:max_length],
            cut=row.cut or len(row.input_ids) > max_length,
            greedy=row.greedy,
        )
        for row in rows
    ]
    return [row for row in short if any(row.loss_mask)], sum(row.cut for row in short)


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


def check_token_ids(rows: Sequence[EncodedRow], vocab_size: int, base: str) -> None:
    """Refuse rows with tokens that the base does not have.

    Raises:
        DataError: names row, position and token.
    """
    for number, row in enumerate(rows):
        if row.input_ids and not 0 <= min(row.input_ids) <= max(row.input_ids) < vocab_size:
            position, token = next((i, t) for i, t in enumerate(row.input_ids) if not 0 <= t < vocab_size)
            raise DataError(
                f"row {number}, position {position}: expected a token id of {base} in 0..{vocab_size - 1}, got "
                f"{token}; the tokenizer is not this model's"
            )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the identity of a vocabulary: the SHA-256 of its tokens with their ids."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


# Packed rows


def save_packed(rows: Sequence[EncodedRow], path: Path, metadata: dict[str, str]) -> None:
    """Write single-reply rows as token ids in one safetensors file.

    Tensors: ``tokens`` (all rows end to end; uint16 where the ids fit, else int32), ``offsets``
    int64 ``[rows + 1]``, ``reply_starts`` int32 ``[rows]``, ``greedy`` uint8 ``[rows]`` (1 for a
    reply at temperature 0). A row's reply runs from its start to the row's end.

    Args:
        rows: the replies' origin (``greedy``) must be known.
        path: the file; it appears when it is complete.
        metadata: stored in its header.

    Raises:
        DataError: no rows.
        ResourceError: the disk is full.
    """
    if not rows:
        raise DataError(f"{path}: expected at least one row to pack, got none; write more rows first")
    lengths = torch.tensor([0] + [len(row.input_ids) for row in rows])
    tokens = torch.tensor([token for row in rows for token in row.input_ids])
    dtype = torch.uint16 if int(tokens.max()) < 2**16 else torch.int32
    tensors = {
        "tokens": tokens.to(dtype),
        "offsets": lengths.cumsum(0),
        "reply_starts": torch.tensor([row.loss_mask.index(True) for row in rows], dtype=torch.int32),
        "greedy": torch.tensor([bool(row.greedy) for row in rows], dtype=torch.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.save_tensors(tensors, path, metadata)
    path.chmod(0o644)


def load_packed(path: Path) -> tuple[TokenDataset, dict[str, str]]:
    """Read what ``save_packed`` wrote: rows and metadata.

    Raises:
        DataError: not such a file.
    """
    names = ("tokens", "offsets", "reply_starts", "greedy")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tokens, offsets, starts, greedy = (file.get_tensor(name) for name in names)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: expected a packed data set with {', '.join(names)}, got {first_line(error)}; "
            "make it anew with python -m recurrent_drafting.distillation --pack"
        ) from error
    ids, bounds = tokens.long().tolist(), offsets.tolist()
    rows = [
        EncodedRow(ids[low:high], [False] * start + [True] * (high - low - start), greedy=bool(flag))
        for low, high, start, flag in zip(bounds[:-1], bounds[1:], starts.tolist(), greedy.tolist(), strict=True)
    ]
    return TokenDataset(rows), metadata


def word_ngrams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    """Return the n-grams of a text's words, case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def ngrams_of(texts: Sequence[str]) -> set[tuple[str, ...]]:
    """Return the ``word_ngrams`` of all texts together."""
    return {ngram for text in texts for ngram in word_ngrams(text)}


def shares_ngram(text: str, references: set[tuple[str, ...]], n: int = 13) -> bool:
    """Tell whether a text shares an n-gram of words with the references' ``word_ngrams``."""
    return not references.isdisjoint(word_ngrams(text, n))
