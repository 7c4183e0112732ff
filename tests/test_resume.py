"""What a run is made of, and which checkpoint it may go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recurrent_drafting import RecurrentDraftingConfig, manifest, resume
from recurrent_drafting.errors import ModelError, UsageError
from recurrent_drafting.token_rows import EncodedRow

ROWS = [EncodedRow([1, 2, 3], [False, True, True]), EncodedRow([4, 5], [False, True])]
SETTINGS = {"learning_rate": 0.1, "objective": "kl"}


def record(settings: dict[str, Any] | None = None, world_size: int = 1, **config: Any) -> dict[str, Any]:
    shape = RecurrentDraftingConfig(**{"hidden_size": 8, "vocab_size": 20, **config})
    return resume.run_record(settings or SETTINGS, world_size, shape, resume.data_fingerprint(ROWS))


def save(folder: Path, step: int, **what: Any) -> Path:
    path = folder / f"checkpoint-{step}"
    with manifest.whole(path, {**record(), **what}) as partial:
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
            (partial / name).write_text(f"{step}")
    return path


@pytest.mark.parametrize(
    "other",
    [
        ROWS[:1],
        ROWS[::-1],
        [EncodedRow([1, 2, 3], [True, True, True]), ROWS[1]],
        [EncodedRow([1, 2, 6], [False, True, True]), ROWS[1]],
        [EncodedRow([1, 2, 3, 4, 5], [False, True, True, False, True])],
        [EncodedRow([1, 2], [False, True]), EncodedRow([3, 4, 5], [True, False, True])],
    ],
)
def test_other_rows_have_another_fingerprint(other: list[EncodedRow]) -> None:
    assert resume.data_fingerprint(other) != resume.data_fingerprint(ROWS)
    again = [EncodedRow(list(row.input_ids), list(row.loss_mask)) for row in ROWS]
    assert resume.data_fingerprint(again) == resume.data_fingerprint(ROWS)


def test_other_continuations_have_another_fingerprint() -> None:
    def distilled(*tokens: list[int]) -> list[EncodedRow]:
        return [EncodedRow([1, 2, 3], [False, True, True], continuations=torch.tensor(tokens)), ROWS[1]]

    found = [
        resume.data_fingerprint(rows) for rows in (ROWS, distilled([5, 6]), distilled([5, 7]), distilled([5], [6]))
    ]
    assert len(set(found)) == len(found)
    assert resume.data_fingerprint(distilled([5, 6])) == found[1]


@pytest.mark.parametrize("wanted", [None, False, "", "False"])
def test_a_new_run_needs_no_checkpoint(tmp_path: Path, wanted: str | bool | None) -> None:
    save(tmp_path, 1)
    assert resume.find_checkpoint(wanted, tmp_path, record()) is None


@pytest.mark.parametrize("wanted", [True, "True"])
def test_the_newest_by_step_is_found_and_the_names_must_be_those_of_checkpoints(
    tmp_path: Path, wanted: str | bool
) -> None:
    for step in (9, 10, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-11-old").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert resume.find_checkpoint(wanted, tmp_path, record()) == tmp_path / "checkpoint-10"
    assert resume.find_checkpoint(str(tmp_path / "checkpoint-2"), tmp_path, record()) == tmp_path / "checkpoint-2"


def test_torn_checkpoints_are_passed_over_but_not_when_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (paths[3] / "optimizer.pt").unlink()
    (paths[2] / manifest.MANIFEST).unlink()
    (paths[1] / "model.safetensors").write_text("x")
    assert resume.find_checkpoint(True, tmp_path, record()) == paths[0]
    assert [entry.levelname for entry in caplog.records] == ["WARNING"] * 3
    for path in paths[1:]:
        with pytest.raises(ModelError, match=path.name):
            resume.find_checkpoint(str(path), tmp_path, record())
    (paths[0] / "scheduler.pt").unlink()
    with pytest.raises(UsageError, match=r"expected a complete checkpoint in .*, found none"):
        resume.find_checkpoint(True, tmp_path, record())


def test_every_difference_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    now = record({"learning_rate": 0.2, "objective": "kl"}, world_size=2, rnn=False)
    now["fingerprints"]["data"] = "0" * 64
    with pytest.raises(ModelError) as caught:
        resume.find_checkpoint(True, tmp_path, now)
    data = resume.data_fingerprint(ROWS)[:12]
    assert str(caught.value) == (
        f"{path} was begun with rnn True, now False; learning_rate 0.1, now 0.2; world_size 1, now 2; "
        f"data {data}, now 000000000000; repeat those or begin a new run"
    )


def test_data_that_is_not_known_is_not_compared(tmp_path: Path) -> None:
    path, unknown = save(tmp_path, 1), record()
    unknown["fingerprints"]["data"] = None
    assert resume.find_checkpoint(True, tmp_path, unknown) == path


@pytest.mark.parametrize("lacking", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_without_a_training_state_is_refused(tmp_path: Path, lacking: str) -> None:
    path = tmp_path / "checkpoint-1"
    with manifest.whole(path, record()) as partial:
        for name in {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} - {lacking}:
            (partial / name).write_text("x")
    with pytest.raises(ModelError, match=f"expected a training state, found no {lacking}"):
        resume.find_checkpoint(True, tmp_path, record())


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4, 5, 9]),
        (0, None, [1, 2, 3, 4, 5, 9]),
        (1, None, [5]),
        (2, None, [4, 5]),
        (2, 1, [1, 5]),
        (1, 1, [1, 5]),
        (3, 1, [1, 4, 5]),
        (2, 5, [4, 5]),
        (5, None, [1, 2, 3, 4, 5]),
        (6, None, [1, 2, 3, 4, 5, 9]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, limit: int | None, best: int | None, kept: list[int]) -> None:
    """Step 9 is of an earlier run: the one just saved is 5."""
    for step in (1, 2, 3, 4, 5, 9):
        save(tmp_path, step)
    resume.rotate(tmp_path / "checkpoint-5", limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert sorted(step for step, _ in resume.checkpoints(tmp_path)) == kept
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in kept}
