"""Reports in a real browser: nothing wider than the page at three widths, light and dark, no console message.

Needs Chromium or Chrome; without one the tests are skipped.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from recurrent_drafting import report
from tests.test_report import SWEEP, TRAINING, record

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")]

WIDTHS = (390, 820, 1440)
# Windows are never as narrow as a phone, frames are; the page in the frame tells its parent what it measures.
CHILD = """<script>
const wide = [...document.querySelectorAll("body *")].filter(
  (item) => !item.closest("svg, .scroll, details:not([open])")
    && item.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
const style = getComputedStyle(document.body);
parent.postMessage({page: document.documentElement.scrollWidth, wide: wide.map((item) => item.tagName),
  paper: style.backgroundColor, ink: style.color, svgs: document.querySelectorAll("svg").length,
  smallest: Math.min(...[...document.querySelectorAll("svg text")].map((item) => item.getBoundingClientRect().height)),
}, "*");
</script>"""
PARENT = """<!DOCTYPE html><body><pre id="out"></pre><script>
const found = {};
onmessage = (event) => {
  for (const frame of frames_) if (frame.contentWindow === event.source) found[frame.width] = event.data;
  document.getElementById("out").textContent = JSON.stringify(found);
};
const frames_ = %s.map((width) => Object.assign(document.createElement("iframe"), {width, height: 900}));
for (const frame of frames_) { frame.src = "page.html"; document.body.append(frame); }
</script>"""


def pages() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return what the pages are made of."""
    other, broken = copy.deepcopy(record()), copy.deepcopy(record())
    other["summary"] |= {"temperature": 1.0, "speculator_path": "a/rather/long/path/of/some/drafter-of-many-steps"}
    broken["summary"]["structural"] = 1
    for row in broken["rows"]:
        row["category"] = "a-category-with-a-long-name"
        row["prompt"] = row["prompt"] * 20 if row.get("prompt") else "word" * 200
    return {
        "evaluation": [("run", record())],
        "structural": [("run", broken)],
        "comparison": [("temperature-0", record()), ("temperature-1", other), ("a-third-run", broken)],
        "training": [("training", TRAINING), ("quick_results", record())],
        "sweep": [("sweep", SWEEP)],
    }


def measure(folder: Path, html: str, *, dark: bool) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Open a page in frames of all widths; return what each measures, and the console's messages."""
    assert BROWSER is not None
    (folder / "page.html").write_text(html.replace("</body>", CHILD + "</body>"), encoding="utf-8")
    (folder / "frames.html").write_text(PARENT % list(WIDTHS), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--window-size=1600,1200", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    told = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told and told[1], done.stderr[-2000:]
    found = json.loads(unescape(told[1]))
    return {int(width): values for width, values in found.items()}, re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.parametrize("name", ["evaluation", "structural", "comparison", "training", "sweep"])
def test_a_page_fits_every_width(tmp_path: Path, name: str) -> None:
    html = report.render([report.Result.of(*item) for item in pages()[name]])
    found, console = measure(tmp_path, html, dark=False)
    assert console == []
    assert sorted(found) == list(WIDTHS)
    for width, values in found.items():
        assert (values["page"] <= width, values["wide"]) == (True, []), width
        assert values["svgs"] > 0 and values["smallest"] >= 9, width  # pixels: letters stay readable


def test_dark_is_dark(tmp_path: Path) -> None:
    html = report.render([report.Result.of(*item) for item in pages()["evaluation"]])

    def brightness(colour: str) -> int:
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    for dark in (False, True):
        folder = tmp_path / str(dark)
        folder.mkdir()
        found, console = measure(folder, html, dark=dark)
        for values in found.values():
            assert (brightness(values["paper"]) < brightness(values["ink"])) == dark
        assert console == []


def test_a_page_that_does_not_fit_and_complains_is_noticed(tmp_path: Path) -> None:
    html = report.render([report.Result.of(*item) for item in pages()["evaluation"]])
    bad = html.replace("</h1>", "</h1><p style='width:600px'>wide</p><script>console.error('oh')</script>", 1)
    found, console = measure(tmp_path, bad, dark=False)
    assert found[390]["wide"] == ["P"] and found[390]["page"] > 390 and not found[820]["wide"]
    assert len(console) == len(WIDTHS) and all("oh" in line for line in console)
