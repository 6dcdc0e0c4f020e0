"""What the statistics and the rounding of one linear take, from its shape: in memory, and with matrices in files.

Axes: N outputs, K inputs of a linear.
"""

from dataclasses import dataclass

from quant import tiles
from quant.awq_cost import clip_rows
from quant.cost import FLOAT_BYTES, Windows
from quant.groupwise import Grid, chunk_rows
from quant.hessian import PANEL_TILES

_DOUBLE_BYTES = 8


@dataclass(frozen=True, slots=True)
class LinearWork:
    """GPTQ's work on one linear.

    rows, width: N, K. batch_tokens: that go through the layer at a time. clip_points: candidates of a group's range.
    paired: whether the inputs of the unquantized model are looked at as well.
    """

    rows: int
    width: int
    windows: Windows
    batch_tokens: int
    grid: Grid
    clip_points: int
    paired: bool

    @property
    def wide(self) -> bool:
        """Whether its matrices take more than one tile, and its inputs are recorded first."""
        return self.width > tiles.TILE

    @property
    def recording_bytes(self) -> int:
        """Bytes of the recorded inputs of a wide linear, 0 for others."""
        return FLOAT_BYTES * self.windows.samples * self.windows.tokens * self.width if self.wide else 0

    @property
    def held_bytes(self) -> int:
        """Bytes of what one pass over the layer leaves in memory of it."""
        return self.recording_bytes if self.wide else FLOAT_BYTES * self.width**2

    @property
    def observing_bytes(self) -> int:
        """Bytes that are summed up while a batch runs: two matrices and a product, none of a wide one."""
        return 0 if self.wide else 5 * _DOUBLE_BYTES * self.width**2 // 2

    @property
    def chunk_bytes(self) -> int:
        """Memory to round some rows in: the weights in float32 seven times over, what a tile carries, candidates."""
        rows = min(self.rows, chunk_rows(self.width))
        candidates = self.clip_points * (2 if self.grid.symmetric else 1)
        weights, carried = 7 * FLOAT_BYTES * rows * self.width, 2 * _DOUBLE_BYTES * rows * min(self.width, tiles.TILE)
        group = self.grid.group(self.width)
        return weights + carried + 4 * FLOAT_BYTES * candidates * min(rows, clip_rows(group)) * group

    @property
    def panel_bytes(self) -> int:
        """Memory of tiles that are summed in one reading of two recordings, and of the batches read."""
        summed = min(PANEL_TILES, self._count**2 if self.paired else self._upper)
        columns = (summed + 1) * min(self.width, tiles.TILE) + 3 * self.width
        return (summed + 1) * self._tile_bytes + FLOAT_BYTES * self.batch_tokens * columns

    @property
    def working_bytes(self) -> int:
        """The most memory of it, no batch running, with matrices in files; those of one tile are worked on whole."""
        whole = 0 if self.wide else 3 * _DOUBLE_BYTES * self.width**2
        making = self.panel_bytes if self.wide else 6 * _DOUBLE_BYTES * self.width**2
        return max(making, whole + self.chunk_bytes + (4 * self._tile_bytes if self.wide else 0))

    @property
    def memory_bytes(self) -> int:
        """The most memory of it with everything in memory."""
        if not self.wide:
            return self.working_bytes
        square = _DOUBLE_BYTES * self.width**2
        half = (square + _DOUBLE_BYTES * self.width * tiles.TILE) // 2
        moments, recordings = half + (square if self.paired else 0), 2 if self.paired else 1
        made = recordings * self.recording_bytes + moments + self.panel_bytes
        return max(made, moments + half + max(self.chunk_bytes, 4 * self._tile_bytes))

    @property
    def file_bytes(self) -> int:
        """Bytes on disk of a wide linear's inputs and matrices."""
        squares = 2 * self._upper + (self._count**2 if self.paired else 0)
        return self.recording_bytes + squares * self._tile_bytes if self.wide else 0

    @property
    def traffic_bytes(self) -> int:
        """Bytes read from files and written there, about."""
        if not self.wide:
            return 0
        square, chunks = self._count**2 if self.paired else 0, -(-self.rows // chunk_rows(self.width))
        readings = -(-self._upper // PANEL_TILES) + 2 * -(-square // PANEL_TILES)
        algebra = 2 * self._count**3 // 3 + 2 * self._upper + square
        rounding = chunks * (3 * self._upper + (square + 2 * self._upper if self.paired else 0))
        return readings * self.recording_bytes + (algebra + rounding) * self._tile_bytes

    @property
    def _count(self) -> int:
        return -(-self.width // tiles.TILE)

    @property
    def _upper(self) -> int:
        return self._count * (self._count + 1) // 2

    @property
    def _tile_bytes(self) -> int:
        return _DOUBLE_BYTES * min(self.width, tiles.TILE) ** 2
