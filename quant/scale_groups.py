"""Which weights may be rescaled without changing the model: found by tracing, proved before use.

AWQ multiplies the input channels of a linear by s and lets whatever produces that input take 1/s. What that is differs
by architecture, so it is not listed but found: a real forward shows which linears share an input, and who could have
produced it; then a random scale is inserted and the output compared. Powers of two make the comparison sharp, as they
round nowhere. A candidate that changes the output is not used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quant.kept_weights import KeptWeights
from quant.layer import LayerInputs, linears

_PROOF_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears that share an input, and the module that can absorb the inverse of its scale.

    linears: names within the layer. absorber: a norm (its weight is divided) or a linear (its rows are).
    offset: 1 where the norm multiplies by 1 + weight, else 0.
    channels: int64 [K], the absorber's output channel behind each input channel (heads that share a value repeat it).
    block: the module whose output the error is measured on: the smallest that holds all the linears.
    """

    linears: tuple[str, ...]
    absorber: str
    offset: int
    channels: Tensor
    block: str

    def apply(self, layer: nn.Module, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale the layer's weights in place by `scale`, float32, one value an output channel of the absorber.

        A norm's new weight is rounded to `dtype`, as it will be stored, and the linears take the rounded ratio, so the
        product of the two is what it was. Returns the scale that was applied.
        """
        absorber = layer.get_submodule(self.absorber)
        assert isinstance(absorber.weight, Tensor), f"{self.absorber} has no weight"
        if isinstance(absorber, nn.Linear):
            absorber.weight.data /= scale[:, None]
        else:
            before: Tensor = absorber.weight.data + self.offset
            after = (before / scale - self.offset).to(dtype).float()
            alive = (before != 0) & (after + self.offset != 0)
            scale = torch.where(alive, before / (after + self.offset), torch.ones_like(scale))
            absorber.weight.data = torch.where(alive, after, absorber.weight.data)
        bias = getattr(absorber, "bias", None)
        if isinstance(bias, Tensor):
            bias.data /= scale
        for name in self.linears:
            layer.get_parameter(f"{name}.weight").data *= scale[self.channels]
        return scale


def find_scale_groups(layer: nn.Module, inputs: LayerInputs, head_dim: int) -> list[ScaleGroup]:
    """Trace one sample through the layer and return the groups that hold, in order of execution.

    head_dim: channels of one attention head, for values that several heads share.
    """
    trace = Trace.of(layer, inputs)
    groups = []
    for candidates in _candidates(layer, trace, head_dim):
        proved = next((group for group in candidates if holds(layer, trace, group, inputs.statistics_to)), None)
        if proved is not None:
            groups.append(proved)
    return groups


@dataclass(frozen=True, slots=True)
class LeafCall:
    """A call of a module with a weight and no parts: addresses of its input and output, and how many tokens it had."""

    name: str
    input_address: int
    output_address: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One sample's way through a layer.

    leaves: in order of execution. blocks: what every module with parts was first called with, the layer itself as "".
    alive: an address is an identity only while its tensor lives.
    """

    leaves: list[LeafCall]
    blocks: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
    alive: list[Tensor]

    @classmethod
    def of(cls, layer: nn.Module, inputs: LayerInputs) -> "Trace":
        """Run the layer on the first sample."""
        trace = cls([], {}, [])

        def leave(name: str, x: Tensor, y: object) -> None:
            if isinstance(y, Tensor):  # the router of a mixture of experts returns several
                trace.alive.extend((x, y))
                trace.leaves.append(LeafCall(name, x.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1]))

        handles = []
        for name, module in layer.named_modules():
            if any(module.children()):
                enter = partial(_remember, trace.blocks, name)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            elif isinstance(getattr(module, "weight", None), Tensor):
                handles.append(module.register_forward_hook(lambda m, a, y, name=name: leave(name, a[0], y)))
        try:
            inputs.select(slice(0, 1)).run(layer)
        finally:
            for handle in handles:
                handle.remove()
        return trace


