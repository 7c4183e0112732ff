"""Token rows: padding by masks, packing, and rows that are held out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from recurrent_drafting import token_rows
from recurrent_drafting.errors import DataError
from recurrent_drafting.token_rows import Collator, EncodedRow, TokenDataset


def test_collator_pads_right_with_masks_and_never_by_id() -> None:
    rows = [EncodedRow([0, 0, 7], [False, True, True]), EncodedRow([0], [True])]
    batch = Collator()(rows)
    assert batch["input_ids"].tolist() == [[0, 0, 7], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["loss_mask"].tolist() == [[False, True, True], [True, False, False]]
    assert [batch[name].dtype for name in ("input_ids", "attention_mask", "loss_mask")] == [
        torch.int64,
        torch.bool,
        torch.bool,
    ]


@pytest.mark.parametrize(("top", "dtype"), [(2**16 - 1, torch.uint16), (2**16, torch.int32)])
def test_packing_round_trip(tmp_path: Path, top: int, dtype: torch.dtype) -> None:
    rows = [
        EncodedRow([1, top, 3], [False, True, True], greedy=True),
        EncodedRow([5, 6, 7, 8], [False, False, False, True], greedy=False),
    ]
    path = tmp_path / "new" / "rows.safetensors"
    token_rows.save_packed(rows, path, {"base": "tiny"})
    packed, metadata = token_rows.load_packed(path)
    assert packed.rows == rows
    assert (metadata, packed.reply_tokens, len(packed)) == ({"base": "tiny"}, 3, 2)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("tokens").dtype == dtype
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_packing_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row"):
        token_rows.save_packed([], tmp_path / "x", {})
    path = tmp_path / "x.safetensors"
    token_rows.save_packed([EncodedRow([1, 2], [False, True], greedy=True)], path, {})
    path.write_bytes(path.read_bytes()[:-3])
    for damaged in (path, tmp_path / "gone.safetensors"):
        with pytest.raises(DataError, match="expected a packed data set"):
            token_rows.load_packed(damaged)


def test_split_holds_out_rows_without_overlap() -> None:
    rows = [EncodedRow([index], [True]) for index in range(100)]
    training, evaluation = token_rows.split(rows, 3)
    assert isinstance(training, TokenDataset)
    assert len(evaluation) == 3
    assert sorted(row.input_ids[0] for row in [*training.rows, *evaluation.rows]) == list(range(100))
    assert len(token_rows.split(rows, None)[1]) == 5
    with pytest.raises(DataError, match="at least 2 rows"):
        token_rows.split(rows[:1], None)
