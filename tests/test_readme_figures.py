"""The figures that README and docs quote are those of the raw files.

In the tables of results a figure is followed by a comment that names its file in benchmarks/results and its place in
there: ``1.92<!-- quick.json:summary.tau -->``; another name with a slash is a path in the repository. A ``*`` stands
for every key of that level, and the values are added up.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEAD = "| figure | value |"
# A figure, its unit, and where it is from.
QUOTED = re.compile(
    r"(?P<minutes>\d+) min (?P<seconds>\d+) s<!-- (?P<clock>[^>]+) -->"
    r"|(?P<figure>\d[\d,]*(?:\.\d+)?)(?P<percent> ?%)?<!-- (?P<source>[^>]+) -->"
)


def value_of(source: str, folder: Path) -> float:
    """Look a figure up."""
    name, _, place = source.partition(":")
    path = folder / name if "/" not in name or (folder / name).exists() else ROOT / name
    return _at(json.loads(path.read_text(encoding="utf-8")), place.split("."))


def _at(data: Any, keys: list[str]) -> float:
    if not keys:
        return float(data)
    if keys[0] == "*":
        return sum(_at(item, keys[1:]) for item in (data.values() if isinstance(data, dict) else data))
    return _at(data[int(keys[0])] if isinstance(data, list) else data[keys[0]], keys[1:])


def wrong_figures(text: str, folder: Path) -> list[str]:
    """Return the marked figures that are not those of their files."""
    wrong = []
    for match in QUOTED.finditer(text):
        if match["clock"]:
            true, quoted = f"{value_of(match['clock'], folder):.0f}", str(60 * int(match["minutes"]) + int(match[2]))
        else:
            quoted = match["figure"].replace(",", "")
            factor = 100 if match["percent"] else 1
            true = f"{value_of(match['source'], folder) * factor:.{len(quoted.partition('.')[2])}f}"
        if true != quoted:
            wrong.append(f"{match[0]}: the file says {true}")
    return wrong


def value_cells(text: str) -> list[str]:
    """Return the cells of values in the tables of results."""
    cells = []
    for part in text.split(HEAD)[1:]:
        lines = part.split("\n\n", maxsplit=1)[0].splitlines()[2:]
        cells += [line.split("|")[2].strip() for line in lines]
    return cells


def unmarked(cells: list[str]) -> list[str]:
    """Return the cells with a figure that names no file."""
    return [cell for cell in cells if re.search(r"\d", QUOTED.sub("", cell))]


def test_the_figures_are_those_of_the_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = value_cells(text)
    assert cells and all(QUOTED.search(cell) for cell in cells)
    assert unmarked(cells) == []
    assert wrong_figures(text, RESULTS) == []
    # A file that is quoted can be opened from there.
    for match in QUOTED.finditer(text):
        name = (match["source"] or match["clock"]).partition(":")[0]
        assert (f"({name})" if "/" in name else f"(benchmarks/results/{name})") in text


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_so_are_those_of_the_docs(page: Path) -> None:
    assert wrong_figures(page.read_text(encoding="utf-8"), RESULTS) == []


@pytest.mark.parametrize(
    ("cell", "right"),
    [
        ("1.36<!-- r.json:summary.speedup -->", True),
        ("1.37<!-- r.json:summary.speedup -->", False),
        ("1.4<!-- r.json:summary.speedup -->", True),
        ("35.8 %<!-- r.json:summary.share -->", True),
        ("36%<!-- r.json:summary.share -->", True),
        ("0.358%<!-- r.json:summary.share -->", False),
        ("1,024<!-- r.json:summary.tokens -->", True),
        ("12<!-- r.json:cases.*.identical --> of 13<!-- r.json:cases.*.compared -->", True),
        ("12<!-- r.json:cases.*.identical --> of 12<!-- r.json:cases.*.compared -->", False),
        ("2<!-- r.json:list.1 -->", True),
        ("4 min 56 s<!-- r.json:seconds -->", True),
        ("4 min 57 s<!-- r.json:seconds -->", False),
    ],
)
def test_a_wrong_figure_is_found(tmp_path: Path, cell: str, right: bool) -> None:
    cases = {"a": {"identical": 5, "compared": 6}, "b.c": {"identical": 7, "compared": 7}}
    record = {"summary": {"speedup": 1.3592, "share": 0.3579, "tokens": 1024}, "cases": cases}
    (tmp_path / "r.json").write_text(json.dumps({**record, "list": [1, 2], "seconds": 296.2}))
    assert (wrong_figures(cell, tmp_path) == []) == right
    table = f"{HEAD} raw file |\n|---|---|---|\n| name | {cell} | [r.json](r.json) |\n| other | 3.5 | |\n\n5\n"
    assert value_cells(table) == [cell, "3.5"]
    assert unmarked(value_cells(table)) == ["3.5"]


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(KeyError):
        wrong_figures("1<!-- r.json:tau -->", tmp_path)
    with pytest.raises(FileNotFoundError):
        wrong_figures("1<!-- s.json:tau -->", tmp_path)
