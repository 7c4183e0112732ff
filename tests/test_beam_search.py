"""Beam search against plain enumeration with the same drafter."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recurrent_drafting import BeamConfig, Drafter, RecurrentDraftingConfig, SamplingConfig, beam_search, sampling
from recurrent_drafting.beam_search import Coupling, Hints
from recurrent_drafting.draft_tree import Beams, DraftTree

H, V, BATCH = 6, 12, 3
TOLERANCE = 1e-5  # scores are kept in float32
Scores = Callable[[int, int, Tensor], Tensor]  # row, depth, drafter logits [V_d] -> log-probabilities [V_d]


class World:
    """A random drafter over random embeddings, and its paths scored one at a time."""

    def __init__(self, seed: int = 0, **overrides: object) -> None:
        torch.manual_seed(seed)
        settings = {"hidden_size": H, "vocab_size": V, "num_draft_layers": 1, **overrides}
        self.drafter = Drafter(RecurrentDraftingConfig(**settings)).double()  # type: ignore[arg-type]
        self.drafter.head.weight.data *= 3
        self.embedding = torch.randn(V, H, dtype=torch.float64)
        self.context = torch.randn(BATCH, H, dtype=torch.float64)
        self.root = torch.randint(V, (BATCH,))

    @property
    def proposable(self) -> list[int]:
        return self.drafter.draft_token_ids.tolist()

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.embedding[token_ids]

    def draft(self, beam: BeamConfig, coupling: Coupling | None = None) -> Beams:
        with torch.no_grad():
            return beam_search.draft(self.drafter, self.context, self.root, self.embed, beam, Hints(coupling))

    def step(self, row: int, drafted: tuple[int, ...], scores: Scores | None = None) -> dict[int, float]:
        """Score every next token after the drafted ones, in the verifier's ids, by the training-time unroll."""
        known = self.embed(torch.tensor([[int(self.root[row]), *drafted]]))
        with torch.no_grad():
            logits = self.drafter.head(self.drafter.unroll(self.context[[row]], known)[0, -1])
        log_q = logits.log_softmax(dim=0) if scores is None else scores(row, len(drafted), logits)
        return dict(zip(self.proposable, log_q.tolist(), strict=True))

    def score(self, row: int, path: tuple[int, ...], scores: Scores | None = None) -> float:
        return sum(self.step(row, path[:depth], scores)[path[depth]] for depth in range(len(path)))


def paths_of(beams: Beams, row: int, depth: int) -> dict[tuple[int, ...], float]:
    """Return the paths that end at a depth (0-based) with their scores."""
    found = {}
    for place in range(beams.tokens.shape[2]):
        path: tuple[int, ...] = ()
        at = place
        for level in range(depth, -1, -1):
            path = (int(beams.tokens[row, level, at]), *path)
            at = int(beams.parents[row, level, at])
        found[path] = float(beams.log_probs[row, depth, place])
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"draft_vocab_size": 5}, {"rnn": False}, {"emb_norm": True, "exit_dim": 2 * H}]
)
def test_full_width_finds_the_best_of_all_paths(settings: dict[str, object]) -> None:
    """With W = V_d nothing is cut before depth 2, so depth 2 holds the best W of V_d * V_d paths."""
    world = World(**settings)
    width = len(world.proposable)
    beams = world.draft(BeamConfig(width=width, length=2))
    for row, depth in itertools.product(range(BATCH), (0, 1)):
        every = {path: world.score(row, path) for path in itertools.product(world.proposable, repeat=depth + 1)}
        best = sorted(every, key=lambda path: -every[path])[:width]
        got = paths_of(beams, row, depth)
        assert set(got) == set(best)
        assert got == pytest.approx({path: every[path] for path in best}, abs=TOLERANCE)


