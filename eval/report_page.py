"""A checkpoint's report as one HTML page: no script, nothing loaded from elsewhere, readable in light and dark."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from eval.report_facts import Report, cut_name, summary
from eval.svg import Chart, Mark, bars, heat_map, parts
from offload.command import format_bytes

_STYLE = """
:root { --ink: #1d232b; --paper: #fbfbf9; --mark: #2b6cb0; --warn: #c05621; --faint: #d9dde3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #16191e; --mark: #63a4e8; --warn: #f0915a; --faint: #363c46 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 900px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
svg { width: 100%; height: auto; font-family: inherit }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: .7rem }
dl div { border: 1px solid var(--faint); border-radius: 6px; padding: .5rem .7rem }
dt, small { font-size: .8rem; opacity: .75 } dd { margin: 0; font-weight: 600 }
small { display: block; font-weight: 400 }
table { border-collapse: collapse; width: 100%; font-size: .85rem } td, th { border-bottom: 1px solid var(--faint);
  padding: .2rem .5rem; text-align: left; vertical-align: top } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums } .table { overflow-x: auto }
"""


def page(report: Report) -> str:
    """Return the page, UTF-8 text; what the report lacks, it leaves out."""
    tiles = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for title, value, note in summary(report)
    )
    sections = [
        _errors(report),
        _widths(report),
        _sensitivity(report),
        _ranges(report),
        _scales(report),
        _windows(report),
        _sizes(report),
        _recipe(report),
        _layers(report),
    ]
    name = escape(report.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n<dl>{tiles}</dl>\n{''.join(sections)}</body></html>\n"
    )


def _section(title: str, what: str, content: Chart | str) -> str:
    content = content.inline() if isinstance(content, Chart) else content
    return f"<h2>{escape(title)}</h2><p>{escape(what)}</p>{content}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table; `numbers` are the columns that are aligned to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = (' class="number"' if index in numbers else "" for index in range(len(cells)))
        return "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="table"><table><tr>{line(head, "th")}</tr>{body}</table></div>'


def _number(layer: str) -> str:
    """Return a decoder layer's index, the last part of its name."""
    return layer.rpartition(".")[2]


def _kind(linear: str) -> str:
    """Return a linear's name within its layer, that of an expert without its number."""
    return re.sub(r"\.\d+\.", ".*.", linear)


def error_bars(report: Report) -> Chart | None:
    """Return the errors of all layers, over those of rounding to nearest; None if none was measured."""
    marks = {}
    for name, layer in report.layers.items():
        if "error" in layer:
            ratio = layer["error"] / layer["rtn_error"] if layer["rtn_error"] else 1.0
            said = f"{name}: {ratio:.3f} of round-to-nearest's {layer['rtn_error']:.5f}"
            marks[_number(name)] = Mark(ratio, said + (", fell back" if layer["fallback"] else ""), layer["fallback"])
    return bars(marks, 1.0, "round to nearest") if marks else None


def _errors(report: Report) -> str:
    chart = error_bars(report)
    if chart is None:
        return ""
    what = (
        "Squared error of each layer's output on windows that were held out, over round-to-nearest's. Both run on what "
        "the quantized layers before give. A layer that would come out above 1 is rounded to nearest."
    )
    return _section("Error of every layer", what, chart)


def _map(values: Mapping[tuple[str, str], Sequence[float]], marks: Mapping[tuple[str, str], Mark]) -> Chart:
    """Return a heat map of kinds of linears over layers; values: those behind each mark, in the order of the model."""
    kinds = list(dict.fromkeys(kind for kind, _ in values))
    layers = sorted({layer for _, layer in values}, key=lambda name: (len(name), name))
    return heat_map(kinds, layers, marks)


def _gathered(found: Iterable[tuple[str, str, float]]) -> dict[tuple[str, str], list[float]]:
    """Gather (layer, linear, value) by kind and number of the layer: experts of a layer come together."""
    gathered: dict[tuple[str, str], list[float]] = {}
    for layer, linear, value in found:
        gathered.setdefault((_kind(linear), _number(layer)), []).append(value)
    return gathered


def _widths(report: Report) -> str:
    if len({linear.bits for linear in report.linears}) < 2:
        return ""
    bits = _gathered((linear.layer, linear.name, linear.bits) for linear in report.linears)
    marks = {
        (kind, layer): Mark(
            (sum(found) / len(found) - 4) / 4, f"layer {layer}, {kind}: {sum(found) / len(found):g} bits"
        )
        for (kind, layer), found in bits.items()
    }
    return _section("Bits", "Dark: 8 bits. Light: 4.", _map(bits, marks))


