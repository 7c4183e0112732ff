"""Targets made by the verifier: self-written prompts and the verifier's replies to them.

An instruct model that is given only its chat template's user header writes user turns. It then
answers them, so a training set of its own text needs no other data. Work goes in chunks; a chunk
is one file that appears when it is complete, and a rerun goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from recurrent_drafting import assets, data
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.data import Conversation, EncodedRow
from recurrent_drafting.decoding import AutoregressiveDecoder
from recurrent_drafting.errors import DataError, UsageError
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


@dataclass(frozen=True)
class Request:
    """One text to be written.

    Args:
        prompt: token ids.
        seed: key of its randomness; the same request always gives the same text.
        temperature: 0 is greedy.
    """

    prompt: list[int]
    seed: int
    temperature: float


class Engine(Protocol):
    """Something that continues prompts with the verifier."""

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""


class VllmEngine:
    """The vLLM engine; several times faster than batches of transformers.

    Args:
        model_directory: local model.
        max_model_len: longest prompt and reply together, in tokens.
        eos_token_id: kept at the end of texts that produced it.
    """

    def __init__(self, model_directory: str, max_model_len: int, eos_token_id: int) -> None:
        from vllm import LLM  # an optional package: nothing else here may need it

        self._eos_token_id = eos_token_id
        self._llm = LLM(model_directory, dtype="bfloat16", max_model_len=max_model_len, max_num_seqs=64)

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(temperature=item.temperature, seed=item.seed, max_tokens=max_new_tokens, detokenize=False)
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
    """

    def __init__(self, verifier: Verifier, batch_size: int = 32) -> None:
        self._decoder = AutoregressiveDecoder(verifier)
        self._batch_size = batch_size

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        """Return the new token ids of each request, EOS included if produced."""
        texts: list[list[int]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda i: (requests[i].temperature, len(requests[i].prompt)))
        for temperature in sorted({item.temperature for item in requests}):
            group = [i for i in order if requests[i].temperature == temperature]
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                output = self._decoder.generate(
                    [requests[i].prompt for i in batch],
                    max_new_tokens=max_new_tokens,
                    sampling=SamplingConfig(temperature=temperature),
                    request_ids=[requests[i].seed for i in batch],
                )
                for i, tokens in zip(batch, output.sequences, strict=True):
                    texts[i] = tokens
        return texts


@dataclass(frozen=True)
class SelfDataConfig:
    """How self-written data is made.

    Args:
        num_rows: prompts to write; fewer rows remain after the filters.
        chunk_rows: prompts per chunk file.
        max_new_tokens: longest reply, in tokens.
        greedy_share: share of replies at temperature 0; the others are sampled at 1.
        seed: key of everything random.
    """

    num_rows: int
    chunk_rows: int = 128
    max_new_tokens: int = 256
    greedy_share: float = 0.7
    seed: int = 0


