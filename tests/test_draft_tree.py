"""The draft tree against brute force over plain paths."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recurrent_drafting.draft_tree import Beams, DraftTree

INF = math.inf
A, B, C, D = 10, 11, 12, 13
many = settings(max_examples=80, deadline=None, database=None, derandomize=True)


@st.composite
def beams(draw: st.DrawFn) -> Beams:
    """Draw a batch of beams: siblings distinct, equal tokens elsewhere, ties and barred beams."""
    batch, length, width = (draw(st.integers(1, 3)) for _ in range(3))
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    for _ in range(batch):
        above = [0.0] * width
        for depth in range(length):
            siblings: dict[int, set[int]] = {}
            places = [draw(st.integers(0, width - 1)) if depth else 0 for _ in range(width)]
            for place in places:
                taken = siblings.setdefault(place, set())
                tokens.append(draw(st.sampled_from(sorted(set(range(width + 1)) - taken))))
                taken.add(tokens[-1])
            above = [above[place] - draw(st.sampled_from([0.0, 0.5, 1.0, INF])) for place in places]
            parents += places
            scores += above
    size = (batch, length, width)
    return Beams(torch.tensor(tokens).view(size), torch.tensor(parents).view(size), torch.tensor(scores).view(size))


def roots(kept: Beams) -> Tensor:
    """Name each row's root by its row; the tokens of ``beams`` overlap with them."""
    return torch.arange(kept.tokens.shape[0])


def ancestors(tree: DraftTree, row: int, node: int) -> list[int]:
    """Follow parents from a node to the root, both included."""
    line = [node]
    while line[-1]:
        line.append(int(tree.parents[row, line[-1]]))
    return line


def path(tree: DraftTree, row: int, node: int) -> tuple[int, ...]:
    return tuple(int(tree.tokens[row, each]) for each in reversed(ancestors(tree, row, node)))


def beam_path(kept: Beams, row: int, depth: int, place: int) -> tuple[int, ...]:
    tokens: list[int] = []
    for level in range(depth, -1, -1):
        tokens.insert(0, int(kept.tokens[row, level, place]))
        place = int(kept.parents[row, level, place])
    return (int(roots(kept)[row]), *tokens)


def worked_example(max_nodes: int | None = None) -> DraftTree:
    """Build the docstring's tree: beams "a", "b"; then "a c", "a d"."""
    kept = Beams(
        tokens=torch.tensor([[[A, B], [C, D]]]),
        parents=torch.tensor([[[0, 0], [0, 0]]]),
        log_probs=torch.tensor([[[-0.5, -1.5], [-1.0, -2.0]]]),
    )
    return DraftTree.from_beams(torch.tensor([3]), kept, max_nodes)


def test_worked_example_of_the_docstring() -> None:
    tree = worked_example()
    assert tree.tokens.tolist() == [[3, A, B, C, D]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 1]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    assert tree.log_probs.tolist() == [[0, -0.5, -1.5, -1, -2]]
    assert tree.valid.all()
    assert (tree.num_nodes, tree.height) == (5, 2)


def test_worked_example_cut_to_its_best_nodes() -> None:
    tree = worked_example(max_nodes=4)  # d, at -2, leaves
    assert (tree.tokens.tolist(), tree.parents.tolist()) == ([[3, A, B, C]], [[0, 0, 0, 1]])
    tree = worked_example(max_nodes=3)  # b, at -1.5, leaves too: node 2 is c now
    assert (tree.tokens.tolist(), tree.parents.tolist()) == ([[3, A, C]], [[0, 0, 1]])
    assert tree.depths.tolist() == [[0, 1, 2]]


def test_root_only_proposes_nothing() -> None:
    tree = DraftTree.root_only(torch.tensor([4, 5]))
    assert (tree.num_nodes, tree.height) == (1, 0)
    assert tree.tokens.tolist() == [[4], [5]]
    assert tree.ancestor_mask().tolist() == [[[True]], [[True]]]
    assert tree.log_probs.dtype == torch.float32
    for token in range(7):
        assert [tree.child(row, 0, token) for row in (0, 1)] == [0, 0]


@many
@given(beams())
def test_tree_holds_exactly_the_beam_paths_of_every_depth(kept: Beams) -> None:
    tree = DraftTree.from_beams(roots(kept), kept)
    batch, length, width = kept.tokens.shape
    assert (tree.num_nodes, tree.height) == (length * width + 1, length)
    for row, depth in itertools.product(range(batch), range(length)):
        nodes = [node for node in range(tree.num_nodes) if tree.depths[row, node] == depth + 1]
        got = {path(tree, row, node): float(tree.log_probs[row, node]) for node in nodes}
        places = range(width)
        expected = {beam_path(kept, row, depth, w): float(kept.log_probs[row, depth, w]) for w in places}
        assert got == expected
        assert len(got) == len(nodes) == width


