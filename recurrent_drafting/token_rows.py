"""Rows of token ids of which some are supervised: in memory, in batches, and packed in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from recurrent_drafting import manifest
from recurrent_drafting.errors import DataError, first_line


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

    A reply of two tokens has one such position, a reply of one token none:

    >>> supervised(torch.tensor([False, False, True, True, False, True])).tolist()
    [False, True, False, False]

    Args:
        loss_mask: bool ``[..., T]``.

    Returns:
        bool ``[..., T - 2]``.
    """
    return loss_mask[..., 1:-1] & loss_mask[..., 2:]


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
