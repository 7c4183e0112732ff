"""Given conversations whose user turns the verifier answers anew."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from recurrent_drafting import data
from recurrent_drafting.engines import Request, TransformersEngine, cut_loop
from recurrent_drafting.errors import DataError
from recurrent_drafting.sources import Conversation, ReadReport
from recurrent_drafting.token_rows import EncodedRow
from recurrent_drafting.verifier import Verifier


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
) -> tuple[list[Conversation], ReadReport]:
    """Find what the chat template refuses before any reply is written; given replies stand for those.

    Args:
        conversations: to be answered anew.
        tokenizer: the base's.
        skip_bad_rows: leave refused conversations out and count them instead of stopping.

    Raises:
        DataError: the template refuses one.
    """
    kept, report = list[Conversation](), ReadReport()
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
) -> tuple[list[EncodedRow], ReadReport]:
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
