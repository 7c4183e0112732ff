"""Targets made by the verifier: self-written prompts, its replies, and distilled continuations.

An instruct model that is given only its chat template's user header writes user turns. It then
answers them, so a training set of its own text needs no other data. Work goes in chunks; a chunk
is one file that appears when it is complete, and a rerun goes on with the missing ones.

Distilled continuations say what the verifier would write next at every position of a text. All
positions branch at once, so that a token of every continuation costs one forward.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import random
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from recurrent_drafting import assets, cli, data, manifest, sources, token_rows
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.decoding import AutoregressiveDecoder
from recurrent_drafting.errors import DataError, ResourceError, UsageError
from recurrent_drafting.kv_cache import VerifierCache
from recurrent_drafting.sampling import Sampler
from recurrent_drafting.sources import Conversation
from recurrent_drafting.token_rows import EncodedRow
from recurrent_drafting.verifier import Verifier

logger = logging.getLogger(__name__)

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
# Requests that transformers decode together; self-written rows where the number is not given.
REPLY_BATCH, SELF_ROWS = 32, 1024
# Where a run keeps what its base has written.
SELF_DATA = "self_data"
# Logits held at once while continuations are written, and the most branches of one forward: their
# keys are visible to themselves alone, so that more of them are mostly masked work.
_LOGITS_AT_ONCE = 2**24
_MOST_BRANCHES = 256


@dataclass(frozen=True)
class Request:
    """One text to be written.

    Args:
        prompt: token ids.
        seed: key of its randomness; the same request always gives the same text.
        temperature: 0 is greedy.
        min_p: least probability, as a share of the most likely token's.
    """

    prompt: list[int]
    seed: int
    temperature: float
    min_p: float = 0.0


class Engine(Protocol):
    """Something that continues prompts with the verifier.

    Args:
        name: as in ``make_engine``.
    """

    name: str

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""


class VllmEngine:
    """The vLLM engine; several times faster than batches of transformers.

    Args:
        model_directory: local model.
        max_model_len: longest prompt and reply together, in tokens.
    """

    name = "vllm"

    def __init__(self, model_directory: str, max_model_len: int = 1024) -> None:
        # An optional package: nothing else here may need it.
        self._vllm = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            model_directory,
            dtype="bfloat16",
            max_model_len=max_model_len,
            max_num_seqs=128,
            max_num_batched_tokens=8 * max_model_len,
            # vLLM 0.32 on a CPU dies when a request with a seed has its prompt split over steps.
            enable_chunked_prefill=False,
            enforce_eager=True,
            disable_log_stats=True,
        )

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""
        parameters = [
            self._vllm.SamplingParams(
                temperature=item.temperature,
                min_p=item.min_p,
                seed=item.seed,
                max_tokens=max_new_tokens,
                detokenize=False,
            )
            for item in requests
        ]
        prompts: list[Any] = [{"prompt_token_ids": item.prompt} for item in requests]
        results = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


class TransformersEngine:
    """Batches of the package's own baseline decoder.

    Args:
        verifier: the model that writes.
        batch_size: requests per batch.
        max_length: longest prompt and text together, in tokens; a prompt of that length has no text.
    """

    name = "transformers"

    def __init__(self, verifier: Verifier, batch_size: int = REPLY_BATCH, max_length: int = sys.maxsize) -> None:
        self._decoder = AutoregressiveDecoder(verifier)
        self._batch_size = batch_size
        self._max_length = max_length

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""
        texts: list[list[int]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for temperature, min_p in sorted({(item.temperature, item.min_p) for item in requests}):
            group = [i for i in order if (requests[i].temperature, requests[i].min_p) == (temperature, min_p)]
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                # A batch has one limit: what its first and shortest prompt leaves.
                output = self._decoder.generate(
                    [requests[i].prompt for i in batch],
                    max_new_tokens=min(max_new_tokens, self._room(requests[batch[0]])),
                    sampling=SamplingConfig(temperature=temperature, min_p=min_p),
                    request_ids=[requests[i].seed for i in batch],
                )
                for i, tokens in zip(batch, output.sequences, strict=True):
                    texts[i] = tokens[: self._room(requests[i])]
        return texts

    def _room(self, request: Request) -> int:
        return max(self._max_length - len(request.prompt), 0)


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
        self._references = data.ngrams_of(references)
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
        wanted = {"base": self._base, "engine": self._engine.name, **asdict(self._config)}
        del wanted["num_rows"]
        path = directory / _SETTINGS
        if not path.exists():
            if any(directory.glob("chunk-*.json")):
                raise UsageError(f"{directory} holds chunks but no {_SETTINGS}; name another directory")
            _write_json(path, wanted)
            return
        found = json.loads(path.read_text())
        changed = manifest.differences({name: found.get(name) for name in wanted}, wanted)
        if changed:
            raise UsageError(f"{directory} was begun with {'; '.join(changed)}; repeat those or name another directory")

    def _chunk(self, numbers: Sequence[int]) -> dict[str, Any]:
        config, rejected = self._config, sources.ReadReport()
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
        if data.shares_ngram(text, self._references):
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


def cut_loop(tokens: list[int], reach: int = 128, novelty: float = 0.1, keep: int = 64) -> list[int]:
    """Shorten a reply that ends in a loop, exact or nearly so, and keep the loop's beginning.

    A token is novel if the 4-gram that it ends did not end within the ``reach`` tokens before. The
    loop is the longest end of the reply with at most a share ``novelty`` of such tokens; its first
    ``keep`` tokens stay, because the verifier loops when it serves as well, and the drafter must
    follow it into the loop.

    Args:
        tokens: a reply.
        reach: tokens looked back.
        novelty: share of novel tokens in a loop.
        keep: tokens of the loop that stay.
    """
    last: dict[tuple[int, ...], int] = {}
    novel = []
    for index in range(len(tokens)):
        gram = tuple(tokens[max(index - 3, 0) : index + 1])
        novel.append(index - last.get(gram, -reach - 1) > reach)
        last[gram] = index
    start, count = len(tokens), 0
    for index in range(len(tokens) - 1, -1, -1):
        count += novel[index]
        if not novel[index] and count <= novelty * (len(tokens) - index):
            start = index
    return tokens[: start + keep]


@dataclass
class SelfDataReport(sources.ReadReport):
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
    known = data.ngrams_of(references)
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
            if known and not reason and data.shares_ngram(tokenizer.decode(prompt + reply), known):
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


def pack(rows: Sequence[EncodedRow], report: SelfDataReport, path: Path, settings: dict[str, Any]) -> None:
    """Write rows to one safetensors file that says how they were made.

    Args:
        rows: what ``load_rows`` gave.
        report: counts of the same.
        path: the file.
        settings: of the run: ``base``, ``engine`` and the fields of ``SelfDataConfig`` without
            ``num_rows``, as its directory holds them; ``fingerprint`` of the base.
    """
    counts = {
        **asdict(report),
        "reply_tokens": sum(sum(row.loss_mask) for row in rows),
        "greedy_rows": sum(bool(row.greedy) for row in rows),
    }
    flags = ("engine", "max_new_tokens", "greedy_share", "prompt_temperature", "prompt_min_p", "seed")
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


def self_rows(verifier: Verifier, tokenizer: Any, directory: Path, num_rows: int | None) -> list[EncodedRow]:
    """Return self-written rows: the packaged set where it is this base's own, else newly written ones.

    Args:
        verifier: the base.
        tokenizer: the base's.
        directory: chunks are kept in its folder ``SELF_DATA``, and found there again.
        num_rows: prompts to write where none are packaged; default ``SELF_ROWS``.
    """
    if (packaged := packaged_rows(verifier)) is not None:
        return packaged
    config = SelfDataConfig(num_rows=num_rows or SELF_ROWS)
    writer = SelfData(TransformersEngine(verifier), tokenizer, config, verifier.name_or_path)
    writer.write(directory / SELF_DATA)
    return load_rows(directory / SELF_DATA, tokenizer)[0]


def packaged_rows(verifier: Verifier) -> list[EncodedRow] | None:
    """Return the packaged self-written rows of this very base, all parts of them; None if there are none."""
    rows: list[EncodedRow] = []
    for path in sorted((Path(__file__).parent / "data").glob("*-self*.safetensors")):
        packed, metadata = token_rows.load_packed(path)
        if verifier.fingerprint is not None and metadata.get("fingerprint") == verifier.fingerprint:
            rows += packed.rows
    return rows or None


class Dialogue:
    """A conversation whose user turns are answered anew, one after the other.

    Args:
        conversation: its user and system turns are asked, its replies are not.
        tokenizer: the base's.
        max_length: prompt and reply together, in tokens.
    """

    def __init__(self, conversation: Conversation, tokenizer: Any, max_length: int) -> None:
        self._turns, self._tokenizer, self._max_length = conversation, tokenizer, max_length
        self._history: list[dict[str, str]] = []
        self.cut = False

    def prompt(self, index: int) -> list[int] | None:
        """Return the turn at an index behind all before it and the replies to them, None where it asks nothing.

        A user turn without room for a reply ends the dialogue (``cut``): templates refuse one that follows
        another without a reply in between.

        Args:
            index: rising from call to call.

        Raises:
            DataError: the chat template refuses the turns so far.
        """
        turn = self._turns[index] if index < len(self._turns) else None
        if self.cut or turn is None or turn.role == "assistant":
            return None
        self._history.append({"role": turn.role, "content": turn.content})
        if turn.role != "user":
            return None
        ids = data.render(self._tokenizer, self._history, ask=True)
        self.cut = len(ids) >= self._max_length - 1
        return None if self.cut else ids

    def reply(self, text: str) -> None:
        """Answer the turn that was asked last."""
        self._history.append({"role": "assistant", "content": text})


def given_reply(conversation: Conversation, index: int) -> str:
    """Return a conversation's own reply to its turn at an index, empty where it has none."""
    following = conversation[index + 1 : index + 2]
    return following[0].content if following and following[0].role == "assistant" else ""


