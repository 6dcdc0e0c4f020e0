"""Which weights may be rescaled without changing the model: found by tracing, proved before use.

AWQ multiplies the input channels of a linear by s and lets whatever produces that input take 1/s. What that is differs
by architecture, so it is not listed but found: a real forward shows which linears share an input, and who could have
produced it; then a random scale is inserted and the layer's output compared. Powers of two make the comparison sharp,
as they round nowhere. A candidate that changes the output is not used.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    sample = inputs.select(slice(0, 1))
    groups = []
    for candidates in _candidates(layer, sample, head_dim):
        proved = next((group for group in candidates if holds(layer, sample, group)), None)
        if proved is not None:
            groups.append(proved)
    return groups


def holds(layer: nn.Module, sample: LayerInputs, group: ScaleGroup) -> bool:
    """Prove a group: insert a random scale on both sides, compare the layer's output, and put everything back."""
    touched = [layer.get_submodule(name) for name in (group.absorber, *group.linears)]
    saved = [(p, p.data.clone()) for module in touched for p in module.parameters(recurse=False)]
    before = sample.run(layer)
    width = layer.get_parameter(f"{group.absorber}.weight").shape[0]
    exponents = torch.randint(-2, 3, (width,), generator=torch.Generator().manual_seed(width))
    group.apply(layer, torch.exp2(exponents.float()), torch.float32)
    after = sample.run(layer)
    for parameter, data in saved:
        parameter.data = data
    return bool((after - before).abs().max() <= _PROOF_TOLERANCE * (before - sample.hidden_STD).abs().max())


def sets_by_input(layer: nn.Module, inputs: LayerInputs, names: list[str]) -> list[tuple[str, ...]]:
    """Return the named linears in sets that share an input, in order of execution; those not traced last, alone."""
    readers: dict[int, list[str]] = {}
    for name, address, _ in _trace(layer, inputs.select(slice(0, 1))):
        if name in names:
            readers.setdefault(address, []).append(name)
    traced = {name for members in readers.values() for name in members}
    return [*map(tuple, readers.values()), *((name,) for name in names if name not in traced)]


def _candidates(layer: nn.Module, sample: LayerInputs, head_dim: int) -> Iterator[list[ScaleGroup]]:
    """Yield, for each set of linears with a common input, the groups that could hold, most likely first."""
    calls = _trace(layer, sample)
    inside = linears(layer)
    readers: dict[int, list[str]] = {}
    for name, input_address, _ in calls:
        if name in inside:
            readers.setdefault(input_address, []).append(name)
    for address, names in readers.items():
        width, block = inside[names[0]].in_features, _smallest_block(names)
        candidates = []
        for name, _, output_address in calls:
            module = layer.get_submodule(name)
            if name not in inside and output_address == address and module.weight.shape == (width,):
                straight = torch.arange(width)
                candidates += [ScaleGroup(tuple(names), name, offset, straight, block) for offset in (0, 1)]
        first_reader = next(i for i, call in enumerate(calls) if call[0] == names[0])
        for name, _, _ in reversed(calls[:first_reader]):
            channels = _channels(inside[name].out_features, width, head_dim) if name in inside else None
            if channels is not None:
                candidates.append(ScaleGroup(tuple(names), name, 0, channels, block))
        yield candidates


def _trace(layer: nn.Module, sample: LayerInputs) -> list[tuple[str, int, int]]:
    """Return (module, address of its input, address of its output) of every weighted leaf, in order of execution."""
    calls: list[tuple[str, int, int]] = []
    alive: list[Tensor] = []  # an address is an identity only while its tensor lives

    def record(name: str, x: Tensor, y: object) -> None:
        if isinstance(y, Tensor):  # the router of a mixture of experts returns several
            alive.extend((x, y))
            calls.append((name, x.data_ptr(), y.data_ptr()))

    handles = []
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not any(module.children()):
            handles.append(module.register_forward_hook(lambda m, a, y, name=name: record(name, a[0], y)))
    try:
        sample.run(layer)
    finally:
        for handle in handles:
            handle.remove()
    return calls


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


def _smallest_block(names: list[str]) -> str:
    """Return the module that holds all the linears; for a single one that is itself."""
    if len(names) == 1:
        return names[0]
    parents = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
