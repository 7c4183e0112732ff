"""The mutation harness: it passes the package as it is, finds faults, and cannot go stale or be fooled."""

from __future__ import annotations

import importlib

import pytest

from tests import mutants
from tests.mutants import MUTANTS, Mutant, Suite, applied, run_check, run_mutant

QUICK = [
    "accepted rows are not moved",
    "slots of the last step are reused",
    "positions are one high",
    "siblings see each other",
    "a drafted token is accepted by a coin of min(1, p/q)",
    "the bonus token is emitted twice",
    "a block goes on after EOS",
    "replies change order when rows leave",
    "penalties do not see the path",
    "two positions share their noise",
    "noise is keyed by the row",
    "the bonus token counts as drafted",
    "the context is the root's",
]
HARMLESS = Mutant("nodes that are not valid may be accepted", "draft_tree", "log_probs > -np.inf", "log_probs < np.inf")
CRASHING = Mutant("the walk divides by zero", "acceptance", "moved = []", "moved = [1 // 0]")


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite(cases=6)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["text", "batch", "counters", "acceptance"])
def test_the_unchanged_package_passes(suite: Suite, check: str) -> None:
    result = run_check(suite, check)
    assert result.verdict == "survived" and result.cases >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_found_by_a_wrong_result(suite: Suite, name: str) -> None:
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    assert run_mutant(suite, mutant).verdict == "killed"


def test_the_table_is_long_and_its_names_are_unique() -> None:
    assert len(MUTANTS) >= 32
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.check for mutant in MUTANTS} == set(Suite.CHECKS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_the_package_and_gives_it_back(mutant: Mutant) -> None:
    module = importlib.import_module(f"recurrent_drafting.{mutant.module}")
    before = {function: function.__code__ for function in mutants.functions(module).values()}
    with applied(mutant):
        assert any(function.__code__ != code for function, code in before.items())
    assert all(function.__code__ == code for function, code in before.items())


@pytest.mark.parametrize(
    ("old", "message"),
    [("no such text", "0 times"), ("tokens", r"[2-9] times"), ('"""The acceptance rule:', "no function")],
)
def test_a_mutant_that_does_not_fit_the_source_is_an_error(old: str, message: str) -> None:
    with pytest.raises(LookupError, match=message), applied(Mutant("stale", "acceptance", old, old)):
        pass


@pytest.mark.slow
def test_what_is_no_fault_survives_and_a_crash_does_not_count(suite: Suite) -> None:
    assert run_mutant(suite, HARMLESS).verdict == "survived"
    assert run_mutant(suite, CRASHING).verdict.startswith("crashed: ZeroDivisionError")
    assert run_check(suite, "acceptance").verdict == "survived"


@pytest.mark.slow
def test_the_command_prints_a_table_and_fails_if_a_mutant_survives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutants, "MUTANTS", [*MUTANTS, HARMLESS])
    assert mutants.main(["--cases", "2", "--only", "positions are one high"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "killed 1 of 1"
    assert mutants.main(["--cases", "2", "--only", "positions are one high", HARMLESS.name]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "killed 1 of 2"
