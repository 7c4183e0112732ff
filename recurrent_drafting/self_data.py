"""Training data that the verifier writes by itself: prompts, its replies to them, and the rows made of both.

An instruct model that is given only its chat template's user header writes user turns. It then
answers them, so a training set of its own text needs no other data. Work goes in chunks; a chunk
is one file that appears when it is complete, and a rerun goes on with the missing ones.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from recurrent_drafting import data, manifest, token_rows
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.engines import Engine, Request, TransformersEngine, cut_loop
from recurrent_drafting.errors import DataError, ResourceError, UsageError
from recurrent_drafting.sources import ReadReport
from recurrent_drafting.token_rows import EncodedRow
from recurrent_drafting.verifier import Verifier

T = TypeVar("T")

# First words that spread the prompts over kinds of task; the model writes all that follows. The
# empty ones leave it the whole turn.
OPENERS = (
    *[""] * 8,
    *("Write", "Write a", "Compose", "Draft an email", "Describe", "Imagine you are", "Pretend to be"),
    *("Act as", "You are", "Explain", "Explain why", "How does", "How can I", "What is", "What are"),
    *("Why", "Which", "Compare", "Summarize", "Rewrite", "Edit the following", "Translate", "Classify"),
    *("Extract", "Given the following", "Read the following", "List", "Create a table", "Calculate"),
    *("Solve", "If", "A farmer has", "Find the", "Prove that", "Is it true that", "Suppose"),
    *("Write a Python function", "Write a program", "Implement", "Write a SQL query", "Debug"),
    *("Discuss", "Analyze", "What would happen if", "Give me advice", "Recommend", "Plan a", "Can you"),
)
_PROMPT_TOKENS = (6, 200)
_MIN_REPLY_TOKENS = 4
_MAX_PROMPT_TOKENS_WRITTEN = 160
_SETTINGS = "settings.json"
# Rows that are written where their number is not given.
SELF_ROWS = 1024
# Where a run keeps what its base has written.
SELF_DATA = "self_data"


@dataclass(frozen=True)
class SelfDataConfig:
    """How self-written data is made.

    Args:
        num_rows: prompts to write; fewer rows remain after the filters.
        chunk_rows: prompts per chunk file.
        max_new_tokens: longest reply, in tokens.
        greedy_share: share of replies at temperature 0; the others are sampled at 1.
        prompt_temperature: temperature at which prompts are written.
        prompt_min_p: least probability of a prompt's tokens, as a share of the most likely token's; keeps
            a small model from drifting into noise, and costs less than a top-p.
        seed: key of everything random.

    Raises:
        UsageError: a value is out of range.
    """

    num_rows: int
    chunk_rows: int = 512
    max_new_tokens: int = 256
    greedy_share: float = 0.7
    prompt_temperature: float = 1.0
    prompt_min_p: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_rows", 0), ("chunk_rows", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not 0 <= self.greedy_share <= 1:
            raise UsageError(f"greedy_share must be in [0, 1], got {self.greedy_share}")
        SamplingConfig(temperature=self.prompt_temperature, min_p=self.prompt_min_p)


class SelfData:
    """Write prompts and replies into a directory, chunk by chunk.

    Every text has a seed made of the row's number, so that interruptions change nothing.

    Args:
        engine: continues prompts.
        tokenizer: the verifier's.
        config: how much of what.
        base: name of the verifier; a directory holds one verifier's text.
        references: texts that no prompt may share a 13-gram with.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, config: SelfDataConfig, base: str, references: Sequence[str] = ()
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._base = base
        self._references = ngrams_of(references)
        self._header = user_header(tokenizer)

    def write(self, directory: Path) -> None:
        """Write the chunks that are missing; safe to interrupt at any time.

        Raises:
            UsageError: the directory was begun with other settings.
            ResourceError: it cannot be written.
        """
        self._claim(directory)
        config = self._config
        starts = range(0, config.num_rows, config.chunk_rows)
        chunks = [range(start, min(start + config.chunk_rows, config.num_rows)) for start in starts]
        missing = [(i, numbers) for i, numbers in enumerate(chunks) if _prompts_written(directory, i) < len(numbers)]
        with tqdm(total=len(chunks), initial=len(chunks) - len(missing), desc="self-written data", unit="chunk") as bar:
            tokens = 0
            for index, numbers in missing:
                chunk = self._chunk(numbers)
                _write_json(_chunk_path(directory, index), chunk)
                tokens += sum(len(row["reply"]) for row in chunk["rows"])
                bar.set_postfix(reply_tokens=tokens, per_second=f"{tokens / bar.format_dict['elapsed']:.0f}")
                bar.update()

    def _claim(self, directory: Path) -> None:
        wanted = {
            "base": self._base,
            "engine": self._engine.name,
            "dtype": self._engine.dtype,
            **asdict(self._config),
        }
        del wanted["num_rows"]
        path = directory / _SETTINGS
        if not path.exists():
            if any(directory.glob("chunk-*.json")):
                raise UsageError(f"{directory} holds chunks but no {_SETTINGS}; name another directory")
            _write_json(path, wanted)
            return
        found = read_settings(directory)
        changed = manifest.differences({name: found.get(name) for name in wanted}, wanted)
        if changed:
            raise UsageError(f"{directory} was begun with {'; '.join(changed)}; repeat those or name another directory")

    def _chunk(self, numbers: Sequence[int]) -> dict[str, Any]:
        config, rejected = self._config, ReadReport()
        prompts = []
        for number, text in zip(numbers, self._write_prompts(numbers), strict=True):
            reason = self._refusal(text)
            if reason:
                rejected.skip(reason)
            else:
                prompts.append((number, text))
        requests = [self._reply_request(number, text) for number, text in prompts]
        replies = self._engine.generate(requests, config.max_new_tokens)
        rows = [
            {"prompt": request.prompt, "reply": reply, "greedy": request.temperature == 0}
            for request, reply in zip(requests, replies, strict=True)
        ]
        return {"rows": rows, "rejected": rejected.skipped}

    def _write_prompts(self, numbers: Sequence[int]) -> list[str]:
        config, tokenizer = self._config, self._tokenizer
        openers = [random.Random(f"{config.seed}/{number}").choice(OPENERS) for number in numbers]
        requests = [
            Request(
                self._header + tokenizer(opener, add_special_tokens=False)["input_ids"],
                seed=self._key(number, 0),
                temperature=config.prompt_temperature,
                min_p=config.prompt_min_p,
            )
            for number, opener in zip(numbers, openers, strict=True)
        ]
        texts = self._engine.generate(requests, _MAX_PROMPT_TOKENS_WRITTEN)
        return [
            opener + tokenizer.decode(tokens[:-1]) if tokens and tokens[-1] == tokenizer.eos_token_id else ""
            for opener, tokens in zip(openers, texts, strict=True)
        ]

    def _refusal(self, text: str) -> str:
        """Name why a prompt is not used, or return an empty string."""
        if not text.strip():
            return "unfinished prompt"
        if not _PROMPT_TOKENS[0] <= len(self._tokenizer(text)["input_ids"]) <= _PROMPT_TOKENS[1]:
            return "prompt length"
        if any(token in text for token in self._tokenizer.all_special_tokens):
            return "special token in prompt"
        if shares_ngram(text, self._references):
            return "shares a 13-gram with the evaluation prompts"
        return ""

    def _reply_request(self, number: int, text: str) -> Request:
        greedy = random.Random(f"{self._config.seed}/reply/{number}").random() < self._config.greedy_share
        ids = data.render(self._tokenizer, [{"role": "user", "content": text.strip()}], ask=True)
        return Request(ids, seed=self._key(number, 1), temperature=0.0 if greedy else 1.0)

    def _key(self, number: int, stage: int) -> int:
        return (self._config.seed * 1_000_003 + number) * 2 + stage


