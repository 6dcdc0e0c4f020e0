"""GPTQ: each column's rounding error is carried into the columns still to be rounded. `python -m quant.gptq --bits 4`

Rounding (arXiv:2210.17323, section 3): with G = E[x x^T] of a linear's inputs and U the upper Cholesky factor of
(G + damping)^-1, the columns of W are rounded one after another, and what column i lost goes into the later ones,

    w_j -= (w_i - q_i) U_ij / U_ii      for j > i

which is the best that the later columns can do about it, and leaves a loss of (w_i - q_i)^2 / U_ii^2. Columns with loud
inputs go first, their groups' scales and zero points are fixed beforehand, for the least sum of those losses, and the
file has them in their own places: the order costs nothing at inference.

Three things around it. Linears are quantized in the order in which a layer runs them, each on the inputs that the
rounded ones before it give. What those inputs lack is put into the weights (QEP, arXiv:2504.09629, eq. 7): with x of
the unquantized model beside x' of the quantized one, and 0 < share <= 1,

    W* = W + share W E[(x - x') x'^T] (E[x' x'^T] + damping)^-1.

And AWQ's scales can go into the layer first, learned rounding (`quant/rounding.py`) come last.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from offload.command import say
from quant import tiles
from quant.awq import Awq, scale_layer, search_clip_by_column
from quant.cost import FLOAT_BYTES, Cost, OnDisk, Shape, Windows
from quant.gptq_cost import LinearWork
from quant.groupwise import Grid, Parameters, fake_quantize, kept_range, minmax, row_chunks
from quant.hessian import Hessian, Statistics, observe, observed, record
from quant.layer import LayerInputs, UnreachedError, inputs_of
from quant.moments import Moments
from quant.pass_dtype import AUTO, PASS_DTYPES
from quant.rounding import Places, learn_rounding, learning_bytes, learning_operations
from quant.scale_groups import sets_by_input
from quant.settings import AwqSettings, GptqSettings, LearningSettings
from quant.tiles import times, times_squared_
from quant.walk_inputs import most_batch_samples

Seen = Callable[[str], Statistics]

_BLOCK_COLUMNS = 64


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
        """Return what a layer whose linears have these shapes will take; AWQ's scales come before.

        What one pass shows of all linears is held until they are rounded, and where weights stood until all are.
        """
        assert windows is not None, "it needs inputs"
        settings = self.settings
        batch_tokens = most_batch_samples(windows.tokens) * windows.tokens
        how = windows, batch_tokens, grid, settings.search.clip_points, settings.propagates
        works = [LinearWork(n, k, *how) for n, k in shapes]
        held_bytes = 0 if settings.sequential else sum(w.held_bytes for w in works)
        weights, tokens = sum(n * k for n, k in shapes), windows.samples * windows.tokens
        passes = 2.0 * weights * tokens * (6 if settings.propagates else 3)
        operations = passes + sum(6.0 * n * k * k + 4.0 * k**3 for n, k in shapes)
        learn_bytes = places_bytes = 0
        if settings.learn.steps:
            learn_bytes, places_bytes = learning_bytes(shapes, batch_tokens), FLOAT_BYTES * weights
            operations += learning_operations(shapes, settings.learn, windows)
        on_disk = OnDisk(
            observing_bytes=max(learn_bytes, places_bytes + max(w.observing_bytes for w in works)),
            working_bytes=places_bytes + max(w.working_bytes for w in works),
            disk_bytes=max(w.file_bytes for w in works),
            traffic_bytes=sum(w.traffic_bytes for w in works),
        )
        rounding_bytes = held_bytes + places_bytes + max(w.memory_bytes for w in works)
        cost = Cost(max(rounding_bytes, learn_bytes), operations, on_disk, pass_operations=passes)
        if settings.learn.steps:
            cost = replace(cost, purpose="statistics and searches, or all places and gradients of learned rounding")
        return cost.after(Awq(settings.search).cost(shapes, grid, windows)) if settings.scale else cost

    def quantize_layer(
        self, layer: nn.Module, inputs: LayerInputs, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Leave representable weights in the named linears of `layer` (float32) and return their parameters.

        Rounding those weights to nearest gives the codes chosen here. Raises ArithmeticError for inputs not finite.
        """
        settings, directory = self.settings, inputs.statistics_to
        report: dict[str, Any] = {"ranges": {}}
        if settings.scale:
            _, report["scales"] = scale_layer(layer, inputs, grids, head_dim, settings.search)
        sets = sets_by_input(layer, inputs, list(grids))
        statistics = self._in_sequence(layer, inputs, sets) if settings.sequential else at_once(layer, inputs, sets)
        found: dict[str, Parameters] = {}
        places: dict[str, Places] = {}
        for members in sets:
            first = members[0]
            try:
                seen = statistics(first)
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

    def _in_sequence(self, layer: nn.Module, inputs: LayerInputs, sets: list[tuple[str, ...]]) -> Seen:
        """Return a function that observes a linear as the layer is when it is called, beside the unquantized one.

        That one is a copy, or, where statistics are on disk, the inputs that its linears had.
        """
        directory = inputs.statistics_to
        if not self.settings.propagates:
            return lambda name: observe(layer, None, inputs, name, directory)
        if directory is not None:
            recorded = record(layer, inputs.original(), [members[0] for members in sets], directory)
            return lambda name: observe(layer, recorded.pop(name), inputs, name, directory)
        original = copy.deepcopy(layer)
        return lambda name: observe(layer, inputs_of(original, inputs.original(), name), inputs, name)


def at_once(layer: nn.Module, inputs: LayerInputs, sets: list[tuple[str, ...]]) -> Seen:
    """Return a function of what the linears see before any is rounded, which is held until then.

    In memory: the inputs of wide linears, and the moments of narrow ones; on disk the inputs of all.
    """
    firsts = [members[0] for members in sets]
    wide = [name for name in firsts if layer.get_parameter(f"{name}.weight").shape[1] > tiles.TILE]
    recorded = record(layer, inputs, wide, inputs.statistics_to) if wide else {}
    narrow = [name for name in firsts if name not in wide]
    seen = Moments(layer, inputs, narrow) if narrow else None

    def statistics(name: str) -> Statistics:
        if name in recorded:
            return observed(name, recorded.pop(name), None, inputs.statistics_to)
        assert seen is not None, "a linear is wide or narrow"
        return Statistics.of(seen.gram(name).read(0, 0).double())

    return statistics


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


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    from quant.pipeline import run_method

    fast = GptqSettings(sequential=False, propagation=0.0, pass_dtype=AUTO)
    slow = GptqSettings(learn=LearningSettings(steps=100))
    tiers = {"best": GptqSettings(), "fast": fast, "slow": slow}
    return run_method("gptq", Gptq, argv, tiers)


if __name__ == "__main__":
    sys.exit(main())
