"""Per-depth objectives, unreduced: one value per supervised position and depth.

``kl``, ``cross_entropy`` and ``expected_length`` are the definitions. ``head_loss`` computes the same
from the head's input in chunks and never holds the logits of all positions; training uses it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Rows of logits held at once; 512 rows of a draft vocabulary of 8,192 are 8 MB in bfloat16.
_CHUNK_ROWS = 512
# Row counts are rounded up to a multiple: matrix libraries prepare a kernel for every shape they meet, and
# that can take longer than its use.
ROW_MULTIPLE = 128


def kl(logits: Tensor, target_probabilities: Tensor) -> Tensor:
    """Return KL(p || q) of the verifier's distribution p against the drafter's q, in nats.

    ``sum_v p(v) (log p(v) - log q(v))`` over the draft vocabulary (p renormalised on it).

    Args:
        logits: drafter logits, ``[..., V_d]``.
        target_probabilities: p, ``[..., V_d]``.

    Returns:
        float ``[...]``.
    """
    log_q = logits.log_softmax(dim=-1)
    log_p = target_probabilities.clamp(min=torch.finfo(target_probabilities.dtype).tiny).log()
    return (target_probabilities * (log_p - log_q)).sum(dim=-1)


def cross_entropy(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Return ``-log q(x)`` of the text's own token, in nats.

    >>> values = cross_entropy(torch.zeros(2, 4), torch.tensor([3, -1]))
    >>> [round(value, 4) for value in values.tolist()]  # log 4; -1 gives 0
    [1.3863, 0.0]

    Args:
        logits: drafter logits, ``[..., V_d]``.
        target_ids: draft ids of the tokens, int64 ``[...]``; -1 (not in the draft vocabulary)
            gives 0.

    Returns:
        float ``[...]``.
    """
    picked = logits.log_softmax(dim=-1).gather(-1, target_ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target_ids >= 0, -picked, 0.0)


def path_probabilities(log_q: Tensor) -> Tensor:
    """Return the probability that a chain along the text is accepted at least to each depth.

    Args:
        log_q: log-probability of the text's own token per depth, float ``[..., K]``; minus infinity
            where there is none.

    Returns:
        ``prod_{j <= k} q_j``, float ``[..., K]``.
    """
    return log_q.cumsum(dim=-1).exp()


def expected_length(log_q: Tensor) -> Tensor:
    """Return the expected accepted length of a chain sampled along the text, ``sum_k prod_{j <= k} q_j``.

    A depth counts for nothing behind one that is never accepted:

    >>> lengths = expected_length(torch.tensor([[0.5, 0.5], [0.0, 0.9]]).log())
    >>> [round(length, 4) for length in lengths.tolist()]
    [0.75, 0.0]

    Args:
        log_q: as for ``path_probabilities``.

    Returns:
        float ``[...]``, in tokens, 0..K.
    """
    return path_probabilities(log_q).sum(dim=-1)


@dataclass(frozen=True)
class HeadTargets:
    """What the head should say, for R rows: one row per position and depth.

    Args:
        ids: draft ids of the text's own tokens, int64 ``[R]``, -1 outside the draft vocabulary.
        table: verifier distributions over the draft vocabulary, ``[U, V_d]``, or None without KL.
        index: the table row of each row, int64 ``[R]``.
        kl_share: weight of KL in the mix; cross-entropy has the rest.
        depths: depth of each row from 0, int64 ``[R]``; the rows of a position stand together, by
            rising depth. None: each row is a position of its own.
        length_share: weight of minus the expected accepted length; the mix has the rest.
    """

    ids: Tensor
    table: Tensor | None
    index: Tensor
    kl_share: float
    depths: Tensor | None = None
    length_share: float = 0.0


@dataclass(frozen=True)
class HeadLoss:
    """Result of ``head_loss``.

    Args:
        total: weighted sum with gradient, ``[]``.
        per_row: unweighted loss per row, without gradient, ``[R]``: nats, and minus path probability
            for the share of the expected length.
        ranks: number of draft tokens scored above the text's own, int64 ``[R]`` (0 = top-1 hit;
            V_d where the token is outside the draft vocabulary; rounded above 256 in a 16-bit type).
        paths: probability of the text from the position's first depth to the row's, ``[R]``; they sum
            to the expected accepted length.
    """

    total: Tensor
    per_row: Tensor
    ranks: Tensor
    paths: Tensor


