"""What GPTQ's statistics and rounding take, from the shapes of a layer's linears: in memory, and with these in files.

Axes: N outputs, K inputs of a linear.
"""

from dataclasses import dataclass, replace

import torch

from quant.awq_cost import awq_cost
from quant.clip_search import searching_bytes
from quant.cost import FLOAT_BYTES, Cost, OnDisk, Shape, Windows
from quant.groupwise import Grid, chunk_rows
from quant.rounding import learning_bytes, learning_operations
from quant.settings import AwqSettings, GptqSettings
from quant.tiles import Tiling, is_wide
from quant.walk_inputs import most_batch_samples

_DOUBLE_BYTES = 8


@dataclass(frozen=True, slots=True)
class LinearWork:
    """GPTQ's work on one linear.

    rows, width: N, K. batch_tokens: that go through the layer at a time. search: how finely ranges are searched.
    sequential: whether its inputs are looked at when it is its turn, else those of all linears are before. paired:
    whether the inputs of the unquantized model are looked at as well.
    """

    rows: int
    width: int
    windows: Windows
    batch_tokens: int
    grid: Grid
    search: AwqSettings
    sequential: bool
    paired: bool

    @property
    def wide(self) -> bool:
        """Whether its matrices take more than one tile, and its inputs are recorded first."""
        return is_wide(self.width)

    @property
    def gram(self) -> Tiling:
        """The tiles of the moments of its inputs, and of their factor."""
        return Tiling(self.width, upper=True)

    @property
    def lost(self) -> Tiling | None:
        """The tiles of what its inputs lack of the unquantized model's."""
        return Tiling(self.width, upper=False) if self.paired else None

    @property
    def recording_bytes(self) -> int:
        """Bytes of the recorded inputs of a wide linear, 0 for others."""
        return self.windows.nbytes(self.width) if self.wide else 0

    @property
    def held_bytes(self) -> int:
        """Bytes of what is left in memory of it, until it is rounded, where one pass shows all linears."""
        if self.sequential:
            return 0
        return self.recording_bytes if self.wide else self._narrow_gram.held_bytes

    @property
    def observing_bytes(self) -> int:
        """Bytes that are summed up while a batch runs: two matrices and a product, none of a wide one."""
        return 0 if self.wide else 5 * _DOUBLE_BYTES * self.width**2 // 2

    @property
    def chunk_bytes(self) -> int:
        """Memory to round some rows in: the weights in float32 seven times over, what a tile carries, candidates."""
        rows = min(self.rows, chunk_rows(self.width))
        weights, carried = 7 * FLOAT_BYTES * rows * self.width, 2 * _DOUBLE_BYTES * rows * self.gram.tile
        return weights + carried + searching_bytes(rows, self.width, self.grid, self.search)

    @property
    def panel_bytes(self) -> int:
        """Memory of tiles that are summed in one reading of two recordings, and of the batches read."""
        summed = max(map(len, (self.lost or self.gram).panels()))
        columns = (summed + 1) * self.gram.tile + 3 * self.width
        return (summed + 1) * self.gram.tile_bytes + FLOAT_BYTES * self.batch_tokens * columns

    @property
    def working_bytes(self) -> int:
        """The most memory of it, no batch running, with matrices in files; those of one tile are worked on whole."""
        whole = 0 if self.wide else 3 * _DOUBLE_BYTES * self.width**2
        making = self.panel_bytes if self.wide else 6 * _DOUBLE_BYTES * self.width**2
        return max(making, whole + self.chunk_bytes + (4 * self.gram.tile_bytes if self.wide else 0))

    @property
    def memory_bytes(self) -> int:
        """The most memory of it with everything in memory."""
        if not self.wide:
            return self.working_bytes
        factor_bytes = self.gram.held_bytes
        moments_bytes, recordings = self.gram.held_bytes + (self.lost.held_bytes if self.lost else 0), 1 + self.paired
        made_bytes = recordings * self.recording_bytes + moments_bytes + self.panel_bytes
        return max(made_bytes, moments_bytes + factor_bytes + max(self.chunk_bytes, 4 * self.gram.tile_bytes))

    @property
    def file_bytes(self) -> int:
        """Bytes on disk of its matrices, and of a wide linear's inputs until the moments are made of them."""
        factor_bytes = self.gram.file_bytes
        if not self.wide:
            return factor_bytes + (0 if self.sequential else self._narrow_gram.file_bytes)
        moments_bytes = self.gram.file_bytes + (self.lost.file_bytes if self.lost else 0)
        return moments_bytes + max(self.recording_bytes, factor_bytes)

    @property
    def traffic_bytes(self) -> int:
        """Bytes read from files and written there, about."""
        if not self.wide:
            return 0
        upper, square = self.gram.tiles, self.lost.tiles if self.lost else 0
        readings = len(self.gram.panels()) + (2 * len(self.lost.panels()) if self.lost else 0)
        algebra = 2 * self.gram.count**3 // 3 + 2 * upper + square
        chunks = -(-self.rows // chunk_rows(self.width))
        rounding = chunks * (3 * upper + (square + 2 * upper if self.paired else 0))
        return readings * self.recording_bytes + (algebra + rounding) * self.gram.tile_bytes

    @property
    def _narrow_gram(self) -> Tiling:
        """The one tile that a narrow linear's inputs are summed in where one pass shows all."""
        return Tiling(self.width, upper=True, dtype=torch.float32)


def gptq_cost(shapes: list[Shape], grid: Grid, windows: Windows, settings: GptqSettings) -> Cost:
    """Return what a layer's linears take together; AWQ's scales come before.

    What one pass shows of all linears is held until they are rounded, and where weights stood until all are.
    """
    batch_tokens = most_batch_samples(windows.tokens) * windows.tokens
    how = windows, batch_tokens, grid, settings.search, settings.sequential, settings.propagates
    works = [LinearWork(n, k, *how) for n, k in shapes]
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
    rounding_bytes = sum(w.held_bytes for w in works) + places_bytes + max(w.memory_bytes for w in works)
    cost = Cost(max(rounding_bytes, learn_bytes), operations, on_disk, pass_operations=passes)
    if settings.learn.steps:
        cost = replace(cost, purpose="statistics and searches, or all places and gradients of learned rounding")
    return cost.after(awq_cost(shapes, grid, windows, settings.search)) if settings.scale else cost
