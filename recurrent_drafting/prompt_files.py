"""Prompt files: their questions, and prompts that keep within a limit of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_drafting import assets, data, sources
from recurrent_drafting.detokenizer import BROKEN, decode
from recurrent_drafting.errors import DataError

_TURNS_PER_QUESTION = 16


@dataclass(frozen=True)
class Question:
    """One question of a prompt file."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]

    def request_id(self, turn: int) -> int:
        """Return the key of the noise of one turn: a function of the question alone."""
        if isinstance(self.question_id, int):
            return self.question_id * _TURNS_PER_QUESTION + turn
        digest = hashlib.sha256(self.question_id.encode()).digest()
        return int.from_bytes(digest[:6], "big") * _TURNS_PER_QUESTION + turn


def load_questions(
    source: str,
    max_num_prompts: int | None = None,
    *,
    usual: int | None = None,
    spread: bool = False,
    skip_bad_rows: bool = False,
) -> tuple[list[Question], str]:
    """Read a FastChat/Spec-Bench style file: ``question_id``, ``category``, ``turns`` per line.

    Args:
        source: a packaged name or a path.
        max_num_prompts: questions to use; None uses the usual number.
        usual: at most so many; None uses all.
        spread: take them evenly over the file instead of from its start.
        skip_bad_rows: leave malformed rows out.

    Returns:
        The questions and a note for the user (empty if there is nothing to say).

    Raises:
        DataError: unreadable, empty or malformed.
    """
    path = assets.fetch(source) if assets.is_asset(source) else Path(source)
    questions: list[Question] = []
    skipped = 0
    for where, row in sources.read_json_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            questions.append(_question(row, where))
        except DataError:
            if not skip_bad_rows:
                raise
            skipped += 1
    if not questions:
        raise DataError(f"{path} holds no question: expected lines with question_id, category and turns")
    notes = [f"{skipped} bad rows skipped"] if skipped else []
    most = len(questions) if usual is None else min(usual, len(questions))
    wanted = most if max_num_prompts is None else max_num_prompts
    if wanted > len(questions):
        notes.append(f"{source} has {len(questions)} prompts, {wanted} were asked for: all are used")
    count = min(wanted, len(questions))
    step = len(questions) / count if spread else 1
    return [questions[int(index * step)] for index in range(count)], "; ".join(notes)


def _question(row: Any, where: str) -> Question:
    turns = row.get("turns") if isinstance(row, dict) else None
    texts = isinstance(turns, list) and bool(turns) and all(isinstance(turn, str) for turn in turns)
    if not texts or not isinstance(row.get("question_id"), (int, str)) or not all(map(_is_unicode, [*row.values()])):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where}: expected question_id, category and turns (a list of texts in valid Unicode), found {found}; "
            "fix the row or pass --skip_bad_rows"
        )
    return Question(row["question_id"], str(row.get("category", "")), tuple(turns or ()))


def _is_unicode(value: Any) -> bool:
    """Tell whether a text, and every text of a list, has no half of a surrogate pair."""
    texts = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    return all(sources.is_unicode(text) for text in texts)


def encode_prompt(tokenizer: Any, messages: Sequence[dict[str, str]], limit: int) -> tuple[list[int], bool]:
    """Render messages within the prompt limit; tell whether anything was cut.

    Args:
        tokenizer: of the base.
        messages: the conversation, a user text last.
        limit: most tokens of the prompt.

    Raises:
        DataError: the limit leaves no room for a prompt.
    """
    kept = list(messages)
    ids = data.render(tokenizer, kept, ask=True)
    if len(ids) <= limit:
        return ids, False
    while len(ids) > limit and len(kept) > 2:
        kept = kept[2:]
        ids = data.render(tokenizer, kept, ask=True)
    text = tokenizer(kept[-1]["content"], add_special_tokens=False)["input_ids"]
    room = len(text)
    while len(ids) > limit:
        room -= len(ids) - limit
        if room < 1:
            raise DataError(
                f"--max_prompt_length {limit} leaves no room for a prompt: the chat template "
                "takes that many tokens by itself; raise it"
            )
        short = {**kept[-1], "content": decode(tokenizer, text[:room]).rstrip(BROKEN)}
        ids = data.render(tokenizer, [*kept[:-1], short], ask=True)
    return ids, True
