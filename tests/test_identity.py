"""The claim: the drafter never changes the text. Float64, so equality is exact."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from recurrent_drafting import (
    AutoregressiveDecoder,
    BeamConfig,
    GenerationOutput,
    SamplingConfig,
    SpeculativeDecoder,
    Verifier,
)
from tests.tiny import CONFIGS, VOCAB, NoisyOracleDecoder, make_drafter, make_verifier

CASES_PER_FAMILY = 250
# The first cases say what holds; the others look for what breaks it.
PARTS = [range(30), pytest.param(range(30, CASES_PER_FAMILY), marks=pytest.mark.slow)]


@dataclass(frozen=True)
class Case:
    prompts: list[list[int]]
    requests: list[int]
    sampling: SamplingConfig
    beam: BeamConfig
    oracle: bool
    probability: float
    as_tensor: bool
    max_new_tokens: int
    batch_size: int | None


def random_case(rng: random.Random) -> Case:
    batch = rng.choice([1, 1, 2, 3, 4, 7])
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(batch)]
    settings: dict[str, object] = {"temperature": rng.choice([0.0, 0.0, 0.5, 1.0, 1.5]), "seed": rng.randrange(1000)}
    if rng.random() < 0.5:
        settings["top_k"] = rng.choice([0, 3, 20])
        settings["top_p"] = rng.choice([1.0, 0.9, 0.5])
        settings["min_p"] = rng.choice([0.0, 0.05])
    if rng.random() < 0.4:
        settings["repetition_penalty"] = rng.choice([1.0, 1.2])
        settings["presence_penalty"] = rng.choice([0.0, 0.5])
        settings["frequency_penalty"] = rng.choice([0.0, 0.7])
        settings["min_new_tokens"] = rng.choice([0, 6])
        settings["bad_words_ids"] = rng.choice([(), ((5,), (7, 9))])
    width, length = rng.choice([(1, 4), (2, 3), (3, 5), (4, 4), (5, 3), (10, 5)])
    max_nodes, lookup_length = rng.choice([None, None, 3, 9, 16]), rng.choice([0, 2, 9])
    return Case(
        prompts=prompts,
        requests=rng.sample(range(100), batch),
        sampling=SamplingConfig(**settings),
        beam=BeamConfig(width, length, max_nodes, rng.choice([0.0, 1.0]), lookup_length, rng.choice([0, 5, 64])),
        oracle=rng.random() < 0.7,
        probability=rng.uniform(0.5, 0.9),
        as_tensor=rng.random() < 0.5,
        max_new_tokens=rng.choice([1, 2, 16, 24]),
        batch_size=rng.choice([None, None, 1, 2]),
    )


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    return ids, mask


def build_decoder(verifier: Verifier, case: Case, seed: int) -> SpeculativeDecoder:
    drafter = make_drafter(verifier, seed=seed, draft_vocab_size=30 if seed % 2 else None)
    if case.oracle:
        return NoisyOracleDecoder(verifier, drafter, case.beam, case.probability, seed)
    return SpeculativeDecoder(verifier, drafter, case.beam)


def run_case(
    verifier: Verifier, case: Case, seed: int
) -> tuple[GenerationOutput, GenerationOutput, SpeculativeDecoder]:
    """Return the baseline's output, the speculative decoder's, and that decoder for its counts."""
    options = {"max_new_tokens": case.max_new_tokens, "sampling": case.sampling, "request_ids": case.requests}
    expected = AutoregressiveDecoder(verifier).generate(case.prompts, **options)
    decoder = build_decoder(verifier, case, seed)
    if isinstance(decoder, NoisyOracleDecoder):
        decoder.truth = expected.sequences
    inputs = left_padded(case.prompts) if case.as_tensor else (case.prompts,)
    return expected, decoder.generate(*inputs, **options, batch_size=case.batch_size), decoder


@pytest.mark.parametrize("part", PARTS, ids=["some", "the others"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_speculative_text_equals_baseline(family: str, part: range, capsys: pytest.CaptureFixture[str]) -> None:
    verifier = make_verifier(family)
    rng = random.Random(family)
    cases = [random_case(rng) for _ in range(CASES_PER_FAMILY)]
    steps = partial = moved = 0
    for index in part:
        expected, got, decoder = run_case(verifier, cases[index], index)
        assert got.sequences == expected.sequences, f"case {index}: {cases[index]}"
        assert got.finish_reasons == expected.finish_reasons
        if isinstance(decoder, NoisyOracleDecoder):
            steps += decoder.steps
            partial += decoder.partly_accepted
            moved += decoder.moved
    with capsys.disabled():
        print(
            f"\n{family}: {len(part)} cases identical; oracle steps {steps}: "
            f"{partial / steps:.0%} partly accepted, {moved / steps:.0%} keep non-contiguous rows"
        )
    assert partial / steps >= 0.4
    assert moved / steps >= 0.2
