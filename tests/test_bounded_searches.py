"""AWQ, sensitivity and experts with their statistics on disk: the same bytes as in memory, the planned memory."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kernels.packed import dequantize
from quant import awq, gptq, groupwise, tiles
from quant.clip_search import search_clip
from quant.cost import Windows
from quant.gptq import Gptq
from quant.groupwise import Grid, fake_quantize, minmax, pack_weight, round_to_nearest_, unpack_into
from quant.kept_weights import KeptWeights
from quant.layer import LayerInputs, inputs_of, linears
from quant.moments import Moments, mean_loss
from quant.preflight import Footprint
from quant.scale_groups import find_scale_groups
from quant.scale_search import search_scale
from quant.settings import AwqSettings, GptqSettings
from quant.tiles import cut
from tests.test_architectures import make_model
from tests.test_awq import SETTINGS, Layer, correlated_gram
from tests.test_bounded import spill_statistics
from tests.test_preflight import TWICE, llama_70b
from tests.test_walk import awq_flags, contents

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles a matrix of the tiny model's widest linear, some rows of its weights at a time."""
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr("quant.moments._GRAM_BLOCK", 24)
    monkeypatch.setattr(tiles, "PANEL_TILES", 2)
    monkeypatch.setattr(groupwise, "_CHUNK_WEIGHTS", 64 * 64)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        (awq, []),
        (awq, ["--asymmetric"]),
        (awq, ["--group-size", "row"]),
        (gptq, ["--set", "scale=true"]),
        (gptq, ["--tier", "fast", "--set", "scale=true"]),
        (gptq, ["--tier", "fast", "--target-bits", "6"]),
    ],
)
@pytest.mark.parametrize("parts", [True, False])
def test_statistics_on_disk_give_the_same_bytes_and_leave_nothing(
    method: Any, flags: list[str], parts: bool, tiny_model: Path, calibration_text: Path, tmp_path: Path, request: Any
) -> None:
    if parts:
        request.getfixturevalue("small_parts")
    results = []
    for spilled in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            spill_statistics(patch, spilled)
            output = tmp_path / str(spilled) / "out"
            assert method.main(awq_flags(tiny_model, calibration_text, output, *flags)) == 0
            results.append(contents(output))
    assert results[0] == results[1]


@pytest.mark.parametrize("flags", [[], ["--tier", "fast"], ["--tier", "fast", "--target-bits", "6"]])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "DeepseekV3"])
def test_experts_are_quantized_to_the_same_bytes(
    kind: str, flags: list[str], tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    model, method = make_model(kind, tiny_model, tmp_path / "model"), gptq if flags else awq
    results = []
    for spilled in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            spill_statistics(patch, spilled)
            output = tmp_path / str(spilled) / "out"
            assert method.main(awq_flags(model, calibration_text, output, *flags)) == 0
            results.append(contents(output))
    assert results[0] == results[1]


def test_matrices_of_many_experts_are_not_held_together() -> None:
    """128 experts as narrow as Qwen3-30B-A3B's: in memory the grams of all, with statistics on disk those of one."""
    expert = [(768, 2048), (768, 2048), (2048, 768)]
    for method in (Gptq(GptqSettings(sequential=False, propagation=0.0)), awq.Awq(AwqSettings())):
        few, many = (method.cost(expert * count, Grid(64, True), Windows(64, 512)) for count in (1, 128))
        assert few.on_disk is not None
        assert many.on_disk is not None
        assert many.memory_bytes > few.memory_bytes + 127 * 4 * 2048**2
        assert many.on_disk.observing_bytes == few.on_disk.observing_bytes
        assert many.on_disk.working_bytes == few.on_disk.working_bytes


@pytest.mark.usefixtures("small_parts")
def test_moments_made_of_a_recording_are_those_summed_up(tmp_path: Path) -> None:
    layer, inputs = Layer().requires_grad_(False), LayerInputs(torch.randn(6, 16, 64), {})
    held = Moments(layer, inputs, list(linears(layer)))
    made = Moments(layer, replace(inputs, statistics_to=tmp_path), list(linears(layer)))
    x_TK = torch.cat(list(inputs_of(layer, inputs, "mlp.down"))).double()
    assert upper_is(held.gram("mlp.down"), x_TK.T @ x_TK / len(x_TK))
    scale = torch.rand(96) + 0.5
    for damping in (0.0, 0.7):
        assert torch.equal(held.gram("mlp.down", damping).whole(), made.gram("mlp.down", damping).whole())
        for moments in (held, made):
            moments.divide(["mlp.down"], scale)
    assert torch.equal(held.magnitude("mlp.down"), made.magnitude("mlp.down"))
    torch.testing.assert_close(held.magnitude("mlp.down"), x_TK.abs().mean(0).float() / scale)
    gram = (x_TK / scale).T @ (x_TK / scale) / len(x_TK)
    assert upper_is(held.gram("mlp.down", 0.7), gram + 0.7 * gram.diagonal().mean() * torch.eye(96))
    assert not list(tmp_path.iterdir())


def upper_is(found: tiles.Tiles, expected: Tensor) -> bool:
    """Tell whether the upper tiles of a gram are those of a matrix in float64, nearly."""
    assert found.count == 3
    parts = [(found.read(i, j).double(), expected[found.span(i), found.span(j)]) for i, j in found.places()]
    return all(torch.allclose(tile, part, rtol=1e-4, atol=1e-5) for tile, part in parts)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "group_size"), [(160, 32), (192, 64), (160, None)])
