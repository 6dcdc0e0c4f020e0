"""AWQ: activation-aware scaling and clipping, then rounding to nearest. `python -m quant.awq --bits 4`

Scaling (arXiv:2306.00978, eq. 4-5): the input channels of linears that share an input are multiplied by s, what
produces that input absorbs 1/s, and s = magnitude^r (or magnitude^r / weight^(1-r)) is searched over r, with identity
among the candidates, for the smallest error of the block's output under quantized weights. Clipping: the range of each
group is shrunk where that lowers the linear's output error, measured exactly through the Gram matrix of its inputs,

    |(W' - W) X|^2 = sum_n d_n G d_n^T,   d = w' - w,   G = E[x x^T],

group after group along the row, each against the error that the others leave (the cross terms of G).
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.awq_cost import SearchWork, awq_cost, clip_rows
from quant.cost import Cost, Shape, Windows
from quant.groupwise import Grid, Parameters, fake_quantize, kept_range, minmax, range_parameters, row_chunks
from quant.layer import LayerInputs
from quant.moments import Moments
from quant.scale_groups import find_scale_groups
from quant.scale_search import search_scale
from quant.settings import AwqSettings
from quant.tiles import Tiles, quadratic, times_symmetric
from quant.walk_inputs import most_batch_samples


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
        settings, samples = self.settings, min(self.settings.search_samples, windows.samples)
        tokens = most_batch_samples(windows.tokens) * windows.tokens, samples * windows.tokens
        how = windows, *tokens, grid, settings.clip_points, settings.scale_points
        return awq_cost(shapes, [SearchWork(n, k, *how) for n, k in shapes], samples)

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


def scale_layer(
    layer: nn.Module, inputs: LayerInputs, grids: dict[str, Grid], head_dim: int, settings: AwqSettings
) -> tuple[Moments, dict[str, str]]:
    """Scale `layer` (float32) in place, group after group, each by the best scale for linears that `grids` holds whole.

    Returns the moments of the inputs of all linears as they are after scaling, and each group's chosen candidate.
    """
    seen = Moments(layer, inputs, grids)
    chosen = {}
    for group in find_scale_groups(layer, inputs, head_dim):
        if not set(group.linears) <= set(grids):
            continue
        grid = grids[group.linears[0]]  # linears that share an input share their grid
        search = inputs.select(slice(0, settings.search_samples))
        scale, label = search_scale(layer, group, search, seen, grid, settings.scale_points)
        scale = group.apply(layer, scale, grid.scale_dtype)
        seen.divide(group.linears, scale[group.channels])
        chosen[f"{group.absorber} -> {', '.join(group.linears)}"] = label
    return seen, chosen


def search_clip(weight: Tensor, gram: Tiles, grid: Grid, settings: AwqSettings) -> Parameters:
    """Return parameters whose ranges minimise E[|(W' - W) x|^2], found group after group along the rows.

    weight: float32 [N, K]. gram: E[x x^T], its upper tiles, float32. Never worse than the full range on the moments
    given, as that is the first candidate. Rows are independent of each other: some are searched at a time.
    """
    whole_rows = gram.count > 1 and grid.group(weight.shape[1]) == weight.shape[1]
    search = _clip_whole_rows if whole_rows else _clip_in_turn
    found = [search(weight[rows], gram, grid, settings) for rows in row_chunks(*weight.shape)]
    return Parameters(torch.cat([f.scale for f in found]), torch.cat([f.zero for f in found]))


def _clip_in_turn(weight: Tensor, gram: Tiles, grid: Grid, settings: AwqSettings) -> Parameters:
    """Search the groups of some rows [N, K], tile after tile, each under the error that the others leave so far."""
    group_size = grid.group(weight.shape[1])
    parameters = minmax(weight, grid)
    scale, zero = parameters.scale.clone(), parameters.zero.clone()
    difference = fake_quantize(weight, parameters, grid).sub_(weight)
    for tile in range(gram.count):
        first, corner = gram.span(tile).start, gram.read(tile, tile)
        pull = times_symmetric(difference, gram, tile)
        for start in range(0, len(corner), group_size):
            inside = slice(start, start + group_size)
            columns, index = slice(first + start, first + start + group_size), (first + start) // group_size
            block = corner[inside, inside]
            others = pull[:, inside] - difference[:, columns] @ block
            found = _clip_group(weight[:, columns], partial(_joint_error, block, others), grid, settings)
            scale[:, index], zero[:, index] = found.scale, found.zero
            changed = _rounded(weight[:, columns], found, grid) - weight[:, columns]
            pull += (changed - difference[:, columns]) @ corner[inside]
            difference[:, columns] = changed
    return Parameters(scale, zero)


def _clip_whole_rows(weight: Tensor, gram: Tiles, grid: Grid, settings: AwqSettings) -> Parameters:
    """Search some rows [N, K] of a single group each, under a gram of several tiles."""
    found = _clip_group(weight, partial(_whole_error, gram), grid, settings)
    return Parameters(found.scale[:, None], found.zero[:, None])


def _whole_error(gram: Tiles, _: slice, d: Tensor) -> Tensor:
    """Return d G d^T of some rows, d [candidates, R, K]: float64 [candidates, R]."""
    return quadratic(d.flatten(0, 1), gram).view(d.shape[:2])


def _joint_error(gram: Tensor, others: Tensor, rows: slice, d: Tensor) -> Tensor:
    """Return d G d^T + 2 d others^T of some rows, d [candidates, R, G]: [candidates, R]. others: of all rows."""
    return ((d @ gram + 2 * others[rows]) * d).sum(-1)


def search_clip_by_column(weight: Tensor, importance: Tensor, grid: Grid, settings: AwqSettings) -> Parameters:
    """Return parameters whose ranges minimise sum_k importance_k (W'_nk - W_nk)^2 in every group of every row.

    weight: float32 [N, K]. importance: float32 [K].
    """
    size = grid.group(weight.shape[1])
    pairs = zip(weight.split(size, 1), importance.split(size), strict=True)
    found = [_clip_group(w_NG, partial(_column_error, i_G), grid, settings) for w_NG, i_G in pairs]
    return Parameters(torch.stack([f.scale for f in found], 1), torch.stack([f.zero for f in found], 1))


def _column_error(importance: Tensor, _: slice, d: Tensor) -> Tensor:
    """Return sum_g importance_g d_g^2 of some rows, d [candidates, R, G]: [candidates, R]."""
    return d.square() @ importance


def _clip_group(
    weight: Tensor, error: Callable[[slice, Tensor], Tensor], grid: Grid, settings: AwqSettings
) -> Parameters:
    """Return scale and zero point [N] of one group [N, G] with the least `error(rows, difference)`.

    difference: [candidates, R, G], of these rows.
    """
    step = clip_rows(weight.shape[1])
    parts = [slice(start, start + step) for start in range(0, len(weight), step)]
    found = [_clip_rows(weight[rows], partial(error, rows), grid, settings) for rows in parts]
    return Parameters(torch.cat([f.scale for f in found]), torch.cat([f.zero for f in found]))


def _clip_rows(weight: Tensor, error: Callable[[Tensor], Tensor], grid: Grid, settings: AwqSettings) -> Parameters:
    """Return scale and zero point [R] of some rows of a group [R, G] with the least `error(difference)`.

    Both ends of the range shrink together first; an asymmetric range then tries each end alone. A symmetric one tries
    the negative scale as well, which puts the one code more that a side has on the other side.
    """
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    factors = torch.linspace(1, settings.clip_floor, settings.clip_points)[:, None]
    if grid.symmetric:
        factors = torch.cat((factors, -factors))

    def best(low_factor: Tensor, high_factor: Tensor) -> tuple[Tensor, Tensor]:
        found = range_parameters(low * low_factor, high * high_factor, grid)
        d = _rounded(weight, found, grid) - weight
        choice = error(d).argmin(0)
        rows = torch.arange(len(weight))
        return low_factor.expand(-1, len(weight))[choice, rows], high_factor.expand(-1, len(weight))[choice, rows]

    low_factor, high_factor = best(factors, factors)
    if not grid.symmetric:
        shared = torch.ones_like(factors)
        low_factor, high_factor = best(low_factor * shared, factors.clone().expand(-1, len(weight)))
        low_factor, high_factor = best(factors.expand(-1, len(weight)), high_factor * shared)
    return range_parameters(low * low_factor, high * high_factor, grid)


def _rounded(weight: Tensor, parameters: Parameters, grid: Grid) -> Tensor:
    """Round one group [N, G] to the grids of `parameters`, [N] or [candidates, N]."""
    scale, zero = parameters.scale[..., None], parameters.zero[..., None]
    return (weight / scale).add_(zero).round_().clamp_(0, grid.code_max).sub_(zero).mul_(scale)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    from quant.pipeline import run_method

    return run_method("awq", Awq, argv, {"best": AwqSettings()})


if __name__ == "__main__":
    sys.exit(main())
