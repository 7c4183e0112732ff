"""The examples in docstrings, run: what they show is what the code gives."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_architecture import NAME, OPTIONAL, PACKAGE

MODULES = [path for path in PACKAGE if path.stem not in OPTIONAL]
# Docstrings with examples, at least; fewer would mean that they are no longer looked for in the right place.
LEAST = 15


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(NAME if path.stem == "__init__" else f"{NAME}.{path.stem}")


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [found for found in doctest.DocTestFinder().find(module) if found.examples]


def failures(module: ModuleType) -> str:
    """Run a module's examples, each docstring by itself, and return what was not as shown."""
    told: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for found in examples(module):
        runner.run(found, out=told.append)
    return "".join(told)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_examples_give_what_they_show(path: Path) -> None:
    assert failures(module_of(path)) == ""


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_every_example_that_is_written_is_run(path: Path) -> None:
    """The finder passes over functions that a decorator of another module made, and optional modules do not run."""
    written = re.findall(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
    run = [] if path.stem in OPTIONAL else [line for found in examples(module_of(path)) for line in found.examples]
    assert len(run) == len(written)


def test_there_are_examples() -> None:
    assert sum(len(examples(module_of(path))) for path in MODULES) >= LEAST


def test_an_example_that_is_wrong_is_found() -> None:
    module = ModuleType("wrong", "Two sums.\n\n>>> 1 + 1\n2\n>>> 1 + 2\n4\n")
    assert re.findall(r"Expected:\n +4\nGot:\n +3\n", failures(module))
