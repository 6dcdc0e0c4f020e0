"""A checkpoint's report as one picture that stands alone: what it came to, layer by layer, and what was clipped."""

from eval.report_facts import Report, summary
from eval.report_page import clipping_map, error_bars
from eval.svg import Chart
from offload.drawing import FAINT, INK, WIDTH, document, heading, text

_LEFT = 20
_COLUMNS = 3
_COLOURS = {"ink": INK, "faint": FAINT, "mark": "#2b6cb0", "warn": "#c05621"}


def draw_report(report: Report) -> str:
    """Return the report as an SVG file; what it lacks is left out."""
    figures = summary(report)
    said = [f"{title}: {value}" for title, value, _ in figures]
    drawn = [heading(30, report.name, figures[0][2])]
    step = (WIDTH - 2 * _LEFT) / _COLUMNS
    for at, words in enumerate(said):
        drawn.append(text(_LEFT + at % _COLUMNS * step, 78 + at // _COLUMNS * 20, words))
    y = 78.0 + -(-len(said) // _COLUMNS) * 20 + 16
    errors, clipping = error_bars(report), clipping_map(report)
    if errors is not None:
        y = _put(drawn, "error of every layer on windows held out, over round-to-nearest's", errors, y)
    if clipping is not None:
        chart, least = clipping
        y = _put(drawn, f"how much the range of its groups was cut: {1 - least:.1%} where it is darkest", chart, y)
    return document(y - 12, drawn)


def _put(drawn: list[str], title: str, chart: Chart, y: float) -> float:
    """Draw a chart under its title and return where the next begins."""
    scale = (WIDTH - 2 * _LEFT) / WIDTH
    drawn += [text(_LEFT, y, title), chart.placed(_LEFT, y + 14, scale, _COLOURS)]
    return y + 14 + scale * chart.height + 34
