"""The drafter that training starts from: what its seed decides, and what a named one is not asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recurrent_drafting.errors import UsageError
from recurrent_drafting.starting_drafter import DrafterSettings, prepare
from recurrent_drafting.token_rows import EncodedRow, TokenDataset
from tests.text_models import make_tokenizer
from tests.tiny import VOCAB, make_verifier

NEW = DrafterSettings(phase="train", seed=3, drafter_num_layers=1, drafter_predict_n_tokens=3)
ROWS = TokenDataset([EncodedRow([5, 6, 7, 8], [False, False, True, True])])


def test_a_new_drafter_depends_on_its_seed_and_leaves_the_global_generator_alone() -> None:
    verifier, tokenizer, said = make_verifier("llama", dtype=torch.float32), make_tokenizer(), list[str]()
    before = torch.get_rng_state()
    weights = [
        prepare(replace(NEW, seed=seed), verifier, tokenizer, ROWS, said.append).state_dict() for seed in (3, 3, 4)
    ]
    assert torch.get_rng_state().equal(before)
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not all(weights[0][name].equal(weights[2][name]) for name in weights[0])
    assert said == [f"draft vocabulary: {VOCAB} of {VOCAB} tokens, 100.0% of the reply tokens"] * 3


def test_a_named_drafter_keeps_its_shape_and_its_own_beams() -> None:
    named = replace(NEW, drafter_name_or_path="here", beam_width=None, beam_length=None)
    assert named.decoding_defaults() == {"lookup_length": 0, "recycled_nodes": 0}
    named.refuse_shape({"beam_width", "seed"})
    NEW.refuse_shape({"rnn"})
    with pytest.raises(UsageError, match="--drafter_num_layers shapes a new drafter, and here has its shape"):
        named.refuse_shape({"rnn", "drafter_num_layers", "beam_width"})
