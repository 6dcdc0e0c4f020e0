"""The rounding of a weight's columns one after another, each one's error carried into those still to be rounded.

GPTQ (arXiv:2210.17323, section 3): with G = E[x x^T] of a linear's inputs and U the upper Cholesky factor of
(G + damping)^-1, what column i lost goes into the later ones,

    w_j -= (w_i - q_i) U_ij / U_ii      for j > i

which is the best that they can do about it, and leaves a loss of (w_i - q_i)^2 / U_ii^2. Columns with loud inputs go
first, their groups' scales and zero points are fixed beforehand, for the least sum of those losses, and the file has
them in their own places: the order costs nothing at inference.

Before that, what the inputs lack of the unquantized model's is put into the weights (QEP, arXiv:2504.09629, eq. 7):
with x of that model beside x' of the quantized one, and 0 < share <= 1,

    W* = W + share W E[(x - x') x'^T] (E[x' x'^T] + damping)^-1.

Axes: N outputs, K inputs of a linear, C groups of a row, B columns of a block.
"""

import torch
from torch import Tensor

from quant.clip_search import search_clip_by_column
from quant.groupwise import Grid, Parameters, fake_quantize, kept_range, row_chunks
from quant.hessian import Hessian
from quant.settings import AwqSettings
from quant.tiles import times, times_squared_

_BLOCK_COLUMNS = 64


def propagate(weight: Tensor, hessian: Hessian, share: float) -> Tensor:
    """Return W*, float32 [N, K]: what the inputs lost on their way here, as far as it can be told from what is left."""
    lost = hessian.seen.lost
    assert lost is not None, "the unquantized model's inputs are known"
    pull = times(weight[:, hessian.order].double(), lost)
    moved = torch.empty_like(weight, dtype=torch.float64)
    moved[:, hessian.order] = times_squared_(pull, hessian.factor)
    return moved.mul_(share).add_(weight).float()


def round_in_place(
    weight: Tensor, hessian: Hessian, grid: Grid, search: AwqSettings, share: float = 0.0, lost: Tensor | None = None
) -> tuple[Parameters, float]:
    """Overwrite a float32 weight [N, K] with its rounding and return parameters and the share of the ranges kept.

    Rows are independent of each other: some are propagated to (with a share above 0) and rounded at a time.
    lost: see `round_weight`.
    """
    found, kept = [], 0.0
    for rows in row_chunks(*weight.shape):
        w_NK = weight[rows]
        start_NK = propagate(w_NK, hessian, share) if share else w_NK.clone()
        parameters, rounded = round_weight(start_NK, hessian, grid, search, None if lost is None else lost[rows])
        kept += len(w_NK) * kept_range(start_NK, parameters, grid)
        found.append(parameters)
        w_NK.copy_(rounded)
    scale, zero = (torch.cat(parts) for parts in zip(*((f.scale, f.zero) for f in found), strict=True))
    return Parameters(scale, zero), round(kept / len(weight), 4)


def round_weight(
    weight: Tensor, hessian: Hessian, grid: Grid, search: AwqSettings, lost: Tensor | None = None
) -> tuple[Parameters, Tensor]:
    """Return parameters and the weight rounded to their grid, both float32, for a float32 weight [N, K].

    A row that carrying makes worse than rounding to nearest under the same parameters is so rounded.
    lost: float32 [N, K], to be filled with what each value lacks of what was rounded to it.
    """
    parameters = search_clip_by_column(weight, hessian.importance().float(), grid, search)
    carried = round_columns(weight, hessian, parameters, grid, lost)
    nearest = fake_quantize(weight, parameters, grid)
    worse = hessian.loss(carried, weight) >= hessian.loss(nearest, weight)
    if lost is not None:
        lost[worse] = weight[worse] - nearest[worse]
    return parameters, torch.where(worse[:, None], nearest, carried)


def round_columns(
    weight: Tensor, hessian: Hessian, parameters: Parameters, grid: Grid, lost: Tensor | None = None
) -> Tensor:
    """Return the values that GPTQ chooses for a float32 weight [N, K], in float32, which they are exact in.

    Within a block of columns errors are carried at once, into the columns after it by one product a block, and into
    those behind other tiles of the factor by one product a tile. lost: see `round_weight`.
    """
    w_KN, factor = weight.T[hessian.order].double(), hessian.factor
    group = hessian.order // grid.group(weight.shape[1])
    scale_CN, zero_CN = parameters.scale.T.contiguous(), parameters.zero.T.contiguous()
    for tile in range(factor.count):
        columns, corner = factor.span(tile), factor.read(tile, tile)
        rest_KN, last = w_KN[columns], tile + 1 == factor.count
        errors_KN = torch.empty_like(rest_KN[:_BLOCK_COLUMNS] if last else rest_KN)
        for start in range(0, len(rest_KN), _BLOCK_COLUMNS):
            block = slice(start, start + _BLOCK_COLUMNS)
            groups = group[columns][block]
            errors_BN = errors_KN[: len(groups)] if last else errors_KN[block]
            _round_block(rest_KN[block], errors_BN, corner[block, block], scale_CN[groups], zero_CN[groups], grid)
            if lost is not None:
                lost.T[hessian.order[columns][block]] = (errors_BN * corner.diagonal()[block, None]).float()
            rest_KN[block.stop :].addmm_(corner[block, block.stop :].T, errors_BN, alpha=-1)
        for later in range(tile + 1, factor.count):
            w_KN[factor.span(later)].addmm_(factor.read(tile, later).T, errors_KN, alpha=-1)
    values = torch.empty_like(weight)
    values.T[hessian.order] = w_KN.to(weight.dtype)
    return values


def _round_block(
    w_BN: Tensor, errors_BN: Tensor, factor: Tensor, scale_BN: Tensor, zero_BN: Tensor, grid: Grid
) -> None:
    """Round a block of columns in place and write each one's error over its diagonal element into `errors_BN`."""
    scale_BN, zero_BN = scale_BN.double(), zero_BN.double()
    for i, w_N in enumerate(w_BN):
        codes_N = (w_N / scale_BN[i] + zero_BN[i]).round_().clamp_(0, grid.code_max)
        value_N = (codes_N - zero_BN[i]) * scale_BN[i]
        torch.div(w_N - value_N, factor[i, i], out=errors_BN[i])
        w_BN[i:].addr_(factor[i, i:], errors_BN[i], alpha=-1)
        w_N.copy_(value_N)
