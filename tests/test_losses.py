"""The chunked head loss against autograd through the plain definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from recurrent_drafting import losses
from recurrent_drafting.losses import HeadLoss, HeadTargets

R, D, V, U = 13, 5, 9, 4
IDS = [0, 3, -1, 8, 3, -1, 2, 2, 7, 1, 0, 5, 8]
# Six positions of up to four depths; the third begins outside the draft vocabulary.
DEPTHS = [0, 1, 2, 0, 1, 0, 1, 0, 0, 1, 2, 3, 0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_targets(kl_share: float, table: bool = True) -> HeadTargets:
    distributions = (2 * noise(U, V, seed=3)).softmax(dim=1)
    index = torch.randint(U, (R,), generator=torch.Generator().manual_seed(4))
    return HeadTargets(torch.tensor(IDS), distributions if table else None, index, kl_share)


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    """Return features, head weight and row weights; a row of weight 0 is among them."""
    row_weights = noise(R, seed=2).abs()
    row_weights[6] = 0
    return noise(R, D, seed=0).requires_grad_(), noise(V, D, seed=1).requires_grad_(), row_weights


def plain(features: Tensor, weight: Tensor, targets: HeadTargets, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return total and per-row loss by the definitions."""
    logits = features @ weight.T
    per_row = (1 - targets.kl_share) * losses.cross_entropy(logits, targets.ids)
    if targets.table is not None:
        per_row = per_row + targets.kl_share * losses.kl(logits, targets.table[targets.index])
    return (per_row * row_weights).sum(), per_row


def backward(total: Tensor, features: Tensor, weight: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total * upstream, (features, weight))


def test_kl_is_the_sum_over_the_vocabulary() -> None:
    logits, p = noise(2, 3, V), (2 * noise(2, 3, V, seed=1)).softmax(dim=-1)
    q = logits.softmax(dim=-1)
    for place in range(6):
        pairs = zip(p.view(6, V)[place].tolist(), q.view(6, V)[place].tolist(), strict=True)
        expected = sum(a * math.log(a / b) for a, b in pairs)
        assert float(losses.kl(logits, p).flatten()[place]) == pytest.approx(expected, rel=1e-12)


