"""Decoder layers that have their weights only while they run, lent out of slots or out of memory kept for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offload.gpu.copy_queue import CopyLog, Lender, Ring
from offload.gpu.device import Device
from offload.layer_view import LayerView
from offload.memory import Memory
from offload.transfer import Turn

ViewOf = Callable[[int, Memory], LayerView]
"""Of the blob with this position among those of a lender, as it lies in some memory: where in the model it belongs."""


class LentLayers:
    """Attaches what a lender lends before a layer runs, and detaches it after, however the run ended."""

    def __init__(self, lender: Lender, view_of: ViewOf) -> None:
        self._lender, self._view_of = lender, view_of
        self._views: dict[tuple[int, int], LayerView] = {}
        self._attached: LayerView | None = None

    def hook(self, layer: nn.Module, position: int) -> tuple[RemovableHandle, ...]:
        """Have a layer lend its weights from now on; return what ends that."""
        return (
            layer.register_forward_pre_hook(partial(self._before, position)),
            layer.register_forward_hook(partial(self._after, position), always_call=True),
        )

    @contextmanager
    def lent(self, position: int, layer: nn.Module) -> Iterator[None]:
        """Have the weights of a layer attached for a while."""
        self._before(position, layer, ())
        try:
            yield
        finally:
            self._after(position, layer, (), None)

    def _before(self, position: int, layer: nn.Module, arguments: Any) -> None:
        slot = self._lender.wait(position)
        if (position, slot) not in self._views:
            self._views[position, slot] = self._view_of(position, self._lender.arenas[slot])
        self._attach(self._views[position, slot])

    def _attach(self, view: LayerView) -> None:
        view.attach()
        self._attached = view

    def _after(self, position: int, layer: nn.Module, arguments: Any, output: Any) -> None:
        if self._attached is not None:
            self._attached.detach()
        self._lender.release(position)


class MappedLayers(LentLayers):
    """The same of layers that a device computes out of pinned host memory, across the bus.

    For more tokens than its kernel takes at once, or for several sequences that share a pass, weights would cross the
    bus again and again: then the layer is copied whole into `scratch` on the device, once, in the stream that computes.
    So is one whose memory is not pinned. log: counts what crosses.
    """

    def __init__(self, ring: Ring, view_of: ViewOf, device: Device, scratch: Memory, log: CopyLog) -> None:
        super().__init__(ring, view_of)
        self._ring, self._device, self._scratch, self._log = ring, device, scratch, log
        self._scratch_views: dict[tuple[int, bool], LayerView] = {}
        self._copied_in: Turn | None = None

    def hook(self, layer: nn.Module, position: int) -> tuple[RemovableHandle, ...]:
        """Have a layer lend its weights from now on; return what ends that."""
        return (
            layer.register_forward_pre_hook(partial(self._before_tokens, position), with_kwargs=True),
            layer.register_forward_hook(partial(self._after, position), always_call=True),
        )

    def _before_tokens(self, position: int, layer: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        hidden: Tensor = arguments[0] if arguments else options["hidden_states"]
        self._lend(position, hidden.numel() // hidden.shape[-1])

    def _before(self, position: int, layer: nn.Module, arguments: Any) -> None:
        self._lend(position, tokens=1)

    def _lend(self, position: int, tokens: int) -> None:
        slot = self._ring.wait(position)
        arena, gate = self._ring.arenas[slot], self._ring.gate
        turn = None if gate is None else gate.turn(position)
        few = tokens <= self._device.most_mapped and arena.pinned
        if few and (turn is None or turn.sequences == 1):
            if (position, slot) not in self._views:
                self._views[position, slot] = self._view_of(position, arena)
            self._attach(self._views[position, slot])
            self._log.copied_bytes += self._ring.blobs[position].nbytes
            return
        if turn is None or turn is not self._copied_in:
            self._copy(arena, self._ring.blobs[position].nbytes)
            self._copied_in = turn
        if (position, few) not in self._scratch_views:
            view = self._view_of(position, self._scratch)
            self._scratch_views[position, few] = view.as_mapped() if few else view
        self._attach(self._scratch_views[position, few])

    def _copy(self, arena: Memory, nbytes: int) -> None:
        self._copied_in = None
        self._device.copy_now(self._scratch.bytes[:nbytes], arena.bytes[:nbytes])
        self._log.copied_bytes += nbytes


class Crossing:
    """Lets layers that the host computes take what a device has computed, and give back what it goes on with."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}  # what all layers of a pass are given, moved once

    def hook(self, layer: nn.Module) -> tuple[RemovableHandle, ...]:
        """Let a layer cross from now on; return what ends that."""
        return (
            layer.register_forward_pre_hook(self._to_host, with_kwargs=True),
            layer.register_forward_hook(self._to_device),
        )

    def _to_host(self, layer: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        hidden = id(arguments[0] if arguments else options.get("hidden_states"))
        given = {id(tensor): tensor for tensor in _tensors((arguments, options)) if id(tensor) != hidden}
        self._shared = {
            key: held if (held := self._shared.get(key)) is not None and held[0] is tensor else (tensor, tensor.cpu())
            for key, tensor in given.items()
        }
        return _mapped((arguments, options), lambda x: self._shared[id(x)][1] if id(x) in self._shared else x.cpu())

    def _to_device(self, layer: nn.Module, arguments: Any, output: Any) -> Any:
        return _mapped(output, lambda tensor: tensor.to(self._device))


def move_inputs(device: torch.device, model: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
    """Return the arguments of a forward with their tensors on a device: a hook of the whole model."""
    return _mapped((arguments, options), lambda tensor: tensor.to(device))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list, dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _mapped(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Return tuples, lists and dictionaries with their tensors moved, and anything else as it is."""
    if isinstance(value, Tensor):
        return move(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(inner, move) for inner in value)
    return {key: _mapped(inner, move) for key, inner in value.items()} if type(value) is dict else value
