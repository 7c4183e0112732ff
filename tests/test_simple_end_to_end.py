"""The whole idea in one screen: train a drafter in memory, decode with it, get the same text in fewer passes.

Run by pytest, or as a script: ``python tests/test_simple_end_to_end.py``.
"""

from __future__ import annotations

import random
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from recurrent_drafting import (
    AutoregressiveDecoder,
    BeamConfig,
    Drafter,
    DrafterTrainer,
    RecurrentDraftingConfig,
    SamplingConfig,
    SpeculativeDecoder,
    TrainingArguments,
    Verifier,
)
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset

VOCAB, HIDDEN = 32, 32


def make_verifier() -> Verifier:
    """Make a tiny base whose texts are regular enough to be learnt in seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return Verifier(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def prompts(count: int, seed: int) -> list[list[int]]:
    """Make random prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(6)] for _ in range(count)]


def train(verifier: Verifier, directory: str) -> Drafter:
    """Train a drafter on the base's own texts."""
    written = AutoregressiveDecoder(verifier).generate(prompts(64, seed=1), max_new_tokens=40).sequences
    rows = [EncodedRow(p + t, [False] * 6 + [True] * len(t)) for p, t in zip(prompts(64, seed=1), written, strict=True)]
    torch.manual_seed(0)
    drafter = Drafter(RecurrentDraftingConfig(hidden_size=HIDDEN, vocab_size=VOCAB, num_draft_layers=1))
    arguments = TrainingArguments(
        output_dir=directory, max_steps=80, learning_rate=3e-3, save_strategy="no", report_to=[], disable_tqdm=True
    )
    DrafterTrainer(drafter, verifier, arguments, train_dataset=TokenDataset(rows), data_collator=Collator()).train()
    return drafter


def test_a_trained_drafter_gives_the_same_text_in_fewer_passes() -> None:
    verifier = make_verifier()
    asked = prompts(4, seed=2)
    with tempfile.TemporaryDirectory() as directory:
        drafter = train(verifier, directory)
    verifier.model.to(torch.float64)
    decoder = SpeculativeDecoder(verifier, drafter, beam=BeamConfig(width=4, length=4))
    for sampling in (SamplingConfig(), SamplingConfig(temperature=0.8, top_p=0.95, seed=3)):
        expected = AutoregressiveDecoder(verifier).generate(asked, max_new_tokens=48, sampling=sampling)
        got = decoder.generate(asked, max_new_tokens=48, sampling=sampling)
        assert got.sequences == expected.sequences
        assert got.stats.tau > 1.3, got.stats.tau
        assert got.stats.row_steps < expected.stats.row_steps


if __name__ == "__main__":
    test_a_trained_drafter_gives_the_same_text_in_fewer_passes()
    print("the same text in fewer passes: ok")
