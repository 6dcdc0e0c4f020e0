"""What AWQ's statistics and searches take, from the shapes of a layer's linears: in memory, and with grams in files.

Axes: N outputs, K inputs of a linear.
"""

from dataclasses import dataclass

from quant import tiles
from quant.cost import FLOAT_BYTES, Cost, OnDisk, Shape, Windows
from quant.groupwise import Grid, chunk_rows
from quant.moments import READ_TILES

CLIP_ROWS = 256
"""Rows whose ranges are searched together: more candidates at once than the caches hold take three times as long."""

_SET = 4
"""Linears of one shape that share an input, at most: gates and projections, queries, keys and values."""


def clip_rows(group_size: int) -> int:
    """Return how many rows' ranges are searched together: fewer where a group is a row of many tiles."""
    return max(1, CLIP_ROWS * tiles.TILE // max(group_size, tiles.TILE))


@dataclass(frozen=True, slots=True)
class SearchWork:
    """AWQ's work on one linear.

    rows, width: N, K. batch_tokens: that go through the layer at a time. search_tokens: that blocks are compared on.
    clip_points: candidates of a group's range. scale_points: of r.
    """

    rows: int
    width: int
    windows: Windows
    batch_tokens: int
    search_tokens: int
    grid: Grid
    clip_points: int
    scale_points: int

    @property
    def gram_bytes(self) -> int:
        """Bytes of its gram, the upper tiles of a wide one's."""
        return self._upper * self._tile_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of the weights that are kept while others are tried in the place of a set's."""
        return _SET * FLOAT_BYTES * self.rows * self.width

    @property
    def scale_bytes(self) -> int:
        """Memory to try a scale in: some rows, and the inputs that a wide linear alone is compared on."""
        rows = min(self.rows, chunk_rows(self.width))
        several = min(_SET * self.rows, chunk_rows(self.width)) * self.width
        inputs = self.search_tokens * 2 * (self.width + rows) if self.width > tiles.TILE else self.width**2
        return FLOAT_BYTES * (5 * several + inputs)

    @property
    def clip_bytes(self) -> int:
        """Memory to search ranges in: some rows seven times over, candidates, a few tiles."""
        rows, group = min(self.rows, chunk_rows(self.width)), self.grid.group(self.width)
        candidates = self.clip_points * (2 if self.grid.symmetric else 1) * min(rows, clip_rows(group)) * group
        return FLOAT_BYTES * (7 * rows * self.width + 4 * candidates) + 3 * self._tile_bytes

    @property
    def reading_bytes(self) -> int:
        """Memory of tiles that are summed in one reading of a recording, and of the batch read."""
        return min(READ_TILES, self._upper) * self._tile_bytes + FLOAT_BYTES * self.batch_tokens * self.width

    @property
    def recording_bytes(self) -> int:
        """Memory that recording a batch takes beside it."""
        return 2 * FLOAT_BYTES * self.batch_tokens * self.width

    @property
    def traffic_bytes(self) -> int:
        """Bytes read from files and written there, about, but for the inputs when they are recorded."""
        recording = FLOAT_BYTES * self.windows.samples * self.windows.tokens * self.width
        readings = -(-self._upper // READ_TILES) + (0 if self.width > tiles.TILE else 1)
        searched = -(-self.rows // chunk_rows(self.width)) * self._count**2 + 3 * self._upper
        tried = (2 * self.scale_points + 2) * FLOAT_BYTES * self.rows * self.width
        return readings * recording + searched * self._tile_bytes + tried

    @property
    def _count(self) -> int:
        return -(-self.width // tiles.TILE)

    @property
    def _upper(self) -> int:
        return self._count * (self._count + 1) // 2

    @property
    def _tile_bytes(self) -> int:
        return FLOAT_BYTES * min(self.width, tiles.TILE) ** 2


def awq_cost(shapes: list[Shape], works: list[SearchWork], samples: int) -> Cost:
    """Return what a layer's linears take together. samples: on which outputs are compared."""
    first = works[0]
    windows, grid, points = first.windows, first.grid, first.clip_points * (2 if first.grid.symmetric else 1)
    weights = sum(n * k for n, k in shapes)
    runs = windows.tokens * (6 * windows.samples + 2 * first.scale_points * samples)
    clips = points * (1 if grid.symmetric else 3) * (2 * max(grid.group(k) for _, k in shapes) + 60)
    statistics = sum(2 * k * k for _, k in shapes) * windows.samples * windows.tokens
    in_memory = sum(w.gram_bytes for w in works)
    in_memory += max(max(w.kept_bytes + w.scale_bytes, w.gram_bytes + w.clip_bytes) for w in works)
    on_disk = OnDisk(
        observing_bytes=max(w.recording_bytes for w in works),
        working_bytes=max(max(w.scale_bytes, w.clip_bytes, w.reading_bytes) for w in works),
        disk_bytes=max(max(w.kept_bytes, 2 * w.gram_bytes) for w in works),
        traffic_bytes=sum(w.traffic_bytes for w in works),
    )
    return Cost(in_memory, 2.0 * weights * runs + weights * clips + statistics, on_disk)
