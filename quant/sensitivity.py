"""Which linears deserve 8 bits: those whose rounding moves their layer's output most, for the bits that they cost.

What the rounding of a set of linears to 4 bits does is measured where it counts, in the residual stream behind their
layer, token by token in units of the stream itself: E[|layer(x; Q(W)) - layer(x; W)|^2 / |layer(x; W)|^2], on the
unquantized model's inputs. 8 bits leave 1/289 of it. Q is GPTQ's rounding, whichever method is to follow: rounding to
nearest overstates what loud channels cost, which each of the methods avoids. Linears that share an input go together,
as engines fuse them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.command import Progress
from offload.errors import UsageError
from offload.skeleton import decoder_layers
from offload.source_weights import SourceWeights
from quant.columns import round_in_place
from quant.cost import FLOAT_BYTES, MOST_IN_SET, Cost, Shape, Windows
from quant.gptq_cost import gptq_cost
from quant.groupwise import Grid
from quant.hessian import Hessian
from quant.hidden_states import HiddenStates
from quant.kept_weights import KeptWeights
from quant.layer import LayerInputs, linears, unreached
from quant.plan import average_bits
from quant.scale_groups import sets_by_input
from quant.settings import AwqSettings, GptqSettings
from quant.statistics import at_once
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


def measuring_cost(shapes: list[Shape], grid: Grid, windows: Windows, hidden_size: int) -> Cost:
    """Return what measuring a layer takes besides its weights and a run of it, hidden states included.

    Statistics are held, or recorded, for all linears while one set is rounded, as in GPTQ's fast tier, and the weights
    of a set twice. States are the layer's inputs and outputs.
    """
    few = Windows(min(_WINDOWS, windows.samples), windows.tokens)
    rounding = gptq_cost(shapes, grid, few, GptqSettings(sequential=False, propagation=0.0))
    assert rounding.on_disk is not None, "GPTQ can put its statistics there"
    kept_bytes = MOST_IN_SET * FLOAT_BYTES * max(n * k for n, k in shapes)
    kept_bytes += 2 * FLOAT_BYTES * few.samples * few.tokens * hidden_size
    on_disk = replace(rounding.on_disk, disk_bytes=rounding.on_disk.disk_bytes + kept_bytes)
    return Cost(rounding.memory_bytes + kept_bytes, rounding.operations, on_disk)


def widen(
    model: PreTrainedModel,
    source: SourceWeights,
    grids: Mapping[str, Grid],
    windows: Tensor,
    target_bits: float,
    directory: Path | None = None,
) -> tuple[dict[str, Grid], list[Candidate]]:
    """Return `grids` with 8 bits where they pay most, until the average reaches `target_bits`, and what was measured.

    windows: int64 [S, T], of which a few are used. directory: for what memory has no room for. Raises UsageError if no
    choice can have that average.
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
    offered = list(candidates(model, source, grids, windows[:_WINDOWS], directory))
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
    model: PreTrainedModel,
    source: SourceWeights,
    grids: Mapping[str, Grid],
    windows: Tensor,
    directory: Path | None = None,
) -> Iterator[Candidate]:
    """Walk the unquantized model on windows [S, T] and yield every set of linears that share an input.

    directory: for hidden states, statistics and weights, which are kept in memory without one. Raises ArithmeticError
    for inputs not finite.
    """
    prefix, layers = decoder_layers(model)
    inputs = first_inputs(model, source, windows, directory)
    progress = Progress("measuring sensitivity, layer", len(layers))
    for index, layer in enumerate(layers):
        name = f"{prefix}.{index}"
        load_layer(layer, name, source)
        output_STD = inputs.original_outputs(layer)
        at_layer = replace(inputs.at_layer, statistics_to=directory)
        within = {key: grids[f"{name}.{key}"] for key in linears(layer) if f"{name}.{key}" in grids}
        for key in unreached(layer, at_layer, within):
            del within[key]
        sets = sets_by_input(layer, at_layer, list(within))
        statistics = at_once(layer, at_layer, sets)
        for members in sets:
            shapes = [(within[key], layer.get_parameter(f"{key}.weight").shape) for key in members]
            extra = sum(replace(grid, bits=8).stored_bytes(*k) - grid.stored_bytes(*k) for grid, k in shapes)
            known = statistics(members[0])
            if not known.finite():
                raise ArithmeticError(f"{name}.{members[0]}: its inputs are not finite")
            hessian = Hessian.of(known, _DAMPING, directory)
            error = rounding_error(layer, at_layer, {k: within[k] for k in members}, hessian, output_STD)
            yield Candidate(tuple(f"{name}.{key}" for key in members), error, extra)
            del known, hessian  # the next set's are made without these beside them
        del statistics
        if index + 1 < len(layers):
            arguments = inputs.arguments_by_layer[index + 1]
            inputs = replace(
                inputs, at_layer=LayerInputs(output_STD, arguments, batch_samples(arguments, windows.shape[1]))
            )
        release(layer)
        progress.advance()


def rounding_error(
    layer: nn.Module, inputs: LayerInputs, grids: Mapping[str, Grid], hessian: Hessian, expected_STD: HiddenStates
) -> float:
    """Return E[|y' - y|^2 / |y|^2] over tokens, y' with the linears of `grids` rounded; `layer` stays as it was.

    hessian: of the input that they share. expected_STD: y, float32 [S, T, D].
    """
    weights = {key: layer.get_parameter(f"{key}.weight") for key in grids}
    kept = KeptWeights(list(weights.values()), inputs.statistics_to)
    for key, weight in weights.items():
        round_in_place(weight.data, hessian, grids[key], AwqSettings())
    shares = []
    for output_BTD, y_BTD in zip(inputs.outputs(layer), expected_STD.split(inputs.batch_samples), strict=True):
        size_BT = y_BTD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        shares.append((output_BTD - y_BTD).square().sum(-1) / size_BT)
    kept.put_back()
    return float(torch.cat(shares).mean())
