"""Training: supervision, objectives, accumulation, checkpoints, and tau that decoding confirms."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from recurrent_drafting import (
    AutoregressiveDecoder,
    BeamConfig,
    Drafter,
    SpeculativeDecoder,
    Verifier,
    manifest,
    resume,
)
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.errors import DataError, InterruptionError, ModelError, NumericsError, ResourceError, UsageError
from recurrent_drafting.metrics import DecodingStats
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset
from recurrent_drafting.trainer import (
    DrafterTrainer,
    LengthGroupedSampler,
    Supervision,
    TrainingArguments,
    choose_draft_vocabulary,
    initialise_from_verifier,
    simulate,
)
from tests.tiny import VOCAB, make_drafter, make_verifier

K = 3


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return make_verifier("llama")


def row(prompt: int, *replies: int, seed: int = 0, gap: int = 2) -> EncodedRow:
    """Make a row of random tokens: a prompt, then replies with a few prompt tokens between them."""
    rng = random.Random(seed)
    mask = [False] * prompt
    for number, length in enumerate(replies):
        mask += [False] * (gap if number else 0) + [True] * length
    return EncodedRow([rng.randrange(3, VOCAB) for _ in mask], mask)


def uneven_rows(count: int = 8) -> list[EncodedRow]:
    lengths = [2, 17, 5, 8, 9, 3, 12, 4]
    return [row(1 + seed % 5, lengths[seed % 8], *[6] * (seed % 3 == 0), seed=seed) for seed in range(count)]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "drafter_predict_n_tokens": K,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**usual, **settings})


def make_trainer(
    drafter: Drafter, verifier: Verifier, args: TrainingArguments, rows: Sequence[EncodedRow], **options: Any
) -> DrafterTrainer:
    data = TokenDataset(rows)
    return DrafterTrainer(
        drafter, verifier, args, train_dataset=data, eval_dataset=data, data_collator=Collator(), **options
    )


def weights(drafter: Drafter) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in drafter.state_dict().items()}


def same(first: Any, second: Any) -> bool:
    """Compare nested values bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, (Tensor, np.ndarray)):
        return first.tobytes() == second.tobytes() if isinstance(first, np.ndarray) else torch.equal(first, second)
    return bool(first == second)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


# Supervision


def brute_supervision(ids: list[list[int]], masks: list[list[bool]], depths: int) -> dict[tuple[int, int], Any]:
    """Return {(row, t): (known, targets of the depths that count)}, from the definition alone."""
    found = {}
    for number, (text, mask) in enumerate(zip(ids, masks, strict=True)):
        for t in range(len(text) - 2):
            if not (mask[t + 1] and mask[t + 2]):
                continue
            end = t + 2
            while end < len(text) and mask[end]:
                end += 1
            found[number, t] = (text[t + 1 : t + 1 + depths], text[t + 2 : end][:depths])
    return found


@pytest.mark.parametrize("depths", [1, 3, 6])
@pytest.mark.parametrize("density", [0.2, 0.6, 0.9])
def test_supervised_positions_are_those_of_the_definition(depths: int, density: float) -> None:
    rng = random.Random(f"{depths}/{density}")
    for length in (1, 2, 3, 7, 20):
        ids = [[rng.randrange(100) for _ in range(length)] for _ in range(4)]
        masks = [[rng.random() < density for _ in range(length)] for _ in range(4)]
        batch = Supervision.from_batch(torch.tensor(ids), torch.tensor(masks), depths)
        got = {}
        for index, at in enumerate(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)):
            counted = int(batch.valid[index].sum())
            assert batch.valid[index].tolist() == [depth < counted for depth in range(depths)]
            # The known tokens that matter are those before the last target that counts.
            got[at] = (batch.known[index, :counted].tolist(), batch.targets[index, :counted].tolist())
        expected = brute_supervision(ids, masks, depths)
        assert got == {at: (known[: len(targets)], targets) for at, (known, targets) in expected.items()}


