"""Pictures as SVG text, for a page that loads nothing: bars, maps of two names, parts of a whole.

Colours are the page's: `var(--ink)`, `var(--mark)`, `var(--warn)`, `var(--faint)`. What a mark says is its `<title>`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 860
_TEXT = 'font-size="11" fill="var(--ink)"'


@dataclass(frozen=True, slots=True)
class Mark:
    """A value that is drawn, what it says when pointed at, and whether it stands out."""

    value: float
    title: str
    loud: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn, 860 units wide and `height` high."""

    height: float
    body: str

    def inline(self) -> str:
        """Return it as an element of a page, in the page's colours, as wide as there is room."""
        return f'<svg viewBox="0 0 {_WIDTH} {self.height:.0f}" role="img">{self.body}</svg>'

    def placed(self, x: float, y: float, scale: float, colours: Mapping[str, str]) -> str:
        """Return it as a part of another picture: colours by name, `ink` say."""
        body = re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], self.body)
        return f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.4f})">{body}</g>'


def bars(marks: Mapping[str, Mark], limit: float | None = None, limit_label: str = "") -> Chart:
    """Return a bar for every name, in order, from 0 up; `limit` is a line across."""
    left, height, bottom = 44, 180, 30
    top = 1.05 * max([0.0, *(mark.value for mark in marks.values()), limit or 0.0]) or 1.0
    step = (_WIDTH - left) / max(1, len(marks))
    drawn = [_y_axis(left, height, top)]
    every = -(-len(marks) // 40)
    for index, (name, mark) in enumerate(marks.items()):
        size = height * min(max(mark.value / top, 0), 1)
        x = left + index * step
        colour = "var(--warn)" if mark.loud else "var(--mark)"
        place = f'x="{x + 0.1 * step:.1f}" y="{height - size:.1f}" width="{0.8 * step:.1f}" height="{size:.1f}"'
        drawn.append(f'<rect {place} fill="{colour}"><title>{escape(mark.title)}</title></rect>')
        if index % every == 0:
            drawn.append(_label(x + step / 2, height + 14, name, "middle"))
    if limit is not None:
        y = height - height * limit / top
        drawn.append(f'<path d="M{left} {y:.1f}H{_WIDTH}" stroke="var(--ink)" stroke-dasharray="4 3"/>')
        drawn.append(_label(_WIDTH, y - 4, limit_label, "end"))
    return Chart(height + bottom, "".join(drawn))


def heat_map(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], Mark]) -> Chart:
    """Return a field for every (row, column) there is, the darker the nearer its value, 0 to 1, comes to 1."""
    left, side, top = 12 + max(7 * len(row) for row in rows), 20, 18
    step = min(28.0, (_WIDTH - left) / max(1, len(columns)))
    every = -(-len(columns) // 30)
    drawn = [_label(left - 8, top + side * i + 14, row, "end") for i, row in enumerate(rows)]
    drawn += [_label(left + step * (j + 0.5), 12, c, "middle") for j, c in enumerate(columns) if j % every == 0]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            mark = cells.get((row, column))
            if mark is None:
                continue
            place = f'x="{left + step * j + 1:.1f}" y="{top + side * i + 1}" width="{step - 2:.1f}" height="{side - 2}"'
            shade = f'fill="var(--mark)" fill-opacity="{0.08 + 0.92 * min(max(mark.value, 0), 1):.3f}"'
            edge = ' stroke="var(--warn)" stroke-width="2"' if mark.loud else ""
            drawn.append(f"<rect {place} {shade}{edge}><title>{escape(mark.title)}</title></rect>")
    return Chart(top + side * len(rows) + 4, "".join(drawn))


def parts(marks: Mapping[str, Mark]) -> Chart:
    """Return one bar, cut in proportion to the values, its parts named below."""
    total, x, drawn = sum(mark.value for mark in marks.values()) or 1.0, 0.0, []
    for index, (name, mark) in enumerate(marks.items()):
        width = _WIDTH * mark.value / total
        shade = f'fill="var(--mark)" fill-opacity="{1 - index / (len(marks) + 1):.2f}"'
        title = f"<title>{escape(mark.title)}</title>"
        drawn.append(f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="28" {shade}>{title}</rect>')
        key = f'<rect x="{_WIDTH / len(marks) * index:.1f}" y="38" width="10" height="10" {shade}/>'
        drawn.append(key + _label(_WIDTH / len(marks) * index + 14, 47, name, "start"))
        x += width
    return Chart(54, "".join(drawn))


def _y_axis(left: int, height: int, top: float) -> str:
    ticks = []
    for share in (0.0, 0.5, 1.0):
        y = height * (1 - share)
        ticks.append(f'<path d="M{left} {y:.1f}H{_WIDTH}" stroke="var(--faint)"/>')
        ticks.append(_label(left - 6, min(max(y + 4, 10), height), f"{top * share:.3g}", "end"))
    return "".join(ticks)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_TEXT}>{escape(text)}</text>'
