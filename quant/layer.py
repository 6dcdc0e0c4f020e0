"""One decoder layer at work: its inputs, its linears, and what flows between them.

Axes: S samples, T tokens, D hidden, K inputs of a linear, N its outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.hidden_states import HiddenStates


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a decoder layer is called with: hidden states of all samples, and arguments that all samples share.

    hidden_STD: float32 [S, T, D], in memory or not. arguments: keyword arguments of the layer's forward, for a batch
    of one. batch_samples: how many samples go through at a time. original_STD: what the hidden states are before any
    layer is quantized, for methods that ask for it, and target_STD what the unquantized layer makes of that.
    statistics_to: a directory for what a method knows of them, where memory has no room for it. pass_dtype: in which
    the layer's linears multiply, float32 or bfloat16.
    """

    hidden_STD: HiddenStates
    arguments: dict[str, Any]
    batch_samples: int = 4
    original_STD: HiddenStates | None = None
    target_STD: HiddenStates | None = None
    statistics_to: Path | None = None
    pass_dtype: torch.dtype = torch.float32

    def select(self, samples: slice) -> "LayerInputs":
        """Return the same inputs for some of the samples; a view."""
        original = None if self.original_STD is None else self.original_STD[samples]
        target = None if self.target_STD is None else self.target_STD[samples]
        return replace(self, hidden_STD=self.hidden_STD[samples], original_STD=original, target_STD=target)

    def original(self) -> "LayerInputs":
        """Return the unquantized model's inputs; where they are not kept, these."""
        hidden_STD = self.hidden_STD if self.original_STD is None else self.original_STD
        return LayerInputs(hidden_STD, self.arguments, self.batch_samples, pass_dtype=self.pass_dtype)

    def split_held_out(self, share: int) -> tuple["LayerInputs", "LayerInputs"]:
        """Split off the last 1/`share` of the samples, at least one; a single sample is both parts."""
        samples = len(self.hidden_STD)
        kept = samples - max(1, samples // share)
        return self.select(slice(0, max(1, kept))), self.select(slice(kept, samples))

    def outputs(self, layer: nn.Module) -> Iterator[Tensor]:
        """Yield the layer's hidden states, float32 [batch, T, D], batch after batch."""
        with multiplying_in(layer, self.pass_dtype):
            for batch_BTD in self.hidden_STD.split(self.batch_samples):
                output = layer(batch_BTD, **self.arguments)
                yield output[0] if isinstance(output, tuple) else output

    def run(self, layer: nn.Module) -> Tensor:
        """Return the layer's hidden states of all samples, float32 [S, T, D]."""
        return torch.cat(list(self.outputs(layer)))


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside, by their name within the layer, in the module's order."""
    return {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}


@contextmanager
def multiplying_in(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the linears of `layer` multiply in `dtype` while the context lasts.

    What goes into them and comes out stays float32, and with that norms, attention and the sum that runs through the
    layers. One weight at a time is there in `dtype`: to round it for every batch of 512 tokens costs 3% of the product.
    """
    narrowed = [] if dtype == torch.float32 else linears(layer).values()
    for module in narrowed:
        module.__dict__["forward"] = partial(_multiply, module.weight, module.bias, dtype)
    try:
        yield
    finally:
        for module in narrowed:
            del module.__dict__["forward"]


def _multiply(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    product = F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)
    return product if bias is None else product.add_(bias)


def shared_inputs(
    layer: nn.Module, inputs: LayerInputs, names: Iterable[str], see: Callable[[str, Tensor], None]
) -> dict[str, str]:
    """Run the layer on all samples and call `see(name, x)` with all that the named linears are given, float32 [T, K].

    What several linears are given is seen once, under the name of the first; returns that name for each of them. The
    layer runs no further than the last of them that a batch comes to. Raises UnreachedError naming a linear that was
    never called.
    """
    names, shared = list(names), dict[str, str]()
    owner: dict[int, tuple[str, Tensor]] = {}  # an address is an identity only while its tensor lives
    expected, met = set(names), set[str]()

    def observe(name: str, x: Tensor) -> None:
        first, _ = owner.setdefault(x.data_ptr(), (name, x))
        shared[name] = first
        if first == name:
            see(name, x.flatten(0, -2).contiguous())
        met.add(name)
        if met == expected:
            raise _Reached(x)

    with multiplying_in(layer, inputs.pass_dtype), observed_inputs(layer, names, observe):
        for batch_BTD in inputs.hidden_STD.split(inputs.batch_samples):
            with suppress(_Reached):
                layer(batch_BTD, **inputs.arguments)
            owner.clear()
            met.clear()
    missing = [name for name in names if name not in shared]
    if missing:
        raise UnreachedError(f"{', '.join(missing)}: not called by any calibration sample")
    return {name: shared[name] for name in names}


def unreached(layer: nn.Module, inputs: LayerInputs, names: Iterable[str]) -> list[str]:
    """Return which of the named linears no sample comes to; runs no more samples than it takes to see the others."""
    missing = dict.fromkeys(names)
    with observed_inputs(layer, tuple(missing), lambda name, x: missing.pop(name, None)):
        for _ in inputs.outputs(layer):
            if not missing:
                break
    return list(missing)


def inputs_of(layer: nn.Module, inputs: LayerInputs, name: str) -> Iterator[Tensor]:
    """Yield what the named linear is first called with, float32 [tokens, K], batch after batch; no tokens if it is not.

    The layer runs no further than that linear.
    """
    in_features = layer.get_parameter(f"{name}.weight").shape[1]

    def reach(_: str, x: Tensor) -> None:
        raise _Reached(x)

    with multiplying_in(layer, inputs.pass_dtype), observed_inputs(layer, (name,), reach):
        for batch_BTD in inputs.hidden_STD.split(inputs.batch_samples):
            x = batch_BTD.new_zeros(0, in_features)
            try:
                layer(batch_BTD, **inputs.arguments)
            except _Reached as reached:
                x = reached.x.flatten(0, -2)
            yield x


class UnreachedError(ValueError):
    """No sample comes to a linear, an expert's say, so nothing is known of its inputs."""


class _Reached(BaseException):
    """Leaves a layer's forward with the input that was waited for."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


@contextmanager
def observed_inputs(layer: nn.Module, names: Iterable[str], observe: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call `observe(name, x)` with the input of each named submodule while the context lasts."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            observe(name, arguments[0])

        return before

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
