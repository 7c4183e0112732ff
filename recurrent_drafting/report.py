"""Reports: one self-contained HTML file made from result files, without network and without scripts.

  python -m recurrent_drafting.report OUT.html RESULT.json...

Takes what evaluations, sweeps and training runs (trainer_state.json) leave; several evaluations
make a comparison. What a file does not hold is left out or shown as a dash.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from recurrent_drafting import cli, plots, result_files
from recurrent_drafting.errors import DataError
from recurrent_drafting.plots import DASH, Line, Series, number
from recurrent_drafting.result_files import plain, rate, speedup

_TEMPLATE = Path(__file__).parent / "templates" / "report.html"
_SHOWN_PROMPTS = 3
TIMES = "\u00d7"
_POSITION_BINS = 16
# Columns of a comparison that are settings.
_RUN_SETTINGS = ("method", "base", "drafter", "beam", "nodes", "temperature", "dtype", "batch")
# The key that tells what a result file is.
_KINDS = {"summary": "evaluation", "sweep": "sweep", "log_history": "training"}


@dataclass(frozen=True)
class Result:
    """One result file.

    Args:
        name: what the reader shall call it.
        kind: "evaluation", "sweep" or "training".
        data: what the file holds.
    """

    name: str
    kind: str
    data: dict[str, Any]

    @classmethod
    def of(cls, name: str, data: Any, where: str | None = None) -> Result:
        """Recognise a result by its keys.

        Args:
            name: what the reader shall call it.
            data: what the file holds.
            where: the file, for the message; default its name.

        Raises:
            DataError: it is none.
        """
        keys = sorted(data) if isinstance(data, dict) else []
        kind = next((kind for key, kind in _KINDS.items() if key in keys), None)
        if kind is None:
            found = ", ".join(keys) or type(data).__name__
            raise DataError(
                f"{where or name} is no result file: expected one of the keys {', '.join(_KINDS)}, found {found}"
            )
        return cls(name, kind, plain(data))


def load(paths: Sequence[str]) -> list[Result]:
    """Read result files; each is called by its name, or by its path where names repeat.

    Raises:
        DataError: a file cannot be read or is no result.
    """
    stems = [Path(path).stem for path in paths]
    results = []
    for path, stem in zip(paths, stems, strict=True):
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error
        except ValueError as error:
            raise DataError(f"{path} is no JSON: {error}; expected a result file") from error
        results.append(Result.of(stem if stems.count(stem) == 1 else str(path), data, str(path)))
    return results


def write(results: Sequence[Result], path: Path) -> None:
    """Write the report of some results.

    Raises:
        UsageError: the path cannot be written.
    """
    result_files.write_text(render(results), path)


def write_training(history: Sequence[dict[str, Any]], steps: int, evaluations: dict[str, Any], path: Path) -> None:
    """Write the report of a training run and of what was measured with its drafter.

    Args:
        history: the trainer's log.
        steps: optimizer steps of the run.
        evaluations: results by the names that the reader shall know them by.
        path: the HTML file.

    Raises:
        UsageError: the path cannot be written.
    """
    named = {"training": {"log_history": history, "global_step": steps}, **evaluations}
    write([Result.of(name, data) for name, data in named.items()], path)


def render(results: Sequence[Result]) -> str:
    """Return the report of some results as HTML."""
    kinds = ("evaluation", "sweep", "training")
    evaluations, sweeps, trainings = ([result for result in results if result.kind == kind] for kind in kinds)
    title = _title(evaluations, sweeps, trainings)
    parts = [f"<h1>{escape(title)}</h1>", *(_alarm(result) for result in results)]
    parts += [_training(result, evaluations) for result in trainings]
    parts += [_sweep(result) for result in sweeps]
    if len(evaluations) > 1:
        parts.append(_comparison(evaluations))
        parts += [
            f"<details><summary>{escape(result.name)}</summary>{_evaluation(result)}</details>"
            for result in evaluations
        ]
    else:
        parts += [_evaluation(result) for result in evaluations]
    return _page(title, parts)


def page(title: str, figures: Sequence[str]) -> str:
    """Return an HTML page of plots.

    Args:
        title: its heading.
        figures: what ``figure`` returned.
    """
    return _page(title, [f"<h1>{escape(title)}</h1>", _plots(figures)])


def _page(title: str, parts: Sequence[str]) -> str:
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(part for part in parts if part))


def _title(evaluations: Sequence[Result], sweeps: Sequence[Result], trainings: Sequence[Result]) -> str:
    if trainings:
        return "Training report"
    if sweeps:
        return "Sweep of the drafting settings"
    return "Evaluation report" if len(evaluations) == 1 else f"Comparison of {len(evaluations)} runs"


def _alarm(result: Result) -> str:
    """Say that texts differ from the baseline's beyond rounding; empty if they do not."""
    verdict = {**result.data.get("lossless", {}), **result.data.get("summary", {})}
    if not verdict.get("structural"):
        return ""
    first = next((item for item in verdict.get("details", []) if item.get("verdict") == "structural"), None)
    where = ""
    if first is not None:
        where = (
            f" First at request {first.get('request_id')}, new token {first.get('position')}: {first.get('reason')}."
        )
    outputs = sum(verdict.get(name, 0) for name in ("identical", "near_ties", "structural", "unaudited"))
    text = f"{result.name}: {verdict['structural']} of {outputs} outputs differ structurally from the baseline's."
    return f'<p class="alarm" role="alert"><strong>{escape(text)} This is a bug.</strong>{escape(where)}</p>'


