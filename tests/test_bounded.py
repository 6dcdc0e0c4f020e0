"""GPTQ with its matrices in tiles and its statistics on disk: the same rounding, the same bytes, the planned memory."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.errors import ResourceError
from quant import gptq, groupwise, tiles
from quant.columns import propagate, round_columns, round_in_place, round_weight
from quant.cost import Windows
from quant.gptq import Gptq
from quant.groupwise import Grid, minmax
from quant.hessian import Hessian
from quant.layer import LayerInputs, inputs_of, linears
from quant.nameless_file import NamelessFile
from quant.preflight import Footprint
from quant.recording import Recording, record
from quant.settings import AwqSettings, GptqSettings
from quant.statistics import Statistics, observe
from tests.test_awq import Layer
from tests.test_gptq import correlated_inputs, gptq_run, gram_of, reference_values
from tests.test_preflight import FOOTPRINT, llama_70b
from tests.test_walk import contents, stop_before

ROOT = Path(__file__).parent.parent
SEARCH = AwqSettings(scale_points=4, clip_points=7, clip_floor=0.5, search_samples=8)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 40)


def recorded_statistics(x0_TK: Tensor, x_TK: Tensor, directory: Path | None) -> Statistics:
    x, x0 = (Recording.of(each.float().split(37), each.shape[1], directory) for each in (x_TK, x0_TK))
    return Statistics.of_recorded(x, x0, directory)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("rows", "width"), [(7, 96), (1, 128), (33, 192)])
def test_rounding_by_tiles_equals_the_reference(rows: int, width: int, tmp_path: Path) -> None:
    """Statistics of float32 products, so the reference is given those; the order is that of the energies."""
    x_TK, weight, grid = correlated_inputs(width).float().double(), torch.randn(rows, width), Grid(32, False)
    seen = recorded_statistics(x_TK, x_TK, tmp_path)
    upper = seen.gram.whole().triu()
    gram = torch.empty_like(upper)
    gram[seen.order[:, None], seen.order] = upper + upper.triu(1).T
    torch.testing.assert_close(gram, gram_of(x_TK), rtol=1e-5, atol=1e-5 * float(gram.abs().max()))
    parameters = minmax(weight, grid)
    found = round_columns(weight, Hessian.of(seen, 0.1, tmp_path), parameters, grid)
    assert torch.equal(found.double(), reference_values(weight, gram, parameters, 32, 0.1))


@pytest.mark.usefixtures("small_tiles")
def test_propagation_by_tiles_is_that_of_whole_matrices(tmp_path: Path) -> None:
    x_TK, weight = correlated_inputs(100), torch.randn(9, 100)
    x0_TK = x_TK + 0.3 * torch.randn(300, 100)
    hessian = Hessian.of(recorded_statistics(x0_TK, x_TK, tmp_path), 0.1, tmp_path)
    gram = gram_of(x_TK)
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(100)
    pull = weight.double() @ (x0_TK.T @ x_TK / 300 - gram)
    expected = weight + 0.5 * torch.linalg.solve(damped, pull.T).T
    torch.testing.assert_close(propagate(weight, hessian, 0.5).double(), expected, rtol=1e-4, atol=1e-5)


def test_chunks_of_rows_are_rounded_as_each_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = torch.randn(150, 64), Grid(32, True)
    x_TK = correlated_inputs(64)
    gram = gram_of(x_TK)
    hessian = Hessian.of(Statistics.of(gram, gram * 1.01), 0.1)
    monkeypatch.setattr(groupwise, "_CHUNK_WEIGHTS", 64 * 64)
    found = weight.clone()
    parameters, kept = round_in_place(found, hessian, grid, SEARCH, 0.5)
    assert 0.5 <= kept <= 1
    for start in range(0, 150, 64):
        rows = slice(start, start + 64)
        expected = round_weight(propagate(weight[rows], hessian, 0.5), hessian, grid, SEARCH)
        assert torch.equal(parameters.scale[rows], expected[0].scale)
        assert torch.equal(parameters.zero[rows], expected[0].zero)
        assert torch.equal(found[rows], expected[1])


def test_recorded_inputs_are_those_that_the_linears_are_called_with(tmp_path: Path) -> None:
    layer, inputs = Layer().requires_grad_(False), LayerInputs(torch.randn(6, 16, 64), {})
    layer.mlp.spare = torch.nn.Linear(64, 64)
    for directory in (None, tmp_path):
        recorded = record(layer, inputs, list(linears(layer)), directory)
        for name in ("mlp.gate", "mlp.down"):
            for found, expected in zip(recorded[name], inputs_of(layer, inputs, name), strict=True):
                assert torch.equal(found, expected)
        assert recorded["mlp.spare"].tokens == [0, 0]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_tiles")
def test_of_what_sees_other_tokens_nothing_is_compared() -> None:
    layer, inputs = Layer().requires_grad_(False), LayerInputs(torch.randn(6, 16, 64), {})
    others = list(inputs_of(layer, inputs, "mlp.down"))
    assert observe(layer, iter(others), inputs, "mlp.down").lost is not None
    others[1] = others[1][:-1]
    assert observe(layer, iter(others), inputs, "mlp.down").lost is None


def spill_statistics(patch: pytest.MonkeyPatch, spilled: bool) -> None:
    within = Footprint.within

    def forced(self: Footprint, budget_bytes: int | None) -> Footprint:
        chosen = within(self, budget_bytes)
        return chosen.smallest() if spilled else chosen

    patch.setattr(Footprint, "within", forced)


@pytest.mark.parametrize("tile", [40, 2048])
@pytest.mark.parametrize("flags", [[], ["--tier", "fast", "--asymmetric"]])
def test_statistics_on_disk_give_the_same_bytes_and_leave_nothing(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, flags: list[str], tile: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    results = []
    for spilled in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            spill_statistics(patch, spilled)
            output = tmp_path / str(spilled) / "out"
            assert gptq_run(tiny_model, calibration_text, output, *flags) == 0
            results.append(contents(output))
    assert results[0] == results[1]


@pytest.mark.usefixtures("small_tiles")
def test_resumed_with_statistics_on_disk_it_is_the_same(
    tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole" / "out", tmp_path / "resumed" / "out"
    assert gptq_run(tiny_model, calibration_text, whole) == 0
    for index in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            spill_statistics(patch, index == 2)
            stop_before(index, patch)
            assert gptq_run(tiny_model, calibration_text, resumed) == 1
    with pytest.MonkeyPatch.context() as patch:
        spill_statistics(patch, True)
        assert gptq_run(tiny_model, calibration_text, resumed) == 0
    assert contents(resumed) == contents(whole)


def test_a_disk_that_fills_up_ends_the_run_with_its_name(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    grow = NamelessFile.grow

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    def without_room(self: NamelessFile, nbytes: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self.purpose != "hidden states":
                patch.setattr("os.posix_fallocate", full)
            grow(self, nbytes)

    spill_statistics(monkeypatch, True)
    monkeypatch.setattr(NamelessFile, "grow", without_room)
    assert gptq_run(tiny_model, calibration_text, tmp_path / "out") == 4
    assert "for inputs of a layer cannot be had on that disk (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize(("tier", "dtype"), [("best", "float32"), ("fast", "float32"), ("fast", "bfloat16")])
def test_70_billion_parameters_need_one_layer_and_its_activations(
    tier: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of 855,654,400 weights in float32 and packed in 4 bits with 16-bit scales; no byte for statistics.

    In bfloat16 its largest weight is there a second time.
    """
    planned: list[Footprint] = []
    within = Footprint.within

    def kept(self: Footprint, budget_bytes: int | None) -> Footprint:
        planned.append(within(self, budget_bytes))
        return planned[-1]

    monkeypatch.setattr(Footprint, "within", kept)
    monkeypatch.setattr("offload.source_weights._read", lambda *_: pytest.fail("weights were read"))
    arguments = ["--model", str(llama_70b(tmp_path)), "--output", str(tmp_path / "out"), "--plan"]
    arguments += ["--tier", tier, "--pass-dtype", dtype]
    assert gptq.main([*arguments, "--cpu-memory", "6GiB"]) == 0
    said = capsys.readouterr().out
    linear_weights = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    layer_bytes = 4 * (linear_weights + 2 * 8192) + linear_weights // 2 + linear_weights // 128 * 2
    batch_values = 4 * 8192 + sum(k + 2 * n for n, k in [(8192, 8192)] * 2 + [(1024, 8192)] * 2)
    batch_values += 2 * (8192 + 2 * 28672) + 28672 + 2 * 8192
    activation_bytes = 4 * 512 * (batch_values + (8 + 24) * 8192)
    needed = planned[0]
    runtime_bytes = needed.runtime_bytes + (48 << 20)
    norms_and_shapes_bytes = 64 << 10
    narrow_bytes = 2 * 28672 * 8192 if dtype == "bfloat16" else 0
    spare_bytes = layer_bytes + narrow_bytes + activation_bytes + norms_and_shapes_bytes
    spare_bytes -= needed.peak_bytes - runtime_bytes
    assert 0 <= spare_bytes < 1 << 20
    assert "statistics and searches" not in said
    assert re.search(r"their hidden states take [13]\.0 GiB, on the disk of \S+\n +statistics of a layer take", said)
    assert needed.disk_bytes > needed.output_bytes + needed.states_bytes + 4 * 28672**2 * 2
    assert needed.seconds > within(needed, None).seconds - 1
    assert gptq.main(arguments) == 0
    smallest = re.search(r"(\d+) MiB would do, with --cpu-memory: the rest goes to disk", capsys.readouterr().out)
    assert smallest is not None
    assert abs(int(smallest[1]) - (needed.peak_bytes >> 20)) < 64


