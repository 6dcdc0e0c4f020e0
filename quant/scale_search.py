"""The search for AWQ's scales: of linears that share an input, by the error of their block's output.

Candidates are s = magnitude^r and s = magnitude^r / weight^(1-r) of the input channels, and identity among them.
A set of linears is rounded under each candidate in turn, some rows at a time, in the place of the weights, of which a
copy is kept. A linear that is alone needs none: its own output says it all.

Axes: N outputs, K inputs, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant.groupwise import Grid, fake_quantize, minmax, row_chunks
from quant.kept_weights import KeptWeights
from quant.layer import LayerInputs, inputs_of
from quant.moments import Moments, mean_loss
from quant.scale_groups import ScaleGroup, find_scale_groups
from quant.settings import AwqSettings
from quant.tiles import is_wide

_SMALLEST = 1e-4

Loss = Callable[[Tensor], float]


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


def search_scale(
    layer: nn.Module, group: ScaleGroup, inputs: LayerInputs, seen: Moments, grid: Grid, points: int
) -> tuple[Tensor, str]:
    """Return the best scale, float32 [channels of the absorber], and its candidate's name; `layer` stays as it was.

    inputs: the samples that are searched on. seen: moments of all. points: values of r.
    """
    weights = [layer.get_parameter(f"{name}.weight").data for name in group.linears]
    best_loss, best_scale, best_label = float("inf"), torch.ones(0), ""
    with _losses(layer, group, inputs, seen, grid) as loss_under:
        for label, scale in _candidate_scales(group, seen.magnitude(group.linears[0]), weights, grid, points):
            loss = loss_under(scale[group.channels])
            if loss < best_loss:
                best_loss, best_scale, best_label = loss, scale, label
    if not best_label:
        raise ArithmeticError(f"{', '.join(group.linears)}: the output is not finite under any scale")
    return best_scale, best_label


@contextmanager
def _losses(layer: nn.Module, group: ScaleGroup, inputs: LayerInputs, seen: Moments, grid: Grid) -> Iterator[Loss]:
    """Give a function of the scale of the input channels [K] to the block's error, and leave the layer as it was.

    For a single linear the gram gives it exactly, and, where that is a matrix of many tiles, its inputs in the samples
    that are searched on. For a block its recorded calls are run again.
    """
    parameters = [layer.get_parameter(f"{name}.weight") for name in group.linears]
    if group.block == group.linears[0]:
        error = _error_alone(layer, group.block, inputs, seen)
        yield lambda columns: _loss_alone(parameters[0].data, columns, grid, error)
        return
    run_again = _block_error(layer, group.block, inputs)
    kept = KeptWeights(parameters, inputs.statistics_to)

    def loss_under(columns: Tensor) -> float:
        for index, parameter in enumerate(parameters):
            for rows in row_chunks(*parameter.shape):
                parameter.data[rows] = _rounded_under(kept.rows(index, rows), columns, grid)
        return run_again()

    try:
        yield loss_under
    finally:
        kept.put_back()


def _rounded_under(weight: Tensor, columns: Tensor, grid: Grid) -> Tensor:
    """Return a weight [N, K] rounded to nearest with its columns scaled, and scaled back."""
    scaled = weight * columns
    return fake_quantize(scaled, minmax(scaled, grid), grid).div_(columns)


def _error_alone(layer: nn.Module, name: str, inputs: LayerInputs, seen: Moments) -> Loss:
    """Return a function of a difference of some rows of a linear's weight, [N, K], to the error of its output."""
    if not is_wide(layer.get_parameter(f"{name}.weight").shape[1]):
        gram = seen.gram(name).read(0, 0)
        return lambda difference: mean_loss(difference, gram)
    x_TK = torch.cat(list(inputs_of(layer, inputs, name)))
    return lambda difference: float((x_TK @ difference.T).square_().sum())


def _loss_alone(weight: Tensor, columns: Tensor, grid: Grid, error: Loss) -> float:
    chunks = [weight[rows] for rows in row_chunks(*weight.shape)]
    return sum(error(_rounded_under(chunk, columns, grid).sub_(chunk)) for chunk in chunks)


def _block_error(layer: nn.Module, name: str, inputs: LayerInputs) -> Callable[[], float]:
    """Return a function of the error of a block's output under the weights that it has when called."""
    block = layer.get_submodule(name)
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
    width = weights[0].shape[1]
    size = grid.group(width)
    grouped = [weight.unflatten(1, (-1, size)) for weight in weights]
    largest = torch.cat([torch.maximum(each.amax(-1), -each.amin(-1)) for each in grouped]).clamp_(min=_SMALLEST)
    means = []
    for columns in row_chunks(width, len(largest)):
        filled = torch.cat([weight[:, columns] for weight in weights]).abs_()
        means.append(filled.div_(largest[:, torch.arange(width)[columns] // size]).mean(0))
    return torch.cat(means)