def test_two_turns_by_hand() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    mask = torch.tensor([[False, True, True, True, False, False, True, True]])
    batch = Supervision.from_batch(ids, mask, 3)
    # From h_0 the root is 11; from h_1 it is 12; the second reply gives one position, h_5.
    assert batch.positions.tolist() == [0, 1, 5]
    assert batch.known[:, 0].tolist() == [11, 12, 16]
    assert batch.valid.tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    assert batch.targets[batch.valid].tolist() == [12, 13, 13, 17]


# Objective and metrics


def brute_figures(
    drafter: Drafter, verifier: Verifier, rows: Sequence[EncodedRow], args: TrainingArguments
) -> dict[str, float]:
    """Compute the logged figures position by position, with the model's own plain forward."""
    ids = drafter.draft_token_ids.tolist()
    losses: list[list[float]] = [[] for _ in range(K)]
    ranks: list[list[int]] = [[] for _ in range(K)]
    share = args.kd_alpha if args.objective != "ce" else 0.0
    length_share = args.expected_length_share if args.objective == "expected_length" else 0.0
    paths: list[list[float]] = [[] for _ in range(K)]
    with torch.no_grad():
        for item in rows:
            output = verifier.model(torch.tensor([item.input_ids]), output_hidden_states=True)
            hidden, logits = output.hidden_states[-1][0], output.logits[0]
            positions = brute_supervision([item.input_ids], [item.loss_mask], K)
            for (_, t), (known, targets) in positions.items():
                state, path = torch.zeros(verifier.hidden_size, dtype=torch.float64), 1.0
                for k, (token, target) in enumerate(zip(known, targets, strict=False), start=1):
                    state = drafter.advance(state, verifier.model.get_input_embeddings().weight[token])
                    log_q = drafter.logits(hidden[t], state).log_softmax(-1)
                    p = (logits[t + k, ids] / args.kd_temperature).softmax(-1)
                    divergence = float((p * (p.log() - log_q)).sum())
                    own = ids.index(target) if target in ids else None
                    likelihood = 0.0 if own is None else -float(log_q[own])
                    losses[k - 1].append((1 - length_share) * (share * divergence + (1 - share) * likelihood))
                    path *= 0.0 if own is None else float(log_q[own].exp())
                    paths[k - 1].append(path)
                    above = len(ids) if own is None else int((log_q > log_q[own]).sum())
                    ranks[k - 1].append(above)
    figures = {}
    for k in range(K):
        figures[f"loss_depth_{k + 1}"] = (sum(losses[k]) - length_share * sum(paths[k])) / len(losses[k])
        for top in (1, args.drafter_top_k):
            figures[f"top{top}_depth_{k + 1}"] = sum(rank < top for rank in ranks[k]) / len(ranks[k])
    weighted = sum(args.depth_decay**k * sum(values) for k, values in enumerate(losses))
    length = sum(map(sum, paths))
    figures["loss"] = (weighted - length_share * length) / sum(map(len, losses))
    figures["expected_length"] = length / len(paths[0])
    return figures


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "ce", "drafter_top_k": 7},
        {"kd_alpha": 0.3, "kd_temperature": 2.0, "depth_decay": 0.5},
        {"objective": "expected_length"},
        {"objective": "expected_length", "expected_length_share": 0.6, "kd_alpha": 0.3},
    ],
    ids=["kl", "ce", "mix", "expected length", "all three"],
)
@pytest.mark.parametrize("draft_vocab_size", [None, 30])
def test_logged_figures_are_those_of_the_definitions(
    verifier: Verifier, tmp_path: Path, settings: dict[str, Any], draft_vocab_size: int | None
) -> None:
    rows, drafter = uneven_rows(), make_drafter(verifier, draft_vocab_size=draft_vocab_size)
    before = copy.deepcopy(drafter)
    args = arguments(tmp_path, per_device_train_batch_size=8, **settings)
    trainer = make_trainer(drafter, verifier, args, rows)
    held_out = trainer.evaluate()
    trainer.train()
    expected = brute_figures(before, verifier, rows, args)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in expected.items():
        # The step's own loss passes through float32.
        assert logged[name] == pytest.approx(value, rel=1e-5 if name == "loss" else 1e-9), name
        if name != "loss":
            assert held_out[f"eval_{name}"] == pytest.approx(value, rel=1e-9), name
    assert math.isfinite(held_out["eval_simulated_tau"])


