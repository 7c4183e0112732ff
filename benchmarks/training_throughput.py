#!/usr/bin/env python
"""How fast is training, and what share of the machine's matrix rate is that?

Times the hidden-state cache and training from it on the packaged data, and a plain matrix product before
and after both, because a shared machine does not always give the same.

Example:
  python benchmarks/training_throughput.py --output benchmarks/results/training-throughput.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import harness
from recurrent_drafting import (
    Drafter,
    DrafterTrainer,
    RecurrentDraftingConfig,
    TrainingArguments,
    Verifier,
    cli,
    data,
    self_data,
    token_rows,
)
from recurrent_drafting.hidden_cache import CachedDataset, HiddenStateCache
from recurrent_drafting.trainer import Supervision, choose_draft_vocabulary, initialise_from_verifier

# Operations of a matrix product per weight and row: one multiplication, one addition.
_MULTIPLY_ADD = 2


class StepTimes(TrainerCallback):
    """Note when each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def matrix_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 10) -> float:
    """Return the operations per second of a square matrix product, best of some."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return _MULTIPLY_ADD * size**3 / min(seconds)


def new_drafter(verifier: Verifier, rows: token_rows.TokenDataset) -> Drafter:
    """Return the default drafter for a base."""
    token_ids, _ = choose_draft_vocabulary(rows, "auto", verifier.vocab_size)
    config = RecurrentDraftingConfig(
        hidden_size=verifier.hidden_size, vocab_size=verifier.vocab_size, draft_vocab_size=len(token_ids)
    )
    drafter = Drafter(config)
    initialise_from_verifier(drafter, verifier, token_ids)
    return drafter


def measure_cache(cache: HiddenStateCache, verifier: Verifier) -> dict[str, float]:
    """Time the writing of the hidden states."""
    tokens = cache.cost().tokens
    start = time.perf_counter()
    cache.write()
    seconds = time.perf_counter() - start
    embedding = verifier.model.get_input_embeddings().weight.numel()
    # The head is not run for hidden states, and an embedding is no product.
    weights = sum(parameter.numel() for parameter in verifier.model.parameters()) - embedding
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "operations_per_token": _MULTIPLY_ADD * weights,
    }


def measure_training(
    args: argparse.Namespace, verifier: Verifier, drafter: Drafter, rows: token_rows.TokenDataset, directory: str
) -> dict[str, Any]:
    """Time optimizer steps; the first ones warm up and do not count."""
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=args.warm_up + args.steps,
        per_device_train_batch_size=args.batch_size,
        bf16=verifier.dtype == torch.bfloat16,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    times = StepTimes()
    trainer = DrafterTrainer(
        drafter, verifier, arguments, train_dataset=rows, data_collator=token_rows.Collator(), callbacks=[times]
    )
    positions = _positions_by_step(trainer, args.warm_up + args.steps)
    trainer.train()
    seconds = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)][args.warm_up - 1 :]
    counted = positions[args.warm_up :]
    rates = [count / time_ for count, time_ in zip(counted, seconds, strict=True)]
    low, middle, high = statistics.quantiles(rates, n=4)
    depths = arguments.drafter_predict_n_tokens
    weights = sum(parameter.numel() for parameter in drafter.parameters())
    return {
        "depths": depths,
        "parameters": weights,
        "positions": sum(counted),
        "seconds": sum(seconds),
        "positions_per_second": sum(counted) / sum(seconds),
        "positions_per_second_by_step": {"median": middle, "quartile_low": low, "quartile_high": high},
        # Forward, gradient of the input and gradient of the weights.
        "operations_per_position": 3 * _MULTIPLY_ADD * weights * depths,
    }


def _positions_by_step(trainer: DrafterTrainer, steps: int) -> list[int]:
    counts: list[int] = []
    depths = trainer.args.drafter_predict_n_tokens
    loader = trainer.get_train_dataloader()
    for epoch in range(steps):
        if len(counts) >= steps:
            break
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batches = (Supervision.from_batch(batch["input_ids"], batch["loss_mask"], depths) for batch in loader)
        counts.extend(len(batch.rows) for batch in batches)
    return counts[:steps]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything once."""
    torch.manual_seed(0)
    verifier = Verifier.from_pretrained(args.base_model, args.dtype)
    tokenizer = data.load_tokenizer(args.base_model)
    rates = [matrix_rate(verifier.dtype)]
    with tempfile.TemporaryDirectory() as directory:
        written = self_data.self_rows(verifier, tokenizer, Path(directory), args.rows)[: args.rows]
        rows = token_rows.TokenDataset(written)
        cache = HiddenStateCache(Path(directory) / "states", verifier, rows)
        making = measure_cache(cache, verifier)
        rates.append(matrix_rate(verifier.dtype))
        drafter = new_drafter(verifier, rows)
        training = measure_training(args, verifier, drafter, CachedDataset(rows, cache), directory)
        rates.append(matrix_rate(verifier.dtype))
    rate = statistics.median(rates)
    making["share_of_matrix_rate"] = making["operations_per_token"] * making["tokens_per_second"] / rate
    share = training["operations_per_position"] * training["positions_per_second"] / rate
    training["share_of_matrix_rate"] = share
    return {
        **harness.head(__file__, args, "dtype", "rows", "batch_size", "steps"),
        "dtype": str(verifier.dtype).removeprefix("torch."),
        "matrix_operations_per_second": rates,
        "cache": making,
        "training": training,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write."""
    parser = harness.build_parser(__doc__, drafter=False, dtype="auto", rows=128, batch_size=4, warm_up=3, steps=24)
    args = parser.parse_args(argv)
    record = measure(args)
    for name in ("matrix_operations_per_second", "cache", "training"):
        print(f"{name}: {record[name]}")
    harness.write(record, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug=False))
