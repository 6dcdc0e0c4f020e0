"""Pictures that stand alone: SVG text on a light ground, readable wherever an image is shown."""

from collections.abc import Sequence
from html import escape

WIDTH = 860
INK, FAINT, PAPER = "#1d232b", "#d9dde3", "#fbfbf9"


def box(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    """Return a filled rectangle, sizes in pixels, which says `title` when pointed at."""
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect {place} fill="{colour}"><title>{escape(title)}</title></rect>'


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, colour: str = INK) -> str:
    """Return a line of text whose base line is at y; anchor: "start", "middle" or "end" is at x."""
    place = f'x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{colour}">{escape(words)}</text>'


def heading(y: float, words: str, below: str) -> str:
    """Return a picture's title and, 18 pixels below it, what it is about."""
    return f'<g font-weight="600">{text(20, y, words, size=15)}</g>{text(20, y + 18, below)}'


def line(x: float, top: float, bottom: float, colour: str = FAINT, dashed: bool = False) -> str:
    """Return an upright line."""
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="M{x:.2f} {top:.2f}V{bottom:.2f}" stroke="{colour}"{dashes}/>'


def document(height: float, drawn: Sequence[str]) -> str:
    """Return the whole file, WIDTH wide and so many pixels high."""
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    ground = f'<rect width="{WIDTH}" height="{height:.0f}" fill="{PAPER}"/>'
    body = "\n".join(drawn)
    font = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\""
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {font}>\n{ground}\n{body}\n</svg>\n'