@pytest.mark.parametrize(
    ("settings", "metric", "best"),
    [({}, "eval_simulated_tau", max), ({"metric_for_best_model": "loss"}, "eval_loss", min)],
    ids=["tau", "loss"],
)
def test_the_best_checkpoint_is_kept_and_loaded(
    verifier: Verifier, tmp_path: Path, settings: dict[str, Any], metric: str, best: Any
) -> None:
    """The learning rate is so high that the last step is not the best one."""
    args = arguments(
        tmp_path, max_steps=8, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, save_total_limit=2, learning_rate=0.2, **settings,
    )  # fmt: skip
    drafter = make_drafter(verifier)
    trainer = make_trainer(drafter, verifier, args, uneven_rows())
    trainer.train()
    measured = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    step = measured.index(best(measured)) + 1
    assert len(measured) == 8 and 1 <= step < 8
    assert trainer.state.best_metric == measured[step - 1]
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"checkpoint-8", f"checkpoint-{step}"})
    assert equal(load_file(checkpoint / "model.safetensors"), weights(drafter))
    assert trainer.evaluate()[metric] == measured[step - 1]


def test_a_best_checkpoint_that_was_damaged_is_not_loaded(verifier: Verifier, tmp_path: Path) -> None:
    args = arguments(
        tmp_path, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = make_trainer(make_drafter(verifier), verifier, args, uneven_rows())

    class Damaging(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (Path(state.best_model_checkpoint) / "model.safetensors").write_bytes(b"")

    trainer.add_callback(Damaging())
    with pytest.raises(ModelError, match=r"model.safetensors: expected \d+ bytes, found 0"):
        trainer.train()


def test_evaluation_in_between_leaves_the_training_figures_alone(verifier: Verifier, tmp_path: Path) -> None:
    logged = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        args = arguments(tmp_path, max_steps=4, logging_steps=2, **settings)
        trainer = make_trainer(make_drafter(verifier), verifier, args, uneven_rows())
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        logged.append([{name: value for name, value in entry.items() if "depth" in name} for entry in history])
    assert len(logged[0]) == 2 and logged[0] == logged[1]


# Steps


def test_training_lowers_the_loss_and_leaves_the_verifier_alone(tmp_path: Path) -> None:
    verifier = make_verifier("llama")  # its parameters ask for gradients
    before = {name: tensor.clone() for name, tensor in verifier.model.state_dict().items()}
    drafter = make_drafter(verifier)
    trainer = make_trainer(drafter, verifier, arguments(tmp_path, max_steps=40), uneven_rows())
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    assert all(parameter.grad is None for parameter in verifier.model.parameters())
    assert equal(before, verifier.model.state_dict())
    trained = {id(item) for group in trainer.optimizer.param_groups for item in group["params"]}
    assert trained == {id(item) for item in drafter.parameters()}


def test_bf16_training_runs_the_heads_product_in_bf16(
    verifier: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = []
    product = torch.mm

    def seen(left: Tensor, right: Tensor, **options: Any) -> Tensor:
        types.append(left.dtype)
        return product(left, right, **options)

    monkeypatch.setattr(torch, "mm", seen)
    drafter = make_drafter(verifier).float()
    make_trainer(drafter, verifier, arguments(tmp_path, bf16=True), uneven_rows()).train()
    assert set(types) == {torch.bfloat16}


@pytest.mark.parametrize("objective", ["kl", "ce", "expected_length"])
def test_one_batch_of_eight_and_eight_of_one_give_the_same_weights(
    verifier: Verifier, tmp_path: Path, objective: str
) -> None:
    results = []
    for size, times in ((8, 1), (1, 8), (2, 4)):
        drafter = make_drafter(verifier)
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=times, max_steps=3,
            objective=objective,
        )  # fmt: skip
        trainer = make_trainer(drafter, verifier, args, uneven_rows(16))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((weights(drafter), losses))
    start = weights(make_drafter(verifier))
    for found, losses in results[1:]:
        assert losses == pytest.approx(results[0][1], rel=1e-5)
        for name, tensor in results[0][0].items():
            assert torch.allclose(found[name], tensor, rtol=0, atol=1e-10), name
    assert not torch.allclose(results[0][0]["head.weight"], start["head.weight"], atol=1e-3)


@pytest.mark.parametrize("times", [1, 2])
def test_a_non_finite_loss_stops_before_the_optimizer_steps(tmp_path: Path, times: int) -> None:
    verifier = make_verifier("llama")
    poison = 60
    rows = [EncodedRow([min(token, poison - 1) for token in item.input_ids], item.loss_mask) for item in uneven_rows()]
    rows[1].input_ids[-3] = poison
    with torch.no_grad():
        verifier.model.get_input_embeddings().weight[poison] = math.nan
    drafter = make_drafter(verifier)
    before = weights(drafter)
    args = arguments(tmp_path, per_device_train_batch_size=8 // times, gradient_accumulation_steps=times)
    with pytest.raises(NumericsError, match="training loss is nan at step 0: expected a finite number"):
        make_trainer(drafter, verifier, args, rows).train()
    assert equal(before, weights(drafter))


@pytest.mark.parametrize("rows", [[row(5), row(7)], [row(4, 1), row(6, 1, 1)]], ids=["masked", "replies of one token"])
def test_rows_without_a_supervised_position_are_a_data_error(
    verifier: Verifier, tmp_path: Path, rows: list[EncodedRow]
) -> None:
    with pytest.raises(DataError, match="every label is masked or every reply is shorter than 2 tokens"):
        make_trainer(make_drafter(verifier), verifier, arguments(tmp_path), rows).train()


def test_a_batch_without_a_supervised_position_does_not_spoil_its_step(verifier: Verifier, tmp_path: Path) -> None:
    results = []
    for rows, times in (([row(3, 9)], 1), ([row(3, 9), row(5)], 2)):
        drafter = make_drafter(verifier)
        args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=times)
        make_trainer(drafter, verifier, args, rows).train()
        results.append(weights(drafter))
    assert all(torch.allclose(results[0][name], results[1][name], rtol=0, atol=1e-10) for name in results[0])


# Order of the rows


def test_rows_of_similar_length_come_together_in_an_order_of_seed_and_epoch() -> None:
    lengths = [random.Random(index).randrange(5, 500) for index in range(400)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 400
        return list(sampler)

    def padded(rows: list[int]) -> int:
        return sum(4 * max(lengths[row] for row in rows[start : start + 4]) for start in range(0, 400, 4))

    shuffled = random.Random(0).sample(range(400), 400)
    assert sorted(order(1, 0)) == list(range(400))
    assert padded(order(1, 0)) < 1.05 * sum(lengths) < 0.8 * padded(shuffled)
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_each_epoch_sees_every_row_in_an_order_of_its_own(verifier: Verifier, tmp_path: Path) -> None:
    rows, seen = uneven_rows(), list[int]()

    class Watching(Collator):
        def __call__(self, batch: Sequence[EncodedRow]) -> dict[str, Tensor]:
            seen.extend(rows.index(item) for item in batch)
            return super().__call__(batch)

    args = arguments(tmp_path, per_device_train_batch_size=2, num_train_epochs=3, max_steps=-1)
    data = TokenDataset(rows)
    DrafterTrainer(make_drafter(verifier), verifier, args, train_dataset=data, data_collator=Watching()).train()
    epochs = [seen[start : start + 8] for start in range(0, 24, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len(set(map(tuple, epochs))) > 1


# Checkpoints


SAVING: dict[str, Any] = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}


def training_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds besides the clock: optimizer, scheduler, random state, steps."""
    files = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    state: dict[str, Any] = {name: torch.load(checkpoint / name, weights_only=False) for name in files}
    record = json.loads((checkpoint / "trainer_state.json").read_text())
    return {**state, **{name: record[name] for name in ("global_step", "epoch", "best_global_step")}}


@pytest.mark.parametrize(
    ("times", "muon"),
    [pytest.param(1, False, marks=pytest.mark.slow), (2, False), (2, True)],
    ids=["plain", "accumulated", "muon"],
)
def test_resuming_from_any_step_gives_the_same_bits(verifier: Verifier, tmp_path: Path, times: int, muon: bool) -> None:
    """An epoch is five (accumulated: three) steps: checkpoints lie within one and at its end."""
    settings = {**SAVING, "max_steps": 7, "weight_decay": 0.1, "gradient_accumulation_steps": times, "muon": muon}
    drafter = make_drafter(verifier, draft_vocab_size=40)
    make_trainer(drafter, verifier, arguments(tmp_path / "whole", **settings), uneven_rows(10)).train()
    last = training_state(tmp_path / "whole" / "checkpoint-7")
    assert load_file(tmp_path / "whole/checkpoint-7/model.safetensors").keys() == drafter.state_dict().keys()
    for step in range(1, 8):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert equal(load_file(checkpoint / "model.safetensors"), weights(drafter)) == (step == 7)
        resumed = make_drafter(verifier, draft_vocab_size=40, seed=step)
        torch.manual_seed(99), random.seed(99)
        trainer = make_trainer(resumed, verifier, arguments(tmp_path / "parts", **settings), uneven_rows(10))
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 7
        assert equal(weights(drafter), weights(resumed)), step
        if step < 7:
            assert same(last, training_state(tmp_path / "parts" / "checkpoint-7")), step


def test_checkpoints_appear_whole_and_the_newest_stay(verifier: Verifier, tmp_path: Path) -> None:
    seen = []

    class Watching(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            assert "run" in manifest.read(tmp_path / f"checkpoint-{state.global_step}")

    args = arguments(tmp_path, max_steps=3, save_total_limit=2, **SAVING)
    make_trainer(make_drafter(verifier), verifier, args, uneven_rows(), callbacks=[Watching()]).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert manifest.read(tmp_path / "checkpoint-3")["files"].keys() >= {
        "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoints_before(
    verifier: Verifier, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write past a limit that comes into force at the second save, at the named file."""
    args = arguments(tmp_path, max_steps=3, **SAVING)
    trainer = make_trainer(make_drafter(verifier), verifier, args, uneven_rows())
    step = {
        "model.safetensors": "save_model",
        "optimizer.pt": "_save_optimizer_and_scheduler",
        "scheduler.pt": "_save_scaler",
        "rng_state.pth": "_save_rng_state",
    }[file]
    original, limits = getattr(trainer, step), resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        original(*args, **kwargs)

    monkeypatch.setattr(trainer, step, limited)
    try:
        with pytest.raises(ResourceError, match="checkpoint-2 was not written, the disk is full or at its limit"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert resume.newest_complete(tmp_path) == tmp_path / "checkpoint-1"


def test_the_drafter_that_is_saved_has_a_manifest_and_loads(verifier: Verifier, tmp_path: Path) -> None:
    drafter = make_drafter(verifier)
    trainer = make_trainer(drafter, verifier, arguments(tmp_path / "out"), uneven_rows())
    trainer.train()
    for _ in range(2):
        trainer.save_model()
        found = manifest.read(tmp_path / "out")
        assert found["fingerprints"]["data"] == resume.data_fingerprint(uneven_rows()) and "run" not in found
        assert equal(load_drafter(str(tmp_path / "out")).state_dict(), weights(drafter))


@pytest.fixture(scope="module")
def half_way(verifier: Verifier, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's checkpoint after two of its four steps."""
    folder = tmp_path_factory.mktemp("begun")
    args = arguments(folder, max_steps=4, **{**SAVING, "save_steps": 2})
    make_trainer(make_drafter(verifier), verifier, args, uneven_rows(10)).train()
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("settings", "rows", "named"),
    [
        ({"learning_rate": 2e-2}, 10, "learning_rate 0.01, now 0.02"),
        ({"max_steps": 9}, 10, "max_steps 4, now 9"),
        ({"seed": 7}, 10, "seed 42, now 7"),
        ({"depth_decay": 0.5}, 10, "depth_decay 0.9, now 0.5"),
        ({"gradient_accumulation_steps": 2}, 10, "gradient_accumulation_steps 1, now 2"),
        ({}, 9, "data [0-9a-f]{12}, now [0-9a-f]{12}"),
        ({"logging_steps": 3, "save_total_limit": 5, "drafter_top_k": 3}, 10, None),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_its_differences(
    verifier: Verifier, half_way: str, tmp_path: Path, settings: dict[str, Any], rows: int, named: str | None
) -> None:
    args = arguments(tmp_path, **{"max_steps": 4, **SAVING, "save_steps": 2, **settings})
    trainer = make_trainer(make_drafter(verifier), verifier, args, uneven_rows(rows))
    if named is None:
        trainer.train(resume_from_checkpoint=half_way)
        return
    with pytest.raises(ModelError, match=rf"checkpoint-2 was begun with .*{named}.*repeat those or begin a new run"):
        trainer.train(resume_from_checkpoint=half_way)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
@pytest.mark.parametrize("save_strategy", ["no", "epoch"])
def test_a_signal_ends_the_run_after_the_step_and_resuming_gives_the_same_bits(
    verifier: Verifier, tmp_path: Path, number: signal.Signals, save_strategy: str
) -> None:
    """The signal comes in the middle of a step: its forward has begun, the optimizer has not stepped."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 7, "save_strategy": save_strategy}
    settings |= {"eval_strategy": save_strategy, "load_best_model_at_end": save_strategy == "epoch"}
    whole = make_drafter(verifier)
    make_trainer(whole, verifier, arguments(tmp_path / "whole", **settings), uneven_rows(10)).train()
    handlers = [signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)]
    for step in (2, 5):  # within an epoch of five steps, and at its end
        args = arguments(tmp_path / "parts", **settings)
        trainer = make_trainer(
            make_drafter(verifier), verifier, args, uneven_rows(10), callbacks=[Signalling(number, step)]
        )
        with pytest.raises(
            InterruptionError, match=rf"{number.name} at step {step}, .*/checkpoint-{step}, go on"
        ) as caught:
            trainer.train()
        assert caught.value.exit_code == 128 + number
        assert [signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)] == handlers
        resumed = make_drafter(verifier)
        trainer = make_trainer(resumed, verifier, args, uneven_rows(10))
        trainer.train(resume_from_checkpoint=True)
        assert equal(weights(whole), weights(resumed))
        shutil.rmtree(tmp_path / "parts")


class Signalling(TrainerCallback):
    """Send a signal to this process at the beginning of a step, or at the end of the run (step 0)."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.step:
            os.kill(os.getpid(), self.number)


def test_a_signal_after_the_last_step_saves_the_drafter(verifier: Verifier, tmp_path: Path) -> None:
    drafter = make_drafter(verifier)
    args = arguments(tmp_path, max_steps=2)
    trainer = make_trainer(drafter, verifier, args, uneven_rows(), callbacks=[Signalling(signal.SIGTERM, 0)])
    with pytest.raises(InterruptionError, match="SIGTERM at step 2, which is complete: the drafter is in"):
        trainer.train()
    assert equal(load_drafter(str(tmp_path)).state_dict(), weights(drafter))


# Simulated tau


@pytest.fixture(scope="module")
def served(verifier: Verifier, tmp_path_factory: pytest.TempPathFactory) -> tuple[Drafter, list[list[int]], Any]:
    """Train a drafter on the verifier's own text, so that it accepts something."""
    prompts = [item.input_ids for item in (row(3 + seed, seed=seed) for seed in range(6))]
    texts = AutoregressiveDecoder(verifier).generate(prompts, max_new_tokens=30).sequences
    rows = [
        EncodedRow(prompt + text, [False] * len(prompt) + [True] * len(text))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    drafter = make_drafter(verifier)
    args = arguments(tmp_path_factory.mktemp("served"), max_steps=40, per_device_train_batch_size=6)
    make_trainer(drafter, verifier, args, rows).train()
    return drafter, prompts, Collator()(rows)


@pytest.mark.parametrize(
    "beam",
    [
        BeamConfig(width=10, length=4),
        BeamConfig(width=1, length=3),
        BeamConfig(width=3, length=2),
        BeamConfig(width=5, length=6, max_nodes=8),
        BeamConfig(width=100, length=2),
    ],
    ids=str,
)
def test_simulated_tau_is_the_tau_of_decoding(verifier: Verifier, served: Any, beam: BeamConfig) -> None:
    drafter, prompts, inputs = served
    output = SpeculativeDecoder(verifier, drafter, beam).generate(prompts, max_new_tokens=30)
    stats = DecodingStats()
    with torch.no_grad():
        hidden = verifier.hidden_states(inputs["input_ids"], inputs["attention_mask"])
        simulate(drafter, verifier, inputs, hidden, beam, stats)
    assert stats.accepted == output.stats.accepted
    assert (stats.tau, stats.row_steps, stats.tokens) == (
        output.stats.tau,
        output.stats.row_steps,
        output.stats.tokens,
    )
    assert stats.tau > 1.1  # something was accepted, so the histograms say something


def test_simulation_counts_the_first_reply_of_each_row(verifier: Verifier) -> None:
    drafter, beam = make_drafter(verifier), BeamConfig(width=2, length=2)
    counts = []
    for rows in ([row(4, 9, seed=1)], [row(4, 9, 5, seed=1), row(3), row(0, 4)]):
        inputs, stats = Collator()(rows), DecodingStats()
        with torch.no_grad():
            hidden = verifier.hidden_states(inputs["input_ids"], inputs["attention_mask"])
            simulate(drafter, verifier, inputs, hidden, beam, stats)
        counts.append((stats.tokens, stats.row_steps, stats.accepted))
    assert counts[0][0] == 9
    assert counts[0] == counts[1]  # rows without a prompt or without a reply have nothing to serve


# Draft vocabulary and start


def counted(vocabulary: dict[int, int]) -> TokenDataset:
    """Make rows whose replies hold each token so often; their prompts hold token 9 a lot."""
    rows = [
        EncodedRow([9, 9, token], [False, False, True]) for token, count in vocabulary.items() for _ in range(count)
    ]
    return TokenDataset(rows)


@pytest.mark.parametrize(
    ("size", "vocab_size", "expected", "coverage"),
    [
        ("1", 10, [7], 3 / 6),
        ("2", 10, [5, 7], 5 / 6),
        ("5", 10, [0, 1, 2, 5, 7], 1.0),  # room is filled with the lowest ids
        ("0", 10, list(range(10)), 1.0),
        ("10", 10, list(range(10)), 1.0),
        ("auto", 10, list(range(10)), 1.0),
        ("auto", 10_000, list(range(8192)), 1.0),
    ],
)
def test_the_draft_vocabulary_is_the_replies_most_frequent(
    size: str, vocab_size: int, expected: list[int], coverage: float
) -> None:
    ids, share = choose_draft_vocabulary(counted({7: 3, 5: 2, 2: 1}), size, vocab_size)
    assert ids.tolist() == expected
    assert share == pytest.approx(coverage)


def test_coverage_counts_replies_that_cannot_be_drafted() -> None:
    rare = dict.fromkeys(range(9000), 1) | {9999: 2}
    ids, share = choose_draft_vocabulary(counted(rare), "auto", 10_000)
    assert len(ids) == 8192 and 9999 in ids.tolist()
    assert share == pytest.approx((8191 + 2) / 9002)


@pytest.mark.parametrize("size", ["-1", "11", "1.5", "many", "", "²"])
def test_a_size_that_is_none_is_a_usage_error(size: str) -> None:
    with pytest.raises(UsageError, match=r"draft_vocab_size must be auto or in 0\.\.10"):
        choose_draft_vocabulary(counted({7: 1}), size, 10)


DRAFT_IDS = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 60])


def started(verifier: Verifier, **overrides: Any) -> tuple[Drafter, Drafter]:
    """Return a drafter as it is made, and the same one started from the verifier."""
    made = make_drafter(verifier, draft_vocab_size=len(DRAFT_IDS), **overrides)
    drafter = copy.deepcopy(made)
    initialise_from_verifier(drafter, verifier, DRAFT_IDS)
    assert drafter.draft_token_ids.tolist() == DRAFT_IDS.tolist()
    return made, drafter


def test_the_head_starts_from_the_verifiers_rows(verifier: Verifier) -> None:
    _, drafter = started(verifier)
    assert drafter.head.weight.equal(verifier.model.get_output_embeddings().weight[DRAFT_IDS])


def contexts(verifier: Verifier) -> tuple[Tensor, Tensor]:
    """Return hidden states, and the verifier's next-token distributions there over the draft vocabulary."""
    ids = torch.tensor([row(60, seed=3).input_ids])
    with torch.no_grad():
        output = verifier.model(ids, output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0][:, DRAFT_IDS].log_softmax(-1)


def test_the_first_prediction_is_the_verifiers_own_at_the_context(verifier: Verifier) -> None:
    """Exactly so before any token or block adds to it; nearly so with both."""
    hidden, expected = contexts(verifier)
    _, drafter = started(verifier, num_draft_layers=0)
    with torch.no_grad():
        found = drafter.logits(hidden, torch.zeros_like(hidden)).log_softmax(-1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    made, drafter = started(verifier, num_draft_layers=2)
    roots = verifier.embed(torch.tensor(row(60, seed=4).input_ids))
    divergences = []
    with torch.no_grad():
        for model in (made, drafter):
            found = model.logits(hidden, model.advance(torch.zeros_like(roots), roots)).log_softmax(-1)
            divergences.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    assert 3 * divergences[1] < divergences[0]


@pytest.mark.parametrize("exit_dim", [64, 48])
def test_with_another_exit_dim_head_and_projection_stay_random(verifier: Verifier, exit_dim: int) -> None:
    made, drafter = started(verifier, exit_dim=exit_dim)
    changed = {name for name, tensor in weights(made).items() if not tensor.equal(drafter.state_dict()[name])}
    assert changed == {"draft_token_ids", "rnn_w.weight"}


@pytest.mark.parametrize(("settings", "scaled"), [({}, True), ({"emb_norm": True}, False)])
def test_recurrent_weights_fit_the_size_of_the_embeddings(
    verifier: Verifier, settings: dict[str, Any], scaled: bool
) -> None:
    made, drafter = started(verifier, **settings)
    size = float(verifier.model.get_input_embeddings().weight.detach()[DRAFT_IDS].float().std())
    expected = made.rnn_w.weight / size if scaled else made.rnn_w.weight
    assert torch.allclose(drafter.rnn_w.weight, expected, rtol=1e-6)


# Arguments


def test_the_documented_call_works(tmp_path: Path) -> None:
    from recurrent_drafting import DrafterTrainer as PublicTrainer
    from recurrent_drafting import TrainingArguments as PublicArguments

    args = PublicArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        drafter_predict_n_tokens=4,
        drafter_num_layers=2,
        use_wandb=True,
    )
    assert (PublicArguments, PublicTrainer) == (TrainingArguments, DrafterTrainer)
    assert args.report_to == ["wandb"]
    assert (args.num_train_epochs, args.learning_rate, args.drafter_num_layers) == (3, 5e-4, 2)


def test_the_defaults_that_training_rests_on(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.num_train_epochs, args.objective) == (5e-4, 3, "kl")
    assert (args.drafter_predict_n_tokens, args.drafter_num_layers, args.drafter_top_k) == (4, 2, 5)
    assert not args.remove_unused_columns and not args.logging_nan_inf_filter
    assert args.report_to in ([], ["none"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "mse"}, "objective must be one of"),
        ({"kd_alpha": -0.1}, r"kd_alpha must be in \[0, 1\]"),
        ({"kd_alpha": math.nan}, r"kd_alpha must be in \[0, 1\]"),
        ({"kd_temperature": 0.0}, "kd_temperature must be > 0"),
        ({"kd_temperature": math.inf}, "kd_temperature must be"),
        ({"depth_decay": math.nan}, "depth_decay must be > 0"),
        ({"drafter_predict_n_tokens": 0}, "drafter_predict_n_tokens must be > 0"),
        ({"drafter_top_k": -1}, "drafter_top_k must be > 0"),
        ({"muon": True, "optim": "sgd"}, "muon goes with optim adamw_torch or adamw_torch_fused, got sgd"),
        ({"muon": True, "optim_args": "foreach=True"}, "muon takes no optim_args, got 'foreach=True'"),
    ],
)
def test_arguments_that_cannot_be_are_usage_errors(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        TrainingArguments(output_dir=str(tmp_path), **settings)


def test_an_apple_gpu_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is on the CPU there (``verifier.resolve_device``), so the drafter has to be."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = arguments(tmp_path)
    assert (args.use_cpu, args.device) == (True, torch.device("cpu"))
