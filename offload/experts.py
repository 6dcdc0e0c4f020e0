"""Experts as linears of their own, where transformers fuses those of a layer into two tensors of rank three.

Quantization and packing are of linears, and so are the names that the hub, compressed-tensors and vLLM know:
`experts.3.gate_proj`. Which modules are fused experts is seen by their parameters, and that the experts taken apart
compute the same is proved on small random weights; what does not pass stays as it is. Linears of a class of their own
are made plain ones in the same way.

Axes: E experts, T tokens, D hidden, I inner width of an expert, K experts that a token is sent to.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOLERANCE = 1e-5
_SMALL_HIDDEN, _SMALL_INNER = 16, 8

FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The fused parameters, [E, 2 I, D] and [E, D, I], and the linears of every expert that lie in them, row after row."""


class Expert(nn.Module):
    """One gated feed-forward network: down(gating([gate(x), up(x)]))."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, gating: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        gate, up = gate_up_proj.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down_proj)
        self.gating = gating

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return [T, D]."""
        hidden: Tensor = self.down_proj(self.gating(torch.cat((self.gate_proj(x_TD), self.up_proj(x_TD)), -1)))
        return hidden


class Experts(nn.ModuleList):
    """Stands where fused experts were, and is called as they are."""

    def __init__(self, fused: nn.Module) -> None:
        gating: Any = getattr(fused, "_apply_gate", None) or partial(_gated, fused.get_submodule("act_fn"))
        weights = zip(fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj"), strict=True)
        super().__init__(Expert(gate_up.data, down.data, gating) for gate_up, down in weights)

    def forward(self, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum over the experts of every token, [T, D]; index and weights are [T, K].

        An expert that no token is sent to does not run.
        """
        sum_TD = torch.zeros_like(hidden_TD)
        for index in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == index)
            output = self[index](hidden_TD[token]) * top_k_weights[token, place, None]
            sum_TD.index_add_(0, token, output.to(sum_TD.dtype))
        return sum_TD


def make_plain(model: nn.Module) -> None:
    """Replace, in place, fused experts by `Experts` and linears of other classes by `nn.Linear`, where that is proved.

    model: its parameters may be on the meta device. Buffers and all other modules stay.
    """
    proofs: dict[type[nn.Module], bool] = {}
    for name, module in list(model.named_modules()):
        kind = type(module)
        if not (is_fused_experts(module) or (isinstance(module, nn.Linear) and kind is not nn.Linear)):
            continue
        if kind not in proofs:
            proofs[kind] = _holds(_experts_agree if is_fused_experts(module) else _linear_agrees, module)
        if proofs[kind]:
            model.set_submodule(name, Experts(module) if is_fused_experts(module) else _plain(module))


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds exactly [E, 2 I, D] and [E, D, I] under the names of fused experts."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if shapes.keys() != FUSED_PARTS.keys() or any(len(shape) != 3 for shape in shapes.values()):
        return False
    experts, hidden, inner = shapes["down_proj"]
    return shapes["gate_up_proj"] == (experts, 2 * inner, hidden)


def fused_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the full names of the fused parameters that `Experts` in `model` stand for, and the parts of each."""
    modules = (name for name, module in model.named_modules() if isinstance(module, Experts))
    return {f"{name}.{fused}": parts for name in modules for fused, parts in FUSED_PARTS.items()}


def _holds(agrees: Callable[[Any], bool], module: nn.Module) -> bool:
    try:
        return agrees(module)
    except Exception:  # a module that cannot be called so is not what it was taken for
        return False


@torch.no_grad()
def _experts_agree(fused: nn.Module) -> bool:
    """Run the same module over small random weights, and what `Experts` makes of it."""
    chance = torch.Generator().manual_seed(0)
    experts, tokens = len(fused.get_parameter("down_proj")), 32
    shapes = {
        "gate_up_proj": (experts, 2 * _SMALL_INNER, _SMALL_HIDDEN),
        "down_proj": (experts, _SMALL_HIDDEN, _SMALL_INNER),
    }
    small = copy.copy(fused)
    small._parameters = {n: nn.Parameter(torch.randn(s, generator=chance), False) for n, s in shapes.items()}
    hidden_TD = torch.randn(tokens, _SMALL_HIDDEN, generator=chance)
    index = torch.rand(tokens, experts, generator=chance).topk(min(2, experts)).indices
    weights = torch.rand(index.shape, generator=chance)
    expected = small(hidden_TD, index, weights)
    return _equal(Experts(small)(hidden_TD, index, weights), expected)


@torch.no_grad()
def _linear_agrees(linear: nn.Linear) -> bool:
    chance = torch.Generator().manual_seed(0)
    small = copy.copy(linear)
    weight, x = torch.randn(5, 7, generator=chance), torch.randn(2, 3, 7, generator=chance)
    bias = None if linear.bias is None else torch.randn(5, generator=chance)
    small._parameters = {
        "weight": nn.Parameter(weight, False),
        "bias": None if bias is None else nn.Parameter(bias, False),
    }
    return _equal(small(x), F.linear(x, weight, bias))


def _equal(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=_TOLERANCE)
    )


def _plain(linear: nn.Module) -> nn.Linear:
    plain = _linear(linear.get_parameter("weight").data)
    plain.register_parameter("bias", linear._parameters["bias"])
    return plain


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear without bias that has `weight`, [out, in]; nothing is copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return activation(gate) * up