def test_kl_is_zero_for_equal_distributions_and_positive_otherwise() -> None:
    logits = noise(20, V)
    same = losses.kl(logits + 3, logits.softmax(dim=1))
    torch.testing.assert_close(same, torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (losses.kl(logits + 0.1 * noise(20, V, seed=1), logits.softmax(dim=1)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_takes_tokens_that_the_verifier_never_says(dtype: torch.dtype) -> None:
    p = torch.tensor([0.0, 1.0, 0.0], dtype=dtype)
    value = losses.kl(torch.tensor([1.0, 1.0, 1.0], dtype=dtype), p)
    assert float(value) == pytest.approx(math.log(3))


def test_cross_entropy_is_minus_the_log_probability_and_zero_outside_the_draft_vocabulary() -> None:
    logits = torch.tensor([[0.2, 0.3, 0.5]] * 4).log()
    got = losses.cross_entropy(logits, torch.tensor([0, -1, 2, -1]))
    assert got.tolist() == pytest.approx([-math.log(0.2), 0, -math.log(0.5), 0])


@pytest.mark.parametrize("chunk", [1, 4, 13, 1024])
@pytest.mark.parametrize(("kl_share", "table"), [(0.0, False), (0.0, True), (0.5, True), (1.0, True)])
def test_head_loss_equals_autograd_through_the_definitions(
    monkeypatch: pytest.MonkeyPatch, kl_share: float, table: bool, chunk: int
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ROWS", chunk)
    targets = make_targets(kl_share, table)
    features, weight, row_weights = leaves()
    expected, per_row = plain(features, weight, targets, row_weights)
    got = losses.head_loss(features, weight, targets, row_weights)
    tight = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(got.total, expected, **tight)
    torch.testing.assert_close(got.per_row, per_row.detach(), **tight)
    assert not got.per_row.requires_grad
    for ours, theirs in zip(
        backward(got.total, features, weight, -2.5), backward(expected, features, weight, -2.5), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tight)


@pytest.mark.parametrize("chunk", [5, 1024])
def test_ranks_count_the_tokens_scored_above_the_texts_own(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ROWS", chunk)
    features, weight, row_weights = leaves()
    features.data[-1] = 0  # all logits are equal: none is above the text's own
    got = losses.head_loss(features, weight, make_targets(0.5), row_weights).ranks.tolist()
    scores = (features @ weight.T).tolist()
    expected = [V if id_ < 0 else sum(score > row[id_] for score in row) for id_, row in zip(IDS, scores, strict=True)]
    assert got == expected
    assert (got[-1], got[2]) == (0, V)


@pytest.mark.parametrize("kl_share", [0.0, 0.3, 1.0])
def test_gradients_equal_finite_differences(kl_share: float) -> None:
    features, weight, row_weights = leaves()

    def total(features: Tensor, weight: Tensor) -> Tensor:
        return losses.head_loss(features, weight, make_targets(kl_share), row_weights).total

    assert torch.autograd.gradcheck(total, (features, weight))


def test_rows_of_weight_zero_are_reported_but_teach_nothing() -> None:
    features, weight, row_weights = leaves()
    got = losses.head_loss(features, weight, make_targets(0.5), row_weights)
    grad_features, _ = backward(got.total, features, weight)
    assert float(got.per_row[6]) > 0
    assert not grad_features[6].any()
    assert grad_features[[0, 1, 3]].any(dim=1).all()


def test_perfect_head_has_no_kl_and_no_gradient() -> None:
    features, weight, row_weights = leaves()
    table = (features @ weight.T).softmax(dim=1).detach()
    targets = HeadTargets(torch.full((R,), -1), table, torch.arange(R), kl_share=1.0)
    got = losses.head_loss(features, weight, targets, row_weights)
    zeros = [torch.zeros(R, dtype=torch.float64), torch.zeros(R, D, dtype=torch.float64), torch.zeros(V, D).double()]
    results = (got.per_row, *backward(got.total, features, weight))
    for result, zero in zip(results, zeros, strict=True):
        torch.testing.assert_close(result, zero, rtol=0, atol=1e-13)


def test_no_rows_give_a_loss_of_zero() -> None:
    """A batch may hold no supervised position while others of the same step do."""
    features, weight = noise(0, D).requires_grad_(), noise(V, D).requires_grad_()
    empty = torch.zeros(0, dtype=torch.long)
    targets = HeadTargets(empty, noise(0, V), empty, kl_share=0.5)
    got = losses.head_loss(features, weight, targets, noise(0))
    assert (got.total.item(), got.per_row.shape, got.ranks.shape) == (0, (0,), (0,))
    assert not backward(got.total, features, weight)[1].any()


def run(dtype: torch.dtype, autocast: bool) -> tuple[HeadLoss, tuple[Tensor, ...]]:
    features, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves()[:2])
    targets = make_targets(0.5)
    assert targets.table is not None
    targets = HeadTargets(targets.ids, targets.table.float(), targets.index, targets.kl_share)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = losses.head_loss(features, weight, targets, leaves()[2].float())
    return result, backward(result.total, features, weight)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_bfloat16_keeps_losses_in_float32_and_near_the_exact_ones(dtype: torch.dtype, autocast: bool) -> None:
    """bfloat16 has 8 bits, so logits of size 5 are off by up to 0.02 and a loss by about as much."""
    features, weight, row_weights = leaves()
    expected, per_row = plain(features, weight, make_targets(0.5), row_weights)
    got, gradients = run(dtype, autocast)
    assert got.total.dtype == got.per_row.dtype == torch.float32
    torch.testing.assert_close(got.total.detach(), (got.per_row * row_weights.float()).sum(), rtol=1e-5, atol=0)
    assert got.total.item() == pytest.approx(expected.item(), rel=0.02)
    torch.testing.assert_close(got.per_row.double(), per_row.detach(), rtol=0.05, atol=0.1)
    for ours, exact in zip(gradients, backward(expected, features, weight), strict=True):
        assert ours.dtype == dtype
        assert float((ours.double() - exact).norm() / exact.norm()) < 0.05


# Expected accepted length


def brute_length(probabilities: list[float]) -> float:
    """Return the mean accepted length over every outcome of accepting depth after depth."""
    total, reached = 0.0, 1.0
    for depth, q in enumerate(probabilities):
        total += depth * reached * (1 - q)
        reached *= q
    return total + len(probabilities) * reached


@pytest.mark.parametrize("q", [[0.5], [0.9, 0.2, 0.7], [1.0, 1.0], [0.0, 0.9, 0.9], [0.8, 0.0, 0.5, 1.0]])
def test_expected_length_is_the_mean_over_what_a_chain_can_do(q: list[float]) -> None:
    log_q = torch.tensor(q, dtype=torch.float64).log()
    assert float(losses.expected_length(log_q)) == pytest.approx(brute_length(q), abs=1e-12)


def length_targets(kl_share: float, length_share: float) -> HeadTargets:
    return replace(make_targets(kl_share), depths=torch.tensor(DEPTHS), length_share=length_share)


def plain_lengths(features: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Return the expected length of each position by the definition."""
    log_q = -losses.cross_entropy(features @ weight.T, ids).masked_fill(ids < 0, torch.inf)
    starts = [*(row for row in range(R) if DEPTHS[row] == 0), R]
    return torch.stack([losses.expected_length(log_q[a:b]) for a, b in pairwise(starts)])


@pytest.mark.parametrize("chunk", [1, 4, 13, 1024])
@pytest.mark.parametrize(("kl_share", "length_share"), [(0.0, 1.0), (0.0, 0.6), (0.3, 0.6), (0.3, 0.0)])
def test_expected_length_and_mixes_equal_autograd_through_the_definitions(
    monkeypatch: pytest.MonkeyPatch, kl_share: float, length_share: float, chunk: int
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ROWS", chunk)
    targets = length_targets(kl_share, length_share)
    features, weight, row_weights = leaves()
    lengths = plain_lengths(features, weight, targets.ids)
    mix, per_row = plain(features, weight, targets, row_weights)
    expected = (1 - length_share) * mix - length_share * lengths.sum()
    got = losses.head_loss(features, weight, targets, row_weights)
    tight = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(got.total, expected, **tight)
    torch.testing.assert_close(got.paths.sum(), lengths.sum().detach(), **tight)
    torch.testing.assert_close(got.per_row, ((1 - length_share) * per_row - length_share * got.paths).detach(), **tight)
    for ours, theirs in zip(
        backward(got.total, features, weight, -2.5), backward(expected, features, weight, -2.5), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tight)
    assert float(lengths.detach().min()) == 0 < float(lengths.detach().max())


def test_nothing_is_learnt_behind_a_depth_that_is_never_accepted() -> None:
    """Row 0 gets probability 0, and rows 5 and 6 are a position that begins outside the draft vocabulary."""
    features, weight, row_weights = leaves()
    features.data[0] = -1e6 * weight.detach()[IDS[0]]
    got = losses.head_loss(features, weight, length_targets(0.0, 1.0), row_weights)
    grad_features, _ = backward(got.total, features, weight)
    for dead in ([0, 1, 2], [5, 6]):
        assert not grad_features[dead].any() and not got.paths[dead].any()
    # The second position's last depth is outside: its first is still learnt.
    assert grad_features[[3, 4, 7, 8, 9, 10, 11, 12]].any(dim=1).all()


def test_chunks_keep_the_depths_of_a_position_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk, expected in ((5, [5, 3, 5]), (4, [3, 4, 1, 4, 1]), (1, [3, 2, 2, 1, 4, 1]), (99, [R])):
        monkeypatch.setattr(losses, "_CHUNK_ROWS", chunk)
        pieces = losses._chunks(torch.tensor(DEPTHS))
        assert [piece.stop - piece.start for piece in pieces] == expected
        assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(R))


def test_the_head_runs_once_and_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ROWS", 4)
    heights: list[int] = []
    softmax = torch.softmax

    def seen(logits: Tensor, **options: Any) -> Tensor:
        heights.append(len(logits))
        return softmax(logits, **options)

    targets = length_targets(0.0, 1.0)
    monkeypatch.setattr(torch, "softmax", seen)
    losses.head_loss(*leaves()[:2], targets, leaves()[2])
    assert heights == [3, 4, 1, 4, 1]
