"""Round to nearest: the whole range of every group, no calibration. The baseline of tables. `python -m quant.rtn`"""

import sys
from typing import Any

import torch
from torch import nn

from quant.cost import Cost, Shape, Windows
from quant.groupwise import Grid, Parameters, minmax
from quant.layer import LayerInputs
from quant.pipeline import run_method


class Rtn:
    """The method, as the walk over the layers calls it."""

    name = "rtn"
    needs_inputs = False
    needs_original = False
    pass_dtype = torch.float32

    def __init__(self, settings: None = None) -> None:
        """Take no settings: there are none."""

    def settings_json(self) -> dict[str, Any]:
        """Return the settings that decide the result: none."""
        return {}

    def cost(self, shapes: list[Shape], grid: Grid, windows: Windows | None) -> Cost:
        """Return what a layer whose linears have these shapes will take."""
        return Cost.of_rounding(shapes)

    def quantize_layer(
        self, layer: nn.Module, inputs: LayerInputs | None, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Return the parameters of the linears of `layer` (float32) that `grids` names."""
        return {name: minmax(layer.get_parameter(f"{name}.weight").data, grid) for name, grid in grids.items()}, {}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_method("rtn", Rtn, argv, {"only": None})


if __name__ == "__main__":
    sys.exit(main())
