"""AWQ against float64 references that enumerate every candidate; what it searches is never worse than rounding."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.packed import BITS
from quant.awq import Awq
from quant.clip_search import search_clip
from quant.groupwise import Grid, Parameters, fake_quantize, minmax
from quant.layer import LayerInputs, linears
from quant.moments import Moments, mean_loss
from quant.rtn import Rtn
from quant.scale_groups import ScaleGroup, find_scale_groups
from quant.scale_search import search_scale
from quant.settings import AwqSettings
from quant.tiles import cut

SETTINGS = AwqSettings(scale_points=8, clip_points=7, clip_floor=0.5, search_samples=8)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(width) + 0.5).bfloat16().float())

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight)


class GatedMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """A decoder layer without attention: a norm, a gated MLP, a residual."""

    def __init__(self, width: int = 64, inner: int = 96) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(width), GatedMlp(width, inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


LOUD, LOUD_INSIDE = [3, 17, 40], [5, 60]


@pytest.fixture
def layer() -> Layer:
    """A layer of which, as in language models, a few input channels are loud and their weights small."""
    layer = Layer().requires_grad_(False)
    layer.mlp.gate.weight[:, LOUD] *= 0.3
    layer.mlp.up.weight[:, LOUD] *= 0.3
    layer.mlp.up.weight[LOUD_INSIDE] *= 10
    layer.mlp.down.weight[:, LOUD_INSIDE] *= 0.3
    return layer


@pytest.fixture
def inputs() -> LayerInputs:
    hidden_STD = torch.randn(6, 16, 64)
    hidden_STD[..., LOUD] *= 20
    return LayerInputs(hidden_STD, {})


def correlated_gram(width: int) -> tuple[Tensor, Tensor]:
    """Return the gram of inputs x [T, K] that have loud channels and are correlated, and x in float64."""
    x_TK = torch.randn(200, width) @ (torch.eye(width) + 0.3 * torch.randn(width, width))
    x_TK *= torch.exp(torch.randn(width))
    return x_TK.T @ x_TK / len(x_TK), x_TK.double()


def explicit_loss(difference: Tensor, x_TK: Tensor) -> float:
    """Return |x (W' - W)^T|^2 / T in float64, without a Gram matrix."""
    return float((x_TK @ difference.double().T).square().sum() / len(x_TK))


def test_the_loss_of_moments_is_the_error_of_the_output() -> None:
    gram, x_TK = correlated_gram(48)
    difference = torch.randn(10, 48)
    assert mean_loss(difference, gram) == pytest.approx(explicit_loss(difference, x_TK), rel=1e-4)
    assert mean_loss(torch.zeros(10, 48), gram) == 0


def test_moments_are_those_of_the_inputs(layer: Layer, inputs: LayerInputs) -> None:
    found = Moments(layer, inputs, linears(layer))
    reference = copy.deepcopy(layer).double()
    x_TD = reference.norm(inputs.hidden_STD.double()).flatten(0, 1)
    middle_TK = F.silu(reference.mlp.gate(x_TD)) * reference.mlp.up(x_TD)
    for name, x_TK in {"mlp.gate": x_TD, "mlp.up": x_TD, "mlp.down": middle_TK}.items():
        torch.testing.assert_close(found.gram(name).whole().double(), x_TK.T @ x_TK / len(x_TK), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.magnitude(name).double(), x_TK.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_a_linear_that_is_never_called_is_named(inputs: LayerInputs) -> None:
    layer = Layer().requires_grad_(False)
    layer.mlp.spare = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"mlp\.spare: not called by any calibration sample"):
        Moments(layer, inputs, linears(layer))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, None])
def test_clipping_is_never_worse_than_the_full_range(group_size: int | None, symmetric: bool, bits: int) -> None:
    grid = Grid(group_size, symmetric, bits=bits)
    weight, (gram, x_TK) = torch.randn(24, 128), correlated_gram(128)
    weight[::3, ::31] *= 6
    clipped, full = search_clip(weight, cut(gram, upper=True), grid, SETTINGS), minmax(weight, grid)
    for row in range(len(weight)):
        losses = [
            explicit_loss((fake_quantize(weight, found, grid) - weight)[row : row + 1], x_TK)
            for found in (clipped, full)
        ]
        assert losses[0] <= losses[1] * (1 + 1e-4)
    total = [explicit_loss(fake_quantize(weight, found, grid) - weight, x_TK) for found in (clipped, full)]
    assert total[0] < 0.9 * total[1]
    assert torch.equal(clipped.scale, clipped.scale.to(grid.scale_dtype).float())
    assert torch.equal(clipped.zero, clipped.zero.round().clamp(0, grid.code_max))


