"""Learned rounding against steps in float64; what it does not improve is kept; it begins where carrying stood."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quant.columns import round_columns, round_weight
from quant.gptq import Gptq
from quant.groupwise import Grid, Parameters, codes, fake_quantize, minmax, values
from quant.layer import LayerInputs, linears
from quant.rounding import Places, learn_rounding
from quant.settings import AwqSettings, GptqSettings, LearningSettings
from quant.tiles import cut
from tests.test_awq import Layer
from tests.test_gptq import correlated_inputs, gram_of, hessian_of

SEARCH = AwqSettings(scale_points=4, clip_points=7, clip_floor=0.5, search_samples=8)


def nearest_places(weight: Tensor, grid: Grid) -> Places:
    """Return where the weights stand under the round-to-nearest parameters."""
    parameters = minmax(weight, grid)
    rounded = fake_quantize(weight, parameters, grid)
    return Places.of(rounded, weight - rounded, parameters, grid)


def carried_by_definition(weight: Tensor, gram: Tensor, parameters: Parameters, group_size: int) -> Tensor:
    """Return what each column has become when it is rounded: float64, one column at a time, G cut down after each."""
    remaining = gram.diagonal().argsort(descending=True, stable=True).tolist()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight, carried = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    while remaining:
        column, inverse = remaining[0], torch.linalg.inv(hessian[remaining][:, remaining])
        scale = parameters.scale[:, column // group_size].double()
        zero = parameters.zero[:, column // group_size].double()
        carried[:, column] = weight[:, column]
        value = ((weight[:, column] / scale + zero).round().clamp(0, 15) - zero) * scale
        weight[:, remaining] -= ((weight[:, column] - value) / inverse[0, 0])[:, None] * inverse[0]
        remaining = remaining[1:]
    return carried


@pytest.mark.parametrize(("rows", "width", "group_size"), [(7, 96, 32), (33, 192, 64), (5, 160, None)])
def test_what_is_lost_at_a_column_is_what_was_rounded_there(rows: int, width: int, group_size: int | None) -> None:
    grid, weight, gram = Grid(group_size, symmetric=False), torch.randn(rows, width), gram_of(correlated_inputs(width))
    parameters, lost = minmax(weight, grid), torch.full((rows, width), float("nan"))
    found = round_columns(weight, hessian_of(gram, 0.01), parameters, grid, lost)
    expected = carried_by_definition(weight, gram, parameters, grid.group(width))
    torch.testing.assert_close(found + lost, expected.float(), rtol=1e-5, atol=1e-5)


def test_rows_rounded_to_nearest_lose_what_that_loses() -> None:
    grid, weight, gram = Grid(32, symmetric=True), torch.randn(64, 64), gram_of(correlated_inputs(64))
    hessian, lost = hessian_of(gram, 0.01), torch.full((64, 64), float("nan"))
    hessian = replace(hessian, factor=cut(hessian.factor.whole().abs(), upper=True))  # carries errors the wrong way
    parameters, rounded = round_weight(weight, hessian, grid, SEARCH, lost)
    nearest = (rounded == fake_quantize(weight, parameters, grid)).all(1)
    assert 0 < nearest.sum() < 64
    torch.testing.assert_close(lost[nearest], (weight - rounded)[nearest])
    assert torch.isfinite(lost).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_places_are_those_of_the_weights_but_for_what_lies_outside(symmetric: bool) -> None:
    """A negative scale, as symmetric ranges may have, turns the direction around."""
    grid, weight = Grid(32, symmetric), torch.randn(9, 64)
    found = minmax(weight, grid)
    parameters = Parameters(found.scale * (torch.tensor([-1.0, 1.0]) if symmetric else 1.0) * 0.8, found.zero)
    rounded = fake_quantize(weight, parameters, grid)
    places = Places.of(rounded, weight - rounded, parameters, grid)
    assert torch.equal(places.chosen(), codes(weight, parameters, grid))
    exact = (weight.unflatten(1, (2, 32)) / parameters.scale[..., None] + parameters.zero[..., None]).flatten(1)
    inside = (exact > -0.499) & (exact < 15.499)
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(places.codes[inside], exact[inside], rtol=0, atol=2e-4)
    assert ((places.codes - places.chosen()).abs() < 0.5).all()


def test_a_step_moves_a_weight_against_its_gradient_whatever_the_sign_of_its_scale() -> None:
    scale = torch.tensor([[0.5, -0.5]])
    places = Places(torch.full((1, 4), 7.0), Parameters(scale, torch.full((1, 2), 8.0)), Grid(2, symmetric=True))
    before = values(places.codes, places.parameters)
    gradient = torch.tensor([[3.0, -0.1, 3.0, 0.0]])
    places.step(gradient, 0.25)
    moved = values(places.codes, places.parameters) - before
    assert torch.equal(moved, torch.tensor([[-0.125, 0.125, -0.125, 0.0]]))


def steps_by_definition(x_TK: Tensor, target_TN: Tensor, places: Places, settings: LearningSettings) -> Tensor:
    """Return the codes after signed steps on |w x - target|^2 / |target|^2, its gradient written out, in float64."""
    group = x_TK.shape[1] // places.parameters.scale.shape[1]
    scale_NK = places.parameters.scale.double().repeat_interleave(group, 1)
    zero_NK = places.parameters.zero.double().repeat_interleave(group, 1)
    place_NK, per_token = places.codes.double(), 2 / target_TN.square().sum(1, keepdim=True)
    pull_NK = torch.zeros_like(place_NK)
    for step in range(settings.steps):
        weight_NK = (place_NK.round().clamp(0, 15) - zero_NK) * scale_NK
        gradient_NK = ((x_TK @ weight_NK.T - target_TN) * per_token).T @ x_TK
        pull_NK = 0.9 * pull_NK + 0.1 * gradient_NK
        size = settings.size * (settings.steps - step) / settings.steps
        place_NK = place_NK - size * torch.sign(pull_NK * scale_NK)
    return place_NK.round().clamp(0, 15)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_steps_are_those_of_float64(symmetric: bool) -> None:
    """One linear, all samples in every step but the held-out one; a sign is another where its gradient is next to 0."""
    grid, layer = Grid(32, symmetric), nn.Sequential(nn.Linear(64, 24, bias=False)).requires_grad_(False)
    hidden_STD = correlated_inputs(64, 8 * 50).float().unflatten(0, (8, 50))
    target_STD = hidden_STD @ layer[0].weight.T
    places, settings = nearest_places(layer[0].weight.data, grid), LearningSettings(steps=40, size=0.002, samples=7)
    layer[0].weight.data = values(places.chosen(), places.parameters)
    start = places.chosen()
    expected = steps_by_definition(
        hidden_STD[:7].flatten(0, 1).double(), target_STD[:7].flatten(0, 1).double(), places, settings
    )
    learned = learn_rounding(layer, LayerInputs(hidden_STD, {}, 2, target_STD=target_STD), {"0": places}, settings)
    found = places.chosen()
    assert (found != start).float().mean() > 0.02
    assert (found != expected).float().mean() < 0.005
    kept = found if learned["after"] < learned["before"] else start
    assert torch.equal(values(kept, places.parameters), layer[0].weight)


def rounded_layer() -> tuple[Layer, LayerInputs, dict[str, Places]]:
    """Return a layer rounded to nearest, its inputs, with what it made of them before, and where its weights stood."""
    layer, hidden_STD = Layer().requires_grad_(False), torch.randn(16, 12, 64)
    target_STD = layer(hidden_STD)
    places = {name: nearest_places(linear.weight.data, Grid(32, False)) for name, linear in linears(layer).items()}
    for name, linear in linears(layer).items():
        linear.weight.data = values(places[name].chosen(), places[name].parameters)
    return layer, LayerInputs(hidden_STD, {}, 4, target_STD=target_STD), places


def test_what_held_out_samples_lose_by_is_not_kept() -> None:
    layer, inputs, places = rounded_layer()
    before = copy.deepcopy(layer)
    learned = learn_rounding(layer, inputs, places, LearningSettings(steps=2, size=9.0))
    assert learned["after"] > learned["before"]
    for name, linear in linears(layer).items():
        assert torch.equal(linear.weight, before.get_parameter(f"{name}.weight"))
        assert not linear.weight.requires_grad
        assert linear.weight.grad is None


def test_samples_that_were_held_out_are_seen_by_no_step() -> None:
    layer, inputs, places = rounded_layer()
    start = {name: place.chosen() for name, place in places.items()}
    other, others = copy.deepcopy(layer), copy.deepcopy(places)
    settings, spoilt = LearningSettings(steps=10, size=0.03), inputs.target_STD.clone()
    spoilt[-2:] += 10 * torch.randn(2, 12, 64)
    learn_rounding(layer, inputs, places, settings)
    learn_rounding(other, replace(inputs, target_STD=spoilt), others, settings)
    assert all(torch.equal(places[name].chosen(), others[name].chosen()) for name in places)
    assert any(not torch.equal(places[name].chosen(), start[name]) for name in places)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_method_learns_after_it_has_rounded(sequential: bool) -> None:
    """What GPTQ leaves of correlated inputs is hardly to be bettered; with such a damping it rounds to nearest."""
    layer, hidden_STD = Layer().requires_grad_(False), torch.randn(64, 16, 12) @ torch.randn(12, 64)
    inputs = LayerInputs(hidden_STD, {}, 4, original_STD=hidden_STD, target_STD=layer(hidden_STD))
    plain = GptqSettings(damping=1000.0, sequential=sequential, propagation=0.5 * sequential, search=SEARCH)
    losses = {}
    for steps in (0, 50):
        rounded, method = copy.deepcopy(layer), Gptq(replace(plain, learn=LearningSettings(steps, 0.005, 16)))
        assert method.needs_original == (sequential or steps > 0)
        found, report = method.quantize_layer(rounded, inputs, dict.fromkeys(linears(layer), Grid(32, False)), 16)
        assert ("learned" in report) == (steps > 0)
        for name, linear in linears(rounded).items():
            assert torch.equal(fake_quantize(linear.weight, found[name], Grid(32, False)), linear.weight)
        losses[steps] = float((rounded(hidden_STD) - inputs.target_STD).square().sum())
    assert losses[50] < 0.7 * losses[0]