class SelfData:
    """Write prompts and replies into a directory, chunk by chunk.

    Args:
        engine: continues prompts.
        tokenizer: the verifier's.
        config: how much of what.
        references: texts that no prompt may share a 13-gram with.
    """

    def __init__(self, engine: Engine, tokenizer: Any, config: SelfDataConfig, references: Sequence[str] = ()) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._references = [data.word_ngrams(text, 13) for text in references]
        self._header = user_header(tokenizer)

    def write(self, directory: Path) -> None:
        """Write the chunks that are missing; safe to interrupt at any time."""
        directory.mkdir(parents=True, exist_ok=True)
        config = self._config
        count = -(-config.num_rows // config.chunk_rows)
        missing = [i for i in range(count) if not _chunk_path(directory, i).exists()]
        with tqdm(total=count, initial=count - len(missing), desc="self-written data", unit="chunk") as bar:
            tokens = 0
            for index in missing:
                chunk = self._chunk(index)
                path = _chunk_path(directory, index)
                temporary = path.with_suffix(".partial")
                temporary.write_text(json.dumps(chunk))
                os.replace(temporary, path)
                tokens += sum(len(row["reply"]) for row in chunk["rows"])
                bar.update()
                bar.set_postfix(reply_tokens=tokens, per_second=f"{tokens / bar.format_dict['elapsed']:.0f}")

    def _chunk(self, index: int) -> dict[str, Any]:
        config, rejected = self._config, data.ReadReport()
        numbers = range(index * config.chunk_rows, (index + 1) * config.chunk_rows)
        prompts = []
        for number, text in zip(numbers, self._write_prompts(numbers), strict=True):
            reason = self._refusal(text)
            if reason:
                rejected.skip(reason)
            else:
                prompts.append((number, text))
        requests = [self._reply_request(number, text) for number, text in prompts]
        rows = []
        for request, tokens in zip(requests, self._engine.generate(requests, config.max_new_tokens), strict=True):
            reply = cut_loop(tokens)
            if len(reply) < _MIN_REPLY_TOKENS:
                rejected.skip("short reply")
            else:
                rows.append({"prompt": request.prompt, "reply": reply, "greedy": request.temperature == 0})
        return {"rows": rows, "rejected": rejected.skipped}

    def _write_prompts(self, numbers: Sequence[int]) -> list[str]:
        requests, openers = [], []
        for number in numbers:
            opener = random.Random(f"{self._config.seed}/{number}").choice(OPENERS)
            ids = self._header + self._tokenizer(opener, add_special_tokens=False)["input_ids"]
            requests.append(Request(ids, seed=self._key(number, 0), temperature=1.0))
            openers.append(opener)
        texts = self._engine.generate(requests, _MAX_PROMPT_TOKENS_WRITTEN)
        return [
            opener + self._tokenizer.decode(tokens[:-1]) if tokens and tokens[-1] == self._tokenizer.eos_token_id else ""
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


def cut_loop(tokens: list[int], longest_period: int = 64, copies: int = 3) -> list[int]:
    """Shorten a reply that ends in a loop to the loop's first two rounds.

    The first rounds stay: the verifier loops when it serves as well, and the drafter must follow
    it into the loop.

    Args:
        tokens: a reply.
        longest_period: longest loop looked for, in tokens.
        copies: rounds at the end that make a loop.
    """
    for period in range(1, longest_period + 1):
        if len(tokens) < copies * period or tokens[-period:] * copies != tokens[-copies * period :]:
            continue
        start = len(tokens) - copies * period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        return tokens[: max(start + 2 * period, 1)]
    return tokens


def load_rows(directory: Path) -> tuple[list[EncodedRow], dict[str, int]]:
    """Read a directory of chunks: rows without repeated prompts, and what was left out by reason.

    Raises:
        DataError: no complete chunk there.
    """
    report, rows = data.ReadReport(), []
    seen: set[tuple[int, ...]] = set()
    for path in sorted(directory.glob("chunk-*.json")):
        chunk = json.loads(path.read_text())
        for reason, count in chunk["rejected"].items():
            report.skipped[reason] = report.skipped.get(reason, 0) + count
        for row in chunk["rows"]:
            if tuple(row["prompt"]) in seen:
                report.skip("repeated prompt")
                continue
            seen.add(tuple(row["prompt"]))
            prompt, reply = row["prompt"], row["reply"]
            rows.append(EncodedRow(prompt + reply, [False] * len(prompt) + [True] * len(reply)))
    if not rows:
        raise DataError(f"{directory} holds no complete chunk of self-written data; run the command again")
    return rows, report.skipped


def self_rows(verifier: Verifier, tokenizer: Any, directory: Path, num_rows: int | None) -> list[EncodedRow]:
    """Return self-written rows: the packaged set where it is this base's own, else newly written ones.

    Args:
        verifier: the base.
        tokenizer: the base's.
        directory: chunks are kept in its ``self_data`` folder.
        num_rows: prompts to write where none are packaged; default 1,024.
    """
    for path in sorted((Path(__file__).parent / "data").glob("*-self.safetensors")):
        packed, metadata = data.load_packed(path)
        if verifier.fingerprint is not None and metadata["fingerprint"] == verifier.fingerprint:
            return packed.rows
    config = SelfDataConfig(num_rows=num_rows or 1024)
    SelfData(TransformersEngine(verifier), tokenizer, config).write(directory / "self_data")
    return load_rows(directory / "self_data")[0]


def regenerate(
    conversations: Sequence[Conversation], verifier: Verifier, tokenizer: Any, max_length: int
) -> list[EncodedRow]:
    """Let the verifier write the replies of given conversations anew, greedily.

    Later turns see the regenerated history. Each reply gives a row of its own, with exactly the
    ids that the verifier produced.

    Args:
        conversations: their user and system turns are kept.
        verifier: the base.
        tokenizer: the base's.
        max_length: prompt and reply together, in tokens.
    """
    engine = TransformersEngine(verifier)
    histories: list[list[dict[str, str]]] = [[] for _ in conversations]
    rows: list[EncodedRow] = []
    for index in range(max(len(conversation) for conversation in conversations)):
        asked: list[tuple[int, list[int]]] = []
        for number, conversation in enumerate(conversations):
            turn = conversation[index] if index < len(conversation) else None
            if turn is not None and turn.role == "assistant" and histories[number]:
                asked.append((number, data.render(tokenizer, histories[number], ask=True)))
            elif turn is not None and turn.role != "assistant":
                histories[number].append({"role": turn.role, "content": turn.content})
        asked = [(number, ids) for number, ids in asked if len(ids) < max_length - 1]
        requests = [Request(ids, seed=number, temperature=0.0) for number, ids in asked]
        replies = engine.generate(requests, max_length) if requests else []
        for (number, ids), reply in zip(asked, replies, strict=True):
            reply = cut_loop(reply)[: max_length - len(ids)]
            rows.append(EncodedRow(ids + reply, [False] * len(ids) + [True] * len(reply)))
            text = tokenizer.decode(reply, skip_special_tokens=True)
            histories[number].append({"role": "assistant", "content": text})
    if not rows:
        raise DataError("no reply to regenerate: expected conversations with a user turn before an assistant turn")
    return rows


def _chunk_path(directory: Path, index: int) -> Path:
    return directory / f"chunk-{index:05d}.json"


def make_engine(name: str, model: str, tokenizer: Any, max_model_len: int = 1024) -> Engine:
    """Build the engine by name: auto (vLLM where it is installed), vllm or transformers."""
    if name == "auto":
        name = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if name == "transformers":
        return TransformersEngine(Verifier.from_pretrained(model))
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("--engine vllm: vLLM is not installed; pip install '.[vllm]' or use --engine transformers")
    directory = str(assets.model_directory(model)) if assets.is_asset(model) else model
    return VllmEngine(directory, max_model_len, tokenizer.eos_token_id)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m recurrent_drafting.distillation", description=__doc__)
    parser.add_argument("--llm_name_or_path", default="smollm2-135m-instruct", help="instruct model that writes")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory of chunk files; a rerun goes on")
    parser.add_argument("--num_rows", type=int, default=2048, help="prompts to write")
    parser.add_argument("--max_new_tokens", type=int, default=SelfDataConfig.max_new_tokens, help="longest reply")
    parser.add_argument("--greedy_share", type=float, default=SelfDataConfig.greedy_share)
    parser.add_argument("--seed", type=int, default=SelfDataConfig.seed)
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--pack", type=Path, help="also write the rows to this safetensors file")
    parser.add_argument("--pack_reply_tokens", type=int, help="stop packing after this many reply tokens")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    from transformers import AutoTokenizer

    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    name = args.llm_name_or_path
    directory = str(assets.model_directory(name)) if assets.is_asset(name) else name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = SelfDataConfig(
        num_rows=args.num_rows, max_new_tokens=args.max_new_tokens, greedy_share=args.greedy_share, seed=args.seed
    )
    if args.num_rows:
        turns = [turn for _, row in data.read_json_rows(assets.fetch("mt-bench")) for turn in row["turns"]]
        engine = make_engine(args.engine, name, tokenizer)
        SelfData(engine, tokenizer, config, turns).write(args.output_dir)
    if args.pack:
        rows, skipped = load_rows(args.output_dir)
        rows = _first_reply_tokens(rows, args.pack_reply_tokens)
        metadata = {
            "base": name,
            "fingerprint": assets.asset_fingerprint(Path(directory)) or "",
            "settings": json.dumps(vars(args), default=str),
            "skipped": json.dumps(skipped),
        }
        data.save_packed(rows, args.pack, metadata)
        logger.info("%d rows, %d reply tokens, skipped %s", len(rows), sum(map(_reply_tokens, rows)), skipped)
    return 0


def _reply_tokens(row: EncodedRow) -> int:
    return sum(row.loss_mask)


def _first_reply_tokens(rows: list[EncodedRow], limit: int | None) -> list[EncodedRow]:
    if limit is None:
        return rows
    kept, total = [], 0
    for row in rows:
        if total >= limit:
            break
        kept.append(row)
        total += _reply_tokens(row)
    return kept


if __name__ == "__main__":
    sys.exit(main())