def test_ranges_searched_by_tiles_are_those_of_the_whole_gram(
    width: int, group_size: int | None, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, (gram, _), grid = torch.randn(90, width), correlated_gram(width), Grid(group_size, symmetric)
    weight[::3, ::31] *= 6
    whole = search_clip(weight, cut(gram, upper=True), grid, SETTINGS)
    monkeypatch.setattr(groupwise, "_CHUNK_WEIGHTS", 64 * width)
    found = search_clip(weight, cut(gram, upper=True, tile=64), grid, SETTINGS)
    assert found.scale.shape == whole.scale.shape
    assert (found.scale == whole.scale).float().mean() > 0.97  # sums in another order decide between near equals
    losses = [mean_loss(fake_quantize(weight, each, grid) - weight, gram) for each in (found, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] < 0.95 * mean_loss(fake_quantize(weight, minmax(weight, grid), grid) - weight, gram)


def test_a_wide_linear_alone_gets_the_scale_that_its_gram_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = Layer().requires_grad_(False), LayerInputs(torch.randn(6, 16, 64), {})
    layer.mlp.up.weight[[5, 60]] *= 10
    layer.mlp.down.weight[:, [5, 60]] *= 0.3
    group = next(g for g in find_scale_groups(layer, inputs, 16) if g.linears == ("mlp.down",))
    found = []
    for tile in (2048, 32):
        monkeypatch.setattr(tiles, "TILE", tile)
        seen = Moments(layer, inputs, ["mlp.down"])
        found.append(search_scale(layer, group, inputs, seen, Grid(32, True), 20))
    assert found[0][1] == found[1][1] != "identity"
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("spilled", [True, False])
def test_kept_weights_are_read_in_rows_and_put_back(spilled: bool, tmp_path: Path) -> None:
    across = torch.nn.Parameter(torch.randn(40, 6).T, requires_grad=False)
    parameters = [
        torch.nn.Parameter(torch.randn(9, 5), requires_grad=False),
        across,
        torch.nn.Parameter(torch.randn(7)),
    ]
    before = [parameter.data.clone() for parameter in parameters]
    kept = KeptWeights(parameters, tmp_path if spilled else None)
    for parameter in parameters:
        parameter.data.zero_()
    assert torch.equal(kept.rows(0, slice(2, 5)), before[0][2:5])
    assert torch.equal(kept.rows(1, slice(4, 6)), before[1][4:6])
    kept.put_back()
    assert all(torch.equal(p.data, data) for p, data in zip(parameters, before, strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_rounded_and_packed_in_parts_are_those_of_the_whole(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, grid = torch.randn(150, 64), Grid(32, symmetric, bits=bits)
    whole = pack_weight(weight, minmax(weight, grid), grid)
    monkeypatch.setattr(groupwise, "_CHUNK_WEIGHTS", 64 * 64)
    parts, found = pack_weight(weight, minmax(weight, grid), grid), torch.empty(150, 64)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scale, whole.scale)
    assert (whole.zero is None) == symmetric
    assert whole.zero is None or (parts.zero is not None and torch.equal(parts.zero, whole.zero))
    unpack_into(found, parts)
    assert torch.equal(found, dequantize(whole))
    round_to_nearest_(weight, grid)
    assert torch.equal(weight, found)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        (awq, []),
        (gptq, ["--set", "scale=true"]),
        (gptq, ["--tier", "fast", "--pass-dtype", "float32", "--set", "scale=true", "--asymmetric"]),
        (awq, ["--target-bits", "5"]),
        (gptq, ["--target-bits", "5"]),
    ],
)
def test_70_billion_parameters_are_searched_in_one_layer_and_its_activations(
    method: Any, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """See the same for GPTQ in `tests/test_bounded.py`; what is recorded of a batch is copied twice beside it."""
    planned: list[Footprint] = []
    within = Footprint.within
    monkeypatch.setattr(Footprint, "within", lambda self, budget: planned.append(within(self, budget)) or planned[-1])
    monkeypatch.setattr("offload.source_weights._read", lambda *_: pytest.fail("weights were read"))
    arguments = ["--model", str(llama_70b(tmp_path)), "--output", str(tmp_path / "out"), "--plan", *flags]
    assert method.main([*arguments, "--cpu-memory", "6GiB"]) == 0
    layer_bytes = 4 * 855_654_400 + 855_638_016 // 2 + 855_638_016 // 128 * (2 + ("--asymmetric" in flags) // 2)
    recorded_bytes, zeros_bytes = 2 * 4 * 512 * 28672, 855_638_016 // 128
    needed = planned[0]
    assert needed.statistics_spilled
    at_work = needed.peak_bytes - needed.runtime_bytes - (48 << 20)
    assert at_work <= layer_bytes + needed.activation_bytes + recorded_bytes + zeros_bytes + (64 << 10)
    assert needed.activation_bytes < 1.1 * 2**30
    assert needed.sensitivity_on_disk_bytes < layer_bytes + needed.activation_bytes
    assert within(needed, None).sensitivity_bytes >= needed.sensitivity_on_disk_bytes
    assert "statistics of a layer take" in capsys.readouterr().out


ALONE = """
import sys
from pathlib import Path
import torch
from torch import nn
from offload.memory import give_memory_back_at_once, own_memory_bytes, peak_memory_bytes
from quant import groupwise, tiles
from quant.awq import Awq
from quant.settings import AwqSettings
from quant.cost import Windows
from quant.gptq import Gptq
from quant.settings import GptqSettings
from quant.groupwise import Grid
from quant.hidden_states import fill, new_states
from quant.layer import LayerInputs, linears
from tests.test_awq import Layer

kind, directory = sys.argv[1], Path(sys.argv[2])
torch.set_grad_enabled(False)
torch.set_num_threads(1)
give_memory_back_at_once()
searching, fast = Awq(AwqSettings(scale_points=4)), Gptq(GptqSettings(sequential=False, propagation=0.0))
method, grid = searching if kind == "gated" else fast, Grid(64, False)


class Experts(nn.ModuleList):
    def forward(self, x):
        return sum(linear(x.roll(shift, -1)) for shift, linear in enumerate(self))


def work(layer, width):
    global before, reached, shapes
    layer.requires_grad_(False)
    shapes = [tuple(linear.weight.shape) for linear in linears(layer).values()]
    states = fill(new_states(8, torch.empty(1, 128, width), directory), torch.randn(8, 128, width).split(1))
    before = own_memory_bytes()
    reached = peak_memory_bytes() - before
    grids = dict.fromkeys(linears(layer), grid)
    method.quantize_layer(layer, LayerInputs(states, {}, 1, statistics_to=directory), grids, 64)


tiles.TILE, groupwise._CHUNK_WEIGHTS = 512, 1 << 18
if kind == "gated":
    work(Layer(64, 640), 64)  # maps the code
    work(Layer(1152, 4096), 1152)
else:
    work(Experts(nn.Linear(512, 64) for _ in range(2)), 512)  # maps the code
    work(Experts(nn.Linear(512, 64) for _ in range(64)), 512)
cost = method.cost(shapes, grid, Windows(8, 128))
batch_bytes = 4 * 128 * sum(k + 2 * n for n, k in shapes)
said = max(batch_bytes + cost.on_disk.observing_bytes, cost.on_disk.working_bytes)
print(said, peak_memory_bytes() - before - reached, cost.memory_bytes)
"""


@pytest.mark.parametrize("kind", ["gated", "experts"])
def test_searches_with_all_on_disk_stay_within_the_plan(kind: str, tmp_path: Path) -> None:
    """A gated layer by AWQ, where weights of 36 MiB are tried in the place of others; 64 narrow experts by GPTQ's fast
    tier, with grams of 64 MiB. What a batch of one sample takes is added."""
    command = [sys.executable, "-c", ALONE, kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, taken, in_memory = map(int, done.stdout.split())
    assert 0.3 * said < taken <= said + (12 << 20)  # what a library maps late is not the plan's
    assert 2 * said < in_memory
    assert not list(tmp_path.iterdir())


def test_learned_rounding_says_that_it_takes_more_than_a_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Places, gradients and those before in float32, the first codes in bytes, of all weights of a layer at once; the
    largest linear three times over, and what a run keeps for its gradients."""
    arguments = ["--model", str(llama_70b(tmp_path)), "--output", str(tmp_path / "out"), "--plan", "--tier", "slow"]
    assert gptq.main([*arguments, "--cpu-memory", "12GiB"]) == 4
    error = capsys.readouterr().err
    found = re.search(
        r"at least (\d+) MiB .* (\S+) GiB for statistics and searches, or all places and gradients", error
    )
    assert found is not None, error
    held_bytes = (3 * 4 + 1) * 855_638_016 + 3 * 4 * 8192 * 28672
    run_bytes = 2 * 4 * 512 * (2 * (8192 + 8192) + 2 * (1024 + 8192) + 3 * (28672 + 8192))
    assert float(found[2]) == pytest.approx((held_bytes + run_bytes) / 2**30, abs=0.05)
    assert gptq.main([*arguments, "--cpu-memory", f"{int(found[1]) + 8}MiB"]) == 0
    assert "all places and gradients of learned rounding" in capsys.readouterr().out


def wide_model(directory: Path, tokenizer: Path) -> Path:
    """Save a layer with 60 MiB of weights in float32, whose widest linear's gram takes as much."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tokenizer / name).read_bytes())
    return directory


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        pytest.param("awq", [], marks=pytest.mark.slow),
        pytest.param("awq", ["--target-bits", "6"], marks=pytest.mark.slow),
        pytest.param("gptq", ["--tier", "fast", "--set", "scale=true"], marks=pytest.mark.slow),
        pytest.param("gptq", [], marks=pytest.mark.slow),
    ],
)
def test_a_process_with_matrices_wider_than_its_tiles_stays_within_the_plan(
    method: str, flags: list[str], tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """Everything as small beside the layer as it is in a large one: tiles, and the rows that are worked on."""
    parts = "from quant import groupwise, tiles\ntiles.TILE, groupwise._CHUNK_WEIGHTS = 512, 1 << 18\n"
    model = wide_model(tmp_path / "model", tiny_model)
    command = [sys.executable, "-c", parts + TWICE.format(method=method, room_mib=2)]
    command += awq_flags(model, calibration_text, tmp_path / "out", *flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result, budget_mib = done.stdout.splitlines()
    taken = json.loads(result)
    assert taken["peak_memory_bytes"] <= int(budget_mib) << 20
