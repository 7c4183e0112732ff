"""Every family as verifier: a tree in one forward, windows, and the same text as the model itself."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from recurrent_drafting import AutoregressiveDecoder, Verifier
from tests.families import FAMILIES, largest_gap, plain, random_tokens, variants
from tests.test_identity import random_case, run_case

# Eager attention takes its softmax in float32 in most families.
TOLERANCE = {"sdpa": 1e-10, "eager": 5e-6}
# A family's other attention is the same code behind another kernel, and a window the harder case of a family that has
# one.
VARIANTS = [
    pytest.param(
        *(name, attention, windowed),
        id=f"{name}-{attention}{'-window' if windowed else ''}",
        marks=[pytest.mark.slow]
        * (attention != FAMILIES[name].attentions[0] or windowed != bool(FAMILIES[name].window)),
    )
    for name, attention, windowed in variants()
]
WINDOWED = [name for name, family in FAMILIES.items() if family.window]
# Texts per variant; a longer run calls check_texts with more.
CASES = 3


@pytest.mark.parametrize(("name", "attention", "windowed"), VARIANTS)
def test_every_node_of_a_tree_equals_its_branch_run_alone(name: str, attention: str, windowed: bool) -> None:
    verifier = Verifier(FAMILIES[name].model(attention, windowed=windowed))
    rng = random.Random(name)
    # With the window of 8, one row lies inside it, one at its edge, one far beyond.
    lengths = (3, 7, 25) if windowed else (1, 6, 13)
    # Paths longer than the window, too: there a node must no longer see its own root.
    nodes = 20 if windowed else 9
    gap = largest_gap(verifier, [random_tokens(rng, length) for length in lengths], rng, steps=3, nodes=nodes)
    assert gap <= TOLERANCE[attention]


def branch_gap(verifier: Verifier, lengths: tuple[int, ...], rng: random.Random, steps: int) -> float:
    """Grow branches from places of their own in each text; compare every token with the branch run alone.

    A first round of other branches is taken back before.

    Returns:
        The largest difference of any logit, relative to the largest logit.
    """
    texts = [random_tokens(rng, length) for length in lengths]
    cache = verifier.new_cache(len(texts), max(lengths) + 4 * steps)
    verifier.read(texts, cache)
    gap = 0.0
    for _ in range(2):
        cuts = [[rng.randint(1, length) for _ in range(4)] for length in lengths]
        tokens = [[random_tokens(rng, steps) for _ in range(4)] for _ in lengths]
        columns = []
        for depth in range(steps):
            ids = torch.tensor(tokens)[:, :, depth]
            columns.append(verifier.branch(ids, torch.tensor(cuts), depth, cache).logits)
            cache.keep([range(4)] * len(texts))
        cache.rewind(lengths)
        got = torch.stack(columns, dim=2)
        for row, text in enumerate(texts):
            for branch, cut in enumerate(cuts[row]):
                expected = plain(verifier.model, text[:cut] + tokens[row][branch])[0][cut:]
                gap = max(gap, float((got[row, branch] - expected).abs().max() / expected.abs().max()))
    return gap


@pytest.mark.parametrize(("name", "attention", "windowed"), VARIANTS)
def test_branches_at_every_place_of_a_text_equal_each_run_alone(name: str, attention: str, windowed: bool) -> None:
    verifier = Verifier(FAMILIES[name].model(attention, windowed=windowed))
    # With the window of 8, branches longer than it lose sight of their text, then of their own beginning.
    lengths, steps = ((3, 7, 25), 10) if windowed else ((1, 6, 13), 4)
    assert branch_gap(verifier, lengths, random.Random(name), steps) <= TOLERANCE[attention]


def generated(model: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return transformers' own greedy text, row by row: eager attention makes NaN of left padding in float64."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        texts.append(output[0, len(prompt) :].tolist())
    return texts


def check_texts(name: str, attention: str, windowed: bool, cases: int) -> None:
    """Compare a family's text with transformers' greedy text, and random drafts' text with the baseline's."""
    model = FAMILIES[name].model(attention, windowed=windowed)
    verifier = Verifier(model)
    baseline = AutoregressiveDecoder(verifier)
    rng = random.Random(name)
    prompts = [random_tokens(rng, length) for length in (12, 5, 9)]
    assert baseline.generate(prompts, max_new_tokens=16).sequences == generated(model, prompts, 16)
    for index in range(cases):
        case = random_case(rng)
        expected, got, _ = run_case(verifier, case, index)
        assert got.sequences == expected.sequences, f"case {index}: {case}"


@pytest.mark.parametrize("cases", [1, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "attention", "windowed"), VARIANTS)
def test_text_is_that_of_generate_and_of_any_draft(name: str, attention: str, windowed: bool, cases: int) -> None:
    check_texts(name, attention, windowed, cases)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_hidden_states_and_head_are_the_models_own(name: str, tied: bool) -> None:
    family = FAMILIES[name]
    model = family.model(windowed=family.window is not None, tie_word_embeddings=tied)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is tied
    verifier = Verifier(model)
    rng = random.Random(name)
    rows = [random_tokens(rng, length) for length in (20, 5, 12)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=9)
    mask = torch.arange(20) < torch.tensor([[len(row)] for row in rows])
    states = verifier.hidden_states(ids, mask)
    some = torch.tensor([60, 3, 17])
    for state, row in zip(states, rows, strict=True):
        logits, hidden = plain(model, row)
        tolerance = {"rtol": 0, "atol": TOLERANCE[family.attentions[0]] * float(hidden.abs().max())}
        torch.testing.assert_close(state[: len(row)], hidden, **tolerance)
        # The same hidden states in: nothing but the head and what follows it is compared.
        torch.testing.assert_close(verifier.head(hidden), logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(verifier.head(hidden, some), logits[:, some], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cohere", "cohere2", "granite", "gemma2", "gemma3"])
def test_what_follows_the_head_is_not_trivial_here(name: str) -> None:
    model = FAMILIES[name].model()
    logits, hidden = plain(model, random_tokens(random.Random(name), 9))
    assert (model.get_output_embeddings()(hidden) - logits).abs().max() > 0.1 * logits.abs().max()


@pytest.mark.parametrize("name", ["phi", "gptj", "codegen"])
def test_the_head_has_a_bias_here(name: str) -> None:
    assert FAMILIES[name].model().get_output_embeddings().bias.abs().max() > 0.1


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_matters_at_these_lengths(name: str) -> None:
    tokens = random_tokens(random.Random(name), 25)
    family = FAMILIES[name]
    narrow = family.model(windowed=True)
    wide = family.model(windowed=True, sliding_window=64)
    wide.load_state_dict(narrow.state_dict())
    near, far = plain(narrow, tokens)[0], plain(wide, tokens)[0]
    torch.testing.assert_close(near[:8], far[:8], rtol=0, atol=1e-10)
    moved = (near[8:] - far[8:]).abs().amax(dim=1)
    assert moved.min() > 1e-6
    assert moved.max() > 0.1
