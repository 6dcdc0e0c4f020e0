"""What GPTQ knows of a linear's inputs: moments, float64 [K, K], in the order in which columns are rounded.

A linear of at most one tile of inputs has its products summed while the layer runs. The inputs of a wider one are
recorded first, in memory or in a file, and its tiles are summed from the recording, a few at a time.

Axes: T tokens of a batch, K inputs of a linear, N outputs.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.layer import LayerInputs, UnreachedError, inputs_of
from quant.moments import Moments
from quant.recording import Recording, record
from quant.tiles import Place, Tiles, cut, is_wide


@dataclass(frozen=True, slots=True)
class Statistics:
    """Moments of the inputs x of a linear, rows and columns in the order in which its columns are rounded.

    order: int64 [K], channels by falling E[x^2]. gram: E[x x^T], its upper tiles. lost: E[(x0 - x) x^T], all tiles,
    with x0 the inputs of the unquantized model; None where those are not known.
    """

    order: Tensor
    gram: Tiles
    lost: Tiles | None = None

    @classmethod
    def of(cls, gram: Tensor, cross: Tensor | None = None) -> "Statistics":
        """Return those of E[x x^T] and E[x0 x^T], float64 [K, K], channels in their own order."""
        order = gram.diagonal().argsort(descending=True, stable=True)
        across = order[:, None]
        lost = None if cross is None else cut((cross - gram)[across, order], upper=False)
        return cls(order, cut(gram[across, order], upper=True), lost)

    @classmethod
    def of_recorded(cls, x: Recording, x0: Recording | None, directory: Path | None) -> "Statistics":
        """Return those of recorded inputs, their tiles in a file in `directory`, in memory without one."""
        order = x.energy.argsort(descending=True, stable=True)
        gram = Tiles(x.width, True, directory)
        for (i, j), total in _products(x, x, order, gram):
            gram.write(i, j, total)
        if x0 is None:
            return cls(order, gram)
        lost = Tiles(x.width, False, directory)
        for (i, j), total in _products(x0, x, order, lost):
            lost.write(i, j, total.sub_(gram.read(i, j) if i <= j else gram.read(j, i).T))
        return cls(order, gram, lost)

    def finite(self) -> bool:
        """Tell whether all inputs are: no product is larger than the squares of its factors."""
        return bool(torch.isfinite(self.gram.diagonal()).all())


def _products(left: Recording, right: Recording, order: Tensor, matrix: Tiles) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tiles of E[l r^T] that `matrix` has, float64, channels in `order`, with their places."""
    tokens = sum(right.tokens)
    for places in matrix.panels():
        channels = {k: order[matrix.span(k)] for place in places for k in place}
        totals = {(i, j): torch.zeros(len(channels[i]), len(channels[j]), dtype=torch.float64) for i, j in places}
        for l_TK, r_TK in ((x, x) for x in right) if left is right else zip(left, right, strict=True):
            columns = {j: r_TK[:, channels[j]] for j in {j for _, j in places}}
            for (i, j), total in totals.items():
                total += l_TK[:, channels[i]].T @ columns[j]
        for place in places:
            yield place, totals.pop(place).div_(tokens)


def observe(
    layer: nn.Module, others: Iterable[Tensor] | None, inputs: LayerInputs, name: str, directory: Path | None = None
) -> Statistics:
    """Return the moments of the inputs of a linear, those of a wide one in a file in `directory` if there is one.

    others: what the same linear is called with in the unquantized model, batch by batch. Where that is not the same
    tokens, as behind a router, nothing is known of them. Raises UnreachedError if no sample calls the linear.
    """
    width = layer.get_parameter(f"{name}.weight").shape[1]
    batches = inputs_of(layer, inputs, name)
    if is_wide(width):
        return observed(name, Recording.of(batches, width, directory), others, directory)
    gram, cross = torch.zeros(2, width, width, dtype=torch.float64)
    tokens, paired = 0, others is not None
    remaining = iter(others or ())
    for x_TK in batches:
        tokens += len(x_TK)
        gram += x_TK.T @ x_TK
        x0_TK = next(remaining) if paired else x_TK
        paired = paired and len(x0_TK) == len(x_TK)
        if paired:
            cross += x0_TK.T @ x_TK
    if not tokens:
        raise UnreachedError(f"{name}: not called by any calibration sample")
    return Statistics.of(gram.div_(tokens), cross.div_(tokens) if paired else None)


def observed(name: str, x: Recording, others: Iterable[Tensor] | None, directory: Path | None) -> Statistics:
    """Return the moments of recorded inputs of a linear, as `observe` does."""
    if not sum(x.tokens):
        raise UnreachedError(f"{name}: not called by any calibration sample")
    if others is not None and not isinstance(others, Recording):
        others = Recording.of(others, x.width, directory)
    return Statistics.of_recorded(x, others if others is not None and others.tokens == x.tokens else None, directory)


def at_once(layer: nn.Module, inputs: LayerInputs, sets: list[tuple[str, ...]]) -> Callable[[str], Statistics]:
    """Return a function of what the linears see before any is rounded, which is held until then.

    In memory: the inputs of wide linears, and the moments of narrow ones; on disk the inputs of all.
    """
    firsts = [members[0] for members in sets]
    wide = [name for name in firsts if is_wide(layer.get_parameter(f"{name}.weight").shape[1])]
    recorded = record(layer, inputs, wide, inputs.statistics_to) if wide else {}
    narrow = [name for name in firsts if name not in wide]
    seen = Moments(layer, inputs, narrow) if narrow else None

    def statistics(name: str) -> Statistics:
        if name in recorded:
            return observed(name, recorded.pop(name), None, inputs.statistics_to)
        assert seen is not None, "a linear is wide or narrow"
        return Statistics.of(seen.gram(name).read(0, 0).double())

    return statistics


def in_sequence(
    layer: nn.Module, inputs: LayerInputs, sets: list[tuple[str, ...]], paired: bool
) -> Callable[[str], Statistics]:
    """Return a function that observes a linear as the layer is when it is called.

    paired: whether beside the unquantized layer, which is a copy, or, where statistics are on disk, the inputs that its
    linears had.
    """
    directory = inputs.statistics_to
    if not paired:
        return lambda name: observe(layer, None, inputs, name, directory)
    if directory is not None:
        recorded = record(layer, inputs.original(), [members[0] for members in sets], directory)
        return lambda name: observe(layer, recorded.pop(name), inputs, name, directory)
    original = copy.deepcopy(layer)
    return lambda name: observe(layer, inputs_of(original, inputs.original(), name), inputs, name)