def answerable(
    conversations: Sequence[Conversation], tokenizer: Any, *, skip_bad_rows: bool
) -> tuple[list[Conversation], sources.ReadReport]:
    """Find what the chat template refuses before any reply is written; given replies stand for those.

    Args:
        conversations: to be answered anew.
        tokenizer: the base's.
        skip_bad_rows: leave refused conversations out and count them instead of stopping.

    Raises:
        DataError: the template refuses one.
    """
    kept, report = list[Conversation](), sources.ReadReport()
    for conversation in conversations:
        try:
            if messages := _up_to_the_last_question(conversation):
                data.render(tokenizer, messages, ask=True)
            kept.append(conversation)
        except DataError:
            if not skip_bad_rows:
                raise
            report.skip("chat template")
    return kept, report


def _up_to_the_last_question(conversation: Conversation) -> list[dict[str, str]]:
    """Return the messages up to the last user turn; each user turn before it has a reply."""
    last = max((index for index, turn in enumerate(conversation) if turn.role == "user"), default=-1)
    messages: list[dict[str, str]] = []
    for index, turn in enumerate(conversation[: last + 1]):
        if turn.role != "assistant":
            messages.append({"role": turn.role, "content": turn.content})
        if turn.role == "user":
            messages.append({"role": "assistant", "content": given_reply(conversation, index)})
    return messages[:-1]


