"""Beam search with the drafter: propose continuations of the root at every depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafting.config import BeamConfig
from recurrent_drafting.draft_tree import Beams
from recurrent_drafting.drafter import Drafter


@dataclass(frozen=True)
class Coupling:
    """What coupled drafting knows of the draws to come.

    Args:
        noise: Gumbel noise of the drafted positions over the draft vocabulary, ``[B, L, V_d]``.
        warp: the request's own temperature and filters, as a function of logits ``[R, V_d]``.
        temperature: allowance s for the drafter's own error.
        sharpness: power c of the drafter's distribution before noise is added; 1 suits an exact drafter.
    """

    noise: Tensor
    warp: Callable[[Tensor], Tensor]
    temperature: float
    sharpness: float = 1.0


def draft(  # noqa: PLR0913, PLR0917 - six that say what to draft, one that says how far
    drafter: Drafter,
    context: Tensor,
    root: Tensor,
    embed: Callable[[Tensor], Tensor],
    beam: BeamConfig,
    coupling: Coupling | None = None,
    worth_going_on: Callable[[Tensor], bool] | None = None,
) -> Beams:
    """Keep the W most likely continuations at each of L depths.

    Uncoupled, a path scores the sum of the drafter's log-probabilities. Coupled, each depth scores
    ``log softmax((c log q + G) / s)``, the chance that this token is the one the verifier draws.

    Args:
        drafter: the recurrent head.
        context: verifier hidden state at the last committed token, ``[B, H]``.
        root: the token chosen after it, int64 ``[B]``.
        embed: the verifier's token embedding, int64 ``[...]`` -> ``[..., H]``.
        beam: width and length; a width above the draft vocabulary is cut to it.
        coupling: noise of the coming draws, or None.
        worth_going_on: gets the path log-probabilities so far, float32 ``[B, depths, W]``, and tells whether
            another depth pays; None drafts all L.

    Returns:
        Every beam kept at every drafted depth, in the verifier's token ids. A row for which the drafter's
        logits are not finite at some depth has ``-inf`` throughout: nothing of it must be proposed.
    """
    batch = context.shape[0]
    width = min(beam.width, drafter.draft_token_ids.shape[0])
    embeddings = embed(root).unsqueeze(1)
    state = drafter.advance(drafter.initial_state(embeddings), embeddings)
    scores = torch.zeros(batch, 1, device=context.device)
    sound = torch.ones(batch, dtype=torch.bool, device=context.device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for depth in range(beam.length):
        logits = drafter.logits(context.unsqueeze(1).expand(-1, state.shape[1], -1), state)
        values, draft_ids = _expand(logits, width, depth, coupling)
        # NaN, and infinity less infinity; a filtered token's -inf is none of them.
        sound = sound & ~values.isnan().flatten(1).any(dim=1)
        scores, best = _best(scores.unsqueeze(2) + values, width)
        parents = best // width
        tokens = drafter.draft_token_ids[draft_ids.flatten(1).gather(1, best)]
        kept.append((tokens, parents, scores))
        if depth + 1 < beam.length:
            if worth_going_on is not None and not worth_going_on(torch.stack([part[2] for part in kept], dim=1)):
                break
            index = parents.unsqueeze(2).expand(-1, -1, state.shape[2])
            state = drafter.advance(state.gather(1, index), embed(tokens))
    return _stacked(kept, sound)


def _expand(logits: Tensor, width: int, depth: int, coupling: Coupling | None) -> tuple[Tensor, Tensor]:
    """Return the ``width`` best next tokens of each beam: log-probabilities and draft ids ``[B, W', W]``."""
    logits = logits.float()
    if coupling is not None:
        batch, beams, vocab = logits.shape
        warped = coupling.warp(logits.reshape(-1, vocab)).view(batch, beams, vocab)
        # Log-probabilities would differ from these by a constant per beam, which ``logsumexp`` below takes out.
        logits = (coupling.sharpness * warped + coupling.noise[:, depth].unsqueeze(1).float()) / coupling.temperature
    values, draft_ids = logits.topk(width, dim=-1)
    return values - logits.logsumexp(dim=-1, keepdim=True), draft_ids


def _best(totals: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the ``width`` best of all expansions ``[B, W', W]``: scores and places among them ``[B, W]``."""
    finite = torch.nan_to_num(totals.flatten(1), nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    scores, places = finite.topk(width, dim=1)
    return scores, places


def _stacked(kept: Sequence[tuple[Tensor, Tensor, Tensor]], sound: Tensor) -> Beams:
    """Put the depths together: tokens, parents and scores of each ``[B, W]``; ``sound`` is bool ``[B]``."""
    tokens, parents, scores = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
    # A row whose logits were not finite at any depth proposes nothing: its beams never become valid nodes.
    log_probs = torch.where(sound.view(-1, 1, 1), scores, -torch.inf)
    return Beams(tokens=tokens, parents=parents, log_probs=log_probs)
