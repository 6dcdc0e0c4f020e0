"""Experts as linears of their own, where transformers fuses those of a layer into two tensors of rank three.

Quantization and packing are of linears, and so are the names that the hub, compressed-tensors and vLLM know:
`experts.3.gate_proj`. Which modules are fused experts is seen by their parameters, and that the experts taken apart
compute the same is proved on small random weights; what does not pass stays as it is. Linears of a class of their own
are made plain ones in the same way.

Axes: E experts, T tokens, D hidden, I inner width of an expert, K experts that a token is sent to.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOLERANCE = 1e-5
_SMALL_HIDDEN, _SMALL_INNER = 16, 8

_KINDS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    {"up_proj": ("up_proj",), "down_proj": ("down_proj",)},
)
"""Fused parameters, [E, 2 I or I, D] and [E, D, I], and the linears of an expert that lie in them, row after row."""


class Expert(nn.Module):
    """One feed-forward network: down(inner(up(x))), or down(inner([gate(x), up(x)])) where there is a gate."""

    def __init__(self, parts: tuple[str, ...], up: Tensor, down: Tensor, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, rows in zip(parts, up.chunk(len(parts)), strict=True):
            self.add_module(name, _linear(rows))
        self.down_proj = _linear(down)
        self.parts, self.inner = parts, inner

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return [T, D]."""
        wide = [self._modules[name](x_TD) for name in self.parts]  # type: ignore[misc]
        hidden_TD: Tensor = self.down_proj(self.inner(torch.cat(wide, -1) if len(wide) > 1 else wide[0]))
        return hidden_TD


class Experts(nn.ModuleList):
    """Stands where fused experts were, and is called as they are.

    lend: yields the indices it is given, each while the weights of that expert are in memory.
    """

    def __init__(self, fused: nn.Module) -> None:
        up, down = parts = _fused_parts(fused)
        inner: Any = getattr(fused, "act_fn", None)
        if len(parts[up]) > 1:
            inner = getattr(fused, "_apply_gate", None) or partial(_gated, inner)
        weights = zip(fused.get_parameter(up), fused.get_parameter(down), strict=True)
        super().__init__(Expert(parts[up], u.data, d.data, inner) for u, d in weights)
        self.fused = parts
        self.lend: Callable[[Sequence[int]], Generator[int]] = _all_there

    def forward(self, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum over the experts of every token, [T, D]; index and weights are [T, K].

        An expert that no token is sent to does not run.
        """
        sum_TD = torch.zeros_like(hidden_TD)
        with closing(self.lend(top_k_index.unique().tolist())) as lent:
            for index in lent:
                token, place = torch.where(top_k_index == index)
                output = self[index](hidden_TD[token]) * top_k_weights[token, place, None]
                sum_TD.index_add_(0, token, output.to(sum_TD.dtype))
        return sum_TD


def _all_there(indices: Sequence[int]) -> Generator[int]:
    yield from indices


def make_plain(model: nn.Module) -> None:
    """Replace, in place, fused experts by `Experts` and linears of other classes by `nn.Linear`, where that is proved.

    model: its parameters may be on the meta device. Buffers and all other modules stay.
    """
    proofs: dict[type[nn.Module], bool] = {}
    for name, module in list(model.named_modules()):
        kind = type(module)
        fused = bool(_fused_parts(module))
        if not fused and (kind is nn.Linear or not isinstance(module, nn.Linear)):
            continue
        if kind not in proofs:
            proofs[kind] = _holds(_experts_agree if fused else _linear_agrees, module)
        if proofs[kind]:
            model.set_submodule(name, Experts(module) if fused else _plain(module))


def _fused_parts(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the fused parameters of a module that holds nothing but them, the way up first; none if it does not."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for parts in _KINDS:
        up, down = parts
        if shapes.keys() == parts.keys() and all(len(shape) == 3 for shape in shapes.values()):
            experts, hidden, inner = shapes[down]
            if shapes[up] == (experts, len(parts[up]) * inner, hidden):
                return parts
    return {}


def fused_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the full names of the fused parameters that `Experts` in `model` stand for, and the parts of each."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    return {f"{name}.{fused}": parts for name, module in modules.items() for fused, parts in module.fused.items()}


def _holds(agrees: Callable[[Any], bool], module: nn.Module) -> bool:
    try:
        return agrees(module)
    except Exception:  # a module that cannot be called so is not what it was taken for
        return False


@torch.no_grad()
def _experts_agree(fused: nn.Module) -> bool:
    """Run the same module over small random weights, and what `Experts` makes of it."""
    chance = torch.Generator().manual_seed(0)
    up, down = parts = _fused_parts(fused)
    experts, tokens, inner = len(fused.get_parameter(down)), 32, _SMALL_INNER
    shapes = {up: (experts, len(parts[up]) * inner, _SMALL_HIDDEN), down: (experts, _SMALL_HIDDEN, inner)}
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
