"""The proposer's bookkeeping against steps as vLLM's runner makes them; needs vLLM, without an engine.

``test_vllm_engine.py`` runs the real engine.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recurrent_drafting import BeamConfig, Drafter, beam_search
from recurrent_drafting.errors import ModelError, UsageError
from tests.tiny import make_drafter, make_verifier

pytest.importorskip("vllm")
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from recurrent_drafting import vllm_proposer
from recurrent_drafting.vllm_proposer import RecurrentDraftingProposer, RejectionSampler, Sampler, rejection_sampler

LENGTH, MAX_MODEL_LEN = 3, 64
VERIFIER = make_verifier("llama")


class Table(VocabParallelEmbedding):
    """A table of embeddings without an engine's processes: the verifier's own rows, or a second table."""

    def __init__(self, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.embedding_dim = embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        return VERIFIER.embed(ids)


class Head(ParallelLMHead):
    """A head of the embeddings' size, which is a table by its class."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embedding_dim = VERIFIER.hidden_size


class Target(nn.Module):
    """A target as vLLM builds Gemma: a factor on the embeddings, logits from hidden rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tied = [Table(VERIFIER.hidden_size)] * 2
        self.per_layer, self.lm_head = Table(VERIFIER.hidden_size + 1), Head()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float16))  # as of a quantised target
        self.config = SimpleNamespace(hidden_size=VERIFIER.hidden_size, vocab_size=VERIFIER.vocab_size)

    def embed_input_ids(self, ids: Tensor) -> Tensor:
        return VERIFIER.embed(ids) * 7.0

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.fixture
def drafter(tmp_path: Path) -> Drafter:
    drafter = make_drafter(VERIFIER)
    drafter.save_pretrained(tmp_path)
    return drafter


@pytest.fixture
def engine(drafter: Drafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Target]:
    """Return a loaded proposer and its target; vLLM's samplers are put back afterwards."""
    monkeypatch.setattr(Sampler, "forward", lambda _sampler: None)
    # As vLLM's does for the last row of each request.
    monkeypatch.setattr(RejectionSampler, "forward", lambda _sampler, _metadata: sample())
    # The engine's own has kernels that only a worker sets up.
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", vllm_proposer.expand_batch_to_tokens)
    proposer = RecurrentDraftingProposer(config(speculator_path=str(tmp_path)))
    target = Target()
    proposer.load_model(target)
    return proposer, target


def config(**additional: str) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=LENGTH),
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN, model="base", dtype=torch.float64),
        additional_config=additional,
    )


def sample() -> None:
    Sampler.forward(Sampler.__new__(Sampler))


def run_step(
    engine: tuple[Any, Target], drafts: list[int] | None, sampled: list[list[int]], lengths: list[int] | None = None
) -> tuple[list[list[int]], Tensor]:
    """Do what the runner does in a step: logits, sampler, prompt log-probabilities, propose."""
    proposer, target = engine
    rows = sum(n + 1 for n in drafts) if drafts is not None else len(sampled)
    hidden = torch.randn(rows, VERIFIER.hidden_size, dtype=torch.float64)
    target.compute_logits(hidden)
    if drafts is None:
        sample()
    else:
        sampler = RejectionSampler.__new__(RejectionSampler)
        RejectionSampler.forward(sampler, SimpleNamespace(num_draft_tokens=drafts))
    target.compute_logits(torch.zeros(5, VERIFIER.hidden_size))  # prompt log-probabilities
    lengths = lengths or [10] * len(sampled)
    return proposer.propose(sampled, np.array(lengths), np.zeros((len(sampled), MAX_MODEL_LEN))), hidden


def chain(drafter: Drafter, context: Tensor, root: int) -> list[int]:
    beam = BeamConfig(width=1, length=LENGTH)
    beams = beam_search.draft(drafter, context.unsqueeze(0), torch.tensor([root]), VERIFIER.embed, beam)
    return list(beams.tokens[0, :, 0].tolist())


def test_without_drafts_each_request_has_one_row(engine: Any, drafter: Drafter) -> None:
    got, hidden = run_step(engine, None, [[7], [9], [11]])
    assert got == [chain(drafter, hidden[i], root) for i, root in enumerate((7, 9, 11))]


def test_the_context_is_the_row_of_the_last_accepted_draft(engine: Any, drafter: Drafter) -> None:
    # 3 verified and 2 accepted; 1 (trimmed) and none accepted; no draft; 3 and all accepted.
    got, hidden = run_step(engine, [3, 1, 0, 3], [[4, 5, 6], [8], [9], [1, 2, 3, 10]])
    rows = (2, 4, 6, 10)
    assert got == [chain(drafter, hidden[row], root) for row, root in zip(rows, (6, 8, 9, 10), strict=True)]


def test_a_request_whose_tokens_are_discarded_keeps_its_rows(engine: Any, drafter: Drafter) -> None:
    got, hidden = run_step(engine, [2, 0, 1], [[], [9], [5, 6]])
    assert got == [[], chain(drafter, hidden[3], 9), chain(drafter, hidden[5], 6)]


def test_a_step_does_not_see_the_one_before(engine: Any, drafter: Drafter) -> None:
    run_step(engine, [3, 3], [[4, 5, 6], [8]])
    got, hidden = run_step(engine, None, [[7]])
    assert got == [chain(drafter, hidden[0], 7)]