def head_loss(features: Tensor, weight: Tensor, targets: HeadTargets, row_weights: Tensor) -> HeadLoss:
    """Return the mix of the objectives of ``features @ weight.T``, in chunks of rows.

    Args:
        features: the head's input, ``[R, D]``.
        weight: the head's weight, ``[V_d, D]``.
        targets: what each row should say.
        row_weights: weight of each row's KL and cross-entropy in the total, ``[R]``; the expected
            length has none.
    """
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(dtype), weight.to(dtype)
    total, per_row, ranks, paths = _HeadLossFunction.apply(  # type: ignore[no-untyped-call]
        features, weight, targets, row_weights
    )
    return HeadLoss(total=total, per_row=per_row.detach(), ranks=ranks, paths=paths)


@dataclass
class _HeadPass:
    """One pass of the head: values per row ``[R]``, and the gradients of all but the linear terms.

    Args:
        normaliser: logsumexp of the logits.
        own: logit of the text's own token.
        ranks: draft tokens scored above it.
        paths: see ``HeadLoss``.
        gains: d(expected length)/d(log q) of the own token.
        grad_features: ``[R, D]``.
        grad_weight: ``[V_d, D]``.
    """

    normaliser: Tensor
    own: Tensor
    ranks: Tensor
    paths: Tensor
    gains: Tensor
    grad_features: Tensor
    grad_weight: Tensor


