"""What AWQ's statistics and searches take, from the shapes of a layer's linears: in memory, and with grams in files.

Axes: N outputs, K inputs of a linear.
"""

from dataclasses import dataclass

import torch

from quant.clip_search import ranges_tried, searching_bytes
from quant.cost import FLOAT_BYTES, MOST_IN_SET, Cost, OnDisk, Shape, Windows
from quant.groupwise import Grid, chunk_rows
from quant.settings import AwqSettings
from quant.tiles import Tiling, is_wide
from quant.walk_inputs import most_batch_samples


@dataclass(frozen=True, slots=True)
class SearchWork:
    """AWQ's work on one linear.

    rows, width: N, K. batch_tokens: that go through the layer at a time. search_tokens: that blocks are compared on.
    settings: how finely it is searched.
    """

    rows: int
    width: int
    windows: Windows
    batch_tokens: int
    search_tokens: int
    grid: Grid
    settings: AwqSettings

    @property
    def gram(self) -> Tiling:
        """The tiles of the gram of its inputs, of which a second one is made where that is damped or scaled."""
        return Tiling(self.width, upper=True, dtype=torch.float32)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the weights that are kept while others are tried in the place of a set's."""
        return MOST_IN_SET * FLOAT_BYTES * self.rows * self.width

    @property
    def scale_bytes(self) -> int:
        """Memory to try a scale in: some rows, and the inputs that a wide linear alone is compared on."""
        rows = min(self.rows, chunk_rows(self.width))
        several = min(MOST_IN_SET * self.rows, chunk_rows(self.width)) * self.width
        inputs = self.search_tokens * 2 * (self.width + rows) if is_wide(self.width) else self.width**2
        return FLOAT_BYTES * (5 * several + inputs)

    @property
    def clip_bytes(self) -> int:
        """Memory to search ranges in: some rows seven times over, candidates, a few tiles."""
        rows = min(self.rows, chunk_rows(self.width))
        candidates_bytes = searching_bytes(rows, self.width, self.grid, self.settings)
        return 7 * FLOAT_BYTES * rows * self.width + candidates_bytes + 3 * self.gram.tile_bytes

    @property
    def reading_bytes(self) -> int:
        """Memory of tiles that are summed in one reading of a recording, and of the batch read."""
        return max(map(len, self.gram.panels())) * self.gram.tile_bytes + FLOAT_BYTES * self.batch_tokens * self.width

    @property
    def recording_bytes(self) -> int:
        """Memory that recording a batch takes beside it."""
        return 2 * FLOAT_BYTES * self.batch_tokens * self.width

    @property
    def traffic_bytes(self) -> int:
        """Bytes read from files and written there, about, but for the inputs when they are recorded."""
        recording_bytes = self.windows.nbytes(self.width)
        gram = self.gram
        readings = len(gram.panels()) + (0 if is_wide(self.width) else 1)
        searched = -(-self.rows // chunk_rows(self.width)) * gram.count**2 + 3 * gram.tiles
        tried = (2 * self.settings.scale_points + 2) * FLOAT_BYTES * self.rows * self.width
        return readings * recording_bytes + searched * gram.tile_bytes + tried


def awq_cost(shapes: list[Shape], grid: Grid, windows: Windows, settings: AwqSettings) -> Cost:
    """Return what a layer's linears take together."""
    searched_samples = min(settings.search_samples, windows.samples)
    batch_tokens, search_tokens = most_batch_samples(windows.tokens) * windows.tokens, searched_samples * windows.tokens
    works = [SearchWork(n, k, windows, batch_tokens, search_tokens, grid, settings) for n, k in shapes]
    weights, tried = sum(n * k for n, k in shapes), ranges_tried(grid, settings) * (1 if grid.symmetric else 3)
    runs = windows.tokens * (6 * windows.samples + 2 * settings.scale_points * searched_samples)
    clips = tried * (2 * max(grid.group(k) for _, k in shapes) + 60)
    statistics = sum(2 * k * k for _, k in shapes) * windows.samples * windows.tokens
    in_memory = sum(w.gram.held_bytes for w in works)
    in_memory += max(max(w.kept_bytes + w.scale_bytes, w.gram.held_bytes + w.clip_bytes) for w in works)
    kept_bytes = max(w.kept_bytes for w in works)
    tried_gram_bytes = max((w.gram.file_bytes for w in works if not is_wide(w.width)), default=0)
    on_disk = OnDisk(
        observing_bytes=max(w.recording_bytes for w in works),
        working_bytes=max(max(w.scale_bytes, w.clip_bytes, w.reading_bytes) for w in works),
        disk_bytes=max(kept_bytes + tried_gram_bytes, 2 * max(w.gram.file_bytes for w in works)),
        traffic_bytes=sum(w.traffic_bytes for w in works),
    )
    return Cost(in_memory, 2.0 * weights * runs + weights * clips + statistics, on_disk)
