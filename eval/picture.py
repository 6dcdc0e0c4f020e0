"""Pictures of measurements. Needs matplotlib: pip install 'int4-offload[bench]'."""

from pathlib import Path

from eval.speed_kernels import Measurement
from offload.errors import ResourceError

_BASELINE = "torch bf16"


def draw_speedups(measurements: list[Measurement], path: Path) -> None:
    """Draw how many times faster than torch's bf16 linear each contender is over the batch, one panel a shape.

    The dashed line is the ratio of the bytes that the two read: the most there is to win while memory is the bound.
    Raises ResourceError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ResourceError("--picture needs matplotlib: pip install 'matplotlib>=3.9,<4'") from None
    shapes = list(dict.fromkeys((item.case.n, item.case.k) for item in measurements))
    names = [name for name in dict.fromkeys(item.contender for item in measurements) if name != _BASELINE]
    figure = Figure(figsize=(4.2 * len(shapes), 3.8), layout="constrained")
    for panel, (n, k) in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), panel + 1)
        here = [item for item in measurements if (item.case.n, item.case.k) == (n, k)]
        for name in names:
            line = [
                (item.case.m, item.time.speedup_over(item.peers[_BASELINE])) for item in here if item.contender == name
            ]
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
        axes.axhline(
            2 * n * k / here[0].case.packed_bytes, linestyle="--", color="grey", label="bytes read, bf16 : int4"
        )
        axes.axhline(1, linewidth=0.8, color="grey")
        axes.set(xscale="log", yscale="log", xlabel="activations M", title=f"N {n}, K {k}")
        ticks = sorted({item.case.m for item in here})
        axes.set_xticks(ticks, labels=[str(m) for m in ticks])
        axes.set_yticks([0.125, 0.25, 0.5, 1, 2, 4, 8], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        axes.minorticks_off()
    figure.axes[0].set_ylabel(f"times as fast as {_BASELINE}")
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
