"""Matrices too large for memory, in square tiles that lie in memory or in a file: products, factors, inverses.

The size of a tile is fixed, and everything is computed tile by tile in one order, so where tiles lie changes no bit. At
any time a handful of them is held: four, and what a function is given. A matrix of one tile is worked on as a whole.

Axes: K rows and columns of a matrix, N rows of others beside it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quant.nameless_file import NamelessFile

TILE = 2048
"""Rows of a tile, 32 MiB in float64: products of that size run at full speed and outweigh reading their factors. A
multiple of every group of a weight but a whole row."""

PANEL_TILES = 8
"""Tiles of float64 that are summed in one reading of what was recorded, or twice as many of float32."""

Place = tuple[int, int]
"""Row and column of a tile, counted in tiles."""


def is_wide(width: int) -> bool:
    """Tell whether a matrix [K, K] of that width takes more than one tile."""
    return width > TILE


class Tiling:
    """How a matrix [K, K] is cut into square tiles, and how many bytes they are: known without the matrix.

    width: K. upper: only tiles on and above the diagonal are there. tile: rows of one; the last ones are smaller, and a
    matrix narrower than that is a single one. dtype: float64 or float32.
    """

    def __init__(self, width: int, upper: bool, tile: int | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.width, self.upper, self.dtype = width, upper, dtype
        self.tile = min(tile or TILE, width)
        self.count = -(-width // self.tile)

    def places(self) -> Iterator[Place]:
        """Yield the place of every tile, column after column."""
        return ((i, j) for j in range(self.count) for i in range(j + 1 if self.upper else self.count))

    def panels(self) -> list[list[Place]]:
        """Return the places of the tiles that are summed together, in one reading of what was recorded each."""
        places, step = list(self.places()), PANEL_TILES * torch.float64.itemsize // self.dtype.itemsize
        return [places[start : start + step] for start in range(0, len(places), step)]

    def span(self, index: int) -> slice:
        """Return the rows of the matrix that tiles of row `index` hold, or the columns of column `index`."""
        return slice(index * self.tile, min((index + 1) * self.tile, self.width))

    def shape(self, place: Place) -> tuple[int, int]:
        """Return how many rows and columns a tile has."""
        rows, columns = map(self.span, place)
        return rows.stop - rows.start, columns.stop - columns.start

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return len(list(self.places()))

    @property
    def tile_bytes(self) -> int:
        """Bytes of the largest tile, the first."""
        return self.dtype.itemsize * self.tile**2

    @property
    def held_bytes(self) -> int:
        """Bytes of all tiles in memory."""
        return self.dtype.itemsize * sum(rows * columns for rows, columns in map(self.shape, self.places()))

    @property
    def file_bytes(self) -> int:
        """Bytes of all tiles in a file, where each has as much room as the first."""
        return self.tiles * self.tile_bytes


class Tiles(Tiling):
    """A matrix [K, K] in tiles that are there.

    directory: of the file they lie in, in memory without one. Raises ResourceError if the disk has no room.
    """

    def __init__(
        self,
        width: int,
        upper: bool,
        directory: Path | None = None,
        tile: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(width, upper, tile, dtype)
        self._held: dict[Place, Tensor] = {}
        self._file = None if directory is None else NamelessFile(directory, "statistics", self.file_bytes)

    def read(self, row: int, column: int) -> Tensor:
        """Return a tile, contiguous; not to be changed, as it may be the one that is kept."""
        if self._file is None:
            return self._held[row, column]
        tile = torch.empty(self.shape((row, column)), dtype=self.dtype)
        self._file.read_into(self._offset(row, column), tile)
        return tile

    def write(self, row: int, column: int, tile: Tensor) -> None:
        """Keep a tile, which is not to be changed afterwards."""
        if self._file is None:
            self._held[row, column] = tile.contiguous()
        else:
            self._file.write(self._offset(row, column), tile)

    def _offset(self, row: int, column: int) -> int:
        before = column * (column + 1) // 2 if self.upper else column * self.count
        return (before + row) * self.tile_bytes

    def diagonal(self) -> Tensor:
        """Return the diagonal, [K]."""
        return torch.cat([self.read(i, i).diagonal() for i in range(self.count)])

    def whole(self) -> Tensor:
        """Return the matrix, [K, K], zero where it has no tiles."""
        matrix = torch.zeros(self.width, self.width, dtype=self.dtype)
        for row, column in self.places():
            matrix[self.span(row), self.span(column)] = self.read(row, column)
        return matrix


def cut(matrix: Tensor, upper: bool, tile: int | None = None) -> Tiles:
    """Cut a matrix [K, K] into tiles in memory; one of a single tile is not copied."""
    tiles = Tiles(len(matrix), upper, tile=tile, dtype=matrix.dtype)
    for row, column in tiles.places():
        tiles.write(row, column, matrix[tiles.span(row), tiles.span(column)])
    return tiles


def factorise(symmetric: Tiles, shift: float, directory: Path | None) -> Tiles | None:
    """Return R, upper, with R R^T = H + shift; None if that is not positive. `symmetric`: the upper tiles of H.

    Column after column from the last one, a Cholesky factorisation from the lower right corner:
    R_kk R_kk^T = H_kk - sum_j R_kj R_kj^T and R_ik = (H_ik - sum_j R_ij R_kj^T) R_kk^-T, with j > k.
    """
    factor = Tiles(symmetric.width, True, directory, symmetric.tile)
    for k in reversed(range(factor.count)):
        corner = torch.empty(0)
        for i in reversed(range(k + 1)):
            rest = symmetric.read(i, k).clone()
            if i == k:
                rest.diagonal().add_(shift)
            for j in range(k + 1, factor.count):
                rest.addmm_(factor.read(i, j), factor.read(k, j).T, alpha=-1)
            if i == k:
                # With rows and columns reversed, L L^T = reverse(H) gives H = R R^T in one factorisation.
                lower, failed = torch.linalg.cholesky_ex(rest.flip(0, 1))
                if failed:
                    return None
                rest = corner = lower.flip(0, 1)
            else:
                rest = torch.linalg.solve_triangular(corner.T, rest, upper=False, left=False)
            factor.write(i, k, rest)
    return factor


def invert(factor: Tiles) -> None:
    """Put U = R^-1 in the place of R, upper.

    Column after column, each from the top: U_ij = -(sum_k U_ik R_kj) R_jj^-1 with i <= k < j.
    """
    for j in range(factor.count):
        corner = factor.read(j, j)
        for i in range(j):
            total = torch.zeros(factor.tile, corner.shape[1], dtype=torch.float64)
            for k in range(i, j):
                total.addmm_(factor.read(i, k), factor.read(k, j), alpha=-1)
            factor.write(i, j, torch.linalg.solve_triangular(corner, total, upper=True, left=False))
        eye = torch.eye(len(corner), dtype=torch.float64)
        factor.write(j, j, torch.linalg.solve_triangular(corner, eye, upper=True))


def times(rows: Tensor, matrix: Tiles) -> Tensor:
    """Return rows M, float64 [N, K], for float64 rows [N, K] and a matrix M that has all its tiles."""
    product = torch.empty_like(rows)
    for j in range(matrix.count):
        part = rows[:, matrix.span(0)] @ matrix.read(0, j)
        for i in range(1, matrix.count):
            part.addmm_(rows[:, matrix.span(i)], matrix.read(i, j))
        product[:, matrix.span(j)] = part
    return product


def times_squared_(rows: Tensor, factor: Tiles) -> Tensor:
    """Overwrite float64 rows [N, K] with rows U^T U, for an upper U."""
    for i in range(factor.count):
        part = rows[:, factor.span(i)] @ factor.read(i, i).T
        for j in range(i + 1, factor.count):
            part.addmm_(rows[:, factor.span(j)], factor.read(i, j).T)
        rows[:, factor.span(i)] = part
    for j in reversed(range(factor.count)):
        part = rows[:, factor.span(j)] @ factor.read(j, j)
        for i in range(j):
            part.addmm_(rows[:, factor.span(i)], factor.read(i, j))
        rows[:, factor.span(j)] = part
    return rows


def times_symmetric(rows: Tensor, symmetric: Tiles, column: int) -> Tensor:
    """Return rows G, but only a column of its tiles, for rows [N, K] and the upper tiles of a symmetric G."""
    product = torch.empty(0)
    for i in range(symmetric.count):
        tile = symmetric.read(i, column) if i <= column else symmetric.read(column, i).T
        part = rows[:, symmetric.span(i)]
        product = part @ tile if i == 0 else product.addmm_(part, tile)
    return product


def quadratic(rows: Tensor, symmetric: Tiles) -> Tensor:
    """Return d G d^T of every row d of [N, K], for the upper tiles of a symmetric G of that dtype: float64 [N]."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for j in range(symmetric.count):
        columns = rows[:, symmetric.span(j)]
        part = columns @ symmetric.read(j, j)
        for i in range(j):  # both triangles have it
            part.addmm_(rows[:, symmetric.span(i)], symmetric.read(i, j), alpha=2)
        total += part.mul_(columns).sum(1)
    return total
