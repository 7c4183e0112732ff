"""Distilled targets: what ``generate`` writes at every position, in a handful of forwards."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import distilled_targets as benchmark
from recurrent_drafting import AutoregressiveDecoder, DrafterTrainer, Verifier, continuations, token_rows
from recurrent_drafting.continuations import DistilConfig
from recurrent_drafting.errors import DataError, UsageError
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset
from recurrent_drafting.trainer import Supervision, TrainingArguments
from tests.families import FAMILIES, random_tokens
from tests.tiny import VOCAB, make_drafter, make_verifier

EOS = 2
WINDOWED = [name for name, family in FAMILIES.items() if family.window]


def own_text(verifier: Verifier, prompt: list[int], count: int) -> list[int]:
    return AutoregressiveDecoder(verifier).generate([prompt], max_new_tokens=count).sequences[0]


def make_rows(verifier: Verifier, seed: int = 0) -> list[EncodedRow]:
    """Make rows of two turns, partly the verifier's own words, partly not, some with an EOS inside."""
    rng, rows = random.Random(seed), []
    for _ in range(2):
        text, mask = random_tokens(rng, 3), [False] * 3
        for turn in range(2):
            reply = own_text(verifier, text, 12)
            for place in range(rng.randrange(5), len(reply), 5):
                reply[place] = rng.randrange(VOCAB)
            text, mask = [*text, *reply], [*mask, *[True] * len(reply)]
            if not turn:
                text, mask = [*text, *random_tokens(rng, 2)], [*mask, False, False]
        rows.append(EncodedRow(text, mask))
    return rows


def expected(verifier: Verifier, rows: Sequence[EncodedRow], config: DistilConfig) -> list[list[list[int]]]:
    """Return one ``generate`` per supervised position."""
    decoder, found = AutoregressiveDecoder(verifier), []
    for request, row in enumerate(rows):
        cuts = [t + 2 for t in range(len(row.input_ids) - 2) if row.loss_mask[t + 1] and row.loss_mask[t + 2]]
        outputs = [
            decoder.generate(
                [row.input_ids[:cut]],
                max_new_tokens=config.num_future_tokens,
                sampling=config.sampling(),
                request_ids=[request],
            )
            for cut in cuts
        ]
        found.append([output.sequences[0] for output in outputs])
    return found


def unpadded(rows: Sequence[EncodedRow]) -> list[list[list[int]]]:
    """Return the continuations of rows without what stands behind their ends."""
    found = []
    for row in rows:
        assert row.continuations is not None
        for continuation in row.continuations.tolist():
            count = len([token for token in continuation if token >= 0])
            assert all(token == -1 for token in continuation[count:])
        found.append([[token for token in continuation if token >= 0] for continuation in row.continuations.tolist()])
    return found


@contextmanager
def forwards(verifier: Verifier) -> Iterator[list[tuple[int, int]]]:
    """Collect (queries, keys) of every forward of the verifier's body."""
    seen: list[tuple[int, int]] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["attention_mask"].shape[-2:]))

    hook = verifier.model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    hook.remove()


# Tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_tokens_are_those_of_one_generate_per_position(
    family: str, chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "_MOST_BRANCHES", chunk)
    verifier = make_verifier(family)
    rows, config = make_rows(verifier), DistilConfig(5, temperature, seed=7)
    distilled = continuations.distil(rows, verifier, config)
    assert unpadded(distilled) == expected(verifier, rows, config)
    assert [(row.input_ids, row.loss_mask) for row in distilled] == [(row.input_ids, row.loss_mask) for row in rows]


@pytest.mark.parametrize("name", [WINDOWED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in WINDOWED[1:])])
def test_tokens_in_families_whose_layers_slide(name: str) -> None:
    verifier = Verifier(FAMILIES[name].model(windowed=True))
    rows, config = make_rows(verifier)[:1], DistilConfig(4)
    assert len(rows[0].input_ids) > 16  # beyond the window of 8
    assert unpadded(continuations.distil(rows, verifier, config)) == expected(verifier, rows, config)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_tokens(count: int) -> None:
    verifier = make_verifier("llama")
    rows, config = make_rows(verifier), DistilConfig(count)
    distilled = continuations.distil(rows, verifier, config)
    assert unpadded(distilled) == expected(verifier, rows, config)
    assert all(row.continuations is not None and row.continuations.shape[1] == count for row in distilled)


