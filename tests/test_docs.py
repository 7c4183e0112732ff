"""The documents against the code: the list of modules, links, and the functions that they name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_architecture import ORDER, PACKAGE, ROOT, SCRIPTS

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"])
# They follow a value through the code, from function to function.
WALKS = [DOCS / name for name in ("decoding.md", "design-training.md", "adding_an_objective.md")]
LINK = re.compile(r"\]\(([^)#\s]+)")
# `module.name`, `module.Class.member` or `Class.member`.
NAME = re.compile(r"`(\w+)\.([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?")
SUFFIXES = {"py", "json", "jsonl", "md"}


def defined(nodes: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Return what statements define, by name; attributes that methods give to ``self`` included."""
    found: dict[str, ast.stmt] = {}
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({ast.unparse(target).removeprefix("self."): node for target in targets})
    return found


def members(node: ast.stmt) -> set[str]:
    """Return what a class has of its own, nothing for other statements."""
    if not isinstance(node, ast.ClassDef):
        return set()
    return set(defined([item for item in ast.walk(node) if isinstance(item, ast.stmt) and item is not node]))


MODULES = {path.stem: defined(ast.parse(path.read_text(encoding="utf-8")).body) for path in [*PACKAGE, *SCRIPTS]}
# Two modules may each have a class of one name.
CLASSES: dict[str, set[str]] = {}
for _module in MODULES.values():
    for _name, _node in _module.items():
        if members(_node):
            CLASSES.setdefault(_name, set()).update(members(_node))


def unknown_names(text: str) -> list[str]:
    """Return the names of modules' and classes' contents, in backticks, that the code does not have."""
    unknown = []
    for place, name, member in NAME.findall(text):
        if name in SUFFIXES or (place not in MODULES and place not in CLASSES):
            continue
        if place in CLASSES:
            known = name in CLASSES[place]
        else:
            known = name in MODULES[place] and (not member or member in members(MODULES[place][name]))
        if not known:
            unknown.append(".".join(filter(None, (place, name, member))))
    return unknown


def broken_links(page: Path) -> list[str]:
    """Return the links of a page to files that are not there."""
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    return [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_the_design_lists_every_module_in_the_order_of_imports() -> None:
    rooms = re.findall(r"^\| `(\w+)` \|", (DOCS / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rooms == [name for name in ORDER if name != "__init__"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", WALKS, ids=lambda page: page.name)
def test_functions_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert unknown_names(text) == []
    assert NAME.search(text)


def test_a_name_or_link_that_is_gone_is_found(tmp_path: Path) -> None:
    text = "`losses.py` `losses.kl` `losses.gone` `Sampler.pick(x)` `Sampler.gone` `config.json` `other.thing`"
    assert unknown_names(text) == ["losses.gone", "Sampler.gone"]
    deep = unknown_names("`trainer.DrafterTrainer.log` `trainer.DrafterTrainer.gone`")
    assert deep == ["trainer.DrafterTrainer.gone"]
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](gone.md#part) [c](https://example.org)")
    assert broken_links(page) == ["gone.md"]
