"""Latency curves on disk: measured once, read back, and never taken from a damaged or foreign file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recurrent_drafting import BeamConfig, latency_cache
from recurrent_drafting.assets import CACHE_VARIABLE
from recurrent_drafting.latency_cache import latency_table
from recurrent_drafting.tree_budget import LatencyCurve, LatencyTable
from tests.tiny import make_drafter, make_verifier

BEAM = BeamConfig(width=2, length=2)


class Measured:
    """The real measurement, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        measure = LatencyCurve.measure

        def count(*args: Any, **options: Any) -> LatencyCurve:
            self.calls.append(options)
            return measure(*args, **options, prefix_length=4)

        monkeypatch.setattr(LatencyCurve, "measure", count)

    def take(self) -> list[tuple[int, int]]:
        """Return batch size and repeats of the measurements since the last call."""
        calls = [(call["batch_size"], call["repeats"]) for call in self.calls]
        self.calls.clear()
        return calls


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measured:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return Measured(monkeypatch)


def table(batch_size: int = 1, repeats: int = 2, dtype: torch.dtype = torch.float64, **drafter: Any) -> LatencyTable:
    verifier = make_verifier("llama", dtype=dtype)
    return latency_table(verifier, make_drafter(verifier, **drafter), BEAM, batch_size, repeats=repeats)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "latency").iterdir())


def test_a_curve_is_measured_once_and_read_back_the_same(measured: Measured, tmp_path: Path) -> None:
    first = table(batch_size=3)
    assert measured.take() == [(1, 2), (2, 2), (4, 2)]
    assert table(batch_size=4) == first
    assert table().curves == {1: first.at(1)}
    assert measured.take() == []
    assert len(files(tmp_path)) == 1


def test_only_what_is_missing_or_too_hasty_is_measured(measured: Measured) -> None:
    table(batch_size=2, repeats=1)
    measured.take()
    table(batch_size=3, repeats=1)
    assert measured.take() == [(4, 1)]
    table(repeats=3)
    assert measured.take() == [(1, 3)]
    table(batch_size=2, repeats=1)
    assert measured.take() == []


def test_dtype_drafter_and_threads_have_curves_of_their_own(measured: Measured, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    table()
    table(dtype=torch.float32)
    table(draft_vocab_size=30)
    torch.set_num_threads(threads + 1)
    try:
        table()
    finally:
        torch.set_num_threads(threads)
    assert len(measured.take()) == len(files(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"curves": {"1": {}}}'])
def test_a_damaged_file_is_measured_again_and_replaced(
    damage: str, measured: Measured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table()
    [path] = files(tmp_path)
    path.write_text(damage)
    measured.take()
    table()
    assert measured.take() == [(1, 2)]
    assert "measured again" in caplog.text
    table()
    assert measured.take() == []
    assert files(tmp_path) == [path]


def test_a_file_of_another_key_is_not_believed(measured: Measured, tmp_path: Path) -> None:
    table()
    [path] = files(tmp_path)
    content = json.loads(path.read_text())
    content["key"]["device"] = "another machine"
    path.write_text(json.dumps(content))
    measured.take()
    table()
    assert measured.take() == [(1, 2)]


def test_a_cache_that_cannot_be_written_costs_only_the_measurement(
    measured: Measured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert table().at(1).nodes == (1, 2, 4, 5)
    assert "are not kept" in caplog.text
    assert measured.take() == [(1, 2)]


def test_the_processor_has_a_name() -> None:
    assert latency_cache.processor()
