"""The exact-distribution harness: it passes the decoder, catches what is biased, and its numbers are right."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from recurrent_drafting import Drafter, SamplingConfig
from tests import joint_distribution as joint
from tests.joint_distribution import ALPHA, PROMPT, Run, Setting, Tiny
from tests.tiny import make_drafter

SAMPLES = 512


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return joint.make_tiny()


@pytest.fixture(scope="module")
def drafters(tiny: Tiny) -> dict[str, Drafter]:
    return {"random": make_drafter(tiny.verifier), "trained": joint.train_drafter(tiny)}


RUNS = [
    pytest.param(
        run,
        id=f"{run.setting.name}-{run.drafter}-{run.coupled}",
        marks=[pytest.mark.slow] * (run.drafter != "trained" or not run.coupled),
    )
    for run in joint.runs()
]


@pytest.mark.parametrize("run", RUNS)
def test_drafted_texts_follow_the_exact_distribution(tiny: Tiny, drafters: dict[str, Drafter], run: Run) -> None:
    counts, _ = joint.draw(tiny, drafters[run.drafter], run, SAMPLES)
    fit = joint.goodness_of_fit(counts, joint.exact_joint(tiny, run.setting))
    assert fit.samples == SAMPLES and fit.degrees >= 5
    assert fit.p_value > ALPHA


def test_a_trained_and_coupled_drafter_is_accepted_most(tiny: Tiny, drafters: dict[str, Drafter]) -> None:
    """Else the test above would look at steps that accept nothing."""
    rates = {
        (run.drafter, run.coupled): joint.draw(tiny, drafters[run.drafter], run, 128)[1].acceptance_by_depth[0]
        for run in joint.runs()
        if run.setting is joint.SETTINGS[0]
    }
    assert rates["random", False] < rates["trained", False] < rates["trained", True]
    assert rates["trained", True] > 0.9


def test_the_coins_of_apples_code_are_rejected_and_those_of_sampled_candidates_are_not(
    tiny: Tiny, drafters: dict[str, Drafter]
) -> None:
    facts, caught = joint.check_biased_rule(tiny, drafters["trained"])
    beams, sampled = facts["beams (biased)"], facts["drawn from q (exact)"]
    assert caught
    assert beams["p_value"] < 1e-6 and beams["total_variation"] > beams["detectable"]
    assert sampled["p_value"] > 1e-6 and sampled["total_variation"] < 1e-12


def test_the_coins_are_biased_with_a_random_drafter_too(tiny: Tiny, drafters: dict[str, Drafter]) -> None:
    exact = joint.exact_joint(tiny, joint.SETTINGS[0])
    rule = joint.CoinRule(tiny, drafters["random"], joint.SETTINGS[0], beams=True).joint()
    assert sum(rule.values()) == pytest.approx(1)
    assert joint.goodness_of_fit(joint.draw_from(rule, 4096, seed=0), exact).p_value < 1e-6


def test_a_text_of_probability_zero_is_rejected(tiny: Tiny) -> None:
    counts = Counter({(0, 2, 0, 0): 1, **dict.fromkeys([(0, 0, 0, 0)], 100)})
    assert joint.goodness_of_fit(counts, joint.exact_joint(tiny, joint.SETTINGS[-1])).p_value == 0


LOGS = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]


@pytest.mark.parametrize(
    ("sampling", "eos", "text", "expected"),
    [
        ({}, (), (), [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, (), (), [25 / 36.5, 9 / 36.5, 2.25 / 36.5, 0.25 / 36.5]),
        ({"top_k": 2}, (), (), [5 / 8, 3 / 8, 0, 0]),
        ({"top_p": 0.7}, (), (), [5 / 8, 3 / 8, 0, 0]),
        ({"top_p": 0.7, "temperature": 0.5}, (), (), [25 / 34, 9 / 34, 0, 0]),
        ({"top_p": 0.6, "top_k": 2}, (), (), [1, 0, 0, 0]),  # 5/8 alone reaches 0.6
        ({"min_p": 0.35}, (), (), [5 / 8, 3 / 8, 0, 0]),
        # The prompt holds 1, 3 and 0, whose logits are negative: log p becomes 2 log p.
        ({"repetition_penalty": 2.0}, (), (), [0.25 / 0.4925, 0.09 / 0.4925, 0.15 / 0.4925, 0.0025 / 0.4925]),
        ({"presence_penalty": math.log(2)}, (), (0, 0), [0.25 / 0.75, 0.3 / 0.75, 0.15 / 0.75, 0.05 / 0.75]),
        ({"frequency_penalty": math.log(2)}, (), (0, 0), [0.125 / 0.625, 0.3 / 0.625, 0.15 / 0.625, 0.05 / 0.625]),
        ({"min_new_tokens": 1}, (0,), (), [0, 0.6, 0.3, 0.1]),
        ({"min_new_tokens": 1}, (0,), (2,), [0.5, 0.3, 0.15, 0.05]),
        ({"bad_words_ids": ((PROMPT[-1], 1), (2, 2))}, (), (), [5 / 7, 0, 1.5 / 7, 0.5 / 7]),
        ({"bad_words_ids": ((PROMPT[-1], 1), (2, 2))}, (), (2,), [5 / 8.5, 3 / 8.5, 0, 0.5 / 8.5]),
    ],
)
def test_the_reference_pipeline_gives_hand_computed_probabilities(
    sampling: dict[str, float], eos: tuple[int, ...], text: tuple[int, ...], expected: list[float]
) -> None:
    setting = Setting("", SamplingConfig(**{"temperature": 1.0, **sampling}), eos)
    assert joint.next_token(LOGS, text, setting) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "degrees", "tail"), [(3.841, 1, 0.05), (6.635, 1, 0.01), (124.342, 100, 0.05)])
def test_the_chi_square_tail_agrees_with_printed_tables(value: float, degrees: int, tail: float) -> None:
    assert joint.chi_square_tail(value, degrees) == pytest.approx(tail, rel=1e-3)
    assert joint.noncentral_tail(value, degrees, 1e-9) == pytest.approx(tail, rel=1e-3)


@pytest.mark.slow
def test_a_deviation_of_the_stated_size_is_found_and_no_deviation_is_not(tiny: Tiny) -> None:
    """The stated power, by simulation: the least favourable deviation moves every cell by the same share."""
    exact = joint.exact_joint(tiny, joint.SETTINGS[1])
    samples, rounds = 4096, 200
    # Nothing pooled, so that both sides speak of the same cells.
    exact = {text: p for text, p in exact.items() if p * samples >= joint.MIN_EXPECTED}
    exact = {text: p / sum(exact.values()) for text, p in exact.items()}
    size = joint.detectable_variation(samples, len(exact) - 1)
    up = set(list(exact)[::2])
    mass = sum(exact[text] for text in up)
    moved = {text: p * (1 + size / mass if text in up else 1 - size / (1 - mass)) for text, p in exact.items()}
    assert joint.total_variation(moved, exact) == pytest.approx(size)

    def p_values(source: joint.Joint) -> torch.Tensor:
        draws = (joint.draw_from(source, samples, seed) for seed in range(rounds))
        return torch.tensor([joint.goodness_of_fit(counts, exact).p_value for counts in draws])

    assert (p_values(moved) < ALPHA).sum() >= 0.96 * rounds  # 0.99 is stated: fewer has probability 0.0002
    null = p_values(exact)
    assert (null < ALPHA).sum() == 0
    assert 0.01 < (null < 0.05).double().mean() < 0.12


@pytest.mark.slow
def test_the_command_writes_its_facts_and_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "joint.json"
    assert joint.main(["--samples", "1280", "--output", str(output)]) == 0
    facts = json.loads(output.read_text())
    assert facts["samples"] == 1280 and facts["rejections"] == 0
    assert len(facts["settings"]) >= 4
    assert set(facts["versions"]) == {"python", "torch", "transformers", "recurrent_drafting"}
    assert "0 rejections at alpha 1e-06; the biased rule is caught" in capsys.readouterr().out
