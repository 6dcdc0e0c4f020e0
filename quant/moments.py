"""What AWQ knows of the inputs x of a layer's linears: G = E[x x^T] and E[|x|], in float32.

Where memory has room they are summed for all linears while the layer runs; else their inputs are recorded, and one
linear's moments made of that when they are asked for, by the same sums in the same order. A matrix of more than a tile
is kept and made in tiles.

Axes: T tokens of a batch, K inputs of a linear.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quant.layer import LayerInputs, shared_inputs
from quant.recording import Recording
from quant.tiles import Place, Tiles

_GRAM_BLOCK = 512
"""Rows of a gram that are added to together: a product of that size runs at full speed."""


class Sums:
    """Sums over tokens of x x^T, tile by tile on and above its diagonal, and of |x|: float32."""

    def __init__(self, width: int) -> None:
        self.tokens, self.magnitude = 0, torch.zeros(width)
        self.gram = Tiles(width, upper=True, dtype=torch.float32)
        self.parts = no_sums(self.gram, list(self.gram.places()))

    def add(self, x_TK: Tensor, dtype: torch.dtype) -> None:
        """Add a batch, multiplied in a dtype."""
        add_products(self.parts, self.gram, x_TK.to(dtype))
        self.magnitude += x_TK.abs().sum(0)
        self.tokens += len(x_TK)


def no_sums(gram: Tiles, places: list[Place]) -> dict[Place, Tensor]:
    """Return zeros for the tiles of a gram at some places."""
    return {place: torch.zeros(gram.shape(place)) for place in places}


def add_products(sums: dict[Place, Tensor], gram: Tiles, x_TK: Tensor) -> None:
    """Add x^T x to the tiles of a gram; of one on its diagonal only to what `mirror` makes up the rest from."""
    for (i, j), total in sums.items():
        if i == j:
            add_gram(total, x_TK[:, gram.span(i)])
        else:
            add_product(total, x_TK[:, gram.span(i)].T, x_TK[:, gram.span(j)])


def add_gram(gram: Tensor, x_TK: Tensor) -> None:
    """Add x^T x to a gram [K, K], in blocks on and above its diagonal alone, as `mirror` makes up for the others."""
    for start in range(0, len(gram), _GRAM_BLOCK):
        columns = slice(start, start + _GRAM_BLOCK)
        add_product(gram[columns, start:], x_TK[:, columns].T, x_TK[:, start:])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 total, in place.

    a, b: float32, or bfloat16, whose products come rounded to that; sums of many batches hardly notice.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def mirror(gram: Tensor) -> Tensor:
    """Return a gram with the blocks below its diagonal, in place."""
    for start in range(_GRAM_BLOCK, len(gram), _GRAM_BLOCK):
        columns = slice(start - _GRAM_BLOCK, start)
        gram[start:, columns] = gram[columns, start:].T
    return gram


class Moments:
    """Moments of the inputs of linears, of those divided by a scale where one was put in.

    Linears that share an input share its moments. Raises UnreachedError naming a linear that was never called, and
    ResourceError if the directory that `inputs` has for statistics has no room for the recorded inputs.
    """

    def __init__(self, layer: nn.Module, inputs: LayerInputs, names: Iterable[str]) -> None:
        self._directory, self._dtype = inputs.statistics_to, inputs.pass_dtype
        self._sums: dict[str, Sums] = {}
        self._recordings: dict[str, Recording] = {}
        self._magnitudes: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._latest: tuple[str, Tensor | None, float, Tiles] | None = None
        self._owners = shared_inputs(layer, inputs, names, self._sum if self._directory is None else self._record)
        for name, sums in self._sums.items():
            self._magnitudes[name] = sums.magnitude.div_(sums.tokens)
            for (i, j), part in sums.parts.items():
                sums.gram.write(i, j, _mean(part, i == j, sums.tokens))
            sums.parts.clear()
        for name, recording in self._recordings.items():
            self._magnitudes[name].div_(sum(recording.tokens))

    def _sum(self, name: str, x_TK: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = Sums(x_TK.shape[1])
        self._sums[name].add(x_TK, self._dtype)

    def _record(self, name: str, x_TK: Tensor) -> None:
        if name not in self._recordings:
            self._recordings[name] = Recording(x_TK.shape[1], self._directory)
            self._magnitudes[name] = torch.zeros(x_TK.shape[1])
        self._recordings[name].append(x_TK)
        self._magnitudes[name] += x_TK.abs().sum(0)

    def magnitude(self, name: str) -> Tensor:
        """Return E[|x|] of the inputs of a linear, float32 [K]."""
        found, scale = self._magnitudes[self._owners[name]], self._scales.get(name)
        return found if scale is None else found / scale

    def divide(self, names: Iterable[str], scale: Tensor) -> None:
        """Know from now on the inputs of some linears as what they were over a scale, float32 [K]."""
        for name in names:
            self._scales[name] = scale

    def gram(self, name: str, damping: float = 0.0) -> Tiles:
        """Return E[x x^T] of the inputs of a linear, its upper tiles; `damping` times the mean of its diagonal added.

        What was asked for last is kept until something else is.
        """
        owner, scale = self._owners[name], self._scales.get(name)
        if self._latest is not None and self._latest[0] == owner and self._latest[1] is scale:
            _, _, known, found = self._latest
            if known == damping:
                return found
        self._latest = None
        found = self._sums[owner].gram if self._directory is None else self._read(self._recordings[owner])
        if scale is not None or damping:
            found = self._changed(found, scale, damping)
        self._latest = owner, scale, damping, found
        return found

    def _read(self, recording: Recording) -> Tiles:
        """Return the gram of what was recorded."""
        gram = Tiles(recording.width, True, self._directory, dtype=torch.float32)
        tokens = sum(recording.tokens)
        for places in gram.panels():
            sums = no_sums(gram, places)
            for x_TK in recording:
                add_products(sums, gram, x_TK.to(self._dtype))
            for place in list(sums):
                gram.write(*place, _mean(sums.pop(place), place[0] == place[1], tokens))
        return gram

    def _changed(self, gram: Tiles, scale: Tensor | None, damping: float) -> Tiles:
        """Return a gram of inputs over a scale, damped."""
        changed = Tiles(gram.width, True, self._directory, dtype=torch.float32)
        trace = torch.zeros(())
        for i, j in gram.places():
            tile = gram.read(i, j).clone()
            if scale is not None:
                tile /= scale[gram.span(i)][:, None] * scale[gram.span(j)]
            if i == j:
                trace += tile.diagonal().sum()
            changed.write(i, j, tile)
        for i in range(changed.count if damping else 0):
            corner = changed.read(i, i).clone()
            corner.diagonal().add_(damping * (trace / gram.width))
            changed.write(i, i, corner)
        return changed


def _mean(total: Tensor, on_diagonal: bool, tokens: int) -> Tensor:
    return (mirror(total) if on_diagonal else total).div_(tokens)


def mean_loss(difference: Tensor, gram: Tensor) -> float:
    """Return E[|(W' - W) x|^2] for a difference of weights [N, K] and a gram [K, K]: the output's squared error."""
    return float(torch.sum((difference @ gram) * difference))
