"""AWQ: activation-aware scaling and clipping, then rounding to nearest. `python -m quant.awq --bits 4`

Scaling (arXiv:2306.00978, eq. 4-5): the input channels of linears that share an input are multiplied by s, what
produces that input absorbs 1/s, and s is searched for the smallest error of the block's output under quantized weights
(`quant/scale_search.py`). Clipping: the range of each group is shrunk where that lowers the linear's output error
(`quant/clip_search.py`).
"""

import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from quant.awq_cost import awq_cost
from quant.clip_search import search_clip
from quant.cost import Cost, Shape, Windows
from quant.groupwise import Grid, Parameters, kept_range
from quant.layer import LayerInputs
from quant.pipeline import run_method
from quant.scale_search import scale_layer
from quant.settings import AwqSettings


class Awq:
    """The method, as the walk over the layers calls it."""

    name = "awq"
    needs_inputs = True
    needs_original = False
    pass_dtype = torch.float32

    def __init__(self, settings: AwqSettings) -> None:
        self.settings = settings

    def settings_json(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        return asdict(self.settings)

    def cost(self, shapes: list[Shape], grid: Grid, windows: Windows | None) -> Cost:
        """Return what a layer whose linears have these shapes will take: Gram matrices, searches."""
        assert windows is not None, "it needs inputs"
        return awq_cost(shapes, grid, windows, self.settings)

    def quantize_layer(
        self, layer: nn.Module, inputs: LayerInputs, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Scale `layer` (float32) in place and return the parameters of its linears and what to report of it."""
        seen, scales = scale_layer(layer, inputs, grids, head_dim, self.settings)
        found, ranges = {}, {}
        for name, grid in grids.items():
            weight = layer.get_parameter(f"{name}.weight").data
            found[name] = search_clip(weight, seen.gram(name, self.settings.clip_damping), grid, self.settings)
            ranges[name] = kept_range(weight, found[name], grid)
        return found, {"scales": scales, "ranges": ranges}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_method("awq", Awq, argv, {"best": AwqSettings()})


if __name__ == "__main__":
    sys.exit(main())