def test_seed_and_row_key_the_noise() -> None:
    verifier = make_verifier("llama")
    row = make_rows(verifier)[0]
    found = [
        unpadded(continuations.distil([row, row], verifier, DistilConfig(5, 1.0, seed))) for seed in (0, 1)
    ]  # fmt: skip
    assert len({str(texts) for pair in found for texts in pair}) == 4


def test_continuations_end_with_eos() -> None:
    """A text that the verifier always ends: EOS is made likely by its own row of the head."""
    verifier = make_verifier("llama")
    with torch.no_grad():
        verifier.model.get_output_embeddings().weight[EOS] *= 3
    rows, config = make_rows(verifier), DistilConfig(5)
    found = unpadded(continuations.distil(rows, verifier, config))
    assert found == expected(verifier, rows, config)
    lengths = {len(continuation) for row in found for continuation in row if continuation[-1] == EOS}
    assert len(lengths - {5}) >= 3


@pytest.mark.parametrize("length", [126, 127, 128])
def test_the_context_window_ends_continuations_as_it_ends_generate(length: int) -> None:
    verifier = make_verifier("gpt2")
    row = EncodedRow(random_tokens(random.Random(length), length), [False] * 110 + [True] * (length - 110))
    found = unpadded(continuations.distil([row], verifier, DistilConfig(5)))
    assert found == expected(verifier, [row], DistilConfig(5))
    assert len(found[0][-1]) == min(5, 129 - length)
    with pytest.raises(DataError, match="row 0 has 129 tokens: expected at most 128"):
        continuations.distil([EncodedRow([5] * 129, [True] * 129)], verifier, DistilConfig(5))


def test_rows_without_a_supervised_position_have_no_continuations() -> None:
    rows = [EncodedRow([5] * length, [False] * length) for length in (1, 2, 9)]
    for row in continuations.distil(rows, make_verifier("llama"), DistilConfig(5)):
        assert row.continuations is not None and row.continuations.shape == (0, 5)


@pytest.mark.parametrize(("settings", "name"), [((0, 0.0), "num_future_tokens"), ((5, -0.1), "temperature")])
def test_settings_out_of_range(settings: tuple[int, float], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        DistilConfig(*settings)


# Cost


def test_cost_is_a_forward_of_the_text_and_one_per_token_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "_MOST_BRANCHES", 16)
    verifier = make_verifier("llama")
    text = random_tokens(random.Random(0), 60)
    with forwards(verifier) as seen:
        [row] = continuations.distil([EncodedRow(text, [False] * 10 + [True] * 50)], verifier, DistilConfig(5))
    assert row.continuations is not None and len(row.continuations) == 49
    assert seen[0] == (60, 60)
    # Random text is hardly ever what the verifier says: almost every position is a branch of its own.
    firsts = row.continuations[:, 0].tolist()
    branches = sum(first not in (EOS, text[11 + index]) for index, first in enumerate(firsts))
    assert 40 < branches < 49
    assert len(seen) == 1 + 4 * -(-branches // 16)
    assert max(queries for queries, _ in seen[1:]) == 16
    # A branch's entries are kept no longer than its chunk.
    assert max(keys for _, keys in seen) == 60 + 4 * 16


def test_a_wide_vocabulary_makes_chunks_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "_LOGITS_AT_ONCE", 10 * VOCAB)
    verifier = make_verifier("llama")
    text = random_tokens(random.Random(0), 60)
    with forwards(verifier) as seen:
        continuations.distil([EncodedRow(text, [True] * 60)], verifier, DistilConfig(3))
    assert max(queries for queries, _ in seen[1:]) == 10


def test_the_verifiers_own_text_costs_hardly_more_than_its_forward() -> None:
    verifier = make_verifier("llama")
    prompt = random_tokens(random.Random(3), 6)
    text = [*prompt, *own_text(verifier, prompt, 50)]
    row = EncodedRow(text, [False] * 6 + [True] * (len(text) - 6))
    with forwards(verifier) as seen:
        found = unpadded(continuations.distil([row], verifier, DistilConfig(5)))
    assert found == expected(verifier, [row], DistilConfig(5))
    # The text's end is the only place where branches leave it.
    assert seen == [(56, 56), (1, 57), (1, 58), (1, 59), (1, 60)]


