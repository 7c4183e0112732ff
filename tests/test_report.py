"""Reports: figures equal the files', text stays text, and nothing comes from outside."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from recurrent_drafting import (
    Drafter,
    SpeculativeDecoder,
    detokenizer,
    evaluation,
    plots,
    prompt_files,
    report,
    result_files,
)
from recurrent_drafting.config import SamplingConfig
from recurrent_drafting.errors import DataError
from recurrent_drafting.evaluation import RunSettings
from recurrent_drafting.plots import DASH
from recurrent_drafting.report import TIMES, Result
from tests.html_pages import Element, parse
from tests.text_models import Models, load_verifier, make_tokenizer, save_questions

BAD = "<script>alert(1)</script>"
TRAINING = {
    "global_step": 20,
    "log_history": [
        {"step": 10, "loss": 2.5, "learning_rate": 1e-3, "top1_depth_1": 0.25, "top1_depth_2": 0.125},
        {"step": 20, "loss": 1.5, "learning_rate": 0.0, "top1_depth_1": 0.5, "top1_depth_2": 0.375},
        {"step": 20, "eval_loss": 1.75, "eval_top1_depth_1": 0.5, "eval_simulated_tau": 1.875},
    ],
}
SWEEP = {
    "sweep": {
        "method": "speculative",
        "base_model": "base",
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 1,
        "prompts": 3,
        "points": [
            {
                **{"width": width, "length": 2, "max_nodes": nodes, "temperature": temperature, "tau": 1.5},
                **{"speedup_median": gain, "speedup_min": 0.5, "speedup_max": 2.5, "tokens_per_second": 30.0},
                **{"mean_tree_nodes": 4.0, "identical": 3, "compared": 3},
            }
            for width, nodes, temperature, gain in ((1, None, 0.0, 1.125), (4, None, 0.0, 1.5), (1, 8, 0.7, None))
        ],
        "recommended": {"width": 4, "length": 2, "max_nodes": None, "speedup": 1.5},
    },
    "settings": {},
    "machine": {"cores": 2},
}


def row(question_id: int, category: str, seconds: float, accepted: list[int]) -> dict[str, Any]:
    """Make a row whose baseline took a second for as many tokens; steps accept what is given."""
    tokens = 1 + sum(accepted) + len(accepted)
    return {
        "question_id": question_id,
        "category": category,
        "turn": 1,
        "prompt": "Why?",
        "text": "".join(f"t{index} " for index in range(tokens)),
        "token_texts": [f"t{index} " for index in range(tokens)],
        "tokens": tokens,
        "seconds": seconds,
        "tau": (tokens - 1) / len(accepted),
        "accepted": [accepted.count(length) for length in range(max(accepted) + 1)],
        "accepted_by_step": accepted,
        "finish_reason": "length",
        "choices": [{"accept_lengths": [length + 1 for length in accepted]}],
        "baseline_seconds": 1.0,
        "baseline_tokens": tokens,
        "identical": True,
    }


def record() -> dict[str, Any]:
    rows = [row(1, "writing", 0.5, [1, 0, 2]), row(2, "writing", 0.8, [0, 0]), row(3, "math", 0.25, [3, 1])]
    return {
        "summary": {
            **{"method": "speculative", "base_model": "base", "base_note": None, "speculator_path": "drafter"},
            **{"dtype": "float32", "device": "cpu", "batch_size": 1, "temperature": 0.0, "prompts": 3},
            **{"cut_prompts": 0, "tokens": 17, "seconds": 1.55, "tokens_per_second": 10.97, "tau": 2.0},
            **{"acceptance_by_depth": [4 / 7, 2 / 7, 1 / 7], "mean_tree_nodes": 8.25},
            **{"phase_seconds": {"draft": 0.5, "verify": 1.0, "other": 0.0}},
            **{"baseline_tokens_per_second": 5.67, "speculative_tokens_per_second": 10.97, "speedup_median": 2.0},
            **{"speedup_min": 1.25, "speedup_max": 4.0, "identical": 3, "compared": 3, "near_ties": 0, "structural": 0},
        },
        "machine": {"processor": "abacus", "versions": {"torch": "2.10"}},
        "settings": {
            **{"max_new_tokens": 12, "stop": [], "beam": {"width": 10, "length": 4, "max_nodes": None}},
            "latency_curve": {"nodes": [1, 4], "seconds": [0.01, 0.0125]},
        },
        "lossless": {"identical": 3, "near_ties": 0, "structural": 0, "details": []},
        "rows": rows,
    }


def page(*data: Any, names: tuple[str, ...] = ("first", "second", "third")) -> Element:
    return parse(report.render([Result.of(name, item) for name, item in zip(names, data, strict=False)]))


def tiles(root: Element) -> dict[str, list[str | Element]]:
    return {item.all("dt")[0].text: item.all("dd")[0].parts for item in root.all("dl", "tiles")[0].children}


@pytest.mark.parametrize(
    ("data", "title"),
    [
        ([record()], "Evaluation report"),
        ([record(), record(), record()], "Comparison of 3 runs"),
        ([TRAINING, record()], "Training report"),
        ([SWEEP], "Sweep of the drafting settings"),
    ],
    ids=["evaluation", "comparison", "training", "sweep"],
)
def test_a_page_is_well_formed_and_takes_nothing_from_outside(data: list[Any], title: str) -> None:
    html = report.render([Result.of(f"run {index}", item) for index, item in enumerate(data)])
    root = parse(html)
    assert root.all("h1")[0].text == root.all("title")[0].text == title
    assert root.all("svg") and not root.all("script")
    assert not re.search(r"(?:https?:)?//|@import|url\(", html)
    everything = [element for tag in ("a", "img", "link", "iframe", "object") for element in root.all(tag)]
    assert [element.attributes.get("href") for element in everything] == ["data:,"]
    assert not [name for element in root.all("svg") for name in element.attributes if name.startswith("on")]
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", root.all("body")[0].text)


def test_the_figures_are_those_of_the_file() -> None:
    root = page(record())
    assert [parts[0] for parts in tiles(root).values()] == [f"2.00{TIMES}", "2.000", "11.0", "3/3", "3"]
    assert root.marks("Speed-up by category") == ["writing, first: 1.62 (1.25 to 2.00)", "math, first: 4.00"]
    assert root.marks("tau by category") == ["writing, first: 1.60", "math, first: 3.00"]
    assert root.marks("Acceptance by depth") == [
        f"depth {k}, first: {v}" for k, v in ((1, "57.1%"), (2, "28.6%"), (3, "14.3%"))
    ]
    shares = ("42.9%", "28.6%", "14.3%", "14.3%")
    assert root.marks("Accepted length") == [f"{k}, first: {share}" for k, share in enumerate(shares)]
    assert "7 steps" in root.figure("Accepted length").text
    assert root.marks("Time split") == ["draft: 33.3%", "verify: 66.7%"]
    assert root.marks("Cost of a verifier step") == ["verify at 1: 10", "verify at 4: 12.5"]
    cells = [cell.text for line in root.all("details")[0].all("tr")[1:] for cell in line.all("td")]
    assert cells[:9] == ["1", "writing", "1", "7", "0.50", "2.00", "2.00", "yes", "length"]
    machine = {line.children[0].text: line.children[1].text for line in root.all("table", "pairs")[1].all("tr")}
    assert machine == {"processor": "abacus", "versions torch": "2.10"}


def test_bars_are_as_long_as_their_values() -> None:
    bars = page(record()).figure("Speed-up by category").all("rect")
    lengths = [float(bar.attributes["width"]) for bar in bars]
    assert lengths[1] / lengths[0] == pytest.approx(4.0 / 1.625, rel=1e-2)


def test_tau_over_the_reply() -> None:
    assert report.accepted_lengths(record()["rows"]) == [3, 2, 1, 1]
    # Steps begin at tokens 1 3 4; 1 2; 1 5 and emit 2 1 3; 1 1; 4 2.
    assert report.tau_by_position(record()["rows"]) == [(0, 9 / 5), (4, 5 / 2)]
    long = [{"choices": [{"accept_lengths": [1] * 200}]}]
    assert [first for first, _ in report.tau_by_position(long)] == list(range(0, 201, 16))


def test_slowest_and_fastest_prompts_with_their_drafted_tokens() -> None:
    root = page(record())
    assert [item.text for item in root.all("h3")] == ["Slowest", "Fastest"]
    assert [item.all("h4")[0].text for item in root.all("article")] == [
        *("2 writing, turn 1", "1 writing, turn 1", "3 math, turn 1")
    ]
    reply = root.all("article")[2].all("p", "reply")[0]
    assert reply.text == record()["rows"][2]["text"]
    assert [item.text for item in reply.all("mark")] == ["t1 ", "t2 ", "t3 ", "t5 "]
    assert f"speed-up 4.00{TIMES}" in root.all("article")[2].text


def test_text_is_never_markup() -> None:
    data = record()
    for item in data["rows"]:
        item |= {"prompt": f"ask {BAD}", "category": f"{BAD} & <b>", "finish_reason": BAD}
        item["token_texts"][1] = BAD
    data["summary"] |= {"base_model": BAD, "speculator_path": '"><img src=x onerror=alert(1)>'}
    data["machine"] = {BAD: [BAD, None]}
    names = (f"a{BAD}", f"b{BAD}")
    for root in (page(data, names=names), page(data, data, names=names), page(TRAINING, data, names=names)):
        assert not [tag for tag in ("script", "img", "b") if root.all(tag)]
        assert BAD in root.all("article")[0].all("p", "reply")[0].text
        assert f"ask {BAD}" in root.all("blockquote")[0].text


def test_a_structural_difference_is_the_first_thing_said() -> None:
    bad = record()
    bad["summary"]["structural"] = 1
    detail = {"verdict": "structural", "request_id": 7, "position": 3, "reason": f"because {BAD}"}
    bad["lossless"] |= {"structural": 1, "details": [{"verdict": "near-tie"}, detail]}
    for root in (page(bad), page(record(), bad), page({**SWEEP, "lossless": bad["lossless"]})):
        [first, second, *_] = root.all("body")[0].children
        assert (first.tag, second.attributes["class"]) == ("h1", "alarm")
        assert "differ structurally" in second.text and f"at request 7, new token 3: because {BAD}" in second.text
    assert page(record(), bad).all("p", "alarm")[0].text.startswith("second: 1 of ")
    assert not page(record(), record()).all("p", "alarm")


def test_what_is_missing_is_left_out_or_a_dash() -> None:
    data = record()
    data["summary"] |= {"tau": float("nan"), "speedup_median": None, "speedup_min": None, "acceptance_by_depth": []}
    data["rows"][0] |= {"tau": None, "accepted": [], "seconds": float("nan")}
    for item in data["rows"]:
        del item["token_texts"]
    root = page(data)
    assert (tiles(root)["tau"][0], tiles(root)["speed-up (median)"][0]) == (DASH, f"{DASH}{TIMES}")
    assert "Acceptance by depth" not in root.text
    assert root.all("details")[0].all("tr")[1].all("td")[5].text == DASH
    assert "drafted tokens" not in root.text and "t1 t2" in root.all("article")[0].text
    bare = page({"summary": {"method": "baseline", "base_model": "base", "temperature": 0.0}})
    assert not bare.all("figure") and tiles(bare)["tokens/s"][0] == DASH


def test_a_comparison_says_common_settings_once_and_groups_the_bars() -> None:
    other = copy.deepcopy(record())
    other["summary"] |= {"temperature": 1.0, "tau": 1.5, "speedup_median": 1.25}
    other["rows"][2]["category"] = "coding"
    root = page(record(), other)
    [table] = [item for item in root.all("table") if item.all("th") and item.all("th")[0].text == "run"]
    lines = [[cell.text for cell in line.children] for line in table.all("tr")]
    assert lines[0][:3] == ["run", "temperature", "tokens/s"] and f"beam 10 {TIMES} 4; nodes auto" in root.text
    assert [dict(zip(lines[0], line, strict=True))["tau"] for line in lines[1:]] == ["2.000", "1.500"]
    assert root.marks("tau by category")[-4:] == [
        *("math, first: 3.00", f"math, second: {DASH}", f"coding, first: {DASH}", "coding, second: 3.00")
    ]
    legend = root.figure("tau by category").all("ul", "legend")[0]
    assert [item.text for item in legend.children] == ["first", "second"]
    assert root.marks("Speed-up of each run") == ["first: 2.00 (1.25 to 4.00)", "second: 1.25 (1.25 to 4.00)"]
    assert [item.text for item in root.all("summary") if "All" not in item.text] == ["first", "second"]
    assert "different machines" not in root.text
    other["machine"] = {}
    assert "different machines" in page(record(), other).text


def test_training_curves_and_simulated_against_served_tau() -> None:
    root = page(TRAINING, record())
    assert root.marks("Loss") == ["training at 10: 2.5", "training at 20: 1.5", "held out at 20: 1.75"]
    assert root.marks("Training accuracy by depth")[2:] == ["depth 2 at 10: 0.125", "depth 2 at 20: 0.375"]
    assert root.marks("Held-out accuracy by depth") == ["depth 1: 50%"]
    assert root.marks("Simulated and served tau") == ["simulated: 1.875", "served, second: 2.000"]
    assert {name: parts[0] for name, parts in tiles(root).items()} == {
        **{"steps": "20", "held-out loss": "1.750", "simulated tau": "1.875", "served tau": "2.000"}
    }
    assert "Evaluation" not in page(TRAINING).text
    assert "Training" in page({"log_history": []}).text


def test_a_sweep_is_a_heat_map_and_a_table() -> None:
    root = page(SWEEP)
    figure = root.figure("Temperature 0, tree nodes auto")
    assert [item.text for item in figure.all("title")] == ["width 1, length 2: 1.12", "width 4, length 2: 1.50"]
    cells = figure.all("rect")
    assert [item.attributes["class"] for item in cells] == ["cell", "cell best"]
    assert float(cells[0].attributes["fill-opacity"]) < float(cells[1].attributes["fill-opacity"])
    assert root.marks("Temperature 0.7, tree nodes 8") == [f"width 1, length 2: {DASH}"]
    assert f"Recommended: width 4, length 2, tree nodes auto; 1.50{TIMES}" in root.text
    lines = [[cell.text for cell in line.children] for line in root.all("table")[0].all("tr")[1:]]
    assert [line[:5] for line in lines] == [
        ["4", "2", "auto", "0", "1.50"],
        ["1", "2", "auto", "0", "1.12"],
        ["1", "2", "8", "0.7", DASH],
    ]


def test_a_real_record_marks_the_tokens_that_were_drafted(models: Models, tmp_path: Path) -> None:
    decoder = SpeculativeDecoder(load_verifier(models.base, "fp64"), Drafter.from_pretrained(models.drafter))
    questions, _ = prompt_files.load_questions(str(save_questions(tmp_path / "q.jsonl")))
    sampling = SamplingConfig(temperature=1.0)
    settings = RunSettings(base_model="base", speculator_path="drafter", max_new_tokens=24, turns=2, sampling=sampling)
    data = evaluation.compare(decoder.verifier, decoder, make_tokenizer(), questions, settings)
    drafted = sum(sum(row["accepted_by_step"]) for row in data["rows"])
    assert drafted > 0
    for item in data["rows"]:
        assert "".join(item["token_texts"]) == item["text"].rstrip(detokenizer.BROKEN)
        assert sum(report.drafted_tokens(item)) == sum(item["accepted_by_step"])
        assert len(report.drafted_tokens(item)) == item["tokens"] == len(item["token_texts"])
        assert report.accepted_lengths([item]) == item["accepted"]
    result_files.write_json(data, tmp_path / "r.json")
    root = parse(report.render(report.load([str(tmp_path / "r.json")])))
    assert tiles(root)["tau"][0] == f"{data['summary']['tau']:.3f}"
    assert len(root.all("mark")) > 1


class TestCommand:
    def test_files_become_a_page(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "r.json").write_text(json.dumps(record()))
        files = [str(tmp_path / name / "r.json") for name in ("a", "b")]
        assert report.main([str(tmp_path / "out.html"), *files]) == 0
        assert capsys.readouterr().out == f"report: {tmp_path / 'out.html'}\n"
        root = parse((tmp_path / "out.html").read_text(encoding="utf-8"))
        assert [item.text for item in root.all("summary") if "All" not in item.text] == files

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ('{"rows": []}', "no result file: expected one of the keys summary, sweep, log_history, found rows"),
            ("[1]", "found list"),
            ("{", "is no JSON"),
            (None, "cannot be read"),
        ],
    )
    def test_other_files_are_refused(
        self, tmp_path: Path, content: str | None, expected: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "r.json"
        if content is not None:
            path.write_text(content)
        assert report.main([str(tmp_path / "out.html"), str(path)]) == 3
        err = capsys.readouterr().err
        assert expected in err and str(path) in err and err.count("\n") == 1
        assert not (tmp_path / "out.html").exists()

    def test_a_result_is_known_by_its_keys(self) -> None:
        with pytest.raises(DataError, match="x is no result file"):
            Result.of("x", {})
        assert Result.of("x", TRAINING).kind == "training"


def test_a_label_that_has_room_is_not_cut() -> None:
    most = max(length for length in range(1, 40) if "…" not in plots.bars(["m" * length], [plots.Series("", [1.0])]))
    assert 9 <= most < 39
    for length in range(1, most + 1):
        assert f">{'m' * length}</text>" in plots.bars(["m" * length], [plots.Series("", [1.0])]), length


@pytest.mark.parametrize("last", [10.0, 2500.0, 1e6])
def test_the_last_mark_of_the_x_axis_stands_within_the_drawing(last: float) -> None:
    drawing = plots.lines([plots.Line("loss", [(0.0, 2.0), (last, 1.0)])], x_label="step")
    width = float(re.search(r'viewBox="0 0 (\d+)', drawing)[1])  # type: ignore[index]
    marks = re.findall(r'<text x="([\d.]+)" y="174.0" class="middle">([^<]+)</text>', drawing)
    assert float(marks[-1][1]) == pytest.approx(last)
    assert all(float(x) + len(text) * 6.9 / 2 <= width for x, text in marks)