def user_header(tokenizer: Any) -> list[int]:
    """Return the ids of a chat template up to where the first user turn's text begins.

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("self-written data needs an instruct model with a chat template; use --dataset_name FILE")
    mark = "\u2603MARK\u2603"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return list(tokenizer(text.split(mark)[0], add_special_tokens=False)["input_ids"])


# What was written, as rows


@dataclass
class SelfDataReport(ReadReport):
    """What became of the prompts of a directory.

    Args:
        prompts: written.
        loops: replies that were cut where a loop began.
        ended: replies that end with an end-of-turn token; the others were cut.
    """

    prompts: int = 0
    loops: int = 0
    ended: int = 0


def load_rows(
    directory: Path, tokenizer: Any, max_reply_tokens: int | None = None, references: Sequence[str] = ()
) -> tuple[list[EncodedRow], SelfDataReport]:
    """Read a directory of chunks; leave out repeated prompts and short replies, cut loops.

    Args:
        directory: what ``SelfData.write`` filled.
        tokenizer: the verifier's.
        max_reply_tokens: rows are taken in order until they hold this many reply tokens.
        references: texts that no conversation may share a 13-gram with, its reply included.

    Raises:
        DataError: no row there, or a damaged chunk.
    """
    report, rows, total = SelfDataReport(), list[EncodedRow](), 0
    known = ngrams_of(references)
    seen: set[str] = set()
    for path in sorted(directory.glob("chunk-*.json")):
        if max_reply_tokens is not None and total >= max_reply_tokens:
            break
        chunk = _read_chunk(path)
        report.prompts += _prompts(chunk)
        for reason, count in chunk["rejected"].items():
            report.skip(reason, count)
        for row in chunk["rows"]:
            prompt, reply = row["prompt"], cut_loop(row["reply"])
            text = _normalise(tokenizer.decode(prompt))
            reason = "repeated prompt" if text in seen else "short reply" if len(reply) < _MIN_REPLY_TOKENS else ""
            if known and not reason and shares_ngram(tokenizer.decode(prompt + reply), known):
                reason = "shares a 13-gram with the evaluation prompts"
            if reason:
                report.skip(reason)
                continue
            seen.add(text)
            report.loops += len(reply) < len(row["reply"])
            report.ended += reply[-1] == tokenizer.eos_token_id
            total += len(reply)
            rows.append(EncodedRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), greedy=row["greedy"]))
    report.read = len(rows)
    if not rows:
        raise DataError(f"{directory}: expected chunks of self-written data with rows, got none; run the command again")
    return rows, report


def _normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


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


def pack(rows: Sequence[EncodedRow], report: SelfDataReport, path: Path, settings: dict[str, Any]) -> None:
    """Write rows to one safetensors file that says how they were made.

    Args:
        rows: what ``load_rows`` gave.
        report: counts of the same.
        path: the file.
        settings: of the run: ``base``, ``engine``, ``dtype`` and the fields of ``SelfDataConfig`` without
            ``num_rows``, as its directory holds them; ``fingerprint`` of the base.
    """
    counts = {
        **asdict(report),
        "reply_tokens": sum(sum(row.loss_mask) for row in rows),
        "greedy_rows": sum(bool(row.greedy) for row in rows),
    }
    flags = ("engine", "dtype", "max_new_tokens", "greedy_share", "prompt_temperature", "prompt_min_p", "seed")
    command = [
        *("python -m recurrent_drafting.distillation --llm_name_or_path", Path(settings["base"]).name),
        *("--output_dir self_data --num_rows", str(report.prompts), "--pack", path.name),
        *(f"--{name} {settings[name]}" for name in flags),
    ]
    metadata = {
        "base": Path(settings["base"]).name,
        "fingerprint": settings["fingerprint"] or "",
        "settings": json.dumps({name: settings[name] for name in settings if name not in ("base", "fingerprint")}),
        "counts": json.dumps(counts),
        "command": " ".join(command),
    }
    token_rows.save_packed(rows, path, metadata)


def self_rows(
    verifier: Verifier, tokenizer: Any, directory: Path, num_rows: int | None, greedy_share: float | None = None
) -> list[EncodedRow]:
    """Return self-written rows: the packaged set where it is this base's own, else newly written ones.

    Args:
        verifier: the base.
        tokenizer: the base's.
        directory: chunks are kept in its folder ``SELF_DATA``, and found there again.
        num_rows: prompts to write where none are packaged; default ``SELF_ROWS``.
        greedy_share: share of greedy replies among the rows; default all that are packaged, else that of
            ``SelfDataConfig``.

    Raises:
        DataError: the packaged set has no rows of such a share.
    """
    if (packaged := packaged_rows(verifier, greedy_share)) is not None:
        return packaged
    share = SelfDataConfig.greedy_share if greedy_share is None else greedy_share
    config = SelfDataConfig(num_rows=num_rows or SELF_ROWS, greedy_share=share)
    writer = SelfData(TransformersEngine(verifier), tokenizer, config, verifier.name_or_path)
    writer.write(directory / SELF_DATA)
    return load_rows(directory / SELF_DATA, tokenizer)[0]


def packaged_rows(verifier: Verifier, greedy_share: float | None = None) -> list[EncodedRow] | None:
    """Return the packaged self-written rows of this very base, all parts of them; None if there are none.

    Args:
        verifier: the base.
        greedy_share: see ``with_greedy_share``; default all rows.

    Raises:
        DataError: there are rows, but none of such a share.
    """
    rows: list[EncodedRow] = []
    for path in sorted((Path(__file__).parent / "data").glob("*-self*.safetensors")):
        packed, metadata = token_rows.load_packed(path)
        if verifier.fingerprint is not None and metadata.get("fingerprint") == verifier.fingerprint:
            rows += packed.rows
    if rows and greedy_share is not None:
        return with_greedy_share(rows, greedy_share)
    return rows or None


def with_greedy_share(rows: Sequence[EncodedRow], share: float) -> list[EncodedRow]:
    """Leave rows out of whichever kind there are too many of, evenly, until a share of them has greedy replies.

    Each kind keeps its order, and the kinds are mixed so that the first rows have that share too.

    >>> rows = [EncodedRow([1], [True], greedy=index % 4 > 0) for index in range(8)]
    >>> [row.greedy for row in with_greedy_share(rows, 0.5)]
    [False, True, False, True]

    Args:
        rows: with ``greedy`` known.
        share: in [0, 1].

    Raises:
        DataError: nothing remains.
    """
    kinds = [[i for i, row in enumerate(rows) if bool(row.greedy) is greedy] for greedy in (True, False)]
    shares = (share, 1 - share)
    total = min(len(kind) / part for kind, part in zip(kinds, shares, strict=True) if part)
    chosen = [spread(kind, round(total * part)) for kind, part in zip(kinds, shares, strict=True)]
    kept = sorted(((place + 0.5) / len(kind), i) for kind in chosen for place, i in enumerate(kind))
    if not kept:
        raise DataError(
            f"self-written rows with a share of {share:g} greedy replies: expected some, got none of "
            f"{len(kinds[0])} greedy and {len(kinds[1])} sampled ones; give another --greedy_share"
        )
    return [rows[i] for _, i in kept]


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return so many of the items, spread over all; at most as many as there are."""
    return [items[i * len(items) // count] for i in range(count)]


# Files


def read_settings(directory: Path) -> dict[str, Any]:
    """Return what a directory was begun with: base, engine, dtype, and the ``SelfDataConfig`` fields but ``num_rows``.

    Raises:
        DataError: they are not there, or damaged.
    """
    found = _read_object(directory / _SETTINGS, "no settings of self-written data", "name another directory")
    # Directories from before there was a choice name none.
    return {"dtype": "auto", **found}


def _chunk_path(directory: Path, index: int) -> Path:
    return directory / f"chunk-{index:05d}.json"


def _read_chunk(path: Path) -> dict[str, Any]:
    return _read_object(path, "no chunk of self-written data", "delete it and run again", ("rows", "rejected"))


def _read_object(path: Path, otherwise: str, advice: str, keys: Sequence[str] = ("base", "engine")) -> dict[str, Any]:
    """Read a JSON object that has some keys.

    Raises:
        DataError: there is none; ``otherwise`` says what the file is then, ``advice`` what to do.
    """
    try:
        found = manifest.read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is {otherwise}: {error}; {advice}") from error
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise DataError(f"{path} is {otherwise}: expected an object with {' and '.join(keys)}; {advice}")
    return found


def _prompts_written(directory: Path, index: int) -> int:
    path = _chunk_path(directory, index)
    return _prompts(_read_chunk(path)) if path.exists() else 0


def _prompts(chunk: dict[str, Any]) -> int:
    return len(chunk["rows"]) + sum(int(count) for count in chunk["rejected"].values())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        manifest.write_text(json.dumps(content), path)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written: {error.strerror}; free space or name another --output_dir, then run again"
        ) from error
