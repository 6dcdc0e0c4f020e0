"""Algebra on tiles against torch on the whole matrix, at sizes that no tile divides; where they lie changes no bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.errors import ResourceError
from quant.nameless_file import NamelessFile
from quant.tiles import Tiles, cut, factorise, invert, quadratic, times, times_squared_

SIZES = [(1, 8), (8, 8), (23, 8), (65, 16), (100, 33), (96, 100)]


def positive(width: int) -> Tensor:
    """Return a symmetric float64 [K, K] whose least eigenvalue lies well above zero."""
    x_TK = torch.randn(3 * width, width, dtype=torch.float64) * torch.exp(torch.randn(width, dtype=torch.float64))
    return x_TK.T @ x_TK / len(x_TK)


def spilled(matrix: Tensor, upper: bool, directory: Path, tile: int) -> Tiles:
    tiles = Tiles(len(matrix), upper, directory, tile)
    for row, column in tiles.places():
        tiles.write(row, column, matrix[tiles.span(row), tiles.span(column)])
    return tiles


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-11 * expected.abs().max())


@pytest.mark.parametrize(("width", "tile"), SIZES)
@pytest.mark.parametrize("upper", [True, False])
def test_tiles_are_the_matrix(width: int, tile: int, upper: bool, tmp_path: Path) -> None:
    matrix = torch.randn(width, width, dtype=torch.float64)
    expected = matrix.clone()
    for row in range(width):
        if upper:
            expected[row, : row // tile * tile] = 0
    for tiles in (cut(matrix, upper, tile), spilled(matrix, upper, tmp_path, tile)):
        assert torch.equal(tiles.whole(), expected)
        assert torch.equal(tiles.diagonal(), matrix.diagonal())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("width", "tile"), SIZES)
def test_the_inverse_factor_is_that_of_torch(width: int, tile: int, tmp_path: Path) -> None:
    matrix, shift = positive(width), 0.3
    damped = matrix + shift * torch.eye(width, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    found = []
    for directory, tiles in ((None, cut(matrix, True, tile)), (tmp_path, spilled(matrix, True, tmp_path, tile))):
        factor = factorise(tiles, shift, directory)
        assert factor is not None
        upper = factor.whole()
        assert torch.equal(upper, upper.triu())
        assert close(upper @ upper.T, damped)
        invert(factor)
        found.append(factor.whole())
        assert close(found[-1], expected)
    assert torch.equal(*found)


@pytest.mark.parametrize("corner", [0, 30, 59])
def test_what_is_not_positive_is_not_factorised(corner: int) -> None:
    matrix = positive(60)
    matrix[corner, corner] = -1
    assert factorise(cut(matrix, True, 16), 0.0, None) is None


@pytest.mark.parametrize(("width", "tile"), SIZES)
@pytest.mark.parametrize("count", [1, 7])
def test_products_are_those_of_torch(width: int, tile: int, count: int, tmp_path: Path) -> None:
    matrix, rows = torch.randn(width, width, dtype=torch.float64), torch.randn(count, width, dtype=torch.float64)
    symmetric, upper = matrix + matrix.T, matrix.triu()
    expected = [rows @ matrix, rows @ upper.T @ upper, ((rows @ symmetric) * rows).sum(1)]
    results = []
    for make in (cut, lambda whole, half, size: spilled(whole, half, tmp_path, size)):
        results.append(
            [
                times(rows, make(matrix, False, tile)),
                times_squared_(rows.clone(), make(upper, True, tile)),
                quadratic(rows, make(symmetric, True, tile)),
            ]
        )
    for in_memory, on_disk, wanted in zip(*results, expected, strict=True):
        assert torch.equal(in_memory, on_disk)
        assert close(in_memory, wanted)


def test_a_file_grows_and_a_disk_without_room_is_named(tmp_path: Path) -> None:
    file = NamelessFile(tmp_path, "statistics")
    for start in (0, 12):
        file.grow(12)
        file.write(start, torch.arange(start, start + 3, dtype=torch.int32))
    found = torch.empty(6, dtype=torch.int32)
    file.read_into(0, found)
    assert found.tolist() == [0, 1, 2, 12, 13, 14]
    with pytest.raises(ResourceError, match=r"4096.0 TiB for statistics cannot be had on that disk \("):
        file.grow((1 << 52) - 24)