class _HeadLossFunction(torch.autograd.Function):
    """Compute gradients in the forward pass, while a chunk's logits are at hand.

    With ``a`` the rows' normaliser weights, the loss of a row is ``a * logsumexp(f W^T)`` minus
    terms that are linear in the logits: ``kl_share * (p W) f`` and ``hard_share * W[x] f``. So the
    soft targets enter as U rows of ``p W`` and never as a matrix [R, V_d]. The gradient of the
    expected length is that of a cross-entropy whose row weights depend on the probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: HeadTargets, row_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(features.dtype, torch.float32)
        scale = row_weights.to(wide) * (1 - targets.length_share)
        hard = (targets.ids >= 0).to(wide) * (1 - targets.kl_share)
        soft = torch.full_like(hard, targets.kl_share if targets.table is not None else 0.0)
        done = _pass_head(features, weight, targets, (hard + soft) * scale)
        loss = (hard + soft) * done.normaliser - hard * done.own
        own_ids = targets.ids.clamp(min=0)
        pull = (hard * scale + targets.length_share * done.gains).unsqueeze(1)
        done.grad_features -= pull * weight[own_ids].to(wide)
        done.grad_weight.index_add_(0, own_ids, -pull * features.to(wide))
        if targets.table is not None:
            loss += _soft_targets(features, weight, targets, scale, (done.grad_features, done.grad_weight))
        ctx.save_for_backward(done.grad_features.to(features.dtype), done.grad_weight.to(weight.dtype))
        ranks = torch.where(targets.ids >= 0, done.ranks, weight.shape[0])
        ctx.mark_non_differentiable(ranks, done.paths)
        total = (loss * scale).sum() - targets.length_share * done.paths.sum()
        per_row = (1 - targets.length_share) * loss - targets.length_share * done.paths
        return total, per_row, ranks, done.paths

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_features, grad_weight = ctx.saved_tensors
        return grad_features * grad_total, grad_weight * grad_total, None, None


def _pass_head(features: Tensor, weight: Tensor, targets: HeadTargets, scale: Tensor) -> _HeadPass:
    """Run the head once; form the gradients of ``(scale + length_share * gains) * logsumexp``."""
    wide, share = scale.dtype, targets.length_share
    grad_features = torch.empty_like(features, dtype=wide)
    grad_weight = torch.zeros_like(weight, dtype=wide)
    depths = torch.zeros_like(targets.ids) if targets.depths is None else targets.depths
    own_ids, known = targets.ids.clamp(min=0), targets.ids >= 0
    chunks = _chunks(depths)
    most = max(_padded(rows.stop - rows.start) for rows in chunks)
    # Reused: fresh memory for every chunk costs as much as the arithmetic.
    feature_buffer, weight_buffer = features.new_empty(most, features.shape[1]), torch.empty_like(weight)
    logit_buffer, q_buffer = features.new_empty(2, most, weight.shape[0])
    parts: list[tuple[Tensor, ...]] = []
    for rows in chunks:
        count = rows.stop - rows.start
        chunk, padded_q = feature_buffer[: _padded(count)], q_buffer[: _padded(count)]
        chunk[:count], chunk[count:] = features[rows], 0
        logits, q = torch.mm(chunk, weight.T, out=logit_buffer[: len(chunk)])[:count], padded_q[:count]
        own = logits.gather(1, own_ids[rows].unsqueeze(1))
        ranks = torch.gt(logits, own, out=q).sum(dim=1).long()
        peak = logits.amax(dim=1).to(wide)
        torch.softmax(logits, dim=1, out=q)
        padded_q[count:] = 0
        # The largest probability is 1 / sum exp(logit - peak): one pass less than a logsumexp.
        normaliser = peak - q.amax(dim=1).to(wide).log()
        own = own.squeeze(1).to(wide)
        paths, gains = _along_text((own - normaliser).masked_fill(~known[rows], -torch.inf), depths[rows])
        weights = (scale[rows] + share * gains).unsqueeze(1)
        grad_features[rows] = (padded_q @ weight)[:count].to(wide) * weights
        chunk[:count] *= weights.to(features.dtype)
        grad_weight += torch.mm(padded_q.T, chunk, out=weight_buffer)
        parts.append((normaliser, own, ranks, paths, gains))
    normaliser, own, ranks, paths, gains = (torch.cat(column) for column in zip(*parts, strict=True))
    return _HeadPass(normaliser, own, ranks, paths, gains, grad_features, grad_weight)


def _padded(rows: int) -> int:
    """Round a number of rows up to a multiple of ``ROW_MULTIPLE``, at least one."""
    return max(-(-rows // ROW_MULTIPLE), 1) * ROW_MULTIPLE


def _chunks(depths: Tensor) -> list[slice]:
    """Cut rows into chunks of at most ``_CHUNK_ROWS`` that leave the rows of a position together.

    There is at least one chunk (a micro-batch may hold no supervised row), and a chunk holds at least
    one position.
    """
    starts = [*(depths == 0).nonzero().flatten().tolist(), len(depths)]
    bounds = [0]
    while bounds[-1] < len(depths):
        within = bisect_right(starts, bounds[-1] + _CHUNK_ROWS) - 1
        bounds.append(starts[max(within, bisect_right(starts, bounds[-1]))])
    return [slice(start, stop) for start, stop in pairwise(bounds)] or [slice(0, 0)]


def _along_text(log_q: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row its path probability and d(expected length of its position)/d(its log q), ``[r]``."""
    position = (depths == 0).cumsum(dim=0) - 1
    shape = (int((depths == 0).sum()), int(depths.max()) + 1 if len(depths) else 0)
    table = log_q.new_full(shape, -torch.inf)
    table[position, depths] = log_q
    paths = path_probabilities(table)
    # A depth's probability is a factor of every path that reaches it.
    gains = paths.flip(1).cumsum(dim=1).flip(1)
    return paths[position, depths], gains[position, depths]


def _soft_targets(
    features: Tensor, weight: Tensor, targets: HeadTargets, scale: Tensor, gradients: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the KL terms beside the normaliser, per row, and add their gradients in place."""
    assert targets.table is not None
    share, wide = targets.kl_share, scale.dtype
    table = targets.table.to(features.dtype)
    mean_rows = (table @ weight).to(wide)[targets.index]
    negative_entropy = torch.cat([_negative_entropy(part) for part in targets.table.split(_CHUNK_ROWS)]).to(wide)
    grad_features, grad_weight = gradients
    grad_features -= share * scale.unsqueeze(1) * mean_rows
    pooled = torch.zeros(table.shape[0], features.shape[1], dtype=wide, device=features.device)
    pooled.index_add_(0, targets.index, features.to(wide) * scale.unsqueeze(1))
    grad_weight.sub_(table.T @ pooled.to(table.dtype), alpha=share)
    terms: Tensor = negative_entropy[targets.index] - (features.to(wide) * mean_rows).sum(dim=1)
    return share * terms


def _negative_entropy(probabilities: Tensor) -> Tensor:
    """Return ``sum_v p(v) log p(v)``, ``[..., V] -> [...]``."""
    log_p = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_()
    return log_p.mul_(probabilities).sum(dim=-1)
