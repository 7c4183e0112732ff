"""Prompt lookup against brute force: the longest repeat, and how copies join the drafter's beams."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_drafting import AutoregressiveDecoder, BeamConfig, SpeculativeDecoder, Verifier
from recurrent_drafting.draft_tree import Beams, DraftTree
from recurrent_drafting.prompt_lookup import MAX_MATCH, Copies, RepeatIndex, best_chain, join
from tests.test_draft_tree import beam_path, beams, path, roots
from tests.tiny import CONFIGS, make_drafter, make_verifier

many = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def longest_repeat(text: list[int]) -> int | None:
    """Return where the longest earlier repeat of the end ends, the latest among equals."""
    best, longest, compared = None, 0, 0
    for end in range(len(text) - 1, 0, -1):
        if longest == 0 and text[end - 1] == text[-1]:
            best, longest = end, 1
        if end == 1 or text[end - 2 : end] != text[-2:]:
            continue
        length = 2
        while length < min(end, MAX_MATCH) and text[end - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        compared += 1
        if compared <= 16 and length > longest:
            best, longest = end, length
    return best


@many
@given(text=st.lists(st.integers(0, 3), max_size=60), cut=st.integers(0, 60), most=st.integers(1, 12))
def test_what_followed_the_longest_repeat_is_copied(text: list[int], cut: int, most: int) -> None:
    index = RepeatIndex(text[:cut])
    index.extend(text[cut:])
    tokens, log_probs = index.continuation(most)
    source = longest_repeat(text)
    if source is None:
        assert (tokens, log_probs) == ([], [])
        return
    grown = list(text)
    for offset in range(most):  # a repeat that runs into the end copies the copy
        grown.append(grown[source + offset])
    assert tokens == grown[len(text) :]
    assert len(log_probs) == most and all(value < 0 for value in log_probs)
    # The further a copy goes, the longer the repeat: without a record each token is surer than the one before.
    assert RepeatIndex(text).continuation(most)[1] == sorted(RepeatIndex(text).continuation(most)[1])


def test_a_record_of_broken_repeats_lowers_the_next_one() -> None:
    broken, kept = RepeatIndex([1, 2, 3]), RepeatIndex([1, 2, 3])
    for fourth in (4, 5, 6, 7):
        broken.extend([1, 2, fourth])  # after "1 2" never what came before
        kept.extend([1, 2, 3])
    for index in (broken, kept):
        index.extend([9, 1, 2])
    assert broken.continuation(1)[1][0] < math.log(0.3) < math.log(0.5) < kept.continuation(1)[1][0]


@st.composite
def copies(draw: st.DrawFn, batch: int) -> Copies:
    reach = draw(st.integers(1, 5))
    tokens = [[draw(st.integers(0, 4)) for _ in range(reach)] for _ in range(batch)]
    log_probs = [
        [draw(st.sampled_from([-0.02, -0.5, -2.0])) for _ in range(reach)]
        if draw(st.booleans())
        else [-math.inf] * reach
        for _ in range(batch)
    ]
    return Copies(torch.tensor(tokens), torch.tensor(log_probs))


def odds(probability: float) -> float:
    probability = min(max(probability, 1e-3), 1 - 1e-3)
    return math.log(probability / (1 - probability))


def reference(kept: Beams, copied: Copies, row: int) -> dict[tuple[int, ...], float]:
    """Return the log-probability of every proposed path, by the definition."""
    _, length, width = kept.tokens.shape
    own = {(int(roots(kept)[row]),): 0.0}
    for depth in range(length):
        for place in range(width):
            if kept.log_probs[row, depth, place] > -math.inf:
                own[beam_path(kept, row, depth, place)] = float(kept.log_probs[row, depth, place])
    chain = [(int(roots(kept)[row]),)]
    pooled, rest = {chain[0]: 0.0}, {}
    if copied.log_probs[row, 0] > -math.inf:
        for depth, token in enumerate(copied.tokens[row].tolist()):
            before, here = chain[-1], (*chain[-1], token)
            repeat = math.exp(copied.log_probs[row, depth])
            if before in own and depth < length:
                q = math.exp(own[here] - own[before]) if here in own else 0.01
                q = min(max(q, 1e-3), 1 - 1e-3)
                p = 1 / (1 + math.exp(-(0.7 + 0.7 * odds(repeat) + 0.5 * odds(q))))
                rest[before] = math.log((1 - p) / (1 - q))
            else:
                p = repeat
            pooled[here] = pooled[before] + math.log(p)
            chain.append(here)
    result, moved = dict(pooled), {line: pooled[line] - own[line] for line in pooled if line in own}
    for line in sorted(own.keys() - pooled.keys(), key=len):
        moved[line] = moved[line[:-1]] + rest.get(line[:-1], 0.0)
        result[line] = min(own[line] + moved[line], result[line[:-1]])
    return result


@many
@given(st.data())
def test_copies_join_the_beams_as_defined(data: st.DataObject) -> None:
    kept = data.draw(beams())
    copied = data.draw(copies(len(kept.tokens)))
    joined = join(kept, copied)
    assert joined.tokens.shape == joined.parents.shape == joined.log_probs.shape
    tree = DraftTree.from_beams(roots(kept), joined)
    for row in range(len(kept.tokens)):
        got: dict[tuple[int, ...], float] = {}
        for node in range(tree.num_nodes):
            if tree.valid[row, node]:
                line = path(tree, row, node)
                assert line not in got  # siblings stay distinct
                got[line] = float(tree.log_probs[row, node])
        expected = reference(kept, copied, row)
        assert got.keys() == expected.keys()
        assert all(math.isclose(got[line], expected[line], abs_tol=1e-3) for line in got)


@many
@given(st.data())
def test_the_best_nodes_of_joined_beams_stay_connected(data: st.DataObject) -> None:
    kept = data.draw(beams())
    joined = join(kept, data.draw(copies(len(kept.tokens))))
    assert not joined.log_probs.isnan().any()
    tree = DraftTree.from_beams(roots(kept), joined, data.draw(st.integers(1, 12)))
    above = tree.valid.gather(1, tree.parents)
    assert bool((above | ~tree.valid).all()) and bool((tree.depths.gather(1, tree.parents) <= tree.depths).all())


def test_rows_without_a_repeat_are_left_as_they_are() -> None:
    kept = Beams(torch.tensor([[[4, 5]]]), torch.zeros(1, 1, 2, dtype=torch.long), torch.tensor([[[-0.5, -1.5]]]))
    joined = join(kept, Copies.of([RepeatIndex([1, 2, 3])], 2))
    assert joined.log_probs.tolist() == [[[-0.5, -1.5, -math.inf], [-math.inf, -math.inf, -math.inf]]]


@many
@given(st.data())
def test_of_two_chains_the_one_that_is_expected_to_go_further_is_chosen(data: st.DataObject) -> None:
    kept = data.draw(beams().filter(lambda drawn: drawn.tokens.shape[2] == 1))
    batch, length, _ = kept.tokens.shape
    drawn = data.draw(copies(batch))
    copied = Copies(*(part.repeat(1, length)[:, :length] for part in (drawn.tokens, drawn.log_probs)))
    tokens, expected = best_chain(kept, copied)
    for row in range(batch):
        gains = []
        for chain in (kept.tokens[row, :, 0].tolist(), copied.tokens[row].tolist()):
            paths = reference(kept, copied, row)
            lines = [(int(roots(kept)[row]), *chain[: depth + 1]) for depth in range(length)]
            gains.append(sum(math.exp(paths.get(line, -math.inf)) for line in lines))
        assert math.isclose(float(expected[row]), max(gains), abs_tol=1e-2)
        if abs(gains[0] - gains[1]) > 1e-2:
            source = kept.tokens[row, :, 0] if gains[0] > gains[1] else copied.tokens[row]
            assert tokens[row].tolist() == source.tolist()


def make_looping_verifier(family: str) -> Verifier:
    """Build a verifier whose next token depends on the last one alone, so that greedy text falls into a loop."""
    verifier = make_verifier(family)
    for name, weight in verifier.model.named_parameters():
        if "o_proj" in name or "attn.c_proj" in name or "wpe" in name:
            torch.nn.init.zeros_(weight)
    return Verifier(verifier.model)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("max_nodes", [None, 6])
def test_a_loop_is_copied_further_than_the_drafter_looks(family: str, max_nodes: int | None) -> None:
    verifier = make_looping_verifier(family)
    prompts = [[5, 9], [7, 1, 3], [11]]
    baseline = AutoregressiveDecoder(verifier).generate(prompts, max_new_tokens=90)
    drafter = make_drafter(verifier)
    taus = []
    for lookup_length in (0, 9):
        beam = BeamConfig(width=3, length=2, max_nodes=max_nodes, lookup_length=lookup_length)
        output = SpeculativeDecoder(verifier, drafter, beam).generate(prompts, max_new_tokens=90)
        assert output.sequences == baseline.sequences
        taus.append(output.stats.tau)
        longest = len(output.stats.accepted) - 1
    assert taus[1] > 1.5 * taus[0] and longest > 2
