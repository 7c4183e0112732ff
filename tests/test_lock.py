"""The locked development environment holds what the package asks for, and names no place of its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def wanted() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    tree = ast.parse((ROOT / "setup.py").read_text())
    extras = next(
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    return [Requirement(line) for line in [*filter(None, lines), *ast.literal_eval(extras)["dev"]]]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_locked_within_its_bounds() -> None:
    versions = locked()
    for requirement in wanted():
        if requirement.name not in ("setuptools", "wheel"):  # pip freeze leaves out what installs
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_lock_holds_exact_versions_alone() -> None:
    lines = [line for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50 and all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines)
