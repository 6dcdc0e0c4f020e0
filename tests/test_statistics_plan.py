"""What a plan counts of statistics is what the work has of them: tiles, readings of recorded inputs, files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import tiles
from quant.awq import Awq
from quant.awq_cost import SearchWork
from quant.cost import Windows
from quant.gptq import Gptq
from quant.gptq_cost import LinearWork
from quant.groupwise import Grid
from quant.layer import LayerInputs, linears
from quant.moments import Moments
from quant.nameless_file import NamelessFile
from quant.recording import Recording
from quant.settings import AwqSettings, GptqSettings
from quant.statistics import Statistics
from quant.tiles import Tiles, Tiling
from tests.test_awq import Layer

SAMPLES, TOKENS = 8, 32
WINDOWS = Windows(SAMPLES, TOKENS)
GRID = Grid(32, True)


@pytest.mark.parametrize(("width", "tile"), [(1, 8), (8, 8), (23, 8), (65, 16), (100, 33), (96, 100)])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiles_take_what_is_counted_of_them_without_them(
    width: int, tile: int, upper: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiling, matrix = Tiling(width, upper, tile, dtype), torch.randn(width, width, dtype=dtype)
    held, spilled = Tiles(width, upper, None, tile, dtype), Tiles(width, upper, tmp_path, tile, dtype)
    for each in (held, spilled):
        for row, column in each.places():
            each.write(row, column, matrix[each.span(row), each.span(column)].clone())
    found = [held.read(*place) for place in tiling.places()]
    assert sum(part.nbytes for part in found) == tiling.held_bytes
    assert (len(found), found[0].nbytes) == (tiling.tiles, tiling.tile_bytes)
    assert spilled._file is not None
    assert os.fstat(spilled._file.descriptor).st_size == tiling.file_bytes
    assert [place for panel in tiling.panels() for place in panel] == list(spilled.places())
    most = 8 if dtype == torch.float64 else 16
    assert [len(panel) for panel in tiling.panels()][:-1] == [most] * (len(tiling.panels()) - 1)
    assert 0 < len(tiling.panels()[-1]) <= most


def test_a_recording_is_read_as_often_as_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 16)
    layer, inputs = Layer(64, 96).requires_grad_(False), LayerInputs(torch.randn(SAMPLES, TOKENS, 64), {})
    readings: list[Recording] = []
    batches = Recording.__iter__

    def counting(self: Recording) -> Iterator[Tensor]:
        readings.append(self)
        return batches(self)

    monkeypatch.setattr(Recording, "__iter__", counting)
    inputs_on_disk = LayerInputs(inputs.hidden_STD, {}, 4, statistics_to=tmp_path)
    Moments(layer, inputs_on_disk, ["mlp.down"]).gram("mlp.down")
    assert len(readings) == len(SearchWork(64, 96, WINDOWS, 128, 128, GRID, AwqSettings()).gram.panels()) == 2
    readings.clear()
    x, x0 = (Recording.of(torch.randn(64, 96).split(32), 96, tmp_path) for _ in "ab")
    Statistics.of_recorded(x, x0, tmp_path)
    work = LinearWork(64, 96, WINDOWS, 128, GRID, AwqSettings(), sequential=True, paired=True)
    assert work.lost is not None
    assert len(readings) == len(work.gram.panels()) + 2 * len(work.lost.panels()) == 3 + 2 * 5


METHODS = {
    "awq": Awq(AwqSettings(scale_points=2)),
    "gptq": Gptq(GptqSettings()),
    "gptq alone": Gptq(GptqSettings(propagation=0.0)),
    "gptq scaled": Gptq(GptqSettings(scale=True)),
    "gptq at once": Gptq(GptqSettings(sequential=False, propagation=0.0)),
    "gptq at once, scaled": Gptq(GptqSettings(sequential=False, propagation=0.0, scale=True)),
}


@pytest.mark.parametrize(
    ("method", "tile", "least"),
    [
        ("awq", 2048, 0.7),
        ("awq", 32, 0.7),
        ("gptq", 2048, 0.6),
        ("gptq", 32, 0.8),
        ("gptq alone", 2048, 1.0),
        ("gptq alone", 32, 1.0),
        ("gptq scaled", 2048, 0.7),
        ("gptq scaled", 32, 0.8),
        ("gptq at once", 2048, 1.0),
        ("gptq at once", 32, 0.6),
        ("gptq at once, scaled", 2048, 0.9),
        ("gptq at once, scaled", 32, 0.6),
    ],
)
def test_files_take_no_more_than_was_said(
    method: str, tile: int, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of statistics, kept weights and inputs; of the last all that are recorded, which `preflight` adds."""
    monkeypatch.setattr(tiles, "TILE", tile)
    live: dict[int, int] = {}
    peak_bytes = 0
    grow, close = NamelessFile.grow, NamelessFile.__del__

    def growing(self: NamelessFile, nbytes: int) -> None:
        nonlocal peak_bytes
        grow(self, nbytes)
        live[id(self)] = os.fstat(self.descriptor).st_size
        peak_bytes = max(peak_bytes, sum(live.values()))

    def closing(self: NamelessFile) -> None:
        live.pop(id(self), None)
        close(self)

    monkeypatch.setattr(NamelessFile, "grow", growing)
    monkeypatch.setattr(NamelessFile, "__del__", closing)
    layer, hidden_STD = Layer(64, 96).requires_grad_(False), torch.randn(SAMPLES, TOKENS, 64)
    names = list(linears(layer))
    inputs = LayerInputs(hidden_STD, {}, 4, hidden_STD.clone(), statistics_to=tmp_path)
    METHODS[method].quantize_layer(layer, inputs, dict.fromkeys(names, GRID), 16)
    cost = METHODS[method].cost([(96, 64), (96, 64), (64, 96)], GRID, WINDOWS)
    assert cost.on_disk is not None
    recorded_bytes = 0 if method == "gptq alone" else 4 * SAMPLES * TOKENS * (64 + 96)
    said_bytes = recorded_bytes + cost.on_disk.disk_bytes
    assert least * said_bytes <= peak_bytes <= said_bytes
    assert not live