@pytest.mark.parametrize("next_turn", [0, 4])
def test_nothing_grows_behind_an_eos(next_turn: int) -> None:
    """The verifier ends the reply; where the text ends it as well or goes on, no branch is needed."""
    verifier = make_verifier("llama")
    with torch.no_grad():
        verifier.model.get_output_embeddings().weight[EOS] *= 1.5
    prompt = random_tokens(random.Random(0), 6)
    reply = own_text(verifier, prompt, 100)
    assert reply[-1] == EOS and len(reply) > 3
    for last in (EOS, 9):
        text = [*prompt, *reply[:-1], last, *[5] * next_turn]
        mask = [False] * 6 + [True] * len(reply) + [False] * next_turn
        with forwards(verifier) as seen:
            found = unpadded(continuations.distil([EncodedRow(text, mask)], verifier, DistilConfig(5)))
        assert found == expected(verifier, [EncodedRow(text, mask)], DistilConfig(5))
        assert seen == [(len(text), len(text))]


# Training


def test_supervision_by_hand() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 0]])
    mask = torch.tensor([[False, True, True, True, True], [False, False, True, True, False]])
    continuations = torch.tensor([[[12, 30, 31], [32, EOS, -1], [33, 34, 35]], [[EOS, -1, -1], [-1] * 3, [-1] * 3]])
    batch = Supervision.from_continuations(ids, mask, continuations, 3)
    assert list(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 1)]
    assert batch.valid.tolist() == [[True] * 3, [True, True, False], [True] * 3, [True, False, False]]
    assert batch.known[batch.valid].tolist() == [11, 12, 30, 12, 32, 13, 33, 34, 22]
    assert batch.targets[batch.valid].tolist() == [12, 30, 31, 32, EOS, 33, 34, 35, EOS]
    assert bool((batch.known >= 0).all())  # all of them are embedded
    shorter = Supervision.from_continuations(ids, mask, continuations, 2)
    assert shorter.targets[shorter.valid].tolist() == [12, 30, 32, EOS, 33, 34, EOS]
    with pytest.raises(UsageError, match="hold 3 future tokens and 4 depths"):
        Supervision.from_continuations(ids, mask, continuations, 4)


def test_text_that_is_the_verifiers_own_gives_the_same_supervision_either_way() -> None:
    verifier = make_verifier("llama")
    rows = []
    for seed in range(3):
        prompt = random_tokens(random.Random(seed), 4 + seed)
        reply = own_text(verifier, prompt, 15 + seed)
        rows.append(EncodedRow(prompt + reply, [False] * len(prompt) + [True] * len(reply)))
    inputs = Collator()(continuations.distil(rows, verifier, DistilConfig(5)))
    assert inputs["continuations"].shape == (3, 16, 5)
    assert (inputs["continuations"][0, 14:] == -1).all()  # behind the first row's own positions
    text = Supervision.from_batch(inputs["input_ids"], inputs["loss_mask"], 4)
    branch = Supervision.from_continuations(inputs["input_ids"], inputs["loss_mask"], inputs["continuations"], 4)
    assert (branch.rows.equal(text.rows), branch.positions.equal(text.positions)) == (True, True)
    assert branch.targets[text.valid].equal(text.targets[text.valid])
    assert branch.known[text.valid].equal(text.known[text.valid])
    assert int(branch.valid.sum()) > int(text.valid.sum())  # a continuation goes on where the text was cut


def train(verifier: Verifier, rows: Sequence[EncodedRow], folder: Path, **settings: Any) -> DrafterTrainer:
    usual = {"max_steps": 60, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=len(rows), drafter_predict_n_tokens=3,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **{**usual, **settings},
    )  # fmt: skip
    trainer = DrafterTrainer(
        make_drafter(verifier), verifier, args, train_dataset=TokenDataset(rows), eval_dataset=TokenDataset(rows),
        data_collator=Collator(),
    )  # fmt: skip
    trainer.train()
    return trainer


def test_a_drafter_learns_the_continuations_and_not_the_text(tmp_path: Path) -> None:
    """The texts are random, so the tokens that follow are no more than what was made of them."""
    verifier, rng = make_verifier("llama"), random.Random(5)
    texts = [EncodedRow(random_tokens(rng, 30), [False] * 5 + [True] * 25) for _ in range(4)]
    rows = continuations.distil(texts, verifier, DistilConfig(3))
    trainer = train(verifier, rows, tmp_path, objective="ce")
    assert trainer.evaluate()["eval_top1_depth_1"] > 0.9
    on_text = trainer.evaluate(TokenDataset(texts))
    assert on_text["eval_top1_depth_1"] < 0.3