@pytest.mark.parametrize(("width", "length"), [(1, 5), (2, 4), (4, 3), (12, 3)])
def test_narrow_beams_equal_a_search_in_plain_python(width: int, length: int) -> None:
    world = World(seed=1)
    beams = world.draft(BeamConfig(width=width, length=length))
    assert beams.tokens.shape == beams.parents.shape == beams.log_probs.shape == (BATCH, length, width)
    assert beams.log_probs.dtype == torch.float32
    for row in range(BATCH):
        kept: dict[tuple[int, ...], float] = {(): 0.0}
        for depth in range(length):
            grown = {
                (*path, token): score + step
                for path, score in kept.items()
                for token, step in world.step(row, path).items()
            }
            kept = dict(sorted(grown.items(), key=lambda item: -item[1])[:width])
            assert paths_of(beams, row, depth) == pytest.approx(kept, abs=TOLERANCE)


@pytest.mark.parametrize("seed", range(5))
def test_beams_fall_along_paths_with_parents_in_range_and_siblings_apart(seed: int) -> None:
    beams = World(seed).draft(BeamConfig(width=4, length=4))
    assert (beams.parents[:, 0] == 0).all()
    assert ((beams.parents >= 0) & (beams.parents < 4)).all()
    above = beams.log_probs[:, :-1].gather(2, beams.parents[:, 1:])
    assert (beams.log_probs[:, 1:] <= above).all()
    assert (beams.log_probs[:, 0] <= 0).all()
    for row, depth in itertools.product(range(BATCH), range(4)):
        edges = set(zip(beams.parents[row, depth].tolist(), beams.tokens[row, depth].tolist(), strict=True))
        assert len(edges) == 4


@pytest.mark.parametrize("depths", [1, 2, 3, 4])
def test_drafting_ends_where_it_is_no_longer_worth_going_on(depths: int) -> None:
    world, beam = World(), BeamConfig(width=3, length=4)
    full = world.draft(beam)
    asked: list[Tensor] = []

    def worth_going_on(log_probs: Tensor) -> bool:
        asked.append(log_probs)
        return len(asked) < depths

    with torch.no_grad():
        cut = beam_search.draft(
            world.drafter, world.context, world.root, world.embed, beam, worth_going_on=worth_going_on
        )
    for name in ("tokens", "parents", "log_probs"):
        assert torch.equal(getattr(cut, name), getattr(full, name)[:, :depths])
    assert len(asked) == min(depths, 3)  # after the last depth there is nothing to ask
    for index, log_probs in enumerate(asked):
        assert torch.equal(log_probs, full.log_probs[:, : index + 1])


def test_width_above_the_draft_vocabulary_is_cut_to_it() -> None:
    world = World(draft_vocab_size=5)
    wide, fitting = (world.draft(BeamConfig(width=width, length=3)) for width in (9, 5))
    for name in ("tokens", "parents", "log_probs"):
        assert torch.equal(getattr(wide, name), getattr(fitting, name))


def test_draft_ids_come_out_as_the_verifiers_ids() -> None:
    world = World(draft_vocab_size=4)
    before = world.draft(BeamConfig(width=4, length=1))
    world.drafter.draft_token_ids.copy_(torch.tensor([2, 5, 7, 11]))
    after = world.draft(BeamConfig(width=4, length=1))
    assert torch.equal(after.tokens, world.drafter.draft_token_ids[before.tokens])
    deep = world.draft(BeamConfig(width=3, length=3))
    assert set(deep.tokens.flatten().tolist()) <= {2, 5, 7, 11}
    for path, score in paths_of(deep, 0, 2).items():
        assert score == pytest.approx(world.score(0, path), abs=TOLERANCE)


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    world = World(seed=2)
    beam = BeamConfig(width=3, length=3)
    together = world.draft(beam)
    for row in range(BATCH):
        with torch.no_grad():
            alone = beam_search.draft(world.drafter, world.context[[row]], world.root[[row]], world.embed, beam)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row])