def regenerate(
    conversations: Sequence[Conversation],
    verifier: Verifier,
    tokenizer: Any,
    max_length: int,
    *,
    max_rows: int | None = None,
    skip_bad_rows: bool = False,
) -> tuple[list[EncodedRow], sources.ReadReport]:
    """Let the verifier answer the user turns of given conversations, greedily.

    Later turns see the regenerated history. Each reply gives a row of its own, with exactly the
    ids that the verifier produced. A conversation ends at its first turn without room for a reply.

    Args:
        conversations: their user and system turns are kept, their replies are not read.
        verifier: the base.
        tokenizer: the base's.
        max_length: prompt and reply together, in tokens.
        max_rows: replies that are written, first turns first; None writes all.
        skip_bad_rows: leave out conversations that the chat template refuses.

    Returns:
        The rows; how many they are, and how many conversations were refused or ended early.

    Raises:
        DataError: no user turn, none with room for a reply, or a conversation is refused.
    """
    kept, report = answerable(conversations, tokenizer, skip_bad_rows=skip_bad_rows)
    engine = TransformersEngine(verifier, max_length=max_length)
    dialogues = [Dialogue(conversation, tokenizer, max_length) for conversation in kept]
    rows: list[EncodedRow] = []
    for index in range(max(map(len, kept), default=0)):
        prompts = ((dialogue, ids) for dialogue in dialogues if (ids := dialogue.prompt(index)) is not None)
        asked = list(itertools.islice(prompts, None if max_rows is None else max_rows - len(rows)))
        requests = [Request(ids, seed=number, temperature=0.0) for number, (_, ids) in enumerate(asked)]
        written = engine.generate(requests, max_length) if requests else []
        for (dialogue, ids), reply in zip(asked, map(cut_loop, written), strict=True):
            rows.append(EncodedRow(ids + reply, [False] * len(ids) + [True] * len(reply), greedy=True))
            dialogue.reply(tokenizer.decode(reply, skip_special_tokens=True))
    if not rows:
        raise DataError(
            f"no reply to regenerate: expected user turns shorter than {max_length} tokens, got none in "
            f"{len(kept)} conversations; raise --model_max_length or use --targets ground_truth"
        )
    if ended := sum(dialogue.cut for dialogue in dialogues):
        report.skip("no room for a reply", ended)
    report.read = len(rows)
    return rows, report


