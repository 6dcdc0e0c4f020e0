"""GPTQ against a float64 reference that goes column by column; never worse than rounding; singular inputs."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from offload.checkpoint import Checkpoint
from quant import gptq
from quant.clip_search import search_clip, search_clip_by_column
from quant.columns import propagate, round_columns, round_weight
from quant.gptq import Gptq
from quant.groupwise import Grid, Parameters, codes, fake_quantize, minmax, values
from quant.hessian import Hessian
from quant.layer import LayerInputs, inputs_of, linears
from quant.moments import Moments
from quant.scale_groups import sets_by_input
from quant.settings import AwqSettings, GptqSettings
from quant.statistics import Statistics, observe
from quant.tiles import cut
from tests.test_awq import Layer, explicit_loss
from tests.test_walk import awq_flags, contents, stop_before

SEARCH = AwqSettings(scale_points=4, clip_points=7, clip_floor=0.5, search_samples=8)


def correlated_inputs(width: int, tokens: int = 300) -> Tensor:
    """Return correlated inputs x [T, K] in float64, of which some channels are loud."""
    x_TK = torch.randn(tokens, width) @ (torch.eye(width) + 0.3 * torch.randn(width, width))
    return (x_TK * torch.exp(torch.randn(width))).double()


def gram_of(x_TK: Tensor) -> Tensor:
    return x_TK.T @ x_TK / len(x_TK)


def hessian_of(gram: Tensor, damping: float, cross: Tensor | None = None) -> Hessian:
    return Hessian.of(Statistics.of(gram, cross), damping)


def in_place_of(matrix: Tensor, order: Tensor) -> Tensor:
    """Return a matrix whose rows and columns are in `order` with them in their own places."""
    placed = torch.empty_like(matrix)
    placed[order[:, None], order] = matrix
    return placed


def reference_values(weight: Tensor, gram: Tensor, parameters: Parameters, group_size: int, damping: float) -> Tensor:
    """GPTQ as its equations 2 and 3 say it: one column at a time, the inverse Hessian cut down after each. Float64."""
    remaining = gram.diagonal().argsort(descending=True, stable=True).tolist()
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight, rounded = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    while remaining:
        column, inverse = remaining[0], torch.linalg.inv(hessian[remaining][:, remaining])
        scale = parameters.scale[:, column // group_size].double()
        zero = parameters.zero[:, column // group_size].double()
        code = (weight[:, column] / scale + zero).round().clamp(0, 15)
        rounded[:, column] = (code - zero) * scale
        error = (weight[:, column] - rounded[:, column]) / inverse[0, 0]
        weight[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    return rounded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "width", "group_size"), [(7, 96, 32), (1, 64, 64), (33, 192, 64), (5, 160, None)])
def test_rounding_equals_the_reference(rows: int, width: int, group_size: int | None, symmetric: bool) -> None:
    grid, weight, gram = Grid(group_size, symmetric), torch.randn(rows, width), gram_of(correlated_inputs(width))
    parameters = minmax(weight, grid)
    found = round_columns(weight, hessian_of(gram, 0.01), parameters, grid)
    expected = reference_values(weight, gram, parameters, grid.group(width), 0.01)
    assert torch.equal(found.double(), expected)
    assert not torch.equal(found, fake_quantize(weight, parameters, grid))


def test_a_column_costs_what_the_later_ones_cannot_make_up_for() -> None:
    """One error of 1 in a column, the later ones at their least-squares best: the quadratic form of what is left."""
    gram = gram_of(correlated_inputs(40))
    hessian = hessian_of(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected = torch.empty(40, dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    for position, column in enumerate(order):
        later = order[position + 1 :]
        difference = torch.zeros(40, dtype=torch.float64)
        difference[column] = 1
        difference[later] = -torch.linalg.solve(damped[later][:, later], damped[later, column])
        expected[column] = difference @ damped @ difference
    torch.testing.assert_close(hessian.importance(), expected)
    assert (hessian.importance() < 0.5 * damped.diagonal()).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_the_best_under_the_importance_of_columns(symmetric: bool) -> None:
    """Each group is searched as clipping alone would search it, if its inputs had the importance for a Gram matrix."""
    grid, weight, importance = Grid(32, symmetric), torch.randn(12, 96), torch.rand(96) ** 4
    found = search_clip_by_column(weight, importance, grid, SEARCH)
    expected = search_clip(weight, cut(torch.diag(importance), upper=True), grid, SEARCH)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)
    errors = [(fake_quantize(weight, p, grid) - weight).square() @ importance for p in (found, minmax(weight, grid))]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_to_nearest_recovers_the_codes(symmetric: bool) -> None:
    """The walk packs by rounding to nearest, and must find what was chosen here, in any order of columns."""
    grid, weight, gram = Grid(32, symmetric), torch.randn(24, 128), gram_of(correlated_inputs(128))
    parameters, rounded = round_weight(weight, hessian_of(gram, 0.01), grid, SEARCH)
    code = codes(rounded, parameters, grid)
    assert torch.equal(values(code, parameters), rounded)
    assert not torch.equal(code, codes(weight, parameters, grid))
    expected = reference_values(weight, gram, parameters, 32, 0.01)
    carried = (rounded.double() == expected).all(1)
    assert carried.float().mean() > 0.9
    assert torch.equal(rounded[~carried], fake_quantize(weight, parameters, grid)[~carried])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_no_row_is_worse_than_nearest_rounding(group_size: int | None, symmetric: bool) -> None:
    grid, weight, x_TK = Grid(group_size, symmetric), torch.randn(40, 128), correlated_inputs(128)
    gram = gram_of(x_TK)
    parameters, rounded = round_weight(weight, hessian_of(gram, 0.01), grid, SEARCH)
    clipped = search_clip_by_column(weight, hessian_of(gram, 0.01).importance().float(), grid, SEARCH)
    nearest = fake_quantize(weight, clipped, grid)
    assert torch.equal(parameters.scale, clipped.scale)
    for row in range(len(weight)):
        losses = [explicit_loss((w - weight)[row : row + 1], x_TK) for w in (rounded, nearest)]
        assert losses[0] <= losses[1] * (1 + 1e-9)
    assert explicit_loss(rounded - weight, x_TK) < 0.7 * explicit_loss(nearest - weight, x_TK)


def test_rows_that_carrying_makes_worse_are_rounded_to_nearest() -> None:
    grid, weight, gram = Grid(32, True), torch.randn(64, 64), gram_of(correlated_inputs(64))
    hessian = hessian_of(gram, 0.01)
    wrong = replace(hessian, factor=cut(hessian.factor.whole().abs(), upper=True))
    parameters, rounded = round_weight(weight, wrong, grid, SEARCH)
    nearest = fake_quantize(weight, parameters, grid)
    carried = round_columns(weight, wrong, parameters, grid)
    worse = hessian.loss(carried, weight) > hessian.loss(nearest, weight)
    assert worse.any()
    assert torch.equal(rounded[worse], nearest[worse])
    assert torch.equal(rounded[~worse], carried[~worse])


def test_dead_channels_are_rounded_to_nearest_and_move_nothing() -> None:
    grid, weight, x_TK = Grid(32, False), torch.randn(12, 96), correlated_inputs(96)
    dead = torch.zeros(96, dtype=torch.bool)
    dead[[0, 31, 40, 95]] = True
    x_TK[:, dead] = 0
    parameters = minmax(weight, grid)
    hessian = hessian_of(gram_of(x_TK), 0.01)
    rounded = round_columns(weight, hessian, parameters, grid)
    nearest = fake_quantize(weight, parameters, grid)
    assert torch.equal(rounded[:, dead], nearest[:, dead])
    other = weight.clone()
    other[:, dead] *= -0.5
    assert torch.equal(round_columns(other, hessian, parameters, grid)[:, ~dead], rounded[:, ~dead])
    silent = round_columns(weight, hessian_of(torch.zeros(96, 96).double(), 0.01), parameters, grid)
    assert torch.equal(silent, nearest)


def test_damping_is_raised_until_the_gram_can_be_factorised() -> None:
    x_TK = correlated_inputs(64, tokens=3)
    singular = gram_of(x_TK)
    found = hessian_of(singular, 0.0)
    assert 1e-6 < found.damping < 1e-3
    assert torch.isfinite(found.factor.whole()).all()
    indefinite = singular - 0.2 * singular.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    raised = hessian_of(indefinite, 0.01)
    assert raised.damping == pytest.approx(1.0)
    ordered = indefinite[raised.order][:, raised.order]
    damped = ordered + raised.damping * indefinite.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    factor = raised.factor.whole()
    product = factor.T @ factor @ damped
    torch.testing.assert_close(product, torch.eye(64).double(), rtol=0, atol=1e-9)


def test_propagation_is_the_regression_of_what_the_inputs_lost() -> None:
    """With the whole share and no damping, W* x' is the least-squares answer to W x."""
    x0_TK = correlated_inputs(24)
    x_TK = x0_TK + 0.3 * torch.randn(300, 24).double() @ torch.randn(24, 24).double()
    weight = torch.randn(9, 24)
    gram = gram_of(x_TK)
    hessian = hessian_of(gram, 1e-12, x0_TK.T @ x_TK / 300)
    found = propagate(weight, hessian, 1.0)
    expected = torch.linalg.lstsq(x_TK, x0_TK @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    half = propagate(weight, hessian, 0.5)
    torch.testing.assert_close(half, (found + weight) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(propagate(weight, hessian_of(gram, 1e-12, gram), 1.0), weight)


@pytest.fixture
def layer() -> Layer:
    return Layer().requires_grad_(False)


def layer_inputs(samples: int = 6) -> LayerInputs:
    hidden_STD = torch.randn(samples, 16, 64)
    return LayerInputs(hidden_STD, {}, original_STD=hidden_STD + 0.1 * torch.randn(samples, 16, 64))


def test_linears_come_in_sets_in_order_of_execution(layer: Layer) -> None:
    assert sets_by_input(layer, layer_inputs(), list(linears(layer))) == [("mlp.gate", "mlp.up"), ("mlp.down",)]
    assert sets_by_input(layer, layer_inputs(), ["mlp.down", "mlp.up"]) == [("mlp.up",), ("mlp.down",)]
    layer.mlp.spare = nn.Linear(64, 64)
    assert sets_by_input(layer, layer_inputs(), list(linears(layer)))[-1] == ("mlp.spare",)


def test_observed_moments_are_those_of_both_models(layer: Layer) -> None:
    inputs, original = layer_inputs(), copy.deepcopy(layer)
    layer.mlp.gate.weight.data *= 1.1
    seen = observe(layer, inputs_of(original, inputs.original(), "mlp.down"), inputs, "mlp.down")
    expected = Moments(layer, inputs, ["mlp.down"]).gram("mlp.down").whole()
    torch.testing.assert_close(in_place_of(seen.gram.whole(), seen.order).float(), expected)
    x_TK = torch.cat(list(inputs_of(layer, inputs, "mlp.down"))).double()
    x0_TK = torch.cat(list(inputs_of(original, inputs.original(), "mlp.down"))).double()
    assert seen.lost is not None
    lost = in_place_of(seen.lost.whole(), seen.order)
    torch.testing.assert_close(lost, (x0_TK - x_TK).T @ x_TK / len(x_TK), rtol=1e-4, atol=1e-5)
    assert observe(layer, None, inputs, "mlp.down").lost is None


@pytest.mark.parametrize("block", [7, 32, 96, 512])
def test_moments_are_whole_however_grams_are_cut(layer: Layer, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after each 7, say, of 64 and of 96 channels: neither is a multiple."""
    monkeypatch.setattr("quant.moments._GRAM_BLOCK", block)
    inputs = layer_inputs()
    seen = Moments(layer, inputs, list(linears(layer)))
    for name in linears(layer):
        gram = seen.gram(name).whole()
        x_TK = torch.cat(list(inputs_of(layer, inputs, name))).double()
        torch.testing.assert_close(gram.double(), x_TK.T @ x_TK / len(x_TK), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.magnitude(name).double(), x_TK.abs().mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gram, gram.T)


def test_moments_run_a_layer_no_further_than_the_last_linear(layer: Layer) -> None:
    layer.mlp.down.register_forward_hook(lambda *_: pytest.fail("ran on"))
    seen = Moments(layer, layer_inputs(), list(linears(layer)))
    assert [seen.gram(name).width for name in linears(layer)] == [64, 64, 96]


def test_inputs_of_run_no_further_than_the_linear(layer: Layer) -> None:
    layer.mlp.down.register_forward_pre_hook(lambda *_: pytest.fail("ran on"))
    assert sum(len(x_TK) for x_TK in inputs_of(layer, layer_inputs(), "mlp.gate")) == 6 * 16


def test_what_is_never_called_and_what_is_not_finite_are_errors(layer: Layer) -> None:
    layer.mlp.spare = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"mlp\.spare: not called by any calibration sample"):
        observe(layer, None, layer_inputs(), "mlp.spare")
    inputs = layer_inputs()
    inputs.hidden_STD[0, 0, 0] = float("inf")
    for sequential in (True, False):
        method = Gptq(GptqSettings(sequential=sequential, search=SEARCH))
        with pytest.raises(ArithmeticError, match=r"mlp\.gate: its inputs are not finite"):
            method.quantize_layer(layer, inputs, dict.fromkeys(["mlp.gate", "mlp.down"], Grid(32, True)), 16)


@pytest.mark.parametrize(
    "settings",
    [
        GptqSettings(scale=True, search=SEARCH),
        GptqSettings(search=SEARCH),
        GptqSettings(propagation=0, search=SEARCH),
        GptqSettings(sequential=False, propagation=0, search=SEARCH),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_set_is_rounded_on_what_the_earlier_sets_give_or_the_original(
    layer: Layer, settings: GptqSettings, symmetric: bool
) -> None:
    grid, inputs, names = Grid(32, symmetric), layer_inputs(), list(linears(layer))
    method, before = Gptq(settings), copy.deepcopy(layer)
    found, report = method.quantize_layer(layer, inputs, dict.fromkeys(names, grid), 16)
    assert list(found) == ["mlp.gate", "mlp.up", "mlp.down"]
    assert ("scales" in report) == settings.scale
    assert list(report["ranges"]) == names
    assert all(0.5 <= kept <= 1 for kept in report["ranges"].values())
    for name in names:
        weight = layer.get_parameter(f"{name}.weight").data
        assert torch.equal(fake_quantize(weight, found[name], grid), weight)
    if not settings.scale and not settings.propagation:
        seen = observe(layer if settings.sequential else before, None, inputs, "mlp.down")
        _, expected = round_weight(before.mlp.down.weight, Hessian.of(seen, settings.damping), grid, SEARCH)
        assert torch.equal(layer.mlp.down.weight, expected)
    reference = inputs.original().run(before)
    nearest = copy.deepcopy(before)
    for name in names:
        plain = nearest.get_parameter(f"{name}.weight")
        plain.data = fake_quantize(plain.data, minmax(plain.data, grid), grid)
    error, rtn_error = (float((inputs.run(other) - reference).square().sum()) for other in (layer, nearest))
    assert error < rtn_error


def gptq_run(model: Path, text: Path, output: Path, *more: str) -> int:
    return gptq.main(awq_flags(model, text, output, *more))


@pytest.mark.parametrize(
    "flags",
    [[], ["--tier", "fast", "--asymmetric"], ["--tier", "slow", "--set", "learn.steps=5", "--set", "scale=true"]],
)
def test_resumed_it_is_the_same(tiny_model: Path, calibration_text: Path, tmp_path: Path, flags: list[str]) -> None:
    whole, resumed = tmp_path / "whole" / "out", tmp_path / "resumed" / "out"
    assert gptq_run(tiny_model, calibration_text, whole, *flags) == 0
    for index in (1, 3, 4):
        with pytest.MonkeyPatch.context() as patch:
            stop_before(index, patch)
            assert gptq_run(tiny_model, calibration_text, resumed, *flags) == 1
    assert gptq_run(tiny_model, calibration_text, resumed, *flags) == 0
    assert contents(resumed) == contents(whole)


def test_the_command_beats_round_to_nearest_and_records_its_settings(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gptq_run(tiny_model, calibration_text, tmp_path / "out", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "gptq"
    assert result["error"] < result["rtn_error"]
    recipe = Checkpoint.open(tmp_path / "out").recipe
    assert recipe.settings == Gptq(GptqSettings()).settings_json()
    assert load_file(tmp_path / "out" / "model-00002-of-00005.safetensors")


ALONE = """
import sys
import torch
from torch import nn
from offload.memory import give_memory_back_at_once, own_memory_bytes, peak_memory_bytes
from quant.cost import Windows
from quant.gptq import Gptq
from quant.settings import GptqSettings
from quant.groupwise import Grid
from quant.layer import LayerInputs
from quant.settings import LearningSettings

rows, width, sequential = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] != "fast"
learn = LearningSettings(2 * (sys.argv[3] == "slow"))
torch.set_num_threads(1)
torch.set_grad_enabled(False)
give_memory_back_at_once()
method, grid = Gptq(GptqSettings(sequential=sequential, propagation=0.5 * sequential, learn=learn)), Grid(64, False)


def work(rows, width):
    layer = nn.Sequential(nn.Linear(width, rows))
    hidden_STD = torch.randn(2, 16, width)
    kept_bytes = 4 * rows * width * sequential  # the copy that is not rounded, counted with the layer
    before = own_memory_bytes() + kept_bytes
    reached = peak_memory_bytes() - own_memory_bytes()  # libraries' code
    inputs = LayerInputs(hidden_STD, {}, 1, hidden_STD.clone(), torch.randn(2, 16, rows))
    method.quantize_layer(layer, inputs, {"0": grid}, 64)
    return peak_memory_bytes() - reached - before


work(64, 192)  # maps the code: more of it where libraries were just installed than where they were long used
taken = work(rows, width)
print(method.cost([(rows, width)], grid, Windows(2, 16)).memory_bytes, taken)
"""


@pytest.mark.parametrize("tier", ["best", "fast", "slow"])
@pytest.mark.parametrize(("rows", "width"), [(64, 2560), (2560, 1024)])
def test_a_wide_linear_takes_no_more_memory_than_was_said(rows: int, width: int, tier: str) -> None:
    command = [sys.executable, "-c", ALONE, str(rows), str(width), tier]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, taken = map(int, done.stdout.split())
    assert 0.4 * said < taken <= said + (16 << 20)