# One evaluation


def _evaluation(result: Result) -> str:
    """Return the sections of one evaluation."""
    data, rows = result.data, result.data.get("rows", [])
    figures = [
        _speedup_by_category([result]),
        _tau_by_category([result]),
        _acceptance([result]),
        _accepted_lengths([result]),
        _tau_by_position([result]),
        _time_split(data["summary"]),
        _latency(data),
    ]
    return "\n".join(
        [
            f'<p class="lead">{escape(_subject(data["summary"]))}</p>',
            _tiles(data["summary"]),
            "<h2>Figures</h2>",
            _plots(figures),
            _extreme_prompts(rows),
            _all_prompts(rows),
            _provenance(data),
        ]
    )


def _subject(summary: dict[str, Any]) -> str:
    note = f" ({summary['base_note']})" if summary.get("base_note") else ""
    at = f", temperature {summary['temperature']:g}" if "temperature" in summary else ""
    return (
        f"{summary.get('method')} decoding of {summary.get('base_model')}{note}, drafter "
        f"{summary.get('speculator_path') or 'none'}, {summary.get('dtype')} on {summary.get('device')}, batch "
        f"{summary.get('batch_size')}{at}"
    )


def _tiles(summary: dict[str, Any]) -> str:
    """Return the headline figures."""
    tiles = []
    if "speedup_median" in summary:
        spread = f"{number(summary['speedup_min'])} to {number(summary['speedup_max'])} over prompts"
        tiles.append(("speed-up (median)", f"{number(summary['speedup_median'])}{TIMES}", spread))
    if summary.get("method") == "speculative":
        nodes = f"tokens per verifier step; {number(summary.get('mean_tree_nodes'), '.1f')} tree nodes"
        if summary.get("lookup_length"):
            nodes += f", up to {summary['lookup_length']} tokens copied where the text repeats"
        if summary.get("recycled_nodes"):
            nodes += f", {summary['recycled_nodes']} verified nodes remembered"
        tiles.append(("tau", number(summary.get("tau"), ".3f"), nodes))
    baseline = summary.get("baseline_tokens_per_second")
    against = "" if baseline is None else f"baseline {number(baseline, '.1f')}"
    tiles.append(("tokens/s", number(summary.get("tokens_per_second"), ".1f"), against))
    if "identical" in summary:
        verdicts = f"{summary.get('near_ties')} rounding near-ties, {summary.get('structural')} structural"
        if summary.get("unaudited"):
            verdicts += f", {summary['unaudited']} differing and not judged"
        tiles.append(("identical outputs", f"{summary['identical']}/{summary['compared']}", verdicts))
    cut = f", {summary['cut_prompts']} cut" if summary.get("cut_prompts") else ""
    seconds = f"{summary.get('tokens')} tokens, {number(summary.get('seconds'), '.1f')} s{cut}"
    tiles.append(("prompts", str(summary.get("prompts")), seconds))
    return _tile_list(tiles)