def test_proposals_stay_within_the_models_length(engine: Any) -> None:
    got, _ = run_step(engine, None, [[7], [8], [9]], [MAX_MODEL_LEN, MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 3])
    assert [len(tokens) for tokens in got] == [0, 0, 2]


def test_a_step_without_decided_tokens_proposes_nothing(engine: Any) -> None:
    got, _ = run_step(engine, None, [[], []])
    assert got == [[], []]


def test_a_non_finite_context_proposes_nothing(engine: Any) -> None:
    proposer, target = engine
    target.compute_logits(torch.full((1, VERIFIER.hidden_size), torch.nan, dtype=torch.float64))
    sample()
    assert proposer.propose([[7]], np.array([10]), np.zeros((1, MAX_MODEL_LEN))) == [[]]


def test_what_the_text_repeats_is_copied_if_the_drafter_allows_it(engine: Any, drafter: Drafter) -> None:
    proposer, target = engine
    proposer._drafter.config.lookup_length = 8
    texts = np.zeros((2, MAX_MODEL_LEN), dtype=np.int32)

    def step(*rows: list[int]) -> tuple[list[list[int]], Tensor]:
        for row, tokens in enumerate(rows):
            texts[row, : len(tokens)] = tokens
        hidden = torch.randn(len(rows), VERIFIER.hidden_size, dtype=torch.float64)
        target.compute_logits(hidden)
        sample()
        return proposer.propose([[row[-1]] for row in rows], np.array([len(row) for row in rows]), texts), hidden

    once, twice = [4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9, 1, 4, 5]
    (first, second), hidden = step(once, twice)
    assert first == chain(drafter, hidden[0], 9) and second == [6, 7, 8]
    (first, second), _ = step([*once, 2, 4, 5], [*twice, 6])
    assert (first, second) == ([6, 7, 8], [7, 8, 9])
    proposer._copies = False
    (first, _), hidden = step([*once, 2, 4, 5], [*twice, 6])
    assert first == chain(drafter, hidden[0], 5)
    proposer._copies = None
    # Another request takes a row.
    (first, second), hidden = step([*once, 2, 4, 5, 6], [11, 12, 13])
    assert first == [7, 8, 9] and second == chain(drafter, hidden[1], 13)


def test_rows_that_do_not_add_up_are_an_error(engine: Any) -> None:
    proposer, target = engine
    target.compute_logits(torch.zeros(5, VERIFIER.hidden_size))
    sample()
    with pytest.raises(ModelError, match=r"5 hidden rows and 2 requests.*expected 2 rows"):
        proposer.propose([[7], [8]], np.array([10, 10]), np.zeros((2, MAX_MODEL_LEN)))


def test_the_drafter_is_named_by_configuration_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_proposer.SPECULATOR_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=f"set {vllm_proposer.SPECULATOR_VARIABLE}"):
        RecurrentDraftingProposer(config())
    monkeypatch.setenv(vllm_proposer.SPECULATOR_VARIABLE, "somewhere")
    RecurrentDraftingProposer(config())


def test_a_drafter_of_another_size_and_an_unknown_vllm_are_refused(
    drafter: Drafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drafter.config.hidden_size == VERIFIER.hidden_size
    target = Target()
    target.config.hidden_size = 5
    with pytest.raises(ModelError, match=f"expected hidden_size 5, got {VERIFIER.hidden_size}"):
        RecurrentDraftingProposer(config(speculator_path=str(tmp_path))).load_model(target)
    monkeypatch.setattr(vllm_proposer, "KNOWN_VERSIONS", ("9.9",))
    with pytest.raises(ModelError, match=r"not known to work.*9\.9\.x"):
        RecurrentDraftingProposer(config(speculator_path=str(tmp_path))).load_model(Target())


@pytest.mark.parametrize("count", [0, 2])
def test_a_target_without_one_table_of_embeddings_is_refused(drafter: Drafter, tmp_path: Path, count: int) -> None:
    target = Target()
    target.table = Table(drafter.config.hidden_size) if count else nn.Identity()
    target.tied = Table(drafter.config.hidden_size) if count else nn.Identity()
    with pytest.raises(ModelError, match=f"Target of vLLM .* has {count} tables of token embeddings of width"):
        RecurrentDraftingProposer(config(speculator_path=str(tmp_path))).load_model(target)


def test_a_value_of_each_request_is_repeated_for_each_of_its_drafts() -> None:
    expand, ends = vllm_proposer.expand_batch_to_tokens, torch.tensor([2, 2, 3], dtype=torch.int32)
    assert expand(torch.tensor([0.5, 1.0, 0.0]), ends, 3, 0, 1).tolist() == [0.5, 0.5, 1.0]
    assert expand(torch.tensor([7, 8, 9]), ends, 3).tolist() == [7, 7, 9]


@pytest.mark.parametrize("works", [False, True])
def test_the_engines_own_expansion_is_replaced_only_where_it_does_not_work(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(x: Tensor, ends: Tensor, count: int) -> Tensor:
        return vllm_proposer.expand_batch_to_tokens(x, ends, count) if works else x.new_zeros(count)

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", own)
    vllm_proposer._mend_expansion(torch.device("cpu"))
    assert (rejection_sampler.expand_batch_to_tokens is own) == works
