"""Stored hidden states: the verifier's own, reused, checked, and the same training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recurrent_drafting import DrafterTrainer, TrainingArguments, Verifier
from recurrent_drafting.errors import DataError
from recurrent_drafting.hidden_cache import CachedDataset, HiddenStateCache
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset
from tests.tiny import VOCAB, make_drafter, make_verifier


def rows(count: int = 70) -> TokenDataset:
    rng = random.Random(0)
    lengths = [rng.randint(4, 20) for _ in range(count)]
    texts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    return TokenDataset([EncodedRow(text, [False] * 2 + [True] * (len(text) - 2)) for text in texts])


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return make_verifier("llama", dtype=torch.float32)


def test_states_are_the_verifiers_own_for_every_row(verifier: Verifier, tmp_path: Path) -> None:
    data = rows()
    cache = HiddenStateCache(tmp_path, verifier, data)
    cost = cache.cost()
    tokens = sum(len(row.input_ids) for row in data.rows)
    assert (cost.tokens, cost.bytes) == (tokens, tokens * verifier.hidden_size * 2) and cost.seconds > 0
    cache.write()
    assert cache.cost().tokens == 0
    for index, row in enumerate(data.rows):
        ids = torch.tensor([row.input_ids])
        expected = verifier.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        # bfloat16 keeps 8 bits.
        torch.testing.assert_close(cache.states(index).float(), expected, rtol=2**-8, atol=1e-5)


def test_shards_are_reused_and_only_missing_ones_are_computed(verifier: Verifier, tmp_path: Path) -> None:
    data = rows()
    HiddenStateCache(tmp_path, verifier, data).write()
    shards = sorted(tmp_path.glob("shard-*"))
    assert len(shards) == 2
    kept, times = shards[0], shards[0].stat().st_mtime_ns
    shards[1].unlink()
    HiddenStateCache(tmp_path, verifier, data).write()
    assert sorted(tmp_path.glob("shard-*")) == shards and kept.stat().st_mtime_ns == times


def test_a_damaged_shard_is_named_and_rebuilt_on_request(verifier: Verifier, tmp_path: Path) -> None:
    data = rows(8)
    HiddenStateCache(tmp_path, verifier, data).write()
    (shard,) = tmp_path.glob("shard-*")
    good = shard.read_bytes()
    wrong = load_file(shard)["hidden"]
    wrong[0, 0] += 1
    for damage in (lambda: save_file({"hidden": wrong}, shard), lambda: shard.write_bytes(good[:-7])):
        damage()
        with pytest.raises(DataError, match=rf"{shard.name} is damaged: .*--rebuild_cache"):
            HiddenStateCache(tmp_path, verifier, data).write()
        HiddenStateCache(tmp_path, verifier, data).write(rebuild=True)
        assert shard.read_bytes() == good


def test_another_base_or_dtype_is_refused(verifier: Verifier, tmp_path: Path) -> None:
    HiddenStateCache(tmp_path, verifier, rows(4))
    for other in (make_verifier("gpt2", dtype=torch.float32), make_verifier("llama", dtype=torch.bfloat16)):
        with pytest.raises(DataError, match="expected states of"):
            HiddenStateCache(tmp_path, other, rows(4))


def test_training_from_stored_states_equals_training_from_live_ones(tmp_path: Path) -> None:
    """In bfloat16 nothing is lost by storing."""
    verifier, data = make_verifier("llama", dtype=torch.bfloat16), rows(16)
    cache = HiddenStateCache(tmp_path / "cache", verifier, data)
    cache.write()
    weights = []
    for source in (data, CachedDataset(data, cache)):
        drafter = make_drafter(verifier, num_draft_layers=1).float()
        # One row per batch: no padding, so that both ways run the very same forward.
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=1, report_to=[], save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        DrafterTrainer(drafter, verifier, arguments, train_dataset=source, data_collator=Collator()).train()
        weights.append(drafter.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0.02, atol=2e-3)
