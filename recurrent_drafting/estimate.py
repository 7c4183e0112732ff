"""What a run will take, before it starts: parameters, memory, disk and hours, from a few timed steps.

Data sets are looked at through a sample of their rows. Replies that the base has yet to write are taken
to run to the row's limit, so estimates that rest on them are upper bounds.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from recurrent_drafting import data, token_rows
from recurrent_drafting.continuations import DistilConfig, distil
from recurrent_drafting.decoding import AutoregressiveDecoder
from recurrent_drafting.engines import REPLY_BATCH
from recurrent_drafting.errors import DataError, UsageError
from recurrent_drafting.regeneration import Dialogue, answerable, given_reply
from recurrent_drafting.self_data import SELF_ROWS, SelfDataConfig, packaged_rows, spread, user_header
from recurrent_drafting.sources import Conversation
from recurrent_drafting.token_rows import EncodedRow
from recurrent_drafting.trainer import DrafterTrainer
from recurrent_drafting.verifier import Verifier

T = TypeVar("T")
# Regeneration above this needs a word from the user.
LARGE_HOURS = 1.0
_SAMPLE, _TIMED_TOKENS, _DISTILLED = 64, 8, 4
# Per trained parameter: float32 weight, gradient and two moments; a checkpoint holds no gradient.
_BYTES_IN_MEMORY, _BYTES_ON_DISK, _WEIGHT_BYTES = 16, 12, 4
_STATE_BYTES = torch.bfloat16.itemsize


@dataclass(frozen=True)
class ExpectedData:
    """A data set before it is made.

    Args:
        rows: a sample.
        count: rows in all.
        replies_written: replies in all that the base has yet to write, 0 where they are there.
        new_tokens: decoded for each of them, at most: a batch goes on until its last reply ends.
    """

    rows: list[EncodedRow]
    count: int
    replies_written: int = 0
    new_tokens: float = 0.0

    @property
    def tokens_per_row(self) -> float:
        """Return the mean length of a row, in tokens."""
        return sum(len(row.input_ids) for row in self.rows) / len(self.rows)

    @property
    def supervised_per_row(self) -> float:
        """Return the mean number of reply tokens of a row."""
        return sum(sum(row.loss_mask) for row in self.rows) / len(self.rows)


@dataclass(frozen=True)
class RunEstimate:
    """What a run will take.

    Args:
        trainable: parameters of the drafter.
        steps: optimizer steps.
        data_seconds: to write replies, at most.
        distil_seconds: to distil targets.
        cache_seconds: to store hidden states.
        training_seconds: of all steps.
        memory: bytes that the process needed for a step, and what base and drafter hold of them.
        disk: bytes of drafter and checkpoints, and of stored hidden states.
    """

    trainable: int
    steps: int
    data_seconds: float
    distil_seconds: float
    cache_seconds: float
    training_seconds: float
    memory: tuple[int, int, int]
    disk: tuple[int, int]

    def describe(self) -> str:
        """Return the estimate in four lines."""
        peak, base, drafter = (size / 1e9 for size in self.memory)
        models, states = (size / 1e6 for size in self.disk)
        total = self.data_seconds + self.distil_seconds + self.cache_seconds + self.training_seconds
        return "\n".join(
            [
                f"trainable parameters: {self.trainable / 1e6:.2f} M",
                f"memory: {peak:.2f} GB at a step's peak; base {base:.2f} GB, drafter and optimizer {drafter:.2f} GB",
                f"disk: {models:.0f} MB of drafter and checkpoints, {states:.0f} MB of hidden states",
                f"time: {total / 3600:.2f} h for {self.steps} steps; replies at most {self.data_seconds / 3600:.2f} h, "
                f"distilled targets {self.distil_seconds / 3600:.2f} h, "
                f"hidden states {self.cache_seconds / 3600:.2f} h, training {self.training_seconds / 3600:.2f} h",
            ]
        )


def given_replies(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    max_length: int,
    *,
    assistant_only: bool,
    skip_bad_rows: bool = False,
) -> ExpectedData:
    """Expect the conversations' own replies; arguments as for ``data.encode_all``.

    Raises:
        DataError: a sampled conversation cannot be encoded, or none has a reply.
    """
    sample = _sample(conversations)
    encoded, _ = data.encode_all(
        sample, tokenizer, max_length, assistant_only=assistant_only, skip_bad_rows=skip_bad_rows
    )
    rows, _ = token_rows.truncate(encoded, max_length)
    if not rows:
        raise DataError(f"none of {len(sample)} conversations has a reply within {max_length} tokens; raise the limit")
    return ExpectedData(rows, round(len(conversations) * len(rows) / len(sample)))


def written_replies(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    max_length: int,
    *,
    max_rows: int | None = None,
    skip_bad_rows: bool = False,
) -> ExpectedData:
    """Expect a reply of the base to every user turn that ``regenerate`` asks; given replies stand for its own.

    Args:
        conversations: what is answered anew.
        tokenizer: the base's.
        max_length: prompt and reply together, in tokens.
        max_rows: replies that are written, first turns first; None writes all.
        skip_bad_rows: conversations that the chat template refuses are left out.

    Raises:
        DataError: no sampled user turn leaves room for a reply, or a sampled conversation is refused.
    """
    sample = _sample(conversations)
    rounds = _rounds(answerable(sample, tokenizer, skip_bad_rows=skip_bad_rows)[0], tokenizer, max_length)
    found = sum(map(len, rounds))
    if not found:
        raise DataError(f"no user turn of {len(sample)} conversations is shorter than {max_length} tokens; raise it")
    count, kept = round(len(conversations) * found / len(sample)), found
    if max_rows is not None and max_rows < count:
        count, kept = max_rows, math.ceil(found * max_rows / count)
    rows, decoded = list[EncodedRow](), 0
    for prompts in rounds:
        asked = prompts[: kept - len(rows)]
        rows += [_filled(prompt, max_length) for prompt in asked]
        decoded += _decoded(asked, max_length)
    return ExpectedData(rows, count, replies_written=count, new_tokens=decoded / len(rows))


def _rounds(conversations: Sequence[Conversation], tokenizer: Any, max_length: int) -> list[list[list[int]]]:
    """Return the prompts that are asked together, round by round."""
    dialogues = [Dialogue(conversation, tokenizer, max_length) for conversation in conversations]
    rounds = []
    for index in range(max(map(len, conversations), default=0)):
        prompts = list[list[int]]()
        for dialogue, conversation in zip(dialogues, conversations, strict=True):
            if (prompt := dialogue.prompt(index)) is not None:
                prompts.append(prompt)
                dialogue.reply(given_reply(conversation, index))
        rounds.append(prompts)
    return rounds


def _decoded(prompts: Sequence[Sequence[int]], max_length: int) -> int:
    """Return the tokens decoded for prompts of one round: all of a batch go on as far as its shortest one may."""
    lengths = sorted(map(len, prompts))
    batches = [lengths[start : start + REPLY_BATCH] for start in range(0, len(lengths), REPLY_BATCH)]
    return sum((max_length - batch[0]) * len(batch) for batch in batches)


def self_written(
    verifier: Verifier, tokenizer: Any, num_rows: int | None, greedy_share: float | None = None
) -> ExpectedData:
    """Expect the packaged self-written rows, or as many as the base will write; see ``self_data.self_rows``."""
    packaged = packaged_rows(verifier, greedy_share)
    if packaged is not None:
        rows = packaged[:num_rows]
        return ExpectedData(_sample(rows), len(rows))
    header, count, longest = user_header(tokenizer), num_rows or SELF_ROWS, SelfDataConfig.max_new_tokens
    rows = [_filled(header, len(header) + longest)]
    return ExpectedData(rows, count, replies_written=count, new_tokens=longest)


def _filled(prompt: list[int], length: int) -> EncodedRow:
    """Stand in for a prompt and its reply; the reply's tokens are the prompt's over again."""
    ids = (prompt * math.ceil(length / len(prompt)))[:length]
    return EncodedRow(ids, [False] * len(prompt) + [True] * (length - len(prompt)))


def _sample(items: Sequence[T]) -> list[T]:
    return spread(items, min(len(items), _SAMPLE))


def writing_seconds(verifier: Verifier, expected: ExpectedData) -> float:
    """Return how long the base takes to write the replies, at most; decodes a few tokens to time them."""
    if not expected.replies_written:
        return 0.0
    batch = expected.rows[:REPLY_BATCH]
    prompts = [row.input_ids[: row.loss_mask.index(True)] for row in batch]
    decoder = AutoregressiveDecoder(verifier)
    decoder.generate(prompts, max_new_tokens=2, eos_token_ids=())
    stats = decoder.generate(prompts, max_new_tokens=_TIMED_TOKENS, eos_token_ids=()).stats
    prefill = stats.phase_seconds["prefill"]
    step = (stats.seconds - prefill) / max(stats.forwards, 1)
    # The last batch may be smaller than the timed one: in shares of that one.
    return expected.replies_written / len(prompts) * (prefill + step * expected.new_tokens)


def require_consent(verifier: Verifier, expected: ExpectedData, instead: str) -> str:
    """Stop before hours of writing replies that nobody asked for.

    Args:
        verifier: the base.
        expected: the data.
        instead: other ways, for the message.

    Returns:
        How many replies will be written, and how long that takes at most.

    Raises:
        UsageError: it would take more than ``LARGE_HOURS``.
    """
    hours = writing_seconds(verifier, expected) / 3600
    replies = f"{expected.replies_written} replies of the base, at most {hours:.2f} h"
    if expected.replies_written and hours > LARGE_HOURS:
        raise UsageError(f"this data takes {replies}: pass --yes to start, --max_train_samples N for a part, {instead}")
    return replies


def distilling_seconds(verifier: Verifier, expected: ExpectedData, config: DistilConfig | None) -> float:
    """Return how long the continuations of all rows take; distils a few rows to time them."""
    if config is None:
        return 0.0
    rows = expected.rows[:: max(len(expected.rows) // _DISTILLED, 1)][:_DISTILLED]
    distil(rows[:1], verifier, config)  # the first one warms up
    start = time.perf_counter()
    distil(rows, verifier, config)
    seconds = time.perf_counter() - start
    return seconds * expected.count * expected.supervised_per_row / sum(sum(row.loss_mask) for row in rows)


def run(
    trainer: DrafterTrainer, expected: ExpectedData, *, stored_states: bool, distilled: DistilConfig | None = None
) -> RunEstimate:
    """Estimate a run from one timed step of the real models.

    Args:
        trainer: of the run, over the sampled rows; its drafter is stepped once.
        expected: the data.
        stored_states: hidden states are computed once and stored.
        distilled: how targets are distilled, None if they are not.
    """
    args, drafter, verifier = trainer.args, trainer.drafter, trainer.verifier
    forward, step = _timed_step(trainer, expected)
    per_epoch = math.ceil(expected.count / (args.train_batch_size * args.world_size))
    updates = math.ceil(per_epoch / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(updates * args.num_train_epochs)
    rows = steps * args.gradient_accumulation_steps * args.train_batch_size
    trainable = sum(parameter.numel() for parameter in drafter.parameters())
    base = sum(item.numel() * item.element_size() for item in verifier.model.parameters())
    checkpoints = _checkpoints(trainer, steps, updates)
    states = round(expected.count * expected.tokens_per_row) * verifier.hidden_size * _STATE_BYTES
    return RunEstimate(
        trainable=trainable,
        steps=steps,
        data_seconds=writing_seconds(verifier, expected),
        distil_seconds=distilling_seconds(verifier, expected, distilled),
        cache_seconds=expected.count * forward if stored_states else 0.0,
        training_seconds=rows * (step + (0.0 if stored_states else forward)),
        memory=(_peak_memory(), base, trainable * _BYTES_IN_MEMORY),
        disk=(trainable * (_WEIGHT_BYTES + checkpoints * _BYTES_ON_DISK), states if stored_states else 0),
    )


def _timed_step(trainer: DrafterTrainer, expected: ExpectedData) -> tuple[float, float]:
    """Return the seconds per row of the base's forward, and of the drafter's forward, backward and update."""
    size = trainer.args.train_batch_size
    rows = [expected.rows[index * len(expected.rows) // size] for index in range(size)]
    batch = trainer.data_collator(rows)  # type: ignore[arg-type]
    inputs = {name: tensor.to(trainer.verifier.device) for name, tensor in batch.items()}
    optimizer = trainer.create_optimizer()
    times: list[float] = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        hidden = trainer.verifier.hidden_states(inputs["input_ids"], inputs["attention_mask"])
        middle = time.perf_counter()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.drafter, {**inputs, "hidden": hidden})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times = [middle - start, time.perf_counter() - middle]
    return times[0] / len(rows), times[1] / len(rows)


def _checkpoints(trainer: DrafterTrainer, steps: int, updates_per_epoch: int) -> int:
    """Return how many checkpoints will be on the disk at the end."""
    args = trainer.args
    if args.save_strategy == "no":
        return 0
    count = steps // max(updates_per_epoch if args.save_strategy == "epoch" else int(args.save_steps), 1)
    return count if args.save_total_limit is None else min(count, args.save_total_limit)


def _peak_memory() -> int:
    """Return the largest number of bytes so far, of the accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