@pytest.mark.parametrize(("temperature", "sharpness"), [(0.3, 1.0), (1.0, 1.3), (3.0, 0.7)])
@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 4}, {"temperature": 2.0, "top_p": 0.7}]
)
def test_coupled_score_is_the_chance_of_being_drawn(
    settings: dict[str, float], temperature: float, sharpness: float
) -> None:
    """Each depth scores log softmax((c log q + G) / s), q after the request's temperature and filters."""
    world = World(seed=3, draft_vocab_size=6)
    config = SamplingConfig(**settings)  # type: ignore[arg-type]
    noise = torch.stack([sampling.GumbelNoise(0, V, torch.device("cpu")).rows([b] * 2, [4, 5]) for b in range(BATCH)])
    noise = noise[:, :, world.drafter.draft_token_ids]

    def coupled(row: int, depth: int, logits: Tensor) -> Tensor:
        log_q = sampling.warp(logits.unsqueeze(0), config)[0].log_softmax(dim=0)
        return ((sharpness * log_q + noise[row, depth]) / temperature).log_softmax(dim=0)

    coupling = Coupling(lambda depth: noise[:, depth], lambda x: sampling.warp(x, config), temperature, sharpness)
    beams = world.draft(BeamConfig(width=6, length=2), coupling)
    for row in range(BATCH):
        every = {path: world.score(row, path, coupled) for path in itertools.product(world.proposable, repeat=2)}
        best = sorted(every.values(), reverse=True)[:6]
        got = paths_of(beams, row, 1)
        assert sorted(got.values(), reverse=True) == pytest.approx(best, abs=TOLERANCE)
        for path, score in got.items():
            assert score == pytest.approx(every[path], abs=TOLERANCE)


def test_coupled_chain_of_an_exact_drafter_drafts_what_the_verifier_draws() -> None:
    """Where q = p the best coupled token is argmax(log p + G), the draw itself, at any s."""
    world = World(seed=4)
    noise = torch.stack(
        [sampling.GumbelNoise(0, V, torch.device("cpu")).rows([b] * 3, [4, 5, 6]) for b in range(BATCH)]
    )
    for temperature in (0.1, 1.0, 10.0):
        coupling = Coupling(lambda depth: noise[:, depth], lambda logits: logits, temperature)
        beams = world.draft(BeamConfig(width=1, length=3), coupling)
        for row in range(BATCH):
            drawn: tuple[int, ...] = ()
            for depth in range(3):
                log_p = torch.tensor(list(world.step(row, drawn).values()))
                drawn = (*drawn, int((log_p + noise[row, depth]).argmax()))
            assert tuple(beams.tokens[row, :, 0].tolist()) == drawn


def test_filtered_tokens_are_not_proposed() -> None:
    world = World(seed=5)
    config = SamplingConfig(temperature=1.0, top_k=2)
    coupling = Coupling(lambda _: torch.zeros(BATCH, V), lambda x: sampling.warp(x, config), 1.0)
    beams = world.draft(BeamConfig(width=5, length=1), coupling)
    assert (beams.log_probs > -torch.inf).sum(dim=2).flatten().tolist() == [2] * BATCH


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("coupled", [False, True])
def test_drafter_that_is_not_finite_proposes_nothing(value: float, coupled: bool) -> None:
    world = World(seed=6)
    world.drafter.head.weight.data[3] = value
    coupling = Coupling(lambda _: torch.zeros(BATCH, V), lambda logits: logits, 1.0) if coupled else None
    beams = world.draft(BeamConfig(width=4, length=3), coupling)
    tree = DraftTree.from_beams(world.root, beams)
    assert tree.valid[:, 0].all()
    assert not tree.valid[:, 1:].any()
    assert ((tree.tokens >= 0) & (tree.tokens < V)).all()


def test_one_bad_row_leaves_the_others_proposing() -> None:
    world = World(seed=7)
    good = world.draft(BeamConfig(width=4, length=3))
    world.context[1] = torch.nan
    beams = world.draft(BeamConfig(width=4, length=3))
    assert (beams.log_probs[1] == -torch.inf).all()
    for row in (0, 2):
        assert torch.equal(beams.tokens[row], good.tokens[row])
        assert torch.isfinite(beams.log_probs[row]).all()
