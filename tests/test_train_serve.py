"""Simulated steps are served steps; every fault between training and serving is found."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from recurrent_drafting import AutoregressiveDecoder, BeamConfig, Drafter, Verifier, train_serve
from recurrent_drafting.errors import DataError, NumericsError
from recurrent_drafting.token_rows import EncodedRow
from tests.mutants import Mutant, applied
from tests.tiny import VOCAB, make_drafter, make_verifier

BEAMS = [BeamConfig(width=6, length=4), BeamConfig(width=2, length=3), BeamConfig(width=5, length=5, max_nodes=9)]
# Each makes training see something else than serving does.
FAULTS = [
    Mutant("context one too late", "trainer", "hidden[index, at - 1]", "hidden[index, at]"),
    Mutant("context one too early", "trainer", "hidden[index, at - 1]", "hidden[index, at - 2]"),
    Mutant("tree of another size", "trainer", "DraftTree.from_beams(root, beams, beam.max_nodes)",
           "DraftTree.from_beams(root, beams, 3)"),
    Mutant("one token too few per step", "trainer", "roots[i] += emitted", "roots[i] += max(emitted - 1, 1)"),
    Mutant("only the first depth counts", "trainer", "for token in text:", "for token in text[:1]:"),
    Mutant("positions of one forward are one too high", "verifier",
           "positions = torch.arange(input_ids.shape[1], device=self.device).expand_as(input_ids)",
           "positions = torch.arange(1, input_ids.shape[1] + 1, device=self.device).expand_as(input_ids)"),
    Mutant("the served context is the root's", "decoding", "path[-1] for path in accepted.paths",
           "path[0] for path in accepted.paths"),
]  # fmt: skip


def random_prompts(count: int = 6) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, VOCAB) for _ in range(2 + index)] for index in range(count)]


def knowing_drafter(verifier: Verifier) -> Drafter:
    """Start a drafter from the verifier's head: it accepts a good part of its own context's guesses."""
    from recurrent_drafting.trainer import initialise_from_verifier

    drafter = make_drafter(verifier)
    initialise_from_verifier(drafter, verifier, torch.arange(VOCAB))
    return drafter


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def float64(request: pytest.FixtureRequest) -> tuple[Verifier, Drafter]:
    verifier = make_verifier(request.param)
    return verifier, knowing_drafter(verifier)


@pytest.mark.parametrize(
    "beam", [BEAMS[0], *(pytest.param(beam, marks=pytest.mark.slow) for beam in BEAMS[1:])], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_simulated_steps_are_served_steps(family: str, dtype: torch.dtype, beam: BeamConfig) -> None:
    verifier = make_verifier(family, dtype=dtype)
    report = train_serve.compare(verifier, knowing_drafter(verifier), random_prompts(), beam, 40)
    assert report.simulated.accepted == report.served.accepted
    assert report.near_ties == 0
    assert report.dtype == ("float64" if dtype == torch.float64 else "float32")
    assert (report.simulated.tokens, report.simulated.row_steps) == (report.served.tokens, report.served.row_steps)
    assert report.served.tau > 1.03  # something was accepted, so equality says something
    assert f"served tau {report.served.tau:.3f}" in report.summary() and "near-ties" not in report.summary()
    assert verifier.dtype == dtype


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_replies_that_end_early_count_alike(float64: tuple[Verifier, Drafter], limit: int) -> None:
    verifier, drafter = float64
    report = train_serve.compare(verifier, drafter, random_prompts(), BEAMS[0], limit)
    assert report.served.tokens == report.simulated.tokens <= 6 * limit
    assert report.simulated.accepted == report.served.accepted


def test_an_end_of_sequence_within_a_step_counts_alike(float64: tuple[Verifier, Drafter]) -> None:
    verifier, drafter = float64
    texts = AutoregressiveDecoder(verifier).generate(random_prompts(), max_new_tokens=12, eos_token_ids=()).sequences
    ends = {text[index] for index, text in enumerate(texts)}  # replies of different lengths, some of one token
    kept = verifier.model.generation_config.eos_token_id
    verifier.model.generation_config.eos_token_id = sorted(ends)
    try:
        report = train_serve.compare(verifier, drafter, random_prompts(), BEAMS[0], 12)
    finally:
        verifier.model.generation_config.eos_token_id = kept
    assert report.served.tokens < 6 * 12
    assert report.simulated.accepted == report.served.accepted


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_found(float64: tuple[Verifier, Drafter], fault: Mutant) -> None:
    verifier, drafter = float64
    beam = BeamConfig(width=6, length=4)
    if verifier.model.config.model_type == "llama" and "positions" in fault.name:
        pytest.skip("rotary positions are relative: shifting all of them changes nothing")
    with applied(fault), pytest.raises(NumericsError, match="training and serving disagree on") as caught:
        train_serve.compare(verifier, drafter, random_prompts(), beam, 40)
    assert caught.value.exit_code == 6
    assert "simulated [" in str(caught.value) and "served [" in str(caught.value)


def test_a_difference_in_float32_is_rounding_only_if_float64_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise on the states of one forward, in float32 alone, is what rounding looks like; in both it is a fault."""
    verifier = make_verifier("llama", dtype=torch.float32)
    drafter, exact = knowing_drafter(verifier), Verifier.hidden_states

    def noisy(kinds: set[torch.dtype]) -> Callable[..., torch.Tensor]:
        def states(self: Verifier, *args: torch.Tensor) -> torch.Tensor:
            hidden = exact(self, *args)
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=hidden.dtype)
            return hidden + 2 * noise if hidden.dtype in kinds else hidden

        return states

    monkeypatch.setattr(Verifier, "hidden_states", noisy({torch.float32}))
    report = train_serve.compare(verifier, drafter, random_prompts(), BEAMS[0], 40)
    assert report.near_ties > 0 and "rounding near-ties" in report.summary()
    assert f"(simulated {report.simulated.accepted})" in report.summary()
    monkeypatch.setattr(Verifier, "hidden_states", noisy({torch.float32, torch.float64}))
    with pytest.raises(NumericsError, match="in float64"):
        train_serve.compare(verifier, drafter, random_prompts(), BEAMS[0], 40)


def test_prompts_end_before_the_first_reply_token() -> None:
    rows = [
        EncodedRow([5, 6, 7, 8, 9], [False, False, True, False, True]),
        EncodedRow([5, 6], [True, True]),
        EncodedRow([5, 6], [False, False]),
        EncodedRow([3, 4], [False, True]),
    ]
    assert train_serve.prompts_of(rows) == [[5, 6], [3]]
    assert train_serve.prompts_of(rows, 1) == [[5, 6]]
    verifier = make_verifier("llama")
    with pytest.raises(DataError, match="expected an evaluation row with a prompt"):
        train_serve.compare(verifier, make_drafter(verifier), train_serve.prompts_of(rows[1:3]), BEAMS[0], 4)