def nearest_levels(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the nearest of 16 levels, all float64; weight [N, G], scale and zero [N]."""
    levels = (torch.arange(16, dtype=torch.float64) - zero[:, None]) * scale[:, None]
    choice = (weight[..., None] - levels[:, None, :]).abs().argmin(-1)
    return levels.gather(1, choice)


def to_stored(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).double()


def loss_by_row(weight: Tensor, scale: Tensor, zero: Tensor, x_TK: Tensor) -> Tensor:
    return ((nearest_levels(weight, scale, zero) - weight) @ x_TK.T).square().sum(1) / len(x_TK)


def all_losses(weight: Tensor, x_TK: Tensor, symmetric: bool, settings: AwqSettings) -> tuple[Tensor, Tensor]:
    """Return the losses [candidates, N] of one group of every pair of shrunk ends, and of equally shrunk ends alone."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    factors = torch.linspace(1, settings.clip_floor, settings.clip_points, dtype=torch.float64).tolist()
    eight = torch.full_like(low, 8)
    if symmetric:
        scales = [to_stored(torch.maximum(-low, high) * factor / 7.5) for factor in factors]
        losses = torch.stack([loss_by_row(weight, s * sign, eight, x_TK) for s in scales for sign in (1, -1)])
        return losses, losses
    pairs, shared = [], []
    for low_factor in factors:
        for high_factor in factors:
            scale = to_stored((high * high_factor - low * low_factor) / 15)
            zero = (-low * low_factor / scale).round().clamp(0, 15)
            pairs.append(loss_by_row(weight, scale, zero, x_TK))
            if low_factor == high_factor:
                shared.append(pairs[-1])
    return torch.stack(pairs), torch.stack(shared)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_of_one_group_finds_the_best_candidate(symmetric: bool) -> None:
    weight, (gram, x_TK) = torch.randn(40, 32), correlated_gram(32)
    weight[::2, 5] *= 4
    found = search_clip(weight, cut(gram, upper=True), Grid(32, symmetric), SETTINGS)
    loss = loss_by_row(weight.double(), found.scale[:, 0].double(), found.zero[:, 0].double(), x_TK)
    pairs, shared = all_losses(weight.double(), x_TK, symmetric, SETTINGS)
    best = pairs.amin(0)
    assert (shared.amin(0) < 0.8 * shared[0]).any()
    if symmetric:
        torch.testing.assert_close(loss, best, rtol=1e-4, atol=0)
    else:  # the ends are searched in turn, so the best pair may be missed, an equally shrunk one may not
        assert (loss <= shared.amin(0) * (1 + 1e-4)).all()
        assert (loss >= best * (1 - 1e-4)).all()
        assert (loss <= best * (1 + 1e-4)).float().mean() > 0.7
        assert loss.sum() < 0.95 * shared.amin(0).sum()


def candidate_scales(weights: list[Tensor], magnitude: Tensor, points: int, group_size: int) -> dict[str, Tensor]:
    """Return the scales of equation 5 of the paper and its variant with weights, in float64, by name."""
    rows = torch.cat(weights).double().abs()
    cut = rows.view(len(rows), -1, group_size)
    filled = (cut / cut.amax(-1, keepdim=True)).view(len(rows), -1).mean(0)
    x = magnitude.double().clamp(min=1e-4)
    scales = {"identity": torch.ones_like(x)}
    for point in range(1, points + 1):
        r = point / points
        scales[f"x^{r:g}"] = x**r
        if point < points:
            scales[f"x^{r:g}/w^{1 - r:g}"] = x**r / (filled ** (1 - r) + 1e-4)
    return {name: scale / (scale.max() * scale.min()).sqrt() for name, scale in scales.items()}


def rounded_under(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Scale the columns, round to the nearest of a symmetric grid, scale back; float64."""
    cut = (weight.double() * scale).view(-1, group_size)
    step = to_stored(cut.abs().amax(1) / 7.5)
    return nearest_levels(cut, step, torch.full_like(step, 8)).view_as(weight) / scale


@pytest.mark.parametrize("names", [("mlp.gate", "mlp.up"), ("mlp.down",)])
def test_the_best_scale_is_the_best_of_all(layer: Layer, inputs: LayerInputs, names: tuple[str, ...]) -> None:
    group = next(group for group in find_scale_groups(layer, inputs, 16) if group.linears == names)
    seen = Moments(layer, inputs, linears(layer))
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    found, label = search_scale(layer, group, inputs, seen, Grid(32, True), SETTINGS.scale_points)
    after = layer.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

    reference = copy.deepcopy(layer).double()
    hidden = inputs.hidden_STD.double()
    weights = {name: reference.get_parameter(f"{name}.weight").data for name in names}
    expected = reference(hidden)

    def loss(scale: Tensor) -> float:
        for name, weight in weights.items():
            reference.get_parameter(f"{name}.weight").data = rounded_under(weight, scale, 32)
        return float((reference(hidden) - expected).square().sum())

    scales = candidate_scales(list(weights.values()), seen.magnitude(names[0]), SETTINGS.scale_points, 32)
    losses = {name: loss(scale) for name, scale in scales.items()}
    assert loss(found.double()) <= min(losses.values()) * (1 + 1e-3)
    assert losses[label] <= min(losses.values()) * (1 + 1e-3)
    torch.testing.assert_close(found.double(), scales[label], rtol=1e-4, atol=0)
    assert min(losses.values()) < 0.8 * losses["identity"]


def test_identity_is_among_the_candidates(layer: Layer, inputs: LayerInputs) -> None:
    """Weights that lie on their grid already lose by any other scale."""
    grid = Grid(32, False)
    for name in ("mlp.gate", "mlp.up"):
        code = torch.randint(0, 16, (96, 2, 32))
        code[..., 0], code[..., 1] = 0, 15
        layer.get_parameter(f"{name}.weight").data = (code - 7).flatten(1) / 64
    group = find_scale_groups(layer, inputs, 16)[0]
    seen = Moments(layer, inputs, linears(layer))
    scale, label = search_scale(layer, group, inputs, seen, grid, SETTINGS.scale_points)
    assert group.linears == ("mlp.gate", "mlp.up")
    assert label == "identity"
    assert torch.equal(scale, torch.ones(64))


def test_an_output_that_is_never_finite_is_an_error(layer: Layer, inputs: LayerInputs) -> None:
    group = ScaleGroup(("mlp.down",), "mlp.up", 0, torch.arange(96), "mlp.down")
    seen = Moments(layer, inputs, ["mlp.down"])
    seen.gram("mlp.down").read(0, 0).mul_(float("nan"))
    with pytest.raises(ArithmeticError, match=r"mlp\.down: the output is not finite under any scale"):
        search_scale(layer, group, inputs, seen, Grid(32, True), SETTINGS.scale_points)


def quantize(
    layer: Layer, inputs: LayerInputs, grid: Grid, settings: AwqSettings
) -> tuple[Layer, dict[str, Parameters]]:
    scaled = copy.deepcopy(layer)
    found, _ = Awq(settings).quantize_layer(scaled, inputs, dict.fromkeys(linears(scaled), grid), 16)
    return scaled, found


def test_without_scales_and_clipping_it_is_round_to_nearest(layer: Layer, inputs: LayerInputs) -> None:
    grid = Grid(32, False)
    nothing = AwqSettings(scale_points=0, clip_points=1, clip_floor=1, search_samples=8)
    unscaled, found = quantize(layer, inputs, grid, nothing)
    nearest, _ = Rtn().quantize_layer(layer, None, dict.fromkeys(linears(layer), grid), 16)
    assert all(torch.equal(layer.state_dict()[key], tensor) for key, tensor in unscaled.state_dict().items())
    assert found.keys() == nearest.keys()
    for name, parameters in found.items():
        assert torch.equal(parameters.scale, nearest[name].scale), name
        assert torch.equal(parameters.zero, nearest[name].zero), name


def test_ranges_are_searched_under_the_damped_gram(layer: Layer, inputs: LayerInputs) -> None:
    grid = Grid(32, True)
    scaled, found = quantize(layer, inputs, grid, replace(SETTINGS, clip_damping=0.7))
    seen = Moments(scaled, inputs, linears(scaled))
    for name, parameters in found.items():
        gram = seen.gram(name).whole()
        damped = cut(gram + 0.7 * gram.diagonal().mean() * torch.eye(len(gram)), upper=True)
        expected = search_clip(scaled.get_parameter(f"{name}.weight").data, damped, grid, SETTINGS)
        same = (parameters.scale == expected.scale).float().mean()
        assert same > 0.99, name  # the moments were scaled there, and are observed anew here
    _, plain = quantize(layer, inputs, grid, replace(SETTINGS, clip_damping=0.0))
    assert any(not torch.equal(plain[name].scale, found[name].scale) for name in found)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_layer_is_better_than_round_to_nearest(layer: Layer, inputs: LayerInputs, symmetric: bool) -> None:
    grid = Grid(32, symmetric)
    scaled, found = quantize(layer, inputs, grid, SETTINGS)
    assert not torch.equal(scaled.norm.weight, layer.norm.weight)
    assert torch.equal(scaled.norm.weight, scaled.norm.weight.bfloat16().float())
    reference = inputs.run(layer)
    torch.testing.assert_close(inputs.run(scaled), reference, rtol=1e-3, atol=1e-4)

    seen = Moments(scaled, inputs, linears(scaled))
    rounded, nearest = copy.deepcopy(scaled), copy.deepcopy(layer)
    for name, parameters in found.items():
        weight = scaled.get_parameter(f"{name}.weight").data
        clipped, full = (fake_quantize(weight, p, grid) for p in (parameters, minmax(weight, grid)))
        gram = seen.gram(name).read(0, 0)
        assert mean_loss(clipped - weight, gram) <= mean_loss(full - weight, gram) * (1 + 1e-3), name
        rounded.get_parameter(f"{name}.weight").data = clipped
        plain = layer.get_parameter(f"{name}.weight").data
        nearest.get_parameter(f"{name}.weight").data = fake_quantize(plain, minmax(plain, grid), grid)
    error, rtn_error = (float((inputs.run(other) - reference).square().sum()) for other in (rounded, nearest))
    assert error < 0.7 * rtn_error