def _sensitivity(report: Report) -> str:
    if not report.sensitivity:
        return ""
    wide = set(report.recipe.get("wide", ()))
    found: dict[tuple[str, str], list[float]] = {}
    chosen = set()
    for each in report.sensitivity:
        for name in each["linears"]:
            layer, within = cut_name(name)
            key = _kind(within), _number(layer)
            found.setdefault(key, []).append(each["error"] / max(each["extra_bytes"], 1))
            if name in wide:
                chosen.add(key)
    means = {key: sum(values) / len(values) for key, values in found.items()}
    least, most = (math.log(bound(v for v in means.values() if v > 0)) for bound in (min, max))
    marks = {
        key: Mark(
            (math.log(mean) - least) / (most - least or 1) if mean > 0 else 0.0,
            f"layer {key[1]}, {key[0]}: {mean:.3g} a byte{', 8 bits' if key in chosen else ''}",
            key in chosen,
        )
        for key, mean in means.items()
    }
    what = (
        "What rounding linears to 4 bits does to the residual stream behind their layer, for each byte that 8 bits "
        "would add, on a logarithmic scale: the darker, the more. Framed: those that were given 8."
    )
    return _section("Sensitivity", what, _map(found, marks))


def clipping_map(report: Report) -> tuple[Chart, float] | None:
    """Return how much of its range each kind of linear lost in each layer, and the least share that was kept."""
    ranges = _gathered(
        (name, linear, kept)
        for name, layer in report.layers.items()
        for linear, kept in layer.get("chosen", {}).get("ranges", {}).items()
    )
    if not ranges:
        return None
    means = {key: sum(values) / len(values) for key, values in ranges.items()}
    least = min(means.values())
    marks = {
        key: Mark((1 - mean) / (1 - least or 1), f"layer {key[1]}, {key[0]}: {mean:.1%} of the range kept")
        for key, mean in means.items()
    }
    return _map(ranges, marks), least


def _ranges(report: Report) -> str:
    found = clipping_map(report)
    if found is None:
        return ""
    chart, least = found
    what = f"How much of its groups' range each linear keeps, on average: {least:.1%} where it is darkest."
    return _section("Clipping", what, chart)


def _scales(report: Report) -> str:
    rows = [
        (_number(name), where, label)
        for name, layer in report.layers.items()
        for where, label in layer.get("chosen", {}).get("scales", {}).items()
    ]
    if not rows:
        return ""
    what = (
        "The scales of input channels that each set of linears took: x is the magnitude of its inputs, w its weights."
    )
    table = _table(("layer", "absorbed by, for", "scale"), rows)
    return _section("Scales", what, f"<details><summary>{len(rows)} scales</summary>{table}</details>")


def _windows(report: Report) -> str:
    if report.accuracy is None:
        return ""
    pairs = zip(report.accuracy.original.window_nll, report.accuracy.checkpoint.window_nll, strict=True)
    marks = {
        str(index): Mark(abs(after - before), f"window {index}: nll {before:.4f} became {after:.4f}", after < before)
        for index, (before, after) in enumerate(pairs)
    }
    what = "How far the mean negative log-likelihood of each window rose, or, in the other colour, fell: nats a token."
    return _section("Accuracy, window by window", what, bars(marks))


def _sizes(report: Report) -> str:
    marks = {name: Mark(size, f"{name}: {format_bytes(size)}") for name, size in report.sizes.items() if size}
    return _section("Bytes", f"{format_bytes(sum(report.sizes.values()))} in all.", parts(marks))


def _recipe(report: Report) -> str:
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value))
        for key, value in report.recipe.items()
        if value not in (None, [], {})
    ]
    table = _table(("field", "value"), rows)
    return _section("Recipe", "Two runs of equal recipes write equal weights.", table)


def _layers(report: Report) -> str:
    rows = [
        (
            name,
            f"{layer['error']:.5f}",
            f"{layer['rtn_error']:.5f}",
            "fell back" if layer["fallback"] else "",
            ", ".join(layer.get("unreached", ())) + ", ".join(layer.get("chosen", {}).get("lost_tokens", ())),
            json.dumps(layer.get("chosen", {}).get("raised_damping", "")).strip('"'),
        )
        for name, layer in report.layers.items()
        if "error" in layer
    ]
    if not rows:
        return ""
    head = ("layer", "error", "to nearest", "", "linears without tokens", "damping that was raised")
    return _section("Layers", "Errors are in units of what the layer adds to its input.", _table(head, rows, (1, 2)))