def _remember(
    blocks: dict[str, Any], name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    blocks.setdefault(name, (args, kwargs))


def holds(layer: nn.Module, trace: Trace, group: ScaleGroup, directory: Path | None = None) -> bool:
    """Prove a group: insert a random scale on both sides, compare what comes out, and put everything back.

    What is compared is all that the smallest module around the group returns, as nothing else sees what is inside it.
    directory: for the weights as they were, which are kept in memory without one.
    """
    scope = _common_module([group.absorber, *group.linears])
    while scope not in trace.blocks:  # a mere list of modules is never called
        scope = scope.rpartition(".")[0]
    touched = [layer.get_submodule(name) for name in (group.absorber, *group.linears)]
    kept = KeptWeights([p for module in touched for p in module.parameters(recurse=False)], directory)
    before = _outputs(layer, trace, scope)
    width = layer.get_parameter(f"{group.absorber}.weight").shape[0]
    exponents = torch.randint(-2, 3, (width,), generator=torch.Generator().manual_seed(width))
    group.apply(layer, torch.exp2(exponents.float()), torch.float32)
    after = _outputs(layer, trace, scope)
    kept.put_back()
    return bool(before) and all(
        bool((y - x).abs().max() <= _PROOF_TOLERANCE * x.abs().max()) for x, y in zip(before, after, strict=True)
    )


def _outputs(layer: nn.Module, trace: Trace, scope: str) -> list[Tensor]:
    """Call a block again and return the tensors that come out, without the residual stream that the layer passes on."""
    args, kwargs = trace.blocks[scope]
    outputs = layer.get_submodule(scope)(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [tensors[0] - args[0], *tensors[1:]] if scope == "" else tensors


def sets_by_input(layer: nn.Module, inputs: LayerInputs, names: list[str]) -> list[tuple[str, ...]]:
    """Return the named linears in sets that share an input, in order of execution; those not traced last, alone."""
    readers: dict[int, list[str]] = {}
    for call in Trace.of(layer, inputs).leaves:
        if call.name in names:
            readers.setdefault(call.input_address, []).append(call.name)
    traced = {name for members in readers.values() for name in members}
    return [*map(tuple, readers.values()), *((name,) for name in names if name not in traced)]


def _candidates(layer: nn.Module, trace: Trace, head_dim: int) -> Iterator[list[ScaleGroup]]:
    """Yield, for each set of linears with a common input, the groups that could hold, most likely first."""
    inside = linears(layer)
    readers: dict[int, list[LeafCall]] = {}
    for call in trace.leaves:
        if call.name in inside:
            readers.setdefault(call.input_address, []).append(call)
    for address, calls in readers.items():
        names = tuple(call.name for call in calls)
        width, block = inside[names[0]].in_features, names[0] if len(names) == 1 else _common_module(names)
        candidates = []
        for call in trace.leaves:
            module = layer.get_submodule(call.name)
            if call.name not in inside and call.output_address == address and module.weight.shape == (width,):
                straight = torch.arange(width)
                candidates += [ScaleGroup(names, call.name, offset, straight, block) for offset in (0, 1)]
        for call in reversed(trace.leaves[: trace.leaves.index(calls[0])]):
            if call.name in inside and call.tokens == calls[0].tokens:
                channels = _channels(inside[call.name].out_features, width, head_dim)
                if channels is not None:
                    candidates.append(ScaleGroup(names, call.name, 0, channels, block))
        yield candidates


def _channels(out_features: int, in_features: int, head_dim: int) -> Tensor | None:
    """Return which of N output channels lies behind each of K input channels, None if no mapping is plausible.

    With K = r N, every head of `head_dim` channels is read by r query heads in a row (grouped-query attention).
    """
    if out_features == in_features:
        return torch.arange(in_features)
    if in_features % out_features or out_features % head_dim:
        return None
    shared = in_features // out_features
    heads = torch.arange(out_features).view(-1, 1, head_dim)
    return heads.expand(-1, shared, -1).reshape(-1)


def _common_module(names: Sequence[str]) -> str:
    """Return the name of the smallest module that holds all the named ones, "" for the layer itself."""
    common = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
