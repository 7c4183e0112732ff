"""Plots as inline SVG: text in, text out, coloured by the page's style sheet.

A drawing is as wide as a phone, so that its text stays readable there; colours are the classes
``s0`` .. ``s5``, one for each series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DASH = "\u2013"
COLOURS = 6
_WIDTH = 360
_BAR = 16
_LETTER = 6.9  # width of a letter of the labels, at 12 pixels
_LABEL_ROOM = 156  # of the longest labels
_VALUE_ROOM = 46


@dataclass(frozen=True)
class Series:
    """Values of one colour.

    Args:
        name: shown in the legend.
        values: one for each label or point; None leaves a gap.
        ranges: least and greatest value behind each one, drawn as a thin line.
    """

    name: str
    values: Sequence[float | None]
    ranges: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Line:
    """Points (x, y) that are joined; points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float | None]]


def number(value: object, spec: str = ".2f") -> str:
    """Format a number; what is none, or not finite, is a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return DASH
    return format(value, spec)


def legend(names: Sequence[str]) -> str:
    """Return the key of colours, empty for a single series."""
    if len(names) < 2:
        return ""
    items = [f'<li><i class="s{index % COLOURS}"></i>{escape(name)}</li>' for index, name in enumerate(names)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def bars(
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    spec: str = ".2f",
    reference: float | None = None,
    most: float | None = None,
) -> str:
    """Draw horizontal bars, grouped by label.

    Args:
        labels: one for each group.
        series: one bar in each group.
        spec: format of the values.
        reference: where to draw a dashed line, or None.
        most: value of a bar of full length; default the greatest.
    """
    left = min(max((len(label) for label in labels), default=0) * _LETTER + 8, _LABEL_ROOM)
    scale = (_WIDTH - left - _VALUE_ROOM) / (most or _largest(series, reference))
    group = len(series) * _BAR + 8
    height = len(labels) * group + 4
    parts = []
    for row, label in enumerate(labels):
        top = row * group + 4
        middle = top + (group - 8) / 2
        parts.append(f'<text x="{left - 6:.1f}" y="{middle + 4:.1f}" class="end">{escape(_short(label, left))}</text>')
        for index, item in enumerate(series):
            parts.append(_bar(item, row, (left, top + index * _BAR, scale), (f"s{index % COLOURS}", label, spec)))
    if reference is not None:
        x = left + reference * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" class="reference"/>')
    return _svg(parts, height)


def _largest(series: Sequence[Series], reference: float | None) -> float:
    values = [value for item in series for value in item.values if value is not None]
    values += [pair[1] for item in series for pair in item.ranges if pair is not None]
    return max([value for value in [*values, reference or 0.0] if math.isfinite(value)], default=0.0) or 1.0


def _bar(item: Series, row: int, place: tuple[float, float, float], look: tuple[str, str, str]) -> str:
    """Draw a bar with its value, and the line of its range."""
    (left, top, scale), (colour, label, spec) = place, look
    value = item.values[row]
    text = number(value, spec)
    length = 0.0 if value is None or text == DASH else max(value, 0.0) * scale
    said = f"{label}, {item.name}: {text}" if item.name else f"{label}: {text}"
    end, line = left + length, ""
    pair = item.ranges[row] if item.ranges else None
    if pair is not None:
        low, high = left + pair[0] * scale, left + pair[1] * scale
        middle = top + _BAR / 2
        line = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" class="range"/>'
        said += f" ({number(pair[0], spec)} to {number(pair[1], spec)})"
        end = max(end, high)
    return (
        f'<g><title>{escape(said)}</title><rect x="{left:.1f}" y="{top + 1:.1f}" width="{length:.1f}" '
        f'height="{_BAR - 3}" class="{colour}"/>{line}'
        f'<text x="{end + 4:.1f}" y="{top + 12:.1f}" class="value">{text}</text></g>'
    )


def _short(label: str, room: float) -> str:
    letters = int((room - 8) / _LETTER + 0.01)  # a label that just fits must not fall to rounding
    return label if len(label) <= letters else label[: letters - 1] + "…"


def lines(series: Sequence[Line], *, x_label: str, spec: str = ".2f") -> str:
    """Draw curves over a common axis.

    Args:
        series: the curves.
        x_label: what x counts.
        spec: format of the marks of the y axis.
    """
    curves = [[(x, y) for x, y in line.points if y is not None and math.isfinite(y)] for line in series]
    points = [point for curve in curves for point in curve]
    if not points:
        return f'<p class="empty">{DASH}</p>'
    top, bottom, height = 8.0, 158.0, 196
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_marks = _marks(min(xs), max(xs), 5)
    y_marks = _marks(min(0.0, *ys), max(ys), 4)
    right = _WIDTH - max(12.0, len(f"{x_marks[-1]:g}") * _LETTER / 2 + 2)  # half of the last mark stands beyond
    left = max(len(number(mark, spec)) for mark in y_marks) * _LETTER + 16  # "%" is broad

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_marks[0]) / (x_marks[-1] - x_marks[0])
        up = (y - y_marks[0]) / (y_marks[-1] - y_marks[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for mark in y_marks:
        _, y = at(x_marks[0], mark)
        parts.append(f'<line x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" class="end">{number(mark, spec)}</text>')
    for mark in x_marks:
        x, _ = at(mark, y_marks[0])
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="middle">{mark:g}</text>')
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{height - 4}" class="middle">{escape(x_label)}</text>')
    for index, curve in enumerate(curves):
        places = [at(*point) for point in curve]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{drawn}" class="s{index % COLOURS}"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" class="s{index % COLOURS}">'
            f"<title>{escape(series[index].name)} at {point[0]:g}: {number(point[1], '.4g')}</title></circle>"
            for (x, y), point in zip(places, curve, strict=True)
        ]
    return _svg(parts, height)


def _marks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers that enclose a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= span * 0.999)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [step * index for index in range(first, last + 1)]


def stack(parts: Sequence[tuple[str, float]]) -> str:
    """Draw one bar whose pieces are shares of a whole."""
    total = sum(value for _, value in parts) or 1.0
    place, drawn = 0.0, []
    for index, (name, value) in enumerate(parts):
        width = value / total * _WIDTH
        drawn.append(
            f'<rect x="{place:.2f}" y="2" width="{width:.2f}" height="28" class="s{index % COLOURS}">'
            f"<title>{escape(name)}: {value / total:.1%}</title></rect>"
        )
        place += width
    return _svg(drawn, 32)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    scale: tuple[float, float],
    best: tuple[int, int] | None = None,
) -> str:
    """Draw a table of coloured cells: the higher the value, the stronger the colour.

    Args:
        rows: labels, top to bottom.
        columns: labels, left to right.
        values: one list for each row; None leaves a cell pale.
        scale: values of the palest and the strongest colour.
        best: row and column of the cell to frame, or None.
    """
    left, top, height = max((len(row) for row in rows), default=0) * _LETTER + 10, 20, 34
    width = min((_WIDTH - left - 2) / max(len(columns), 1), 110)
    parts = [
        f'<text x="{left + (column + 0.5) * width:.1f}" y="13" class="middle">{escape(name)}</text>'
        for column, name in enumerate(columns)
    ]
    for row, name in enumerate(rows):
        y = top + row * height
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 21}" class="end">{escape(name)}</text>')
        for column, value in enumerate(values[row]):
            colour = "cell best" if best == (row, column) else "cell"
            said = f"{name}, {columns[column]}: {number(value)}"
            parts.append(_cell(value, scale, (left + column * width, y, width, height), (colour, said)))
    return _svg(parts, top + len(rows) * height + 2)


def _cell(
    value: float | None,
    scale: tuple[float, float],
    box: tuple[float, float, float, float],
    look: tuple[str, str],
) -> str:
    """Draw one cell of a heat map within its box (x, y, width, height)."""
    (x, y, width, height), (colour, said), (low, high) = box, look, scale
    text = number(value)
    strength = 0.08 if value is None or text == DASH else 0.12 + 0.88 * (value - low) / ((high - low) or 1.0)
    strong = " strong" if strength > 0.72 else ""
    return (
        f'<g><title>{escape(said)}</title><rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" '
        f'height="{height - 2:.1f}" class="{colour}" fill-opacity="{strength:.2f}"/>'
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}" class="middle{strong}">{text}</text></g>'
    )


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}">{"".join(parts)}</svg>'
