"""The walk: the verifier's picks decide, the tree only says how many come at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from recurrent_drafting import SamplingConfig, acceptance
from recurrent_drafting.draft_tree import Beams, DraftTree
from recurrent_drafting.errors import NumericsError
from recurrent_drafting.sampling import Sampler

V = 8
ROOT, A, B, C, D, X, EOS = 0, 1, 2, 3, 4, 5, 6
GREEDY = SamplingConfig()


def docstring_tree(batch: int = 1) -> DraftTree:
    """Build the tree of ``DraftTree.from_beams``: nodes 0 root, 1 a, 2 b, 3 c (under a), 4 d (under a)."""
    kept = Beams(
        tokens=torch.tensor([[[A, B], [C, D]]] * batch),
        parents=torch.tensor([[[0, 0], [0, 0]]] * batch),
        log_probs=torch.tensor([[[-0.5, -1.5], [-1.0, -2.0]]] * batch),
    )
    return DraftTree.from_beams(torch.full((batch,), ROOT), kept)


def make_sampler(config: SamplingConfig = GREEDY, prompts: Sequence[Sequence[int]] = ((D,),)) -> Sampler:
    """Make a sampler whose rows have each just committed the root."""
    sampler = Sampler(config, prompts, range(len(prompts)), [EOS], V, torch.device("cpu"))
    for row in range(len(prompts)):
        sampler.commit(row, ROOT)
    return sampler


def node_logits(wanted: dict[int, dict[int, float]], nodes: int = 5) -> Tensor:
    """Give each node's logits by token; all others are -9."""
    logits = torch.full((1, nodes, V), -9.0)
    for node, scores in wanted.items():
        for token, score in scores.items():
            logits[0, node, token] = score
    return logits


def test_worked_example_of_the_docstring() -> None:
    logits = node_logits({0: {A: 1.0}, 1: {D: 1.0}, 4: {X: 1.0}})
    accepted = acceptance.walk(docstring_tree(), logits, make_sampler())
    assert accepted == acceptance.Acceptance(paths=[[0, 1, 4]], tokens=[[A, D, X]])


@pytest.mark.parametrize(
    ("picks", "path", "tokens"),
    [
        ({0: X}, [0], [X]),
        ({0: C}, [0], [C]),  # c is in the tree, but not below the root
        ({0: B, 2: C}, [0, 2], [B, C]),  # nor below b
        ({0: A, 1: A}, [0, 1], [A, A]),
        ({0: A, 1: C, 3: ROOT}, [0, 1, 3], [A, C, ROOT]),  # the root's own token is a token as any other
        ({0: ROOT}, [0], [ROOT]),
    ],
)
def test_walk_ends_at_the_first_pick_that_is_no_child_and_emits_it(
    picks: dict[int, int], path: list[int], tokens: list[int]
) -> None:
    logits = node_logits({node: {token: 1.0} for node, token in picks.items()})
    accepted = acceptance.walk(docstring_tree(), logits, make_sampler())
    assert (accepted.paths, accepted.tokens) == ([path], [tokens])


def test_beam_of_probability_zero_is_never_accepted() -> None:
    tree = docstring_tree()
    tree = dataclasses.replace(tree, valid=torch.tensor([[True, False, True, True, True]]))
    accepted = acceptance.walk(tree, node_logits({0: {A: 1.0}, 1: {D: 1.0}}), make_sampler())
    assert (accepted.paths, accepted.tokens) == ([[0]], [[A]])


def test_tree_of_the_root_alone_yields_the_bonus_token() -> None:
    tree = DraftTree.root_only(torch.tensor([ROOT]))
    accepted = acceptance.walk(tree, node_logits({0: {A: 1.0}}, nodes=1), make_sampler())
    assert (accepted.paths, accepted.tokens) == ([[0]], [[A]])


# Every node wants its first token; what the path has drafted so far decides whether it may have it.
WISHES = {0: {A: 4.0, B: 3.0}, 1: {A: 4.0, X: 3.0}, 2: {B: 4.0, X: 3.0}}


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, [A, A]),
        ({"repetition_penalty": 2.0}, [A, X]),  # a at 4 / 2
        ({"repetition_penalty": 1.2}, [A, A]),  # a at 4 / 1.2 = 3.33
        ({"presence_penalty": 1.5}, [A, X]),  # a at 2.5
        ({"presence_penalty": 0.5}, [A, A]),
        ({"frequency_penalty": 1.5}, [A, X]),
        ({"bad_words_ids": ((A, A),)}, [A, X]),  # barred by the drafted a
        ({"bad_words_ids": ((ROOT, A, A),)}, [A, X]),  # begins at the root
        ({"bad_words_ids": ((D, ROOT, A, A),)}, [A, X]),  # begins in the prompt
        ({"bad_words_ids": ((B, A),)}, [A, A]),  # another path's
        ({"bad_words_ids": ((A,),)}, [B, B]),
        ({"bad_words_ids": ((ROOT, A), (B, B))}, [B, X]),
    ],
)
def test_penalties_at_a_node_come_from_its_own_path(settings: dict[str, object], tokens: list[int]) -> None:
    sampler = make_sampler(SamplingConfig(**settings))  # type: ignore[arg-type]
    accepted = acceptance.walk(docstring_tree(), node_logits(WISHES), sampler)
    assert accepted.tokens == [tokens]