def test_kl_needs_distributions_that_continuations_have_not(tmp_path: Path) -> None:
    verifier = make_verifier("llama")
    rows = continuations.distil(make_rows(verifier), verifier, DistilConfig(3))
    for settings in ({}, {"objective": "expected_length", "expected_length_share": 0.5}):
        with pytest.raises(UsageError, match="use --objective ce"):
            train(verifier, rows, tmp_path, max_steps=1, **settings)
    train(verifier, rows, tmp_path, max_steps=1, objective="kl", kd_alpha=0.0)


@pytest.mark.parametrize("source", ["text", "distilled"])
def test_the_expected_length_rises_when_it_is_the_objective(source: str, tmp_path: Path) -> None:
    verifier = make_verifier("llama")
    rows = make_rows(verifier)
    if source == "distilled":
        rows = continuations.distil(rows, verifier, DistilConfig(3))
    trainer = train(verifier, rows, tmp_path, objective="expected_length")
    history = [entry["expected_length"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[0] < 0.1 and history[-1] > 0.6
    # The loss is minus the same length, per supervised depth instead of per position.
    batch = trainer._supervise(trainer._prepare_inputs(Collator()(rows)))
    pairs, positions = int(batch.valid.sum()), len(batch.positions)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([-length * positions / pairs for length in history], rel=1e-5)


def test_root_and_first_target_of_a_supervised_position_belong_to_a_reply() -> None:
    mask = torch.tensor([[True, True, False, True, True, True], [False] * 6])
    assert token_rows.supervised(mask).nonzero().tolist() == [[0, 2], [0, 3]]
    assert token_rows.supervised(torch.ones(1, 1, dtype=torch.bool)).shape == (1, 0)


# The benchmark


def packed_rows(verifier: Verifier, path: Path) -> Path:
    rows = []
    for seed in range(6):
        prompt = random_tokens(random.Random(seed), 5)
        reply = own_text(verifier, prompt, 12) if seed % 2 else random_tokens(random.Random(seed + 9), 12)
        rows.append(EncodedRow(prompt + reply, [False] * 5 + [True] * len(reply), greedy=bool(seed % 2)))
    token_rows.save_packed(rows, path, {})
    return path


def test_the_benchmark_compares_tokens_and_says_what_is_extrapolated(tmp_path: Path) -> None:
    verifier = make_verifier("llama", dtype=torch.float32)
    verifier.model.save_pretrained(tmp_path / "base")
    rows = packed_rows(verifier, tmp_path / "rows.safetensors")
    options = ["--base_model", str(tmp_path / "base"), "--data", str(rows), "--rows", "4", "--positions", "3"]
    assert benchmark.main([*options, "--output", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["tokens"]["positions_compared"] == 12 == record["tokens"]["identical"]
    whole = record["all rows"]
    assert (whole["rows"], whole["positions_timed_with_generate"]) == (4, 12)
    assert whole["positions"] == sum(row["positions"] for row in record["per_row"])
    slow = sum(sum(row["generate_seconds"]) / 3 * row["positions"] for row in record["per_row"])
    fast = sum(sorted(row["distil_seconds"])[1] for row in record["per_row"])
    assert whole["generate_seconds_extrapolated"] == pytest.approx(slow)
    assert whole["times_faster"] == pytest.approx(slow / fast)
    greedy, sampled = record["greedy replies"], record["sampled replies"]
    assert greedy["positions_that_follow_the_text"] == greedy["positions"]
    assert sampled["positions_that_follow_the_text"] < sampled["positions"] / 2


def test_the_benchmark_finds_tokens_that_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Branches that see one token too many of their text are no rounding."""
    verifier = make_verifier("llama", dtype=torch.float32)
    path = packed_rows(verifier, tmp_path / "rows.safetensors")
    row, config = token_rows.load_packed(path)[0].rows[0], DistilConfig(5)
    branch = Verifier.branch
    wrong = lambda self, tokens, cuts, depth, cache: branch(self, tokens, cuts - 1, depth, cache)  # noqa: E731
    monkeypatch.setattr(Verifier, "branch", wrong)
    measured = benchmark.measure_row(verifier, row, config, rounds=1, count=0)
    report = benchmark.compare(verifier, [measured], config)
    assert report.structural > 0 and report.identical + report.structural == len(measured.positions)
