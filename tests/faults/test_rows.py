"""Every row of the fault table has tests that exist, start a script, and are parametrised widely enough."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.faults.rows import FAULTS, ROWS

TESTS = Path(__file__).resolve().parent.parent
LEAST_CASES = 200
# What starts a script, whatever the test's own helpers are called.
STARTERS = {"main", "launch", "process"}
NAMED = sorted({name for names in ROWS.values() for name in names})


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> dict[str, tuple[Path, ast.FunctionDef]]:
    """Return a file's functions by name, those that it imports from other tests included."""
    found: dict[str, tuple[Path, ast.FunctionDef]] = {}
    for node in tree_of(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            other = TESTS.parent / f"{(node.module or '').replace('.', '/')}.py"
            theirs = functions(other) if other.is_file() else {}
            found |= {alias.name: theirs[alias.name] for alias in node.names if alias.name in theirs}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = (path, node)
    return found


def words(node: ast.AST) -> set[str]:
    names = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
    names |= {item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute)}
    return names | {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}


def reaches_a_script(path: Path, name: str, seen: frozenset[str] = frozenset()) -> bool:
    """Follow a test through the helpers and fixtures it names."""
    known = functions(path)
    if name in STARTERS:
        return True
    if name not in known or name in seen:
        return False
    place, node = known[name]
    return any(word in STARTERS or reaches_a_script(place, word, seen | {name}) for word in words(node) - {name})


def test_the_table_is_whole() -> None:
    assert list(FAULTS) == list(ROWS) == list(range(1, 37))
    assert all(ROWS.values())


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_exists_and_starts_a_script(name: str) -> None:
    file, _, function = name.partition("::")
    assert function in functions(TESTS / file)
    assert reaches_a_script(TESTS / file, function)


@pytest.mark.slow
def test_there_are_enough_cases() -> None:
    """As pytest collects them, each by its own name."""
    files = sorted({str(TESTS / name.partition("::")[0]) for name in NAMED})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = Counter(re.sub(r"^tests/|\[.*", "", line) for line in done.stdout.splitlines() if "::" in line)
    assert {name for name in NAMED if not cases[name]} == set()
    assert sum(cases[name] for name in NAMED) >= LEAST_CASES
