"""Pictures of measurements. Needs matplotlib: pip install 'int4-offload[bench]'."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.speed.measurement import PEERS, Measurement
from offload.errors import ResourceError

_BASELINE = "torch bf16"
_COLORS = {
    "avx2": "#9ecae1",
    "avx512-vnni": "#4292c6",
    "amx": "#08306b",
    "triton": "#08306b",
    "triton mapped": "#4292c6",
    "torch fp32": "#bdbdbd",
    "torch int4": "#e6550d",
    "torch int8": "#e6550d",
    "ggml amx": "#006d2c",
    "ggml repack": "#74c476",
    "ggml plain": "#c7e9c0",
    "gemlite": "#756bb1",
    "marlin": "#d6a419",
}
"""Ours are blue, darker with the instruction set."""
_GREY = "#636363"
_PANELS_IN_A_ROW = 4


def draw_speedups(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw how many times faster than torch's bf16 linear each contender is over the batch, one panel a shape.

    The dashed line is the ratio of the bytes that the two read: the ideal while memory is the bound. What was measured
    without torch's linear beside it is left out. Raises ResourceError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ResourceError("--picture needs matplotlib: pip install 'matplotlib>=3.9,<4'") from None
    compared = [item for item in measurements if _BASELINE in item.peers and item.contender != _BASELINE]
    shapes = list(dict.fromkeys((item.case.n, item.case.k) for item in compared))
    columns = min(len(shapes), _PANELS_IN_A_ROW) or 1
    rows = max(1, -(-len(shapes) // columns))
    figure = Figure(figsize=(max(5.0, 3.3 * columns), 3.3 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, shape in zip(panels, shapes, strict=False):
        _draw_shape(axes, [item for item in compared if (item.case.n, item.case.k) == shape])
    for axes in panels[len(shapes) :]:
        axes.remove()
    _scale(panels[0], compared)
    lines = {line.get_label(): line for axes in panels[: len(shapes)] for line in axes.get_lines()}
    named = [(line, label) for label, line in lines.items() if not label.startswith("_")]
    if named:
        figure.legend(*zip(*named, strict=True), loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    figure.supylabel(f"times as fast as {_BASELINE}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_shape(axes: Any, measurements: list[Measurement]) -> None:
    """Draw the lines of one shape, and the ideal."""
    case = measurements[0].case
    for name in dict.fromkeys(item.contender for item in measurements):
        line = [
            (item.case.m, item.time.speedup_over(item.peers[_BASELINE]))
            for item in measurements
            if item.contender == name
        ]
        ours = name not in PEERS
        axes.plot(
            *zip(*line, strict=True),
            color=_COLORS.get(name),
            linewidth=2.2 if ours else 1.3,
            marker="o",
            markersize=4.5 if ours else 3.5,
            zorder=3 if ours else 2,
            label=name,
        )
    ideal = 2 * case.n * case.k / case.packed_bytes
    axes.axhline(ideal, linestyle="--", linewidth=1.2, color=_GREY, label=f"ideal: {ideal:.2f} times fewer bytes")
    axes.axhline(1, linewidth=1, color=_GREY, label="_baseline")
    axes.set_title(f"N {case.n}, K {case.k}", fontsize=10)
    axes.set_xlabel("activations M", fontsize=9)
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0, labelbottom=True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _scale(axes: Any, measurements: Sequence[Measurement]) -> None:
    """Scale the axes, which all panels share, by powers of two."""
    if not measurements:
        return
    batches = sorted({item.case.m for item in measurements})
    ratios = [item.time.speedup_over(item.peers[_BASELINE]) for item in measurements]
    low, high = math.floor(math.log2(min(*ratios, 1))), math.ceil(math.log2(max(*ratios, 4)))
    powers = range(low, high + 1)
    axes.set(xscale="log", yscale="log", ylim=(2.0**low, 2.0**high))
    axes.set_xticks(batches, labels=[str(m) for m in batches])
    axes.set_yticks([2.0**p for p in powers], labels=[str(2**p) if p >= 0 else f"1/{2**-p}" for p in powers])
    axes.minorticks_off()
