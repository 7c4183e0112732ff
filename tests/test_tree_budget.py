"""The tree size that maximises expected tokens per second, by brute force."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import asdict, replace

import pytest
import torch

from recurrent_drafting import BeamConfig, Verifier
from recurrent_drafting.beam_search import draft
from recurrent_drafting.draft_tree import Beams, DraftTree
from recurrent_drafting.tree_budget import NODE_COUNTS, DraftBudget, LatencyCurve, LatencyTable, batch_sizes
from tests.tiny import CONFIGS, make_drafter, make_verifier


def random_tree(seed: int, batch: int = 2, length: int = 2, width: int = 3) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    parents = torch.randint(width, (batch, length, width), generator=generator)
    parents[:, 0] = 0
    above = torch.zeros(batch, width)
    scores = []
    for depth in range(length):
        above = above.gather(1, parents[:, depth]) - 2 * torch.rand(batch, width, generator=generator)
        scores.append(above)
    tokens = torch.arange(width).expand(batch, length, width)
    return DraftTree.from_beams(
        torch.zeros(batch, dtype=torch.long), Beams(tokens, parents, torch.stack(scores, dim=1))
    )


def beams_of(tree: DraftTree, length: int = 2) -> torch.Tensor:
    """Return the path log-probabilities of an unpruned tree by depth, without the root."""
    return tree.log_probs[:, 1:].view(len(tree.log_probs), length, -1)


def random_curve(rng: random.Random, nodes: list[int]) -> LatencyCurve:
    seconds = sorted(rng.uniform(1, 4) for _ in nodes)
    return LatencyCurve(tuple(nodes), tuple(seconds), depth_seconds=rng.uniform(0, 1))


def expected_tokens(tree: DraftTree, row: int, size: int) -> float:
    """Return the most tokens that a connected tree of a size is expected to emit: 1 + sum of path probabilities."""
    probabilities = tree.log_probs[row].exp().tolist()
    return max(
        1 + sum(probabilities[node] for node in others)
        for others in itertools.combinations(range(1, tree.num_nodes), size - 1)
        if all(int(tree.parents[row, node]) in (0, *others) for node in others)
    )


@pytest.mark.parametrize("seed", range(25))
def test_best_nodes_maximises_expected_tokens_per_second(seed: int) -> None:
    rng = random.Random(seed)
    tree = random_tree(seed)
    nodes = sorted(rng.sample(range(1, tree.num_nodes + 1), 4))
    curve = random_curve(rng, nodes)
    rates = {
        size: sum(expected_tokens(tree, row, size) for row in range(2)) / (2 * curve.depth_seconds + seconds)
        for size, seconds in zip(nodes, curve.seconds, strict=True)
    }
    got = curve.best_nodes(beams_of(tree))
    assert got in nodes
    assert rates[got] == pytest.approx(max(rates.values()))


@pytest.mark.parametrize(
    ("nodes", "seconds", "depth_seconds", "best"),
    [
        ((1, 4, 7), (1.0, 1.0, 1.0), 0.0, 7),  # nodes are free: all of them
        ((1, 4, 7), (1.0, 9.0, 99.0), 0.0, 1),  # nodes cost more than they bring
        ((1, 4, 7), (1.0, 9.0, 99.0), 1e6, 7),  # a costly draft dwarfs them
        ((1, 4, 64), (1.0, 9.0, 9.0), 1e6, 7),  # more nodes than there are
        ((64, 128), (1.0, 1.0), 0.0, 7),
        ((2,), (1.0,), 0.0, 2),
    ],
)
def test_extreme_costs_choose_extreme_sizes(
    nodes: tuple[int, ...], seconds: tuple[float, ...], depth_seconds: float, best: int
) -> None:
    assert LatencyCurve(nodes, seconds, depth_seconds).best_nodes(beams_of(random_tree(0))) == best


def test_beams_of_probability_zero_add_nothing_and_among_equals_the_smaller_tree_wins() -> None:
    tokens = torch.tensor([[[1, 2]]])
    beams = Beams(tokens, torch.zeros_like(tokens), torch.tensor([[[-torch.inf, -torch.inf]]]))
    assert LatencyCurve((1, 3), (1.0, 1.0)).best_nodes(beams.log_probs) == 1


@pytest.mark.parametrize("max_nodes", [None, 2, 5])
@pytest.mark.parametrize("seed", range(25))
def test_next_depth_is_drafted_where_its_hits_and_misses_together_beat_the_best_rate_so_far(
    seed: int, max_nodes: int | None
) -> None:
    """A hit brings every path a further node as likely as its last, a miss none; nodes and drafting cost time."""
    rng = random.Random(seed)
    tree = random_tree(seed)
    nodes = sorted(rng.sample(range(1, 10), 3))
    seconds = tuple(sorted(rng.uniform(1, 4) for _ in nodes))
    curve = LatencyCurve(tuple(nodes), seconds, depth_seconds=rng.uniform(0, 0.5))
    paths = beams_of(tree).exp()

    def best_rate(depths: int, further: torch.Tensor) -> float:
        rows = [sorted(row.flatten().tolist(), reverse=True) for row in torch.cat([paths, further], dim=1)]
        most = len(rows[0]) if max_nodes is None else min(max_nodes - 1, len(rows[0]))
        return max(
            sum(1 + sum(row[: min(size - 1, most)]) for row in rows) / (depths * curve.depth_seconds + cost)
            for size, cost in zip(nodes, seconds, strict=True)
        )

    survival = min(float(paths[:, 1].sum() / paths[:, 0].sum()), 1)
    hit, miss, now = best_rate(3, paths[:, 1:]), best_rate(3, paths[:, :0]), best_rate(2, paths[:, :0])
    wanted = survival * hit + (1 - survival) * miss > now
    assert curve.worth_going_on(paths.log(), max_nodes=max_nodes) is wanted


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize(
    ("beam", "sizes"),
    [
        (BeamConfig(width=1, length=1), (1, 2)),
        (BeamConfig(width=3, length=3), (1, 2, 4, 6, 8, 10)),
        (BeamConfig(width=4, length=3), (1, 2, 4, 6, 8, 12, 13)),
        (BeamConfig(width=4, length=3, recycled_nodes=8), (1, 2, 4, 6, 8, 12, 13)),
        (BeamConfig(width=20, length=4), (*NODE_COUNTS, 81)),
    ],
)
def test_measured_curve_rises_over_the_promised_sizes(family: str, beam: BeamConfig, sizes: tuple[int, ...]) -> None:
    verifier = make_verifier(family, dtype=torch.float32)
    curve = LatencyCurve.measure(verifier, make_drafter(verifier), beam, repeats=2, prefix_length=200)
    assert curve.nodes == sizes
    assert len(curve.seconds) == len(sizes)
    assert curve.seconds[0] > 0
    assert curve.baseline_seconds > 0
    assert list(curve.seconds) == sorted(curve.seconds)
    assert curve.depth_seconds > 0
    assert [width for width, _ in curve.narrow] == [width for width in (2, 4, 6) if width < beam.width]
    assert all(seconds > 0 for _, seconds in curve.narrow)
    assert LatencyCurve.of(json.loads(json.dumps(asdict(curve)))) == curve


def test_model_without_a_stated_window_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verifier, "context_window", None)
    verifier = make_verifier("llama")
    curve = LatencyCurve.measure(verifier, make_drafter(verifier), BeamConfig(width=2, length=2), prefix_length=4)
    assert curve.nodes == (1, 2, 4, 5)


def test_drafting_goes_on_only_while_the_next_depth_is_expected_to_pay() -> None:
    """One node costs 1 s, each further one nothing; a depth costs 0.1 s: it must add more than a tenth of the rate."""
    curve = LatencyCurve(nodes=(1, 7), seconds=(1.0, 1.0), depth_seconds=0.1)
    sure = torch.tensor([[[0.9, 0.05, 0.05]]]).log()  # next depth: 1 token more
    doubtful = torch.tensor([[[0.1, 0.05, 0.05]]]).log()  # 0.2 tokens, one time in five; rate 1.2 / 1.1 per second
    assert curve.worth_going_on(sure)
    assert not curve.worth_going_on(doubtful)
    # Survival is extrapolated from the last two depths: 0.5 after 0.5 is no decline, 0.1 after 1.0 is.
    steady = torch.tensor([[[0.5, 0.0, 0.0], [0.5, 0.0, 0.0]]]).log()
    falling = torch.tensor([[[0.9, 0.1, 0.0], [0.1, 0.0, 0.0]]]).log()
    assert curve.worth_going_on(steady)
    assert not curve.worth_going_on(falling)


def test_no_depth_is_drafted_whose_nodes_cost_too_much_or_have_no_room() -> None:
    """The second of two sure tokens brings one more for 0.1 s of drafting and what a third node costs."""
    sure = torch.tensor([[[1.0]]]).log()
    assert LatencyCurve((1, 2, 3), (1.0, 1.0, 1.3), depth_seconds=0.1).worth_going_on(sure)  # 3 / 1.5 beats 2 / 1.1
    costly = LatencyCurve((1, 2, 3), (1.0, 1.0, 1.5), depth_seconds=0.1)
    assert not costly.worth_going_on(sure)  # 3 / 1.7 does not
    assert not LatencyCurve((1, 2, 3), (1.0, 1.0, 1.3), depth_seconds=0.1).worth_going_on(sure, max_nodes=2)


def test_only_drafted_depths_are_charged() -> None:
    """Two nodes: 1.5 tokens in 1 + 1.3 s; three: 1.6 in 1 + 1.5 s. Ten depths charged would make it three."""
    tokens = torch.tensor([[[1, 2]]])
    beams = Beams(tokens, torch.zeros_like(tokens), torch.tensor([[[0.5, 0.1]]]).log())
    assert LatencyCurve((1, 2, 3), (1.0, 1.3, 1.5), depth_seconds=1.0).best_nodes(beams.log_probs) == 2
    assert LatencyCurve((1, 2, 3), (1.0, 1.3, 1.5), depth_seconds=10.0).best_nodes(beams.log_probs) == 3


# --- whether to draft at all ---

CHEAP = LatencyCurve((1, 2, 4), (1.0, 1.1, 1.2), depth_seconds=0.1)
SURE = torch.tensor([[[0.9, 0.05]]]).log()
DOUBTFUL = torch.tensor([[[0.02, 0.01]]]).log()


def make_budget(curve: LatencyCurve = CHEAP, max_nodes: int = 4) -> DraftBudget:
    return DraftBudget(LatencyTable({1: curve}), BeamConfig(width=2, length=1), max_nodes)


def drafted_steps(budget: DraftBudget, log_probs: torch.Tensor, accepted: int, steps: int) -> list[int]:
    """Return which of some steps drafted."""
    drafted = []
    for step in range(steps):
        if budget.wants_draft(1):
            budget.choose(log_probs)
            budget.record(accepted)
            drafted.append(step)
    return drafted


@pytest.mark.parametrize(
    ("curve", "length", "max_nodes", "pays"),
    [
        (CHEAP, 1, 4, True),  # 2 tokens in 1.2 steps
        (CHEAP, 1, 1, False),  # no room for a drafted token
        (LatencyCurve((1, 2), (1.0, 1.8), 0.2), 1, 2, False),  # 2 tokens in 2 steps
        (LatencyCurve((1, 2), (1.0, 1.8), 0.19), 1, 2, True),
        (LatencyCurve((1, 2), (1.0, 1.8), 0.19, baseline_seconds=0.99), 1, 2, False),  # the baseline's own step counts
        (LatencyCurve((1, 5), (1.0, 1.5), 0.3), 1, 2, True),  # a tree of 2 costs at most what 5 cost
        (LatencyCurve((1, 5), (1.0, 2.0), 0.4), 1, 5, False),  # a single depth does not pay ...
        (LatencyCurve((1, 5), (1.0, 2.0), 0.4), 4, 5, True),  # ... four do: 5 tokens in 3.6 steps
    ],
)
def test_drafting_can_pay_if_full_acceptance_beats_the_baseline(
    curve: LatencyCurve, length: int, max_nodes: int, pays: bool
) -> None:
    assert curve.can_pay(BeamConfig(length=length), max_nodes) is pays


def test_what_is_copied_costs_no_drafting() -> None:
    curve = LatencyCurve((1, 5), (1.0, 2.0), 0.8)
    assert not curve.can_pay(BeamConfig(length=4), 5)  # 5 tokens in 5.2 steps
    assert curve.can_pay(BeamConfig(length=1, lookup_length=4), 5)  # 5 tokens in 2.8 steps


def test_what_cannot_pay_is_never_drafted() -> None:
    budget = make_budget(LatencyCurve((1, 2, 4), (1.0, 2.0, 4.0), depth_seconds=0.5))
    assert drafted_steps(budget, SURE, 1, 50) == []
    assert budget.hopeless


def test_a_draft_that_pays_never_pauses() -> None:
    budget = make_budget()
    assert drafted_steps(budget, SURE, 1, 200) == list(range(200))
    assert not budget.hopeless


def test_a_draft_that_does_not_pay_is_tried_ever_more_rarely_and_costs_less_than_three_per_cent() -> None:
    """Each doubtful draft costs about a tenth of a step: 16 bring the loss to the limit, then trials follow pauses."""
    budget = make_budget()
    drafted = drafted_steps(budget, DOUBTFUL, 0, 1000)
    gaps = [after - before - 1 for before, after in itertools.pairwise(drafted) if after - before > 1]
    assert gaps == [16, 32, 64, 128, 256, 256]
    assert budget.hopeless
    assert len(drafted) * CHEAP.depth_seconds < 0.03 * 1000


def test_a_drafter_that_promises_too_much_is_found_out() -> None:
    """Its probabilities promise a gain; none of its tokens is accepted."""
    budget = make_budget()
    drafted = drafted_steps(budget, SURE, 0, 400)
    assert len(drafted) < 120
    assert budget.calibration < 0.25


def test_drafting_comes_back_when_it_pays_again() -> None:
    budget = make_budget()
    drafted_steps(budget, DOUBTFUL, 0, 40)
    assert drafted_steps(budget, SURE, 1, 200)[-100:] == list(range(100, 200))


def test_narrow_beams_cost_what_was_timed_for_the_next_width() -> None:
    curve = LatencyCurve((1, 2), (1.0, 1.1), 0.8, narrow=((2, 0.2), (4, 0.4)))
    assert [curve.at_width(width).depth_seconds for width in (1, 2, 3, 4, 5, 10)] == [0.2, 0.2, 0.4, 0.4, 0.8, 0.8]
    assert LatencyCurve((1,), (1.0,), 0.8).at_width(1).depth_seconds == 0.8
    assert replace(curve, baseline_seconds=0.9).at_width(2).baseline_seconds == 0.9


def test_beams_are_as_wide_as_twice_the_largest_recent_tree_needs() -> None:
    """Only two of the eight nodes pay at first; then all do."""
    free = LatencyCurve((1, 2, 9), (1.0, 1.0, 9.0))
    budget = DraftBudget(LatencyTable({1: free}), BeamConfig(8, 1), max_nodes=9)
    assert budget.width(1) == 8
    for _ in range(8):
        assert budget.wants_draft(1)
        assert budget.choose(SURE) == 2
    assert budget.width(1) == 2
    budget = DraftBudget(LatencyTable({1: LatencyCurve((1, 4), (1.0, 1.01))}), BeamConfig(8, 1), max_nodes=9)
    for _ in range(8):
        assert budget.choose(torch.full((1, 1, 8), 0.1).log()) == 4
    assert budget.width(1) == 6


@pytest.mark.parametrize(
    ("seconds", "widest"),
    [
        ((1.0, 1.0, 5.0), math.inf),  # a second node is free
        ((1.0, 1.25, 2.0), 4.0),  # four nodes more, or one: a quarter of a step for each
        ((1.0, 1.5, 2.0), 4.0),
        ((2.0, 2.5, 6.0), 4.0),
        ((1.0, 2.0, 5.0), 1.0),
    ],
)
def test_beams_are_no_wider_than_the_cheapest_tree_pays_for(seconds: tuple[float, ...], widest: float) -> None:
    """The k-th best path of a depth has at most 1/k of the probability."""
    curve = LatencyCurve((1, 2, 5), seconds)
    assert curve.widest() == widest
    assert curve.widest(0.5) == widest / 2
    table = LatencyTable({1: LatencyCurve((1, 2), (1.0, 1.0)), 2: curve})
    budget = DraftBudget(table, BeamConfig(6, 1), max_nodes=7)
    assert [budget.width(rows) for rows in (1, 2, 3)] == [6, *2 * [max(2, min(6, int(min(widest, 6))))]]


def test_what_only_wide_beams_cannot_pay_is_drafted_with_narrow_ones() -> None:
    curve = LatencyCurve((1, 2), (1.0, 1.1), depth_seconds=2.0, narrow=((2, 0.1),))
    assert make_budget(curve).wants_draft(1)


@pytest.mark.parametrize("nodes", [2, 3, 5, 8])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_beams_as_wide_as_a_tree_has_drafted_nodes_give_the_tree_of_wider_ones(family: str, nodes: int) -> None:
    verifier = make_verifier(family)
    drafter = make_drafter(verifier)
    root, generator = torch.tensor([3, 5]), torch.Generator().manual_seed(nodes)
    context = torch.randn(2, verifier.hidden_size, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        wide, narrow = (
            DraftTree.from_beams(root, draft(drafter, context, root, verifier.embed, BeamConfig(width, 3)), nodes)
            for width in (10, nodes - 1)
        )
    for row in range(2):
        assert path_set(narrow, row) == path_set(wide, row)


def path_set(tree: DraftTree, row: int) -> set[tuple[int, ...]]:
    """Return the tokens of the path to each node."""
    paths = {0: (int(tree.tokens[row, 0]),)}
    for node in range(1, tree.num_nodes):
        paths[node] = (*paths[int(tree.parents[row, node])], int(tree.tokens[row, node]))
    return set(paths.values())


def test_calibration_is_the_ratio_of_accepted_to_predicted_tokens() -> None:
    budget = make_budget()
    assert budget.calibration == 1
    for _ in range(1000):
        budget.choose(SURE)
        budget.record(0 if _ % 2 else 1)
    # Half a token a step where the chosen tree promised 0.9, 0.95 or 1: the prior of 8 tokens hardly weighs.
    assert 0.49 < budget.calibration < 0.57
    without_a_choice = budget.calibration
    budget.record(5)
    assert budget.calibration == without_a_choice


def test_calibration_scales_what_is_expected() -> None:
    curve = LatencyCurve((1, 2, 3), (1.0, 1.3, 2.0))
    beams = torch.tensor([[[0.5, 0.4]]]).log()
    assert curve.best_nodes(beams) == 2  # 1.5 / 1.3 beats 1 / 1 and 1.9 / 2
    assert curve.best_nodes(beams, 0.5) == 1  # 1.25 / 1.3
    assert curve.best_nodes(beams, 6.0) == 2  # no probability rises above 1: 2 / 1.3 beats 3 / 2


def test_a_table_answers_with_the_smallest_batch_that_holds_the_rows() -> None:
    curves = {rows: LatencyCurve((1,), (float(rows),)) for rows in (1, 2, 4)}
    table = LatencyTable(curves)
    assert [table.at(rows).seconds[0] for rows in (1, 2, 3, 4, 9)] == [1, 2, 4, 4, 4]
    assert [batch_sizes(rows) for rows in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8], [1, 2, 4, 8, 16]]