@many
@given(beams())
def test_only_beams_of_probability_zero_are_invalid(kept: Beams) -> None:
    tree = DraftTree.from_beams(roots(kept), kept)
    assert tree.valid.tolist() == (tree.log_probs > -INF).tolist()
    assert tree.valid[:, 0].all()


@many
@given(beams())
def test_parents_come_first_and_lie_one_depth_up(kept: Beams) -> None:
    full = DraftTree.from_beams(roots(kept), kept)
    for max_nodes in range(1, full.num_nodes + 1):
        tree = full.prune(max_nodes)
        assert tree.parents[:, 0].tolist() == [0] * tree.tokens.shape[0]
        assert (tree.parents[:, 1:] < torch.arange(1, max_nodes)).all()
        assert (tree.depths.gather(1, tree.parents)[:, 1:] == tree.depths[:, 1:] - 1).all()
        assert int(tree.depths.max()) <= tree.height


@many
@given(beams())
def test_pruned_tree_is_the_best_connected_tree_of_its_size(kept: Beams) -> None:
    full = DraftTree.from_beams(roots(kept), kept)
    probabilities = full.log_probs.double().exp()
    for row, size in itertools.product(range(len(probabilities)), range(1, full.num_nodes + 1)):
        expected = max(
            float(probabilities[row, [0, *others]].sum())
            for others in itertools.combinations(range(1, full.num_nodes), size - 1)
            if all(int(full.parents[row, node]) in (0, *others) for node in others)
        )
        tree = full.prune(size)
        assert tree.num_nodes == size
        assert math.isclose(float(tree.log_probs[row].double().exp().sum()), expected, rel_tol=1e-12)
        every_path = {path(full, row, node): float(full.log_probs[row, node]) for node in range(full.num_nodes)}
        kept_paths = {path(tree, row, node): float(tree.log_probs[row, node]) for node in range(size)}
        assert kept_paths.items() <= every_path.items()
        assert len(kept_paths) == size
        assert tree.valid[row].tolist() == (tree.log_probs[row] > -INF).tolist()


def test_among_equals_the_shallower_and_earlier_nodes_stay() -> None:
    """Large enough for sorts that keep the order of equals only when they are told to."""
    size = (2, 6, 9)
    parents = torch.randint(9, size, generator=torch.Generator().manual_seed(0))
    kept = Beams(torch.arange(9).expand(size), parents, torch.zeros(size))
    full = DraftTree.from_beams(roots(kept), kept)
    for max_nodes in range(1, full.num_nodes + 1):
        tree = full.prune(max_nodes)
        for name in ("tokens", "parents", "depths"):
            assert torch.equal(getattr(tree, name), getattr(full, name)[:, :max_nodes])


@many
@given(beams(), st.integers(1, 12))
def test_from_beams_with_a_budget_is_the_pruned_full_tree(kept: Beams, max_nodes: int) -> None:
    got = DraftTree.from_beams(roots(kept), kept, max_nodes)
    expected = DraftTree.from_beams(roots(kept), kept).prune(max_nodes)
    assert got.height == expected.height
    for name in ("tokens", "parents", "depths", "log_probs", "valid"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


@many
@given(beams(), st.integers(1, 10))
def test_ancestor_mask_follows_the_parents(kept: Beams, max_nodes: int) -> None:
    tree = DraftTree.from_beams(roots(kept), kept, max_nodes)
    mask = tree.ancestor_mask()
    assert mask.dtype == torch.bool
    for row, node in itertools.product(range(mask.shape[0]), range(tree.num_nodes)):
        assert set(mask[row, node].nonzero().flatten().tolist()) == set(ancestors(tree, row, node))


@many
@given(beams(), st.integers(1, 10))
def test_child_is_the_valid_child_with_the_token_or_none(kept: Beams, max_nodes: int) -> None:
    tree = DraftTree.from_beams(roots(kept), kept, max_nodes)
    queries = list(itertools.product(range(tree.tokens.shape[0]), range(tree.num_nodes), range(6)))
    for row, node, token in queries:
        child = tree.child(row, node, token)
        children = [
            each
            for each in range(1, tree.num_nodes)
            if (int(tree.parents[row, each]), int(tree.tokens[row, each])) == (node, token) and tree.valid[row, each]
        ]
        assert children == ([child] if child else [])


@many
@given(beams(), st.integers(1, 10))
def test_rows_of_a_batch_do_not_touch_each_other(kept: Beams, max_nodes: int) -> None:
    batched = DraftTree.from_beams(roots(kept), kept, max_nodes)
    for row in range(kept.tokens.shape[0]):
        part = slice(row, row + 1)
        single = Beams(kept.tokens[part], kept.parents[part], kept.log_probs[part])
        alone = DraftTree.from_beams(roots(kept)[part], single, max_nodes)
        for name in ("tokens", "parents", "depths", "log_probs", "valid"):
            assert torch.equal(getattr(batched, name)[part], getattr(alone, name))
        assert torch.equal(batched.ancestor_mask()[part], alone.ancestor_mask())
