"""Which linears deserve 8 bits: those whose rounding moves their layer's output most, for the bits that they cost.

What the rounding of a set of linears to 4 bits does is measured where it counts, in the residual stream behind their
layer, token by token in units of the stream itself: E[|layer(x; Q(W)) - layer(x; W)|^2 / |layer(x; W)|^2], on the
unquantized model's inputs. 8 bits leave 1/289 of it. Q is GPTQ's rounding, whichever method is to follow: rounding to
nearest overstates what loud channels cost, which each of the methods avoids. Linears that share an input go together,
as engines fuse them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.command import Progress
from offload.errors import UsageError
from offload.skeleton import decoder_layers
from offload.source_weights import SourceWeights
from quant.awq import AwqSettings
from quant.cost import FLOAT_BYTES, Cost, Shape, Windows
from quant.gptq import Gptq, GptqSettings, round_weight
from quant.groupwise import Grid
from quant.hessian import Hessian, Statistics
from quant.layer import LayerInputs, linears, moments, unreached
from quant.scale_groups import sets_by_input
from quant.walk import load_layer, release
from quant.walk_inputs import batch_samples, first_inputs

_WINDOWS = 8
_DAMPING = 0.1


@dataclass(frozen=True, slots=True)
class Candidate:
    """Linears, by full name, the error of rounding them to 4 bits, and the bytes that 8 bits would add."""

    linears: tuple[str, ...]
    error: float
    extra_bytes: int


def average_bits(model: nn.Module, grids: Mapping[str, Grid]) -> float:
    """Return the bits of a quantized weight in the file, scales and zero points counted."""
    weights = {name: model.get_parameter(f"{name}.weight") for name in grids}
    stored_bytes = sum(grids[name].stored_bytes(*weight.shape) for name, weight in weights.items())
    return 8 * stored_bytes / sum(weight.numel() for weight in weights.values())


def measuring_cost(shapes: list[Shape], grid: Grid, windows: Windows, hidden_size: int) -> Cost:
    """Return what measuring a layer takes besides its weights and a run of it, hidden states included.

    Statistics are held for all linears while one is rounded, as in GPTQ's fast tier, and the weights of a set twice.
    States are the layer's inputs and outputs, and the moved outputs, with what their comparison makes of them.
    """
    few = Windows(min(_WINDOWS, windows.samples), windows.tokens)
    rounding = Gptq(GptqSettings(sequential=False, propagation=0.0)).cost(shapes, grid, few)
    search = AwqSettings()
    candidates = search.clip_points * (2 if grid.symmetric else 1)
    statistics = FLOAT_BYTES * sum(k * k for _, k in shapes) + max(
        8 * max(6 * k * k, 3 * k * k + 9 * n * k) + 4 * FLOAT_BYTES * candidates * n * grid.group(k) for n, k in shapes
    )
    states = 7 * FLOAT_BYTES * few.samples * few.tokens * hidden_size
    rounded = FLOAT_BYTES * sum(n * k for n, k in shapes)
    return Cost(statistics + rounded + states, rounding.operations)


def widen(
    model: PreTrainedModel, source: SourceWeights, grids: Mapping[str, Grid], windows: Tensor, target_bits: float
) -> tuple[dict[str, Grid], list[Candidate]]:
    """Return `grids` with 8 bits where they pay most, until the average reaches `target_bits`, and what was measured.

    windows: int64 [S, T], of which a few are used. Raises UsageError if no choice can have that average.
    """
    wide = {name: replace(grid, bits=8) for name, grid in grids.items()}
    least, most = average_bits(model, grids), average_bits(model, wide)
    if not least <= target_bits <= most:
        raise UsageError(
            f"--target-bits {target_bits:g}: with their scales, 4-bit weights take {least:.3f} bits here and 8-bit "
            f"weights {most:.3f}; expected something between"
        )
    weights = sum(model.get_parameter(f"{name}.weight").numel() for name in grids)
    budget_bytes = (target_bits - least) * weights / 8
    offered = list(candidates(model, source, grids, windows[:_WINDOWS]))
    chosen = choose(offered, budget_bytes)
    return {name: wide[name] if name in chosen else grid for name, grid in grids.items()}, offered


def choose(candidates: list[Candidate], budget_bytes: float) -> set[str]:
    """Return the linears of those that pay most for a byte, as many as fit."""
    chosen: set[str] = set()
    for candidate in sorted(candidates, key=lambda c: c.error / c.extra_bytes, reverse=True):
        if candidate.extra_bytes <= budget_bytes:
            budget_bytes -= candidate.extra_bytes
            chosen.update(candidate.linears)
    return chosen


def candidates(
    model: PreTrainedModel, source: SourceWeights, grids: Mapping[str, Grid], windows: Tensor
) -> Iterator[Candidate]:
    """Walk the unquantized model on windows [S, T] and yield every set of linears that share an input.

    Raises ArithmeticError for inputs not finite.
    """
    prefix, layers = decoder_layers(model)
    inputs = first_inputs(model, source, windows)
    progress = Progress("measuring sensitivity, layer", len(layers))
    for index, layer in enumerate(layers):
        name = f"{prefix}.{index}"
        load_layer(layer, name, source)
        output_STD = inputs.at_layer.run(layer)
        within = {key: grids[f"{name}.{key}"] for key in linears(layer) if f"{name}.{key}" in grids}
        for key in unreached(layer, inputs.at_layer, within):
            del within[key]
        seen = moments(layer, inputs.at_layer, within)
        for members in sets_by_input(layer, inputs.at_layer, list(within)):
            shapes = [(within[key], layer.get_parameter(f"{key}.weight").shape) for key in members]
            extra = sum(replace(grid, bits=8).stored_bytes(*k) - grid.stored_bytes(*k) for grid, k in shapes)
            known = Statistics.of(seen[members[0]].gram.double())
            if not known.finite():
                raise ArithmeticError(f"{name}.{members[0]}: its inputs are not finite")
            hessian = Hessian.of(known, _DAMPING)
            error = rounding_error(layer, inputs.at_layer, {k: within[k] for k in members}, hessian, output_STD)
            yield Candidate(tuple(f"{name}.{key}" for key in members), error, extra)
        if index + 1 < len(layers):
            arguments = inputs.arguments_by_layer[index + 1]
            inputs = replace(
                inputs, at_layer=LayerInputs(output_STD, arguments, batch_samples(arguments, windows.shape[1]))
            )
        release(layer)
        progress.advance()


def rounding_error(
    layer: nn.Module, inputs: LayerInputs, grids: Mapping[str, Grid], hessian: Hessian, expected_STD: Tensor
) -> float:
    """Return E[|y' - y|^2 / |y|^2] over tokens, y' with the linears of `grids` rounded; `layer` stays as it was.

    hessian: of the input that they share. expected_STD: y, float32 [S, T, D].
    """
    weights = {key: layer.get_parameter(f"{key}.weight") for key in grids}
    originals = {key: weight.data for key, weight in weights.items()}
    for key, weight in weights.items():
        _, weight.data = round_weight(weight.data, hessian, grids[key], AwqSettings())
    moved_ST = (inputs.run(layer) - expected_STD).square().sum(-1)
    for key, weight in weights.items():
        weight.data = originals[key]
    size_ST = expected_STD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float((moved_ST / size_ST).mean())