def _tile_list(tiles: Iterable[tuple[str, str, str]]) -> str:
    """Return headline figures, each with its name before and a note behind it."""
    cells = (f"<div><dt>{name}</dt><dd>{escape(value)}{_small(note)}</dd></div>" for name, value, note in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _small(note: str) -> str:
    return f"<small>{escape(note)}</small>" if note else ""


def _plots(figures: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def figure(title: str, drawing: str, note: str = "", names: Sequence[str] = ()) -> str:
    """Frame a drawing of ``plots`` with its title, a note and the key of its colours."""
    if not drawing:
        return ""
    return f"<figure><figcaption>{escape(title)}{_small(note)}</figcaption>{drawing}{plots.legend(names)}</figure>"


def _categories(results: Sequence[Result]) -> list[str]:
    """Return every category in the order of its first appearance."""
    return list(
        dict.fromkeys(str(row.get("category", "")) for result in results for row in result.data.get("rows", []))
    )


def _by_category(
    result: Result, value: Callable[[dict[str, Any]], float | None], categories: Sequence[str]
) -> list[list[float]]:
    """Return the known values of the rows of each category."""
    found: dict[str, list[float]] = {name: [] for name in categories}
    for row in result.data.get("rows", []):
        if (known := value(row)) is not None:
            found[str(row.get("category", ""))].append(known)
    return [found[name] for name in categories]


def _speedup_by_category(results: Sequence[Result]) -> str:
    categories = _categories(results)
    groups = [_by_category(result, speedup, categories) for result in results]
    if not any(values for group in groups for values in group):
        return ""
    series = [
        Series(
            result.name,
            [statistics.median(values) if values else None for values in group],
            [(min(values), max(values)) if len(values) > 1 else None for values in group],
        )
        for result, group in zip(results, groups, strict=True)
    ]
    drawing = plots.bars([name or "all" for name in categories], series, reference=1.0)
    note = "median over prompts, line from least to greatest; dashed: the baseline"
    return figure("Speed-up by category", drawing, note, [result.name for result in results])


def _tau_by_category(results: Sequence[Result]) -> str:
    """Draw tau over all steps of a category."""
    categories = _categories(results)
    series = []
    for result in results:
        steps = _by_category(result, _steps, categories)
        tokens = _by_category(result, lambda row: (row.get("tau") or 0) * _steps(row), categories)
        pairs = zip(tokens, steps, strict=True)
        series.append(Series(result.name, [sum(t) / sum(s) if sum(s) else None for t, s in pairs]))
    if not any(value is not None for item in series for value in item.values):
        return ""
    drawing = plots.bars([name or "all" for name in categories], series)
    return figure("tau by category", drawing, "tokens per verifier step", [result.name for result in results])


def _steps(row: dict[str, Any]) -> int:
    """Return the verifier steps of a row."""
    return sum(accepted_lengths([row]))


def _acceptance(results: Sequence[Result]) -> str:
    """Draw the share of steps that accept at least k drafted tokens."""
    shares = [result.data["summary"].get("acceptance_by_depth") or [] for result in results]
    depths = max(map(len, shares), default=0)
    if not depths:
        return ""
    series = [Series(result.name, _padded(values, depths)) for result, values in zip(results, shares, strict=True)]
    drawing = plots.bars([f"depth {depth}" for depth in range(1, depths + 1)], series, spec=".1%", most=1.0)
    note = "share of steps with at least so many drafted tokens accepted"
    return figure("Acceptance by depth", drawing, note, [result.name for result in results])


def _padded(values: Sequence[float], length: int) -> list[float | None]:
    return [*values, *[None] * (length - len(values))]


def accepted_lengths(rows: Iterable[dict[str, Any]]) -> list[int]:
    """Return the number of steps with accepted length 0, 1, 2, ... over all rows."""
    total: list[int] = []
    for row in rows:
        counts = row.get("accepted") or []
        total += [0] * (len(counts) - len(total))
        for length, count in enumerate(counts):
            total[length] += count
    return total


def _accepted_lengths(results: Sequence[Result]) -> str:
    counts = [accepted_lengths(result.data.get("rows", [])) for result in results]
    longest = max(map(len, counts), default=0)
    if not longest:
        return ""
    series = [
        Series(result.name, _padded([count / sum(steps) for count in steps] if steps else [], longest))
        for result, steps in zip(results, counts, strict=True)
    ]
    drawing = plots.bars([str(length) for length in range(longest)], series, spec=".1%", most=1.0)
    total = ", ".join(str(sum(steps)) for steps in counts)
    subtitle = f"tokens accepted in a step; share of {total} steps"
    return figure("Accepted length", drawing, subtitle, [result.name for result in results])


def tau_by_position(rows: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (first token of a stretch of the replies, tokens per step that begins in it)."""
    starts: list[tuple[int, int]] = []
    for row in rows:
        position = 1  # the prefill gives the first token
        for emitted in _accept_lengths(row):
            starts.append((position, emitted))
            position += emitted
    if not starts:
        return []
    width = 4
    while max(position for position, _ in starts) >= width * _POSITION_BINS:
        width *= 2
    stretches: dict[int, list[int]] = {}
    for position, emitted in starts:
        stretches.setdefault(position // width * width, []).append(emitted)
    return [(first, sum(items) / len(items)) for first, items in sorted(stretches.items())]


def _accept_lengths(row: dict[str, Any]) -> list[int]:
    return [length for choice in row.get("choices", []) for length in choice.get("accept_lengths", [])]


def _tau_by_position(results: Sequence[Result]) -> str:
    curves = [Line(result.name, tau_by_position(result.data.get("rows", []))) for result in results]
    if not any(curve.points for curve in curves):
        return ""
    drawing = plots.lines(curves, x_label="token of the reply")
    return figure("tau over the reply", drawing, "tokens per verifier step", [result.name for result in results])


def _time_split(summary: dict[str, Any]) -> str:
    phases = {name: seconds for name, seconds in (summary.get("phase_seconds") or {}).items() if seconds}
    total = sum(phases.values())
    if not total:
        return ""
    names = [f"{name} {seconds / total:.1%}" for name, seconds in phases.items()]
    note = f"{total:.1f} s of {summary.get('method')} decoding"
    return figure("Time split", plots.stack(list(phases.items())), note, names)


def _latency(data: dict[str, Any]) -> str:
    curve = data.get("settings", {}).get("latency_curve")
    if not curve:
        return ""
    points = [(nodes, seconds * 1000) for nodes, seconds in zip(curve["nodes"], curve["seconds"], strict=True)]
    drawing = plots.lines([Line("verify", points)], x_label="tree nodes", spec=".0f")
    return figure("Cost of a verifier step", drawing, "milliseconds of one forward by tree size")


# Prompts


def _extreme_prompts(rows: Sequence[dict[str, Any]]) -> str:
    """Show the replies that gained least and most."""
    measure = speedup if any(speedup(row) for row in rows) else rate
    known = sorted((row for row in rows if measure(row)), key=lambda row: measure(row) or 0.0)
    if not known:
        return ""
    count = min(_SHOWN_PROMPTS, (len(known) + 1) // 2)
    parts = ["<h2>Slowest and fastest prompts</h2>"]
    if any(row.get("token_texts") for row in known):
        parts.append('<p class="note"><mark>drafted tokens</mark> were proposed by the drafter and accepted.</p>')
    for title, some in (("Slowest", known[:count]), ("Fastest", known[count:][::-1][:count])):
        if some:
            cards = "".join(_prompt(row) for row in some)
            parts.append(f'<h3>{title}</h3><div class="prompts">{cards}</div>')
    return "\n".join(parts)


def _prompt(row: dict[str, Any]) -> str:
    facts = f"tau {number(row.get('tau'))}, {row.get('tokens')} tokens in {number(row.get('seconds'))} s"
    if (gain := speedup(row)) is not None:
        facts = f"speed-up {gain:.2f}{TIMES}, {facts}"
    asked = f"<blockquote>{escape(row['prompt'])}</blockquote>" if row.get("prompt") else ""
    head = f"{row.get('question_id')} {row.get('category', '')}, turn {row.get('turn', 1)}"
    return f'<article><h4>{escape(head)}</h4><p class="facts">{facts}</p>{asked}{_reply(row)}</article>'


def drafted_tokens(row: dict[str, Any]) -> list[bool]:
    """Return for each token of a reply whether it was drafted: per step the drafted ones come first."""
    marks = [False]
    for emitted, accepted in zip(_accept_lengths(row), row["accepted_by_step"], strict=True):
        marks += [True] * accepted + [False] * (emitted - accepted)
    return marks[: row["tokens"]]


def _reply(row: dict[str, Any]) -> str:
    """Return a reply with its drafted tokens marked, where the row says which ones they were."""
    if not row.get("token_texts"):
        return f'<p class="reply">{escape(row.get("text") or DASH)}</p>'
    pieces = zip(row["token_texts"], drafted_tokens(row), strict=True)
    marked = (f"<mark>{escape(text)}</mark>" if drafted else escape(text) for text, drafted in pieces if text)
    return f'<p class="reply">{"".join(marked)}</p>'


def _all_prompts(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = ("prompt", "category", "turn", "tokens", "seconds", "tau", "speed-up", "identical", "finished by")
    lines = [
        (
            str(row.get("question_id", DASH)),
            str(row.get("category", DASH)),
            str(row.get("turn", DASH)),
            number(row.get("tokens"), "d"),
            number(row.get("seconds")),
            number(row.get("tau")),
            number(speedup(row)),
            {True: "yes", False: "no"}.get(row.get("identical"), DASH),  # type: ignore[arg-type]
            str(row.get("finish_reason", DASH)),
        )
        for row in rows
    ]
    table = _table(head, lines, numeric=range(2, 7))
    return f"<details><summary>All {len(rows)} prompts</summary>{table}</details>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], *, numeric: Iterable[int] = ()) -> str:
    """Return a table; columns that are numeric are set flush right."""
    right = set(numeric)

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = (' class="n"' if column in right else "" for column in range(len(cells)))
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))

    body = (f"<tr>{line('td', cells)}</tr>" for cells in lines)
    return f'<div class="scroll"><table><tr>{line("th", head)}</tr>{"".join(body)}</table></div>'


def _provenance(data: dict[str, Any]) -> str:
    """Return settings and machine as two tables."""
    settings = {name: value for name, value in data.get("settings", {}).items() if name != "latency_curve"}
    return (
        '<div class="pairs-grid"><div><h2>Settings</h2>'
        f"{_pairs(settings)}</div><div><h2>Machine</h2>{_pairs(data.get('machine', {}))}</div></div>"
    )


def _pairs(values: dict[str, Any]) -> str:
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(_shown(value))}</td></tr>" for name, value in _flat(values))
    return f'<div class="scroll"><table class="pairs">{"".join(cells)}</table></div>'


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    if value is None or value in ([], ()):
        return DASH
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return number(value, "g") if isinstance(value, float) else str(value)


# Several evaluations


def _comparison(results: Sequence[Result]) -> str:
    """Return the table of the runs and their figures side by side."""
    cells = [_run_cells(result.data) for result in results]
    # What is the same in all runs is said once, so that the table stays narrow.
    same = [name for name in _RUN_SETTINGS if len({cell[name] for cell in cells}) == 1]
    head = ["run", *(name for name in cells[0] if name not in same)]
    lines = [[result.name, *(cell[name] for name in head[1:])] for result, cell in zip(results, cells, strict=True)]
    common = "; ".join(f"{name} {cells[0][name]}" for name in same)
    figures = [_speedup_by_category(results), _tau_by_category(results), _acceptance(results)]
    figures += [_accepted_lengths(results), _tau_by_position(results), _run_speedups(results)]
    machines = {json.dumps(result.data.get("machine"), sort_keys=True) for result in results}
    parts = [f'<p class="lead">The same in all runs: {escape(common)}</p>' if common else ""]
    if len(machines) > 1:
        parts.append('<p class="warning">The runs were measured on different machines or versions.</p>')
    numeric = [index for index, name in enumerate(head) if index and name not in _RUN_SETTINGS]
    parts += [_table(head, lines, numeric=numeric), "<h2>Figures</h2>", _plots(figures), "<h2>Runs</h2>"]
    return "".join(parts)


def _run_cells(data: dict[str, Any]) -> dict[str, str]:
    """Return a run's line of the comparison: its settings, then its figures."""
    summary, beam = data["summary"], data.get("settings", {}).get("beam") or {}
    low, high = number(summary.get("speedup_min")), number(summary.get("speedup_max"))
    return {
        "method": str(summary.get("method")),
        "base": str(summary.get("base_model")),
        "drafter": str(summary.get("speculator_path") or DASH),
        "beam": f"{beam['width']} {TIMES} {beam['length']}" if beam else DASH,
        "nodes": _nodes(beam.get("max_nodes")) if beam else DASH,
        "temperature": number(summary.get("temperature"), "g"),
        "dtype": str(summary.get("dtype")),
        "batch": str(summary.get("batch_size")),
        "tokens/s": number(summary.get("tokens_per_second"), ".1f"),
        "baseline": number(summary.get("baseline_tokens_per_second"), ".1f"),
        "speed-up": number(summary.get("speedup_median")),
        "range": DASH if DASH in (low, high) else f"{low} to {high}",
        "tau": number(summary.get("tau"), ".3f"),
        "tree nodes": number(summary.get("mean_tree_nodes"), ".1f"),
        "identical": f"{summary['identical']}/{summary['compared']}" if "identical" in summary else DASH,
    }


def _run_speedups(results: Sequence[Result]) -> str:
    summaries = [result.data["summary"] for result in results]
    if not any(summary.get("speedup_median") for summary in summaries):
        return ""
    ranges = [
        (summary["speedup_min"], summary["speedup_max"]) if summary.get("speedup_median") else None
        for summary in summaries
    ]
    series = Series("", [summary.get("speedup_median") for summary in summaries], ranges)
    drawing = plots.bars([result.name for result in results], [series], reference=1.0)
    return figure("Speed-up of each run", drawing, "median over prompts, line from least to greatest")


# Training


def _training(result: Result, evaluations: Sequence[Result]) -> str:
    """Return loss, accuracies, and simulated tau against the tau that was served."""
    history: list[dict[str, Any]] = result.data["log_history"]
    held_out = [entry for entry in history if "eval_simulated_tau" in entry]
    simulated = held_out[-1]["eval_simulated_tau"] if held_out else None
    figures = [
        _curves(history, "Loss", {"training": "loss", "held out": "eval_loss"}),
        _curves(history, "Training accuracy by depth", _depths(history, ""), spec=".0%"),
        _curves(history, "Held-out accuracy by depth", _depths(history, "eval_"), spec=".0%"),
        _curves(history, "Learning rate", {"learning rate": "learning_rate"}, spec=".2g"),
        _taus(simulated, evaluations),
    ]
    steps = result.data.get("global_step") or max((entry.get("step", 0) for entry in history), default=0)
    loss = held_out[-1].get("eval_loss") if held_out else None
    values = [("steps", str(steps)), ("held-out loss", number(loss, ".3f"))]
    values += [("simulated tau", number(simulated, ".3f"))]
    values += [("served tau", number(item.data["summary"].get("tau"), ".3f")) for item in evaluations]
    tiles = _tile_list((name, value, "") for name, value in values)
    return f"<h2>Training</h2>{tiles}{_plots(figures)}{'<h2>Evaluation</h2>' if evaluations else ''}"


def _depths(history: Sequence[dict[str, Any]], prefix: str) -> dict[str, str]:
    """Return the accuracies of the first choice that a log holds, by depth."""
    start = f"{prefix}top1_depth_"
    names = sorted({name for entry in history for name in entry if name.startswith(start)})
    return {f"depth {name.removeprefix(start)}": name for name in names}


def _curves(history: Sequence[dict[str, Any]], title: str, names: dict[str, str], spec: str = ".2f") -> str:
    curves = [
        Line(shown, [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry])
        for shown, name in names.items()
    ]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    if all(len(curve.points) == 1 for curve in curves):
        return figure(
            title, plots.bars([c.name for c in curves], [Series("", [c.points[0][1] for c in curves])], spec=spec)
        )
    return figure(title, plots.lines(curves, x_label="step", spec=spec), names=[curve.name for curve in curves])


def _taus(simulated: float | None, evaluations: Sequence[Result]) -> str:
    labels = ["simulated", *(f"served, {item.name}" for item in evaluations)]
    values = [simulated, *(item.data["summary"].get("tau") for item in evaluations)]
    if not any(values):
        return ""
    drawing = plots.bars(labels, [Series("", values)], spec=".3f", reference=1.0)
    note = "simulated on held-out rows, served on the prompts of the evaluation"
    return figure("Simulated and served tau", drawing, note)


# Sweep


def _sweep(result: Result) -> str:
    """Return a heat map for each temperature and tree size, and the table of all points."""
    sweep = result.data["sweep"]
    points: list[dict[str, Any]] = sweep["points"]
    best = sweep["recommended"]
    groups = dict.fromkeys((point["temperature"], point["max_nodes"]) for point in points)
    figures = [_heat_map(points, group, best) for group in groups]
    head = (
        "width",
        "length",
        "nodes",
        "temperature",
        "speed-up",
        "range",
        "tokens/s",
        "tau",
        "tree nodes",
        "identical",
    )
    order = sorted(points, key=lambda point: (point["temperature"], -(point["speedup_median"] or 0.0)))
    lines = [_point_cells(point) for point in order]
    shape = f"width {best['width']}, length {best['length']}, tree nodes {_nodes(best.get('max_nodes'))}"
    advice = f"Recommended: {shape}; {number(best['speedup'])}{TIMES} the baseline over all temperatures."
    return "\n".join(
        [
            f'<p class="lead">{escape(_subject(sweep))}, {sweep["prompts"]} prompts</p>',
            f"<p><strong>{escape(advice)}</strong></p>",
            "<h2>Speed-up by beam width and length</h2>",
            _plots(figures),
            "<h2>All points</h2>",
            _table(head, lines, numeric=range(10)),
            _provenance(result.data),
        ]
    )


def _nodes(max_nodes: int | None) -> str:
    return cli.AUTO if max_nodes is None else str(max_nodes)


def _heat_map(points: Sequence[dict[str, Any]], group: tuple[float, int | None], best: dict[str, Any]) -> str:
    """Draw the points of one temperature and tree size; colours mean the same for all of a temperature."""
    temperature, max_nodes = group
    same = [point for point in points if point["temperature"] == temperature]
    known = [point["speedup_median"] for point in same if point["speedup_median"] is not None]
    shown = [point for point in same if point["max_nodes"] == max_nodes]
    widths = sorted({point["width"] for point in shown})
    lengths = sorted({point["length"] for point in shown})
    found = {(point["width"], point["length"]): point["speedup_median"] for point in shown}
    values = [[found.get((width, length)) for length in lengths] for width in widths]
    framed, note = None, "median over prompts"
    if best["max_nodes"] == max_nodes:
        framed = (widths.index(best["width"]), lengths.index(best["length"]))
        note += "; framed: recommended"
    rows, columns = [f"width {width}" for width in widths], [f"length {length}" for length in lengths]
    scale = (min(known, default=0.0), max(known, default=1.0))
    title = f"Temperature {temperature:g}, tree nodes {_nodes(max_nodes)}"
    return figure(title, plots.heat_map(rows, columns, values, scale, framed), note)


def _point_cells(point: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(point["width"]),
        str(point["length"]),
        _nodes(point.get("max_nodes")),
        number(point["temperature"], "g"),
        number(point["speedup_median"]),
        f"{number(point['speedup_min'])} to {number(point['speedup_max'])}",
        number(point["tokens_per_second"], ".1f"),
        number(point["tau"], ".3f"),
        number(point["mean_tree_nodes"], ".1f"),
        f"{point['identical']}/{point['compared']}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of result files; return the exit code."""
    parser = cli.ArgumentParser(prog="python -m recurrent_drafting.report", description=__doc__)
    parser.add_argument("out", metavar="OUT.html")
    parser.add_argument("results", metavar="RESULT.json", nargs="+")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    args = parser.parse_args(argv)

    def body() -> int:
        write(load(args.results), Path(args.out))
        sys.stdout.write(f"report: {args.out}\n")
        return 0

    return cli.run(body, args.debug)


if __name__ == "__main__":
    sys.exit(main())