@dataclass(frozen=True)
class DistilConfig:
    """How distilled continuations are made.

    Args:
        num_future_tokens: tokens n of each continuation.
        temperature: 0 is greedy; above, the package's position-keyed noise decides.
        seed: key of that noise.

    Raises:
        UsageError: a value is out of range.
    """

    num_future_tokens: int = 5
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_future_tokens < 1:
            raise UsageError(f"num_future_tokens must be >= 1, got {self.num_future_tokens}")
        self.sampling()

    def sampling(self) -> SamplingConfig:
        """Return the settings with which ``generate`` writes the same tokens."""
        return SamplingConfig(temperature=self.temperature, seed=self.seed)


def distil(rows: Sequence[EncodedRow], verifier: Verifier, config: DistilConfig) -> list[EncodedRow]:
    """Give rows the verifier's own continuations at every supervised position: the paper's distilled set.

    The continuation of position t follows the text up to its root x_{t+1}: it is what
    ``AutoregressiveDecoder.generate`` writes for the prompt x_0 .. x_{t+1} with ``config.sampling()``
    and the row's index as its request id.

    Args:
        rows: texts; their order keys the noise.
        verifier: the base.
        config: how many tokens, and how they are chosen.

    Returns:
        The rows with ``continuations``, int64 ``[P, n]``, -1 behind EOS or the context window.

    Raises:
        DataError: a row is longer than the context window.
    """
    distilled = []
    for request, row in enumerate(tqdm(rows, desc="distilled targets", unit="row", disable=len(rows) < 2)):
        positions = token_rows.supervised(torch.tensor(row.loss_mask)).nonzero().flatten()
        continuations = _Branches(row.input_ids, request, verifier, config).continue_from((positions + 2).tolist())
        distilled.append(replace(row, continuations=_padded(continuations, config.num_future_tokens)))
    return distilled


def _padded(continuations: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in continuations]).view(-1, width)


