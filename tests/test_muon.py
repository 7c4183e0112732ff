"""Muon beside AdamW as one optimizer: who steps what, equal to the two alone, and its state saved and loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from recurrent_drafting import Drafter, RecurrentDraftingConfig
from recurrent_drafting.muon import MuonWithAdamW, split_parameters

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def make_drafter() -> Drafter:
    torch.manual_seed(0)
    return Drafter(RecurrentDraftingConfig(hidden_size=8, vocab_size=40, draft_vocab_size=16, num_draft_layers=2))


def descend(drafter: Drafter, steppers: list[torch.optim.Optimizer], steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        context, embeddings = torch.randn(6, 8, generator=generator), torch.randn(6, 3, 8, generator=generator)
        loss = drafter.head(drafter.unroll(context, embeddings)).logsumexp(dim=-1).mean()
        for stepper in steppers:
            stepper.zero_grad()
        loss.backward()
        for stepper in steppers:
            stepper.step()


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_hidden_matrices_are_muons_and_head_and_biases_are_adamws() -> None:
    drafter = make_drafter()
    drafter.blocks[1].requires_grad_(False)
    names = {parameter: name for name, parameter in drafter.named_parameters()}
    hidden, head, vectors = ([names[parameter] for parameter in part] for part in split_parameters(drafter))
    assert sorted(hidden) == ["blocks.0.linear.weight", "input_proj.weight", "rnn_u.weight", "rnn_w.weight"]
    assert head == ["head.weight"]
    assert sorted(vectors) == ["blocks.0.linear.bias", "input_proj.bias", "rnn_u.bias"]


def test_a_step_is_that_of_the_two_optimizers_alone() -> None:
    one, other = make_drafter(), make_drafter()
    descend(one, [MuonWithAdamW(one, **SETTINGS)], 3, seed=1)
    hidden, head, vectors = split_parameters(other)
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups: list[dict[str, Any]] = [{"params": head, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    descend(other, [muon, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)], 3, seed=1)
    assert equal(one, other)
    assert not equal(one, make_drafter())


def test_a_scheduler_moves_both_rates() -> None:
    drafter = make_drafter()
    optimizer = MuonWithAdamW(drafter, **SETTINGS)
    before = copy.deepcopy(drafter)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    descend(drafter, [optimizer], 1, seed=1)
    changed = copy.deepcopy(drafter)
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), drafter.parameters(), strict=True))
    scheduler.step()
    descend(drafter, [optimizer], 2, seed=2)
    assert equal(changed, drafter)


def test_going_on_from_a_saved_state_gives_the_same_bits() -> None:
    whole = make_drafter()
    optimizer = MuonWithAdamW(whole, **SETTINGS)
    descend(whole, [optimizer], 2, seed=1)
    resumed, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    descend(whole, [optimizer], 2, seed=2)
    again = MuonWithAdamW(resumed, **SETTINGS)
    again.load_state_dict(state)
    descend(resumed, [again], 2, seed=2)
    assert equal(whole, resumed)


def test_a_closure_is_called_once_with_gradients() -> None:
    drafter = make_drafter()
    calls = []

    def loss() -> float:
        calls.append(torch.is_grad_enabled())
        drafter.head.weight.sum().backward()
        return 2.5

    with torch.no_grad():
        assert MuonWithAdamW(drafter, **SETTINGS).step(loss) == pytest.approx(2.5)
    assert calls == [True]
