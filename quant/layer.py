"""One decoder layer at work: its inputs, its linears, and what flows between them.

Axes: S samples, T tokens, D hidden, K inputs of a linear, N its outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.hidden_states import HiddenStates

_GRAM_BLOCK = 512
"""Rows of a gram that are added to together: a product of that size runs at full speed."""


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a decoder layer is called with: hidden states of all samples, and arguments that all samples share.

    hidden_STD: float32 [S, T, D], in memory or not. arguments: keyword arguments of the layer's forward, for a batch
    of one. batch_samples: how many samples go through at a time. original_STD: what the hidden states are before any
    layer is quantized, for methods that ask for it, and target_STD what the unquantized layer makes of that.
    statistics_to: a directory for what a method knows of them, where memory has no room for it.
    """

    hidden_STD: HiddenStates
    arguments: dict[str, Any]
    batch_samples: int = 4
    original_STD: HiddenStates | None = None
    target_STD: HiddenStates | None = None
    statistics_to: Path | None = None

    def select(self, samples: slice) -> "LayerInputs":
        """Return the same inputs for some of the samples; a view."""
        original = None if self.original_STD is None else self.original_STD[samples]
        target = None if self.target_STD is None else self.target_STD[samples]
        return replace(self, hidden_STD=self.hidden_STD[samples], original_STD=original, target_STD=target)

    def original(self) -> "LayerInputs":
        """Return the unquantized model's inputs; where they are not kept, these."""
        hidden_STD = self.hidden_STD if self.original_STD is None else self.original_STD
        return LayerInputs(hidden_STD, self.arguments, self.batch_samples)

    def split_held_out(self, share: int) -> tuple["LayerInputs", "LayerInputs"]:
        """Split off the last 1/`share` of the samples, at least one; a single sample is both parts."""
        samples = len(self.hidden_STD)
        kept = samples - max(1, samples // share)
        return self.select(slice(0, max(1, kept))), self.select(slice(kept, samples))

    def outputs(self, layer: nn.Module) -> Iterator[Tensor]:
        """Yield the layer's hidden states, float32 [batch, T, D], batch after batch."""
        for batch_BTD in self.hidden_STD.split(self.batch_samples):
            output = layer(batch_BTD, **self.arguments)
            yield output[0] if isinstance(output, tuple) else output

    def run(self, layer: nn.Module) -> Tensor:
        """Return the layer's hidden states of all samples, float32 [S, T, D]."""
        return torch.cat(list(self.outputs(layer)))


@dataclass(frozen=True, slots=True)
class Moments:
    """What a linear's loss needs to know of its inputs x.

    gram: E[x x^T], float32 [K, K]. magnitude: E[|x|], float32 [K].
    """

    gram: Tensor
    magnitude: Tensor

    def damped(self, share: float) -> "Moments":
        """Return these with `share` of the mean of the gram's diagonal added to it."""
        unit = share * self.gram.diagonal().mean()
        return replace(self, gram=self.gram + unit * torch.eye(len(self.gram)))

    def loss(self, difference: Tensor) -> float:
        """Return E[|(W' - W) x|^2] for a difference of weights [N, K]: the output's squared error, exactly."""
        return float(torch.sum((difference @ self.gram) * difference))


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside, by their name within the layer, in the module's order."""
    return {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}


def moments(layer: nn.Module, inputs: LayerInputs, names: Iterable[str]) -> dict[str, Moments]:
    """Run the layer on all samples and return the moments of the inputs of the named linears.

    Linears that share an input share its moments. The layer runs no further than the last of them that a batch comes
    to. Raises UnreachedError naming a linear that was never called.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, int] = {}
    shared: dict[str, str] = {}
    owner: dict[int, tuple[str, Tensor]] = {}  # an address is an identity only while its tensor lives
    expected, met = set(names), set[str]()

    def observe(name: str, x: Tensor) -> None:
        first, _ = owner.setdefault(x.data_ptr(), (name, x))
        shared[name] = first
        if first == name:
            x_TK = x.flatten(0, -2)
            if name not in sums:
                width = x_TK.shape[1]
                sums[name] = (x_TK.new_zeros(width, width), x_TK.new_zeros(width))
            gram, magnitude = sums[name]
            add_gram(gram, x_TK)
            magnitude += x_TK.abs().sum(0)
            counts[name] = counts.get(name, 0) + len(x_TK)
        met.add(name)
        if met == expected:
            raise _Reached(x)

    with observed_inputs(layer, names, observe):
        for batch_BTD in inputs.hidden_STD.split(inputs.batch_samples):
            with suppress(_Reached):
                layer(batch_BTD, **inputs.arguments)
            owner.clear()
            met.clear()
    missing = [name for name in names if name not in shared]
    if missing:
        raise UnreachedError(f"{', '.join(missing)}: not called by any calibration sample")
    means = {name: Moments(mirror(g).div_(counts[name]), m.div_(counts[name])) for name, (g, m) in sums.items()}
    return {name: means[shared[name]] for name in names}


def add_gram(gram: Tensor, x_TK: Tensor) -> None:
    """Add x^T x to a gram [K, K], in blocks on and above its diagonal alone, as `mirror` makes up for the others."""
    for start in range(0, len(gram), _GRAM_BLOCK):
        columns = slice(start, start + _GRAM_BLOCK)
        gram[columns, start:].addmm_(x_TK[:, columns].T, x_TK[:, start:])


def mirror(gram: Tensor) -> Tensor:
    """Return a gram with the blocks below its diagonal, in place."""
    for start in range(_GRAM_BLOCK, len(gram), _GRAM_BLOCK):
        columns = slice(start - _GRAM_BLOCK, start)
        gram[start:, columns] = gram[columns, start:].T
    return gram


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

    with observed_inputs(layer, (name,), reach):
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