class _Branches:
    """Continuations of one text from many places at once.

    A cut s stands for the prompt of the text's first s tokens. One forward over the text gives the
    first token of every cut. Where that is the text's own next token, what follows is the continuation
    of the next cut; all other cuts grow a branch, a token of all branches per forward.

    Args:
        text: token ids.
        request: key of the noise.
        verifier: the base.
        config: see ``DistilConfig``.
    """

    def __init__(self, text: Sequence[int], request: int, verifier: Verifier, config: DistilConfig) -> None:
        self._text, self._request, self._verifier, self._config = list(text), request, verifier, config
        window = verifier.context_window
        if window is not None and len(self._text) > window:
            raise DataError(
                f"row {request} has {len(self._text)} tokens: expected at most {window}, the context window of "
                f"{verifier.name_or_path}; lower --model_max_length"
            )
        self._window = sys.maxsize if window is None else window
        self._eos = frozenset(verifier.eos_token_ids)
        self._chunk = max(1, min(_LOGITS_AT_ONCE // verifier.vocab_size, _MOST_BRANCHES))

    def continue_from(self, cuts: Sequence[int]) -> list[list[int]]:
        """Return the new tokens after each cut, EOS included if produced, nothing after it.

        Args:
            cuts: rising, in 1..T.
        """
        if not cuts:
            return []
        count, stop = self._config.num_future_tokens, len(self._text) + 1
        reached = sorted({later for cut in cuts for later in range(cut, min(cut + count, stop))})
        cache = self._verifier.new_cache(1, len(self._text) + (count - 1) * min(self._chunk, len(reached)))
        hidden = self._verifier.read([self._text], cache)[0]
        first = self._first_tokens(reached, hidden)
        leaving = {place for cut in cuts if (place := self._leaving(cut, first)) is not None}
        found = self._grow(sorted(leaving), first, cache)
        for cut in reversed(reached):
            if cut not in found:
                found[cut] = self._ended(cut, [first[cut], *found.get(cut + 1, [])])
        return [found[cut] for cut in cuts]

    def _leaving(self, cut: int, first: dict[int, int]) -> int | None:
        """Return the cut at which a continuation leaves the text, None where it ends before."""
        for later in range(cut, min(cut + self._config.num_future_tokens, len(self._text) + 1)):
            if first[later] in self._eos:
                return None
            if self._text[later : later + 1] != [first[later]]:
                return later
        return None

    def _ended(self, cut: int, tokens: Sequence[int]) -> list[int]:
        """Cut new tokens behind EOS, at their number and at the context window, as ``generate`` does."""
        limit = min(self._config.num_future_tokens, self._window - cut)
        end = next((index for index, token in enumerate(tokens) if token in self._eos), len(tokens))
        return list(tokens[: min(end + 1, limit)])

    def _sampler(self, cuts: Sequence[int]) -> Sampler:
        return Sampler(
            self._config.sampling(),
            [self._text[:cut] for cut in cuts],
            [self._request] * len(cuts),
            tuple(self._eos),
            self._verifier.vocab_size,
            self._verifier.device,
        )

    @torch.inference_mode()
    def _first_tokens(self, cuts: Sequence[int], hidden: Tensor) -> dict[int, int]:
        """Pick the token after each cut from the states of the text, ``[T, H]``."""
        first: dict[int, int] = {}
        for start in range(0, len(cuts), self._chunk):
            chunk = cuts[start : start + self._chunk]
            logits = self._verifier.head(hidden[torch.tensor(chunk, device=hidden.device) - 1])
            tokens = self._sampler(chunk).pick(logits, range(len(chunk))).tolist()
            first.update(zip(chunk, tokens, strict=True))
        return first

    def _grow(self, cuts: Sequence[int], first: dict[int, int], cache: VerifierCache) -> dict[int, list[int]]:
        """Write a branch from each cut, given its first token; a chunk's entries leave the cache with it."""
        found = {}
        for start in range(0, len(cuts), self._chunk):
            chunk = cuts[start : start + self._chunk]
            sampler, tokens = self._sampler(chunk), [[first[cut]] for cut in chunk]
            places = torch.tensor([chunk], device=self._verifier.device)
            for depth in range(self._config.num_future_tokens - 1):
                for branch, written in enumerate(tokens):
                    sampler.commit(branch, written[-1])
                last = torch.tensor([[written[-1] for written in tokens]], device=self._verifier.device)
                logits = self._verifier.branch(last, places, depth, cache).logits[0]
                cache.keep([range(len(chunk))])
                for written, token in zip(tokens, sampler.pick(logits, range(len(chunk))).tolist(), strict=True):
                    written.append(token)
            cache.rewind([len(self._text)])
            found.update({cut: self._ended(cut, written) for cut, written in zip(chunk, tokens, strict=True)})
        return found


def _chunk_path(directory: Path, index: int) -> Path:
    return directory / f"chunk-{index:05d}.json"


def _read_chunk(path: Path) -> dict[str, Any]:
    try:
        chunk: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is no chunk of self-written data: {error}; delete it and run again") from error
    return chunk


def _prompts_written(directory: Path, index: int) -> int:
    path = _chunk_path(directory, index)
    return _prompts(_read_chunk(path)) if path.exists() else 0


def _prompts(chunk: dict[str, Any]) -> int:
    return len(chunk["rows"]) + sum(int(count) for count in chunk["rejected"].values())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written: {error.strerror}; free space or name another --output_dir, then run again"
        ) from error


def make_engine(name: str, model: str) -> Engine:
    """Build the engine by name: auto (vLLM where it is installed), vllm or transformers.

    Raises:
        UsageError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UsageError("--engine vllm: vLLM is not installed; install it or use --engine transformers")
    if name == "transformers" or not installed:
        return TransformersEngine(Verifier.from_pretrained(model))
    return VllmEngine(assets.source_of(model))


def build_parser() -> cli.ArgumentParser:
    """Describe the command line."""
    parser = cli.ArgumentParser(prog="python -m recurrent_drafting.distillation", description=__doc__)
    parser.add_argument("--llm_name_or_path", default=assets.DEFAULT_BASE, help="instruct model that writes")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory of chunk files; a rerun goes on")
    parser.add_argument("--num_rows", type=int, default=2048, help="prompts to write; 0 only packs what is there")
    parser.add_argument("--max_new_tokens", type=int, default=SelfDataConfig.max_new_tokens, help="longest reply")
    parser.add_argument(
        "--greedy_share", type=float, default=SelfDataConfig.greedy_share, help="share of greedy replies"
    )
    parser.add_argument(
        "--prompt_temperature", type=float, default=SelfDataConfig.prompt_temperature, help="of written prompts"
    )
    parser.add_argument(
        "--prompt_min_p",
        type=float,
        default=SelfDataConfig.prompt_min_p,
        help="least relative probability of their tokens",
    )
    parser.add_argument("--seed", type=int, default=SelfDataConfig.seed, help="key of everything random")
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="what generates")
    parser.add_argument("--pack", type=Path, help="also write the rows to this safetensors file")
    parser.add_argument("--pack_reply_tokens", type=int, help="stop packing after this many reply tokens")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Write and pack what the command line asks for."""
    name = args.llm_name_or_path
    tokenizer = data.load_tokenizer(name)
    turns = [turn for _, row in sources.read_json_rows(assets.fetch("mt-bench")) for turn in row["turns"]]
    if args.num_rows:
        names = {item.name for item in fields(SelfDataConfig)} - {"chunk_rows"}
        config = SelfDataConfig(**{name: getattr(args, name) for name in names})
        SelfData(make_engine(args.engine, name), tokenizer, config, name, turns).write(args.output_dir)
    if args.pack:
        rows, report = load_rows(args.output_dir, tokenizer, args.pack_reply_tokens, turns)
        settings = {
            **json.loads((args.output_dir / _SETTINGS).read_text()),
            "fingerprint": assets.asset_fingerprint(Path(assets.source_of(name))),
        }
        pack(rows, report, args.pack, settings)
        logger.info("%s: %s, %d reply tokens", args.pack, report, sum(sum(row.loss_mask) for row in rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; return the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    # An orderly exit ends the engine's processes too; the unfinished chunk is lost, the others stay.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return cli.run(lambda: execute(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
