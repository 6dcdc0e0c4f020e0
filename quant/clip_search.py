"""The search for the ranges of a weight's groups: each is shrunk where that lowers the error of the linear's output.

That error is measured exactly through the Gram matrix of the linear's inputs,

    |(W' - W) X|^2 = sum_n d_n G d_n^T,   d = w' - w,   G = E[x x^T],

group after group along the row, each against the error that the others leave (the cross terms of G); or, where later
columns make up for what earlier ones lose, as a sum over columns.

Axes: N outputs, K inputs of a linear, G columns of a group, R some of the rows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant import tiles
from quant.cost import FLOAT_BYTES
from quant.groupwise import Grid, Parameters, chunk_rows, fake_quantize, minmax, range_parameters, row_chunks
from quant.settings import AwqSettings
from quant.tiles import Tiles, quadratic, times_symmetric

_SEARCHED_ROWS = 256
"""Rows whose ranges are searched together: more candidates at once than the caches hold take three times as long."""


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
    step = _searched_rows(weight.shape[1])
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


def searching_bytes(rows: int, width: int, grid: Grid, settings: AwqSettings) -> int:
    """Return the memory of the candidates for a group's range while some rows of a weight [N, K] are searched."""
    group = grid.group(width)
    together = min(rows, chunk_rows(width), _searched_rows(group))
    return 4 * FLOAT_BYTES * ranges_tried(grid, settings) * together * group


def ranges_tried(grid: Grid, settings: AwqSettings) -> int:
    """Return how many ranges of a group are tried at once."""
    return settings.clip_points * (2 if grid.symmetric else 1)


def _searched_rows(group_size: int) -> int:
    """Return how many rows' ranges are searched together: fewer where a group is a row of many tiles."""
    return max(1, _SEARCHED_ROWS * tiles.TILE // max(group_size, tiles.TILE))
