"""AWQ: activation-aware scaling and clipping, then rounding to nearest. `python -m quant.awq --bits 4`

Scaling (arXiv:2306.00978, eq. 4-5): the input channels of linears that share an input are multiplied by s, what
produces that input absorbs 1/s, and s = magnitude^r (or magnitude^r / weight^(1-r)) is searched over r, with identity
among the candidates, for the smallest error of the block's output under quantized weights. Clipping: the range of each
group is shrunk where that lowers the linear's output error, measured exactly through the Gram matrix of its inputs,

    |(W' - W) X|^2 = sum_n d_n G d_n^T,   d = w' - w,   G = E[x x^T],

group after group along the row, each against the error that the others leave (the cross terms of G).
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.cost import FLOAT_BYTES, Cost, Shape, Windows
from quant.groupwise import Grid, Parameters, fake_quantize, kept_range, minmax, range_parameters
from quant.layer import LayerInputs, Moments, moments
from quant.scale_groups import ScaleGroup, find_scale_groups

_SMALLEST = 1e-4

CLIP_ROWS = 256
"""Rows whose ranges are searched together: more candidates at once than the caches hold take three times as long."""


@dataclass(frozen=True, slots=True)
class AwqSettings:
    """How finely AWQ searches.

    scale_points: values of r in (0, 1]. clip_points: shrink factors of a group's range, from 1 down to clip_floor.
    clip_damping: added to the diagonal of G there, in units of its mean: groups are searched one after another, and
    cancel less of each other's errors than G promises, on other text above all.
    search_samples: samples on which block outputs are compared; moments always see all of them. In two layers of
    SmolLM2-135M, 2 of 512 tokens chose scales whose loss on 16 is within 0.3% of that of 8's choice.
    """

    scale_points: int = 20
    clip_points: int = 12
    clip_floor: float = 0.4
    clip_damping: float = 1.0
    search_samples: int = 2


class Awq:
    """The method, as the walk over the layers calls it."""

    name = "awq"
    needs_inputs = True
    needs_original = False

    def __init__(self, settings: AwqSettings) -> None:
        self.settings = settings

    def settings_json(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        return asdict(self.settings)

    def cost(self, shapes: list[Shape], grid: Grid, windows: Windows | None) -> Cost:
        """Return what a layer whose linears have these shapes will take: Gram matrices, searches."""
        assert windows is not None, "it needs inputs"
        settings = self.settings
        candidates = settings.clip_points * (2 if grid.symmetric else 1)
        grams = [FLOAT_BYTES * columns * columns for _, columns in shapes]
        search = [FLOAT_BYTES * (4 * candidates * min(n, CLIP_ROWS) * grid.group(k) + 6 * n * k) for n, k in shapes]
        weights = sum(n * k for n, k in shapes)
        runs = windows.tokens * (6 * windows.samples + 2 * settings.scale_points * settings.search_samples)
        clips = candidates * (1 if grid.symmetric else 3) * (2 * max(grid.group(k) for _, k in shapes) + 60)
        statistics = sum(2 * k * k for _, k in shapes) * windows.samples * windows.tokens
        return Cost(sum(grams) + max(grams) + max(search), 2.0 * weights * runs + weights * clips + statistics)

    def quantize_layer(
        self, layer: nn.Module, inputs: LayerInputs, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Scale `layer` (float32) in place and return the parameters of its linears and what to report of it."""
        seen, scales = scale_layer(layer, inputs, grids, head_dim, self.settings)
        weights = {name: layer.get_parameter(f"{name}.weight").data for name in grids}
        damped = {name: seen[name].damped(self.settings.clip_damping) for name in grids}
        found = {name: search_clip(weights[name], damped[name], grids[name], self.settings) for name in grids}
        ranges = {name: kept_range(weights[name], found[name], grids[name]) for name in grids}
        return found, {"scales": scales, "ranges": ranges}


def scale_layer(
    layer: nn.Module, inputs: LayerInputs, grids: dict[str, Grid], head_dim: int, settings: AwqSettings
) -> tuple[dict[str, Moments], dict[str, str]]:
    """Scale `layer` (float32) in place, group after group, each by the best scale for linears that `grids` holds whole.

    Returns the moments of the inputs of all linears as they are after scaling, and each group's chosen candidate.
    """
    seen = moments(layer, inputs, grids)
    chosen = {}
    for group in find_scale_groups(layer, inputs, head_dim):
        if not set(group.linears) <= set(grids):
            continue
        grid = grids[group.linears[0]]  # linears that share an input share their grid
        search = inputs.select(slice(0, settings.search_samples))
        scale, label = search_scale(layer, group, search, seen[group.linears[0]], grid, settings)
        scale = group.apply(layer, scale, grid.scale_dtype)
        for name in group.linears:
            seen[name] = _rescaled(seen[name], scale[group.channels])
        chosen[f"{group.absorber} -> {', '.join(group.linears)}"] = label
    return seen, chosen


