"""The drafter against the paper's formulas, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recurrent_drafting import Drafter, RecurrentDraftingConfig

H, V = 6, 15


def make(**overrides: object) -> Drafter:
    torch.manual_seed(0)
    settings = {"hidden_size": H, "vocab_size": V, "exit_dim": 10, **overrides}
    drafter = Drafter(RecurrentDraftingConfig(**settings)).double()  # type: ignore[arg-type]
    for parameter in drafter.parameters():  # biases start at zero, where a formula cannot show them
        parameter.data.normal_()
    return drafter


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def test_state_follows_the_recurrence_of_the_paper() -> None:
    """s_k = silu(W e(x_k) + U s_{k-1} + b), s_0 = 0."""
    drafter = make()
    embeddings = noise(4, 3, H)
    state = drafter.initial_state(embeddings[:, 0])
    assert torch.equal(state, torch.zeros(4, H, dtype=torch.float64))
    expected = torch.zeros(4, H, dtype=torch.float64)
    for step in range(3):
        w, u, b = drafter.rnn_w.weight, drafter.rnn_u.weight, drafter.rnn_u.bias
        expected = silu(embeddings[:, step] @ w.T + expected @ u.T + b)
        state = drafter.advance(state, embeddings[:, step])
        torch.testing.assert_close(state, expected)
    assert drafter.rnn_w.bias is None


def test_without_the_recurrence_the_state_is_the_sum_of_the_embeddings() -> None:
    drafter = make(rnn=False)
    embeddings = noise(4, 3, H)
    state = drafter.initial_state(embeddings[:, 0])
    for step in range(3):
        state = drafter.advance(state, embeddings[:, step])
    torch.testing.assert_close(state, embeddings.sum(dim=1))
    assert not any(name.startswith("rnn") for name, _ in drafter.named_parameters())


@pytest.mark.parametrize("rnn", [True, False])
def test_embedding_norm_takes_out_mean_and_scale(rnn: bool) -> None:
    drafter, plain = make(emb_norm=True, rnn=rnn), make(rnn=rnn)
    embeddings, state = noise(4, H), noise(4, H)
    centred = embeddings - embeddings.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(drafter.advance(state, embeddings), plain.advance(state, normed))
    torch.testing.assert_close(
        drafter.advance(state, 3 * embeddings + 7), drafter.advance(state, embeddings), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("exit_dim", [10, 2 * H])
def test_logits_follow_the_formula(layers: int, exit_dim: int) -> None:
    """Head of residual blocks x + silu(A x + b) over the projection of [h, s]; none at D = 2H."""
    drafter = make(num_draft_layers=layers, exit_dim=exit_dim)
    context, state = noise(2, 3, H), noise(2, 3, H).flip(0)
    x = torch.cat([context, state], dim=-1)
    if exit_dim != 2 * H:
        x = x @ drafter.input_proj.weight.T + drafter.input_proj.bias
    for block in drafter.blocks:
        x = x + silu(x @ block.linear.weight.T + block.linear.bias)
    torch.testing.assert_close(drafter.features(context, state), x)
    torch.testing.assert_close(drafter.logits(context, state), x @ drafter.head.weight.T)


def test_exit_of_twice_the_hidden_size_has_no_projection() -> None:
    names = {name for name, _ in make(exit_dim=2 * H).named_parameters()}
    assert names == {name for name, _ in make().named_parameters()} - {"input_proj.weight", "input_proj.bias"}


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("emb_norm", [True, False])
def test_unroll_is_advance_and_features_step_by_step(rnn: bool, emb_norm: bool) -> None:
    drafter = make(rnn=rnn, emb_norm=emb_norm)
    context, embeddings = noise(5, H), noise(5, 4, H)
    got = drafter.unroll(context, embeddings)
    assert got.shape == (5, 4, 10)
    state = drafter.initial_state(context)
    for depth in range(4):
        state = drafter.advance(state, embeddings[:, depth])
        torch.testing.assert_close(got[:, depth], drafter.features(context, state))
        torch.testing.assert_close(drafter.head(got[:, depth]), drafter.logits(context, state))
    assert torch.equal(drafter(context, embeddings), got)


def test_a_depth_sees_no_later_token() -> None:
    drafter = make()
    context, embeddings = noise(5, H), noise(5, 4, H)
    changed = embeddings.clone()
    changed[:, 2:] += 1
    first, second = drafter.unroll(context, embeddings), drafter.unroll(context, changed)
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.isclose(first[:, 2:], second[:, 2:]).all(dim=-1).any()


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("exit_dim", [None, 10, 2 * H])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("draft_vocab_size", [None, 7])
def test_parameter_count(rnn: bool, exit_dim: int | None, layers: int, draft_vocab_size: int | None) -> None:
    drafter = make(rnn=rnn, exit_dim=exit_dim, num_draft_layers=layers, draft_vocab_size=draft_vocab_size)
    d, v_d = exit_dim or H, draft_vocab_size or V
    expected = (2 * H * H + H) * rnn  # W, U and b
    expected += 0 if d == 2 * H else 2 * H * d + d
    expected += layers * (d * d + d) + v_d * d
    assert sum(parameter.numel() for parameter in drafter.parameters()) == expected


def test_all_tokens_may_be_drafted_unless_told_otherwise() -> None:
    assert make().draft_token_ids.tolist() == list(range(V))
    assert make(draft_vocab_size=4).draft_token_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_drafter_comes_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    drafter = make(draft_vocab_size=4).to(dtype)
    drafter.draft_token_ids.copy_(torch.tensor([1, 4, 9, 14]))
    drafter.save_pretrained(tmp_path)
    loaded = Drafter.from_pretrained(tmp_path, dtype="auto")
    before, after = drafter.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert "draft_token_ids" in after
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    assert loaded.draft_token_ids.tolist() == [1, 4, 9, 14]
    assert loaded.draft_token_ids.dtype == torch.int64


def test_new_drafter_starts_at_the_scale_of_its_inputs() -> None:
    """Weights have variance 1 / inputs and biases are zero, so random inputs keep their scale."""
    torch.manual_seed(0)
    drafter = Drafter(RecurrentDraftingConfig(hidden_size=256, vocab_size=300))
    for name, parameter in drafter.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:  # relative error of a standard deviation over n numbers is 1 / sqrt(2 n): below 0.3 %
            assert float(parameter.detach().std()) == pytest.approx(parameter.shape[1] ** -0.5, rel=0.02)