@pytest.mark.parametrize(("min_new_tokens", "tokens"), [(0, [EOS]), (1, [EOS]), (2, [A, EOS]), (3, [A, C, EOS])])
def test_minimum_length_counts_drafted_tokens(min_new_tokens: int, tokens: list[int]) -> None:
    """The root is the first new token; the k-th pick of the walk is number k + 1."""
    logits = node_logits({0: {EOS: 2.0, A: 1.0}, 1: {EOS: 2.0, C: 1.0}, 3: {EOS: 2.0, C: 1.0}})
    sampler = make_sampler(SamplingConfig(min_new_tokens=min_new_tokens))
    assert acceptance.walk(docstring_tree(), logits, sampler).tokens == [tokens]


def test_every_pick_is_committed_and_no_more() -> None:
    sampler = make_sampler(SamplingConfig(frequency_penalty=1.0))
    acceptance.walk(docstring_tree(), node_logits({0: {A: 1.0}, 1: {A: 9.0}}), sampler)
    penalties = -sampler.process(torch.zeros(1, V), [0])[0]
    assert penalties.tolist() == [1.0, 2.0, 0, 0, 0, 0, 0, 0]  # root once, a twice


def test_rows_end_at_their_own_depth() -> None:
    logits = torch.cat(
        [
            node_logits({0: {X: 1.0}}),
            node_logits({0: {A: 1.0}, 1: {C: 1.0}, 3: {C: 1.0}}),
            node_logits({0: {B: 1.0}, 2: {X: 1.0}}),
        ]
    )
    sampler = make_sampler(prompts=[[1], [1, 2, 3], [4, 5]])
    accepted = acceptance.walk(docstring_tree(3), logits, sampler)
    assert accepted.paths == [[0], [0, 1, 3], [0, 2]]
    assert accepted.tokens == [[X], [A, C, C], [B, X]]


@pytest.mark.parametrize("seed", range(20))
def test_walk_equals_picking_token_by_token(seed: int) -> None:
    """Sampled, with penalties, over random trees: the same picks as one row and one token at a time."""
    generator = torch.Generator().manual_seed(seed)
    batch, width, length = 3, 4, 3
    prompts = [[1], [2, 3, 4], [5, 6]]
    steps = -torch.rand(batch, length, width, generator=generator)
    tokens = torch.stack([torch.randperm(V, generator=generator)[:width] for _ in range(batch * length)])
    parents = torch.randint(width, (batch, length, width), generator=generator)
    parents[:, 0] = 0
    kept = Beams(tokens.view(batch, length, width), parents, steps.cumsum(dim=1))
    tree = DraftTree.from_beams(torch.full((batch,), ROOT), kept)
    logits = torch.randn(batch, tree.num_nodes, V, generator=generator, dtype=torch.float64)
    config = SamplingConfig(temperature=1.0, frequency_penalty=0.4, repetition_penalty=1.1, top_k=5, seed=seed)
    accepted = acceptance.walk(tree, logits, make_sampler(config, prompts))
    edges = [
        {
            (int(p), int(t)): node
            for node, (p, t) in enumerate(zip(tree.parents[r], tree.tokens[r], strict=True))
            if node
        }
        for r in range(batch)
    ]
    for row in range(batch):
        sampler = make_sampler(config, prompts)
        path, picks = [0], []
        while True:
            picks.append(int(sampler.pick(logits[row, path[-1]].unsqueeze(0), [row])))
            sampler.commit(row, picks[-1])
            if (path[-1], picks[-1]) not in edges[row]:
                break
            path.append(edges[row][path[-1], picks[-1]])
        assert (accepted.paths[row], accepted.tokens[row]) == (path, picks)


def test_bad_logits_matter_only_where_the_walk_comes_by() -> None:
    logits = node_logits({0: {A: 1.0}, 1: {X: 1.0}})
    logits[0, 2] = torch.nan
    assert acceptance.walk(docstring_tree(), logits, make_sampler()).tokens == [[A, X]]
    logits[0, 1] = torch.nan
    with pytest.raises(NumericsError, match="not finite at new token 2 of row 0"):
        acceptance.walk(docstring_tree(), logits, make_sampler())
