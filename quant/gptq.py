"""GPTQ: each column's rounding error is carried into the columns still to be rounded. `python -m quant.gptq --bits 4`

The rounding (arXiv:2210.17323, section 3) is in `quant/columns.py`. Three things around it: linears are quantized in
the order in which a layer runs them, each on the inputs that the rounded ones before it give, and what those inputs
lack is put into the weights; AWQ's scales can go into the layer first (`quant/scale_search.py`); learned rounding
(`quant/rounding.py`) can come last.
"""

import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from offload.command import say
from quant.columns import round_in_place
from quant.cost import Cost, Shape, Windows
from quant.gptq_cost import gptq_cost
from quant.groupwise import Grid, Parameters, minmax
from quant.hessian import Hessian
from quant.layer import LayerInputs, UnreachedError
from quant.pass_dtype import AUTO, PASS_DTYPES
from quant.pipeline import run_method
from quant.rounding import Places, learn_rounding
from quant.scale_groups import sets_by_input
from quant.scale_search import scale_layer
from quant.settings import GptqSettings, LearningSettings
from quant.statistics import at_once, in_sequence


class Gptq:
    """The method, as the walk over the layers calls it."""

    name = "gptq"
    needs_inputs = True

    def __init__(self, settings: GptqSettings) -> None:
        self.settings, self.pass_dtype = settings, PASS_DTYPES[settings.pass_dtype]
        self.needs_original = settings.propagates or settings.learn.steps > 0

    def settings_json(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        return asdict(self.settings)

    def cost(self, shapes: list[Shape], grid: Grid, windows: Windows | None) -> Cost:
        """Return what a layer whose linears have these shapes will take."""
        assert windows is not None, "it needs inputs"
        return gptq_cost(shapes, grid, windows, self.settings)

    def quantize_layer(
        self, layer: nn.Module, inputs: LayerInputs, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Leave representable weights in the named linears of `layer` (float32) and return their parameters.

        Rounding those weights to nearest gives the codes chosen here. Raises ArithmeticError for inputs not finite.
        """
        settings, directory = self.settings, inputs.statistics_to
        report: dict[str, Any] = {"ranges": {}}
        if settings.scale:
            report["scales"] = scale_layer(layer, inputs, grids, head_dim, settings.search)[1]  # the moments go
        sets = sets_by_input(layer, inputs, list(grids))
        if settings.sequential:
            seen_by = in_sequence(layer, inputs, sets, settings.propagates)
        else:
            seen_by = at_once(layer, inputs, sets)
        found: dict[str, Parameters] = {}
        places: dict[str, Places] = {}
        for members in sets:
            first = members[0]
            try:
                seen = seen_by(first)
            except UnreachedError:  # rounding what comes before has sent an expert's few tokens elsewhere
                say(f"{', '.join(members)}: rounding what comes before left no token here; rounded to nearest")
                report.setdefault("lost_tokens", []).extend(members)
                weights = {name: layer.get_parameter(f"{name}.weight").data for name in members}
                found |= {name: minmax(weight, grids[name]) for name, weight in weights.items()}
                continue
            if not seen.finite():
                raise ArithmeticError(f"{first}: its inputs are not finite")
            hessian = Hessian.of(seen, settings.damping, directory)
            if hessian.damping > settings.damping:
                report.setdefault("raised_damping", {})[", ".join(members)] = hessian.damping
            share = 0.0 if seen.lost is None else settings.propagation
            for name in members:
                weight = layer.get_parameter(f"{name}.weight").data
                lost = torch.empty_like(weight) if settings.learn.steps else None
                found[name], kept = round_in_place(weight, hessian, grids[name], settings.search, share, lost)
                report["ranges"][name] = kept
                if lost is not None:
                    places[name] = Places.of(weight, lost, found[name], grids[name])
            del seen, hessian  # the next set's are made without these beside them
        if places:
            report["learned"] = learn_rounding(layer, inputs, places, settings.learn)
        return found, report


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    fast = GptqSettings(sequential=False, propagation=0.0, pass_dtype=AUTO)
    slow = GptqSettings(learn=LearningSettings(steps=100))
    tiers = {"best": GptqSettings(), "fast": fast, "slow": slow}
    return run_method("gptq", Gptq, argv, tiers)


if __name__ == "__main__":
    sys.exit(main())
