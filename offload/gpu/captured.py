"""The decode step of layers that a device computes: captured once, replayed for every later token.

Kernels that multiply by one token end sooner than the host can launch them one by one, let alone through modules. The
first token of a layer launches them so; with the second they are captured, and from then on a token costs the host
three launches a layer, whichever sequence it is of: what changes from token to token lies in memory that all layers
share.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kernels.device_step import DeviceStep
from kernels.kv_block import integers_on
from kernels.step_room import StepRoom, StepShape
from offload.fused import decoder_layer
from offload.gpu.device import Device
from offload.kv.cache import Int8Layer
from offload.linear import PackedLinear
from offload.memory import Memory
from offload.single_token import SingleToken, hold, with_room

FEWEST_TOKENS = 256
"""Of a past and the token itself: up to so many, and then up to every power of two, one step is good for all."""

_ROOM_TOKENS = 16384
"""Attention over more is split no further, so that a step takes hardly more memory."""


def most_tokens(tokens: int) -> int:
    """Return up to how many tokens a step is good that is good for `tokens`, the new one included."""
    return max(FEWEST_TOKENS, 1 << (tokens - 1).bit_length())


def room_bytes(shape: StepShape) -> int:
    """Return what `StepRooms` takes for a model with layers of one shape."""
    return replace(shape, most_tokens=max(shape.most_tokens, _ROOM_TOKENS)).nbytes


class StepRooms:
    """Memory on a device that the steps of a model's layers share: they are queued one after the other."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._rooms: dict[StepShape, StepRoom] = {}
        self._memory: Memory | None = None

    def of(self, shape: StepShape) -> StepRoom:
        """Return that of steps of some shape. Raises torch.OutOfMemoryError."""
        if shape not in self._rooms:
            if self._memory is None or self._memory.nbytes < shape.nbytes:
                with torch.inference_mode(False):  # it outlives the mode of the caller
                    self._memory = self.device.allocate(room_bytes(shape))
            self._rooms[shape] = StepRoom(shape, self._memory.bytes)
        return self._rooms[shape]


@dataclass(slots=True)
class _Queued:
    """A layer's step over one range of tokens. queue: launches its kernels, or replays them once they are captured."""

    step: DeviceStep
    queue: Callable[[], None]
    captured: bool = False


class CapturedLayer(SingleToken):
    """A layer whose single tokens a device computes without its modules. rooms: of all such layers of a model.

    Its weights may lie in several places, one after the other, as slots do: each has a step of its own.
    """

    def __init__(self, rooms: StepRooms, layer: Any, enabled: bool = True) -> None:
        super().__init__(layer, enabled)
        self._rooms = rooms
        self._output: PackedLinear = layer.self_attn.o_proj
        self._steps: dict[Any, _Queued] = {}  # by what differs between them; the first is the place of the weights

    def takes(self, cache: DynamicLayer | Int8Layer) -> bool:
        """Whether all of a past is on the device: what comes part by part takes more than one call."""
        return not isinstance(cache, Int8Layer) or type(cache) is Int8Layer

    def step(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DynamicLayer | Int8Layer) -> Tensor:
        """Return the output [1, 1, hidden] for one token, appending to the cache. Raises torch.OutOfMemoryError."""
        if isinstance(cache, Int8Layer):
            cache.make_room(1)
            table, tokens = cache.blocks.device_addresses(hidden.device), cache.tokens
            out = self._queue(hidden, cos, sin, table, tokens, True, cache.key_offset)
            cache.count(1)
        else:
            keys, values, tokens = with_room(cache)
            place = array("q", (keys.data_ptr(), values.data_ptr(), keys.shape[1]))
            out = self._queue(hidden, cos, sin, integers_on(hidden.device, place.tobytes()), tokens, False, None)
            hold(cache, keys, values, tokens + 1)
        return out

    def _queue(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, table: Tensor, tokens: int, int8: bool, offset: Tensor | None
    ) -> Tensor:
        """Queue the step of a token with `tokens` before it, whose past lies where `table` says; return its output."""
        most = most_tokens(tokens + 1)
        key = id(self._output.packed), most, int8, cos.shape[-1], hidden.dtype, 0 if offset is None else id(offset)
        queued = self._steps.get(key)
        if queued is None:
            layer = decoder_layer(self.layer)
            shape = StepShape.of(layer, cos.shape[-1], hidden.dtype, int8, most, self._rooms.device.gpu)
            step = DeviceStep(layer, self._rooms.of(shape), offset)
            queued = self._steps[key] = _Queued(step, step.run)
        elif not queued.captured:
            queued.queue, queued.captured = self._rooms.device.capture(queued.step.run), True
        queued.step.load(hidden.flatten(), cos.flatten(), sin.flatten(), table, tokens)
        queued.queue()
        return queued.step.out.clone().view(1, 1, -1)  # the next layer's token takes its place
