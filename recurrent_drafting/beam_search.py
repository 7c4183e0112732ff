"""Beam search with the drafter: propose continuations of the root at every depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafting.config import BeamConfig
from recurrent_drafting.draft_tree import Beams
from recurrent_drafting.drafter import Drafter
from recurrent_drafting.recycling import RecycledNodes


@dataclass(frozen=True)
class Coupling:
    """What coupled drafting knows of the draws to come.

    Args:
        noise: Gumbel noise at a depth (from 0) over the draft vocabulary, ``[B, V_d]``.
        warp: the request's own temperature and filters, as a function of logits ``[R, V_d + n]``.
        temperature: allowance s for the drafter's own error.
        sharpness: power c of the drafter's distribution before noise is added; 1 suits an exact drafter.
        noise_of: noise of any tokens at a depth (from 0), int64 ``[B, W', n]`` -> ``[B, W', n]``; recycled nodes
            bring tokens from outside the draft vocabulary.
    """

    noise: Callable[[int], Tensor]
    warp: Callable[[Tensor], Tensor]
    temperature: float
    sharpness: float = 1.0
    noise_of: Callable[[int, Tensor], Tensor] | None = None

    def score(self, logits: Tensor, depth: int, further: Tensor) -> Tensor:
        """Return the logarithm of ``softmax((c log q + G) / s)`` over what a depth may propose, ``[B, W', V_d + n]``.

        Args:
            logits: log q up to a constant for each beam, which cancels; ``[B, W', V_d + n]``.
            depth: from 0.
            further: the last n tokens of each beam, int64 ``[B, W', n]``.
        """
        noise = self.noise(depth).unsqueeze(1).float()
        known = noise.shape[2]
        scores = self.warp(logits.float().flatten(0, 1)).view(logits.shape) * (self.sharpness / self.temperature)
        scores[:, :, :known] += noise / self.temperature  # in place: the draft vocabulary is what takes the time
        if further.shape[2] and self.noise_of is not None:
            scores[:, :, known:] += self.noise_of(depth, further).float() / self.temperature
        return scores.log_softmax(dim=2)


@dataclass(frozen=True)
class Hints:
    """What is known of the next tokens besides the drafter's word.

    Args:
        coupling: noise of the coming draws, or None.
        recycled: nodes verified before, whose predictions are mixed into the drafter's, or None.
    """

    coupling: Coupling | None = None
    recycled: RecycledNodes | None = None

    def before(self, root: Tensor) -> Tensor:
        """Return the token before each root, int64 ``[B]``; without recycled nodes nobody asks, and it is the root."""
        return root if self.recycled is None else self.recycled.before

    def apply(self, logits: Tensor, depth: int, tokens: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Score what may follow each beam at a depth.

        Args:
            logits: the drafter's, ``[B, W', V_d]``.
            depth: from 0.
            tokens: last token of each beam, int64 ``[B, W']``.
            before: the token before it, int64 ``[B, W']``.

        Returns:
            Log-probabilities, float32 ``[B, W', V_d + n]``: of the draft vocabulary and of n further tokens,
            int64 ``[B, W', n]``, n = 0 without recycled nodes.
        """
        further = tokens.new_empty(*tokens.shape, 0)
        if self.recycled is not None:
            found = self.recycled.look_up(tokens, before)
            logits, further = self.recycled.blend(logits, found), found.tokens
        if self.coupling is not None:
            return self.coupling.score(logits, depth, further), further
        return logits.float().log_softmax(dim=2), further


def draft(  # noqa: PLR0913, PLR0917 - six that say what to draft, one that says how far
    drafter: Drafter,
    context: Tensor,
    root: Tensor,
    embed: Callable[[Tensor], Tensor],
    beam: BeamConfig,
    hints: Hints = Hints(),
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
        hints: noise of the coming draws, and nodes verified before; default neither.
        worth_going_on: tells from the path log-probabilities so far, ``[B, depths, W]``, whether another depth pays.

    Returns:
        Every beam kept at every drafted depth, in the verifier's token ids. A row for which the drafter's
        logits are not finite at some depth has ``-inf`` throughout: nothing of it must be proposed.
    """
    width, draft_token_ids = min(beam.width, len(drafter.draft_token_ids)), drafter.draft_token_ids
    embeddings = embed(root).unsqueeze(1)
    state = drafter.advance(drafter.initial_state(embeddings), embeddings)
    scores = torch.zeros(len(root), 1, device=context.device)
    tokens, before = root.unsqueeze(1), hints.before(root).unsqueeze(1)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for depth in range(beam.length):
        logits = drafter.logits(context.unsqueeze(1).expand(-1, state.shape[1], -1), state)
        choices, further = hints.apply(logits, depth, tokens, before)
        scores, parents, places = _best(scores, *choices.topk(width, dim=-1))
        if hints.recycled is not None:
            before = tokens.gather(1, parents)
        tokens = _token_ids(places, parents, draft_token_ids, further)
        kept.append((tokens, parents, scores))
        if depth + 1 < beam.length:
            if worth_going_on is not None and not worth_going_on(torch.stack([part[2] for part in kept], dim=1)):
                break
            state = state.gather(1, parents.unsqueeze(2).expand(-1, -1, state.shape[2]))
            state = drafter.advance(state, embed(tokens))
    return _stacked(kept)


def _token_ids(places: Tensor, parents: Tensor, draft_token_ids: Tensor, further: Tensor) -> Tensor:
    """Return the verifier's ids of the choices, int64 ``[B, W]``.

    Args:
        places: among the draft vocabulary and then a beam's further tokens, int64 ``[B, W]``.
        parents: the beam that each was a choice of, int64 ``[B, W]``.
        draft_token_ids: the draft vocabulary, int64 ``[V_d]``.
        further: of each beam, int64 ``[B, W', n]``.
    """
    if not further.shape[2]:
        return draft_token_ids[places]
    known = len(draft_token_ids)
    tokens = draft_token_ids[places.clamp(max=known - 1)]
    theirs = further.gather(1, parents.unsqueeze(2).expand(-1, -1, further.shape[2]))
    return torch.where(places < known, tokens, theirs.gather(2, (places - known).clamp(min=0).unsqueeze(2)).squeeze(2))


def _best(scores: Tensor, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, parents and places of the W best of all expansions, each ``[B, W]``; NaN comes first.

    Args:
        scores: of the beams, ``[B, W']``.
        values: of the W best choices of each beam, falling, ``[B, W', W]``.
        places: of these choices, int64 ``[B, W', W]``.
    """
    width = values.shape[2]
    if values.shape[1] == 1:
        return scores + values[:, 0], torch.zeros_like(places[:, 0]), places[:, 0]
    scores, best = (scores.unsqueeze(2) + values).flatten(1).topk(width, dim=1)
    return scores, best // width, places.flatten(1).gather(1, best)


def _stacked(kept: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Beams:
    """Put the depths together.

    Args:
        kept: of each depth tokens, parents and scores, each ``[B, W]``.
    """
    tokens, parents, scores = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
    # A single logit that is not finite makes all log-probabilities of its beam NaN, which a search keeps first of all;
    # a filtered token's -inf does not. Such a row proposes nothing: its beams never become valid nodes.
    unsound = scores.isnan().flatten(1).any(dim=1)
    return Beams(tokens=tokens, parents=parents, log_probs=scores.masked_fill(unsound.view(-1, 1, 1), -torch.inf))