def search_scale(
    layer: nn.Module, group: ScaleGroup, inputs: LayerInputs, seen: Moments, grid: Grid, settings: AwqSettings
) -> tuple[Tensor, str]:
    """Return the best scale, float32 [channels of the absorber], and its candidate's name; `layer` stays as it was."""
    parameters = [layer.get_parameter(f"{name}.weight") for name in group.linears]
    originals = [parameter.data for parameter in parameters]
    measure = _loss_of(layer, group, inputs, seen, originals)
    best_loss, best_scale, best_label = float("inf"), torch.ones(0), ""
    for label, scale in _candidate_scales(group, seen.magnitude, originals, grid, settings.scale_points):
        columns = scale[group.channels]
        for parameter, original in zip(parameters, originals, strict=True):
            scaled = original * columns
            parameter.data = fake_quantize(scaled, minmax(scaled, grid), grid) / columns
        loss = measure()
        if loss < best_loss:
            best_loss, best_scale, best_label = loss, scale, label
    for parameter, original in zip(parameters, originals, strict=True):
        parameter.data = original
    if not best_label:
        raise ArithmeticError(f"{', '.join(group.linears)}: the output is not finite under any scale")
    return best_scale, best_label


def _candidate_scales(
    group: ScaleGroup, magnitude: Tensor, weights: list[Tensor], grid: Grid, points: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield identity, then s = x^r and s = x^r / w^(1-r), each scaled so that its extremes lie around 1."""
    size = int(group.channels.max()) + 1
    x = _mean_by_channel(magnitude, group.channels, size).clamp(min=_SMALLEST)
    w = _mean_by_channel(_relative_weight(weights, grid), group.channels, size)
    yield "identity", torch.ones(size)
    for point in range(1, points + 1):
        r = point / points
        yield f"x^{r:g}", _centred(x**r)
        if r < 1:
            yield f"x^{r:g}/w^{1 - r:g}", _centred(x**r / (w ** (1 - r) + _SMALLEST))


def _centred(scale: Tensor) -> Tensor:
    scale = scale.clamp(min=_SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def _mean_by_channel(values: Tensor, channels: Tensor, size: int) -> Tensor:
    """Average [K] values over the input channels that share one of `size` absorber channels."""
    total = torch.zeros(size).index_add_(0, channels, values)
    return total / torch.bincount(channels, minlength=size)


def _relative_weight(weights: list[Tensor], grid: Grid) -> Tensor:
    """Return the mean over all rows of |w| / max of its group, [K]: how much of the range an input channel fills."""
    stacked = torch.cat(weights).abs()
    grouped = stacked.unflatten(1, (-1, grid.group(stacked.shape[1])))
    filled: Tensor = grouped / grouped.amax(-1, keepdim=True).clamp(min=_SMALLEST)
    return filled.flatten(1).mean(0)


def _loss_of(
    layer: nn.Module, group: ScaleGroup, inputs: LayerInputs, seen: Moments, originals: list[Tensor]
) -> Callable[[], float]:
    """Return a function that measures the error of the group's block under the weights it has when called.

    For a single linear the Gram matrix gives it exactly; for a block its recorded calls are run again.
    """
    if group.block == group.linears[0]:
        weight = layer.get_parameter(f"{group.block}.weight")
        return lambda: seen.loss(weight.data - originals[0])
    block = layer.get_submodule(group.block)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    references: list[Tensor] = []
    before = block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    after = block.register_forward_hook(lambda m, args, output: references.append(_hidden(output)))
    for _ in inputs.outputs(layer):
        pass
    before.remove()
    after.remove()

    def measure() -> float:
        pairs = zip(calls, references, strict=True)
        return sum(float((_hidden(block(*args, **kwargs)) - y).square().sum()) for (args, kwargs), y in pairs)

    return measure


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _rescaled(seen: Moments, scale: Tensor) -> Moments:
    """Return the moments of x / scale."""
    return replace(seen, gram=seen.gram / (scale[:, None] * scale), magnitude=seen.magnitude / scale)


def search_clip(weight: Tensor, seen: Moments, grid: Grid, settings: AwqSettings) -> Parameters:
    """Return parameters whose ranges minimise E[|(W' - W) x|^2], found group after group along the rows.

    weight: float32 [N, K]. Never worse than the full range on the moments given, as that is the first candidate.
    """
    group_size = grid.group(weight.shape[1])
    parameters = minmax(weight, grid)
    scale, zero = parameters.scale.clone(), parameters.zero.clone()
    difference = fake_quantize(weight, parameters, grid) - weight
    pull = difference @ seen.gram
    for index, column in enumerate(range(0, weight.shape[1], group_size)):
        columns = slice(column, column + group_size)
        gram = seen.gram[columns, columns]
        others = pull[:, columns] - difference[:, columns] @ gram
        found = _clip_group(weight[:, columns], partial(_joint_error, gram, others), grid, settings)
        scale[:, index], zero[:, index] = found.scale, found.zero
        changed = _rounded(weight[:, columns], found, grid) - weight[:, columns]
        pull += (changed - difference[:, columns]) @ seen.gram[columns]
        difference[:, columns] = changed
    return Parameters(scale, zero)


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
    parts = [slice(start, start + CLIP_ROWS) for start in range(0, len(weight), CLIP_ROWS)]
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
