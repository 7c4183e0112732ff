"""Per-depth objectives, unreduced: one value per supervised position and depth.

``kl`` and ``cross_entropy`` are the definitions. ``head_loss`` computes the same from the head's
input in chunks and never holds the logits of all positions; training uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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

    Args:
        logits: drafter logits, ``[..., V_d]``.
        target_ids: draft ids of the tokens, int64 ``[...]``; -1 (not in the draft vocabulary)
            gives 0.

    Returns:
        float ``[...]``.
    """
    picked = logits.log_softmax(dim=-1).gather(-1, target_ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target_ids >= 0, -picked, 0.0)


@dataclass(frozen=True)
class HeadTargets:
    """What the head should say, for R rows.

    Args:
        ids: draft ids of the text's own tokens, int64 ``[R]``, -1 outside the draft vocabulary.
        table: verifier distributions over the draft vocabulary, ``[U, V_d]``, or None without KL.
        index: the table row of each row, int64 ``[R]``.
        kl_share: weight of KL in the mix; cross-entropy has the rest.
    """

    ids: Tensor
    table: Tensor | None
    index: Tensor
    kl_share: float


@dataclass(frozen=True)
class HeadLoss:
    """Result of ``head_loss``.

    Args:
        total: weighted sum with gradient, ``[]``.
        per_row: unweighted loss per row in nats, without gradient, ``[R]``.
        ranks: number of draft tokens scored above the text's own, int64 ``[R]`` (0 = top-1 hit;
            V_d where the token is outside the draft vocabulary; rounded above 256 in a 16-bit type).
    """

    total: Tensor
    per_row: Tensor
    ranks: Tensor


def head_loss(features: Tensor, weight: Tensor, targets: HeadTargets, row_weights: Tensor) -> HeadLoss:
    """Return the mix of KL and cross-entropy of ``features @ weight.T``, in chunks of rows.

    Args:
        features: the head's input, ``[R, D]``.
        weight: the head's weight, ``[V_d, D]``.
        targets: what each row should say.
        row_weights: weight of each row in the total, ``[R]``.
    """
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(dtype), weight.to(dtype)
    total, per_row, ranks = _HeadLossFunction.apply(  # type: ignore[no-untyped-call]
        features, weight, targets, row_weights
    )
    return HeadLoss(total=total, per_row=per_row.detach(), ranks=ranks)


class _HeadLossFunction(torch.autograd.Function):
    """Compute gradients in the forward pass, while a chunk's logits are at hand.

    With ``a`` the rows' normaliser weights, the loss of a row is ``a * logsumexp(f W^T)`` minus
    terms that are linear in the logits: ``kl_share * (p W) f`` and ``hard_share * W[x] f``. So the
    soft targets enter as U rows of ``p W`` and never as a matrix [R, V_d].
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: HeadTargets, row_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(features.dtype, torch.float32)
        scale = row_weights.to(wide)
        hard = (targets.ids >= 0).to(wide) * (1 - targets.kl_share)
        soft = torch.full_like(hard, targets.kl_share if targets.table is not None else 0.0)
        own_ids = targets.ids.clamp(min=0)
        normaliser, own, ranks, grad_features, grad_weight = _normaliser(
            features, weight, own_ids, (hard + soft) * scale
        )
        loss = (hard + soft) * normaliser - hard * own
        own_rows = weight[own_ids].to(wide)
        grad_features -= (hard * scale).unsqueeze(1) * own_rows
        grad_weight.index_add_(0, own_ids, -(hard * scale).unsqueeze(1) * features.to(wide))
        if targets.table is not None:
            loss += _soft_targets(features, weight, targets, scale, (grad_features, grad_weight))
        ctx.save_for_backward(grad_features.to(features.dtype), grad_weight.to(weight.dtype))
        ranks = torch.where(targets.ids >= 0, ranks, weight.shape[0])
        ctx.mark_non_differentiable(ranks)
        return (loss * scale).sum(), loss, ranks

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_features, grad_weight = ctx.saved_tensors
        return grad_features * grad_total, grad_weight * grad_total, None, None


def _normaliser(
    features: Tensor, weight: Tensor, own_ids: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logsumexp, own logit and rank per row, and the gradients of ``scale * logsumexp``."""
    wide, count = scale.dtype, features.shape[0]
    # At least one row: a micro-batch may hold no supervised one.
    padding = -count % ROW_MULTIPLE if count else ROW_MULTIPLE
    padded = nn.functional.pad(features, (0, 0, 0, padding))
    own_ids, scale = nn.functional.pad(own_ids, (0, padding)), nn.functional.pad(scale, (0, padding))
    grad_features = torch.empty_like(padded, dtype=wide)
    grad_weight = torch.zeros_like(weight, dtype=wide)
    # Both are reused: fresh memory for every chunk costs as much as the arithmetic.
    logit_buffer = features.new_empty(_CHUNK_ROWS, weight.shape[0])
    scratch_buffer = torch.empty_like(logit_buffer)
    weight_buffer = torch.empty_like(weight)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(padded), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        chunk = padded[rows]
        logits = torch.mm(chunk, weight.T, out=logit_buffer[: len(chunk)])
        scratch = scratch_buffer[: len(chunk)]
        own = logits.gather(1, own_ids[rows].unsqueeze(1))
        ranks = torch.gt(logits, own, out=scratch).sum(dim=1).long()
        peak = logits.amax(dim=1).to(wide)
        q = torch.softmax(logits, dim=1, out=scratch)
        # The largest probability is 1 / sum exp(logit - peak): one pass less than a logsumexp.
        normaliser = peak - q.amax(dim=1).to(wide).log()
        grad_features[rows] = (q @ weight).to(wide) * scale[rows].unsqueeze(1)
        scaled = chunk * scale[rows].unsqueeze(1).to(features.dtype)
        grad_weight += torch.mm(q.T, scaled, out=weight_buffer)
        parts.append((normaliser, own.squeeze(1).to(wide), ranks))
    normaliser, own, ranks = (torch.cat(column)[:count] for column in zip(*parts, strict=True))
    return normaliser, own, ranks, grad_features[:count], grad_weight


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
    grad_weight -= share * (table.T @ pooled.to(table.dtype)).to(wide)
    terms: Tensor = negative_entropy[targets.index] - (features.to(wide) * mean_rows).sum(dim=1)
    return share * terms


def _negative_entropy(probabilities: Tensor) -> Tensor:
    """Return ``sum_v p(v) log p(v)``, ``[..., V] -> [...]``."""
    log_p = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_()
    return log_p.mul_(probabilities).sum(dim=-1)
