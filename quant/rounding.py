"""Learned rounding: which of its neighbours a weight is rounded to, by signed steps on what the layer computes.

SignRound (arXiv:2309.05516, algorithm 1), begun where another rounding stands: the place p of a weight among the codes,
a real number, moves against the sign of what gradients were of late,

    w = (round(p) - z) s        m = 0.9 m + 0.1 dL/dw        p -= size sign(m) sign(s),

with a size that falls to zero along the steps. None moves by more than about `steps * size / 2`, so what flips was
close to the middle between two codes. L is the squared error of the layer's output against that of the unquantized
model, over each token's own mean square: a few tokens are far louder than the others. Without m, steps follow the noise
of their few windows, and lose in layers where GPTQ left little: docs/quality.md has the figures.

Axes: N outputs, K inputs, C groups of a linear; B samples, T tokens, D hidden.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.cost import FLOAT_BYTES, Shape, Windows
from quant.groupwise import Grid, Parameters, codes, values
from quant.layer import LayerInputs
from quant.settings import LearningSettings

_HELD_OUT_SHARE = 8
_KEPT = 0.9
"""Of what gradients were before, at each step: with 0.97 they lag behind, and steps overshoot."""
_HALF = 0.4999
"""Of a code, and short of the middle between two, whose rounding would depend on which of them it is."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the weights of a linear stand among its codes: float32 [N, K], each the code chosen when it is rounded."""

    codes: Tensor
    parameters: Parameters
    grid: Grid

    @classmethod
    def of(cls, weight: Tensor, lost: Tensor, parameters: Parameters, grid: Grid) -> "Places":
        """Return where a weight of the grid stood before it was rounded, half a code from there at most.

        weight, lost: float32 [N, K]; the latter is overwritten.
        """
        by_scale_NCG = lost.unflatten(1, (parameters.scale.shape[1], -1)).div_(parameters.scale[..., None])
        return cls(
            codes(weight, parameters, grid).add_(by_scale_NCG.flatten(1).clamp_(-_HALF, _HALF)), parameters, grid
        )

    def chosen(self) -> Tensor:
        """Return the codes, float32 integers [N, K]."""
        return self.codes.round().clamp_(0, self.grid.code_max)

    def step(self, gradient: Tensor, size: float) -> None:
        """Move all places by `size` against the sign of a gradient of the weights, float32 [N, K]."""
        sign_NCG = gradient.sign().unflatten(1, (self.parameters.scale.shape[1], -1))
        self.codes.sub_(sign_NCG.mul_(self.parameters.scale.sign()[..., None]).flatten(1), alpha=size)


def learn_rounding(
    layer: nn.Module, inputs: LayerInputs, places: Mapping[str, Places], settings: LearningSettings
) -> dict[str, float]:
    """Choose the codes of the named linears of `layer` anew, where held-out samples are the better for it.

    layer: float32, with the weights that `places` say. inputs: with targets. Some of the samples are seen by no step;
    if what they lose is not less than before, the layer is left as it was. Returns their loss before and after.
    """
    fit, held_out = inputs.split_held_out(_HELD_OUT_SHARE)
    weights = {name: layer.get_parameter(f"{name}.weight") for name in places}
    start = {name: place.chosen().byte() for name, place in places.items()}
    pull = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    before = _mean_loss(layer, held_out)
    layer.requires_grad_(False)
    samples = _in_turn(fit, settings.samples)
    for step in range(settings.steps):
        with torch.enable_grad():
            for weight in weights.values():
                weight.requires_grad_(True)
            for loss in _losses(layer, next(samples)):
                loss.backward()
        for name, weight in weights.items():
            gradient, weight.grad = weight.grad, None
            weight.requires_grad_(False)
            pull[name].mul_(_KEPT)
            if gradient is not None:  # an expert that no token of these samples was sent to has none
                pull[name].add_(gradient, alpha=1 - _KEPT)
            places[name].step(pull[name], settings.size * (1 - step / settings.steps))
            weight.data = values(places[name].chosen(), places[name].parameters)
    after = _mean_loss(layer, held_out)
    if not after < before:
        for name, weight in weights.items():
            weight.data = values(start[name].float(), places[name].parameters)
    return {"before": before, "after": after}


def _in_turn(inputs: LayerInputs, samples: int) -> Iterator[LayerInputs]:
    """Yield `samples` of the inputs at a time, all in turn, in another order each time round, the same in every run."""
    chance, count = torch.Generator().manual_seed(0), len(inputs.hidden_STD)
    while True:
        starts = torch.arange(0, max(1, count - samples + 1), samples)
        for start in starts[torch.randperm(len(starts), generator=chance)].tolist():
            yield inputs.select(slice(start, start + samples))


def _losses(layer: nn.Module, inputs: LayerInputs) -> Iterator[Tensor]:
    """Yield each batch's loss, so that a batch's gradients can be had before the next one runs."""
    assert inputs.target_STD is not None, "what the layer should compute is known"
    targets = inputs.target_STD.split(inputs.batch_samples)
    for output_BTD, target_BTD in zip(inputs.outputs(layer), targets, strict=True):
        loudness_BT = target_BTD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        yield ((output_BTD - target_BTD).square().sum(-1) / loudness_BT).sum()


def _mean_loss(layer: nn.Module, inputs: LayerInputs) -> float:
    tokens = len(inputs.hidden_STD) * inputs.hidden_STD.shape[-2]
    return sum(float(loss) for loss in _losses(layer, inputs)) / tokens


def learning_bytes(shapes: list[Shape], batch_tokens: int) -> int:
    """Return the memory it takes beside the layer and a run of it.

    Places, gradients, those before and the first codes of all weights; what a run keeps for its gradients, and these;
    the largest linear three times over.
    """
    weights, per_token = sum(n * k for n, k in shapes), sum(n + k for n, k in shapes)
    largest = max(n * k for n, k in shapes)
    return (3 * FLOAT_BYTES + 1) * weights + FLOAT_BYTES * (3 * largest + 2 * per_token * batch_tokens)


def learning_operations(shapes: list[Shape], settings: LearningSettings, windows: Windows) -> float:
    """Return the operations of all steps: each runs the layer forth and twice back."""
    weights = sum(n * k for n, k in shapes)
    return 6.0 * weights * settings.steps * min(settings.samples, windows.samples) * windows.tokens