def test_states_go_to_disk_first_and_statistics_when_that_is_not_enough() -> None:
    on_disk = gptq_cost_on_disk(observing_mib=3, working_mib=35)
    both = replace(FOOTPRINT, original_bytes=40 << 20, kept_bytes=5 << 20, on_disk=on_disk)
    in_memory = (300 + 48 + 50 + 40 + 20 + 30 + 500) << 20
    assert both.within(in_memory) == both
    assert both.within(in_memory - 1) == replace(both, spilled=True)
    smallest = both.within(in_memory - (500 << 20) - 1)
    assert (smallest.spilled, smallest.statistics_spilled) == (True, True)
    assert smallest.peak_bytes == (300 + 48 + 50 + 30 + 10) << 20  # 35 at work and 5 kept are 10 more than a batch
    assert smallest.disk_bytes == FOOTPRINT.disk_bytes + (500 << 20) + (900 << 20)
    observing = replace(both, on_disk=gptq_cost_on_disk(observing_mib=12, working_mib=2)).smallest()
    assert observing.peak_bytes == (300 + 48 + 50 + 30 + 12) << 20
    with pytest.raises(ResourceError, match="at least 438 MiB is needed"):
        both.within((438 << 20) - 1)


def gptq_cost_on_disk(observing_mib: int, working_mib: int) -> Any:
    cost = Gptq(GptqSettings()).cost([(64, 64)], Grid(32, True), Windows(1, 8))
    assert cost.on_disk is not None
    sizes = {"observing_bytes": observing_mib << 20, "working_bytes": working_mib << 20, "disk_bytes": 900 << 20}
    return replace(cost.on_disk, **sizes)


