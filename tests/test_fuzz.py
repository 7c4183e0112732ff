"""A short form of the fuzzing, what it found before, and that it finds what is planted."""

from __future__ import annotations

import pytest

from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.kv_cache import VerifierCache
from tests import fuzz

NAMES = ("drafter config", "base config", "safetensors header", "index", "manifest", "prompts", "chat template")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Reader]:
    return fuzz.readers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_readers_take_or_refuse_whatever_comes(readers: dict[str, fuzz.Reader], name: str) -> None:
    assert list(fuzz.fuzz(name, readers[name], 150, 1)) == []
    assert [raw for raw in fuzz.KEPT.get(name, []) if fuzz.finding(readers[name], raw)] == []
    for raw in readers[name].sound:
        readers[name].read(raw)


def test_every_reader_is_fuzzed(readers: dict[str, fuzz.Reader]) -> None:
    assert tuple(readers) == NAMES


def test_states_equal_brute_force() -> None:
    assert fuzz.check_states(3000, 1) >= 3000


def test_a_planted_fault_of_a_reader_is_found() -> None:
    reader = fuzz.Reader(lambda raw: {b"{": 1}[raw[:1]], [b'{"a": 1}'])
    found = list(fuzz.fuzz("planted", reader, 200, 0))
    assert found and all("KeyError" in line for line, _ in found)


@pytest.mark.parametrize(
    ("kind", "name"), [(DraftTree, "prune"), (DraftTree, "child"), (VerifierCache, "keep")], ids=str
)
def test_a_planted_fault_of_a_state_is_found(kind: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = getattr(kind, name)

    def wrong(self: object, *args: object) -> object:
        if name == "prune":
            return sound(self, max(int(args[0]) - 1, 1))  # type: ignore[call-overload]
        if name == "child":
            return sound(self, *args) * 0
        return sound(self, [[0] for _ in args[0]])  # type: ignore[attr-defined]

    monkeypatch.setattr(kind, name, wrong)
    with pytest.raises((AssertionError, IndexError)):
        fuzz.check_states(500, 0)


def test_a_slow_reader_is_found() -> None:
    def slow(raw: bytes) -> None:
        with fuzz.limited(1):
            while True:
                pass

    assert fuzz.finding(fuzz.Reader(slow, []), b"") == "more than 1 s"
