"""What GPTQ knows of a linear's inputs, and its factor: matrices [K, K] in the order in which columns are rounded.

A linear of at most one tile of inputs has its products summed while the layer runs. The inputs of a wider one are
recorded first, in memory or in a file, and its tiles are summed from the recording, a few at a time.

Axes: T tokens of a batch, K inputs of a linear, N outputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant import tiles
from quant.layer import LayerInputs, UnreachedError, inputs_of, observed_inputs
from quant.nameless_file import NamelessFile
from quant.tiles import Tiles, cut, factorise, invert, quadratic

PANEL_TILES = 8
"""Tiles that are summed in one reading of a recording."""

_DAMPING_STEP = 10.0


class Recording:
    """Inputs of a linear, float32 [T, K] a batch, kept in memory or in a file, to be gone through again and again.

    tokens: of every batch. energy: the sum of x^2, float64 [K]. Raises ResourceError if the disk has no room.
    """

    def __init__(self, width: int, directory: Path | None) -> None:
        self.width, self.tokens = width, list[int]()
        self.energy = torch.zeros(width, dtype=torch.float64)
        self._held: list[Tensor] = []
        self._file = None if directory is None else NamelessFile(directory, "inputs of a layer")

    @classmethod
    def of(cls, batches: Iterable[Tensor], width: int, directory: Path | None) -> "Recording":
        """Record all batches."""
        recording = cls(width, directory)
        for x_TK in batches:
            recording.append(x_TK)
        return recording

    def append(self, x_TK: Tensor) -> None:
        """Record one batch."""
        self.tokens.append(len(x_TK))
        for x_tK in x_TK.split(64):  # in float64, without a second batch
            self.energy += x_tK.double().square_().sum(0)
        if self._file is None:
            self._held.append(x_TK.clone())
            return
        offset = self._file.nbytes
        self._file.grow(x_TK.nbytes)
        self._file.write(offset, x_TK)

    def __iter__(self) -> Iterator[Tensor]:
        if self._file is None:
            yield from self._held
            return
        offset = 0
        for tokens in self.tokens:
            x_TK = torch.empty(tokens, self.width)
            self._file.read_into(offset, x_TK)
            yield x_TK
            offset += x_TK.nbytes


def record(layer: nn.Module, inputs: LayerInputs, names: Sequence[str], directory: Path | None) -> dict[str, Recording]:
    """Run the layer once and return what each named linear is called with first; no tokens where it is not called."""
    widths = {name: layer.get_parameter(f"{name}.weight").shape[1] for name in names}
    recordings = {name: Recording(width, directory) for name, width in widths.items()}
    missing: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        if name in missing:
            missing.remove(name)
            recordings[name].append(x.flatten(0, -2))

    with observed_inputs(layer, names, see):
        missing.update(names)
        for _ in inputs.outputs(layer):
            for name in missing:
                recordings[name].append(torch.empty(0, widths[name]))
            missing.update(names)
    return recordings


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


def _products(
    left: Recording, right: Recording, order: Tensor, matrix: Tiles
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield the tiles of E[l r^T] that `matrix` has, float64, channels in `order`, with their places."""
    tokens = sum(right.tokens)
    wanted = list(matrix.places())
    for start in range(0, len(wanted), PANEL_TILES):
        places = wanted[start : start + PANEL_TILES]
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
    if width > tiles.TILE:
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


@dataclass(frozen=True, slots=True)
class Hessian:
    """The loss of a linear's weights around W, and what rounding one column should do to the later ones.

    seen: moments of the inputs, G among them. factor: U, upper, with U^T U = (G + damping mean(diag G))^-1, in the
    moments' order. damping: what it took to have one.
    """

    seen: Statistics
    factor: Tiles
    damping: float

    @classmethod
    def of(cls, seen: Statistics, damping: float, directory: Path | None = None) -> "Hessian":
        """Factorise finite moments; the damping is raised until that succeeds. directory: for the factor's tiles.

        A dead channel has nothing but the damping: its column is rounded to nearest and moves no other. The same holds
        for all of them if no input is ever other than zero.
        """
        diagonal = torch.empty_like(seen.order, dtype=torch.float64)
        diagonal[seen.order] = seen.gram.diagonal()
        unit = float(diagonal.mean()) or 1.0
        while (factor := factorise(seen.gram, damping * unit, directory)) is None:
            damping = max(damping, 1e-6) * _DAMPING_STEP
        invert(factor)
        return cls(seen, factor, damping)

    @property
    def order(self) -> Tensor:
        """The channels in the order in which their columns are rounded, int64 [K]."""
        return self.seen.order

    def importance(self) -> Tensor:
        """Return what an error of 1 in a column costs when the later ones make up for it, float64 [K]: 1 / U_ii^2.

        The carried rounding's whole (damped) loss is the sum of these times the squared errors, so they and not the
        diagonal of G are what its groups' ranges are best searched under.
        """
        importance = torch.empty_like(self.order, dtype=torch.float64)
        importance[self.order] = self.factor.diagonal() ** -2
        return importance

    def loss(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return E[|d x|^2] of every row d = values - weight, both float32 [N, K], undamped: float64 [N]."""
        difference = values[:, self.order].double()
        return quadratic(difference.sub_(weight[:, self.order]), self.seen.gram)