ALONE = """
import sys
from pathlib import Path
import torch
from torch import nn
from quant import tiles
from offload.memory import give_memory_back_at_once, own_memory_bytes, peak_memory_bytes
from quant.cost import Windows
from quant.gptq import Gptq
from quant.settings import GptqSettings
from quant.groupwise import Grid
from quant.hidden_states import fill, new_states
from quant.layer import LayerInputs

rows, width, tile, directory = *map(int, sys.argv[1:4]), Path(sys.argv[4])
torch.set_grad_enabled(False)
give_memory_back_at_once()
method, grid = Gptq(GptqSettings()), Grid(64, False)


def work(rows, width, tile):
    global before, reached
    tiles.TILE, layer = tile, nn.Sequential(nn.Linear(width, rows))
    noise, like = torch.randn(8, 64, width), torch.empty(1, 64, width)
    states = [fill(new_states(8, like, directory), noise.split(1)) for _ in "ab"]
    del noise
    before = own_memory_bytes()
    reached = peak_memory_bytes() - before  # libraries' code, mapped from files
    inputs = LayerInputs(states[0], {}, 4, states[1], statistics_to=directory)
    method.quantize_layer(layer, inputs, {"0": grid}, 64)


work(64, 320, 128)  # maps the code: more of it where libraries were just installed than where they were long used
work(rows, width, tile)
cost = method.cost([(rows, width)], grid, Windows(8, 64))
print(cost.on_disk.working_bytes, peak_memory_bytes() - before - reached, cost.memory_bytes)
"""


@pytest.mark.parametrize(
    ("rows", "width", "tile"),
    [
        (64, 1600, 512),
        pytest.param(64, 4160, 2048, marks=pytest.mark.slow),
        pytest.param(4160, 4160, 1024, marks=pytest.mark.slow),  # rows in two chunks, 25 tiles, the last ones small
    ],
)
def test_a_process_with_statistics_on_disk_stays_within_the_plan(
    rows: int, width: int, tile: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", ALONE, str(rows), str(width), str(tile), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, taken, in_memory = map(int, done.stdout.split())
    assert 0.4 * said < taken <= said + (16 << 20)
    assert said < in_memory
    assert not list(tmp_path.iterdir())
