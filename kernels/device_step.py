"""A decode step on the GPU that can be captured once and replayed: one token of one sequence through a decoder layer.

Everything that changes from token to token lies in fixed memory, a `StepRoom`: `DeviceStep.load` brings it there, and
`DeviceStep.run`, which is what a CUDA graph captures, finds it there; the past is found through a table in it, so that
a captured step serves every sequence. What its kernels compute: kernels/triton_step_kernels.py.

Rounding is that of transformers' modules on a GPU: products and norms are computed in float32, and what lies between
them is of the activations' dtype.
"""

import torch
from torch import Tensor

from kernels.decoder import DecoderLayer
from kernels.step_room import StepRoom, StepShape


class DeviceStep:
    """One token of one sequence through one layer, from a room to its `out`.

    layer: its weights on the room's device or in pinned host memory, norms and biases on the device; read when it
    runs. key_offset: float32 [key_heads, head_dim] on the device, as in `KVContext`, for a past in 8 bits. Raises
    ValueError if the room is not for such a layer.
    """

    def __init__(self, layer: DecoderLayer, room: StepRoom, key_offset: Tensor | None = None) -> None:
        shape = room.shape
        expected = StepShape.of(layer, shape.rotary, shape.dtype, shape.int8, shape.most_tokens, shape.gpu)
        if shape != expected:
            raise ValueError(f"the room is for {shape}, the layer of {expected}; make a room of the layer's shape")
        if key_offset is not None:
            found, offsets = (shape.int8, key_offset.dtype, tuple(key_offset.shape)), (layer.key_heads, layer.head_dim)
            if found != (True, torch.float32, offsets) or not key_offset.is_contiguous():
                raise ValueError(
                    f"key_offset: expected contiguous float32 {list(offsets)}, for a past in 8 bits, "
                    f"found {key_offset.dtype} {list(key_offset.shape)}, int8={shape.int8}"
                )
        self.layer, self.room, self.key_offset = layer, room, key_offset

    def load(self, hidden: Tensor, cos: Tensor, sin: Tensor, past: Tensor, tokens: int) -> None:
        """Bring a token's operands into the room, in one launch, which is not to be captured.

        hidden: [hidden], which may be the room's `out`. cos, sin: [rotary]. All of the room's dtype, on its device,
        contiguous. tokens: those before this one. past: int64 on the device. In 8 bits the addresses of its blocks, of
        one sequence, at least as many as tokens + 1 take: `KVBlocks.device_addresses`. Dense: the addresses of keys and
        values [key_heads, capacity, head_dim], contiguous, of the room's dtype, beginning at multiples of 16 bytes; and
        the capacity, above `tokens`. Raises ValueError for other shapes and dtypes, or more tokens than the room's.
        """
        from kernels.triton_step import load  # triton is no dependency without a GPU

        shape = self.room.shape
        for name, x, size in (("hidden", hidden, shape.hidden), ("cos", cos, shape.rotary), ("sin", sin, shape.rotary)):
            if x.dtype != shape.dtype or x.shape != (size,) or not x.is_contiguous():
                raise ValueError(f"{name}: expected contiguous {shape.dtype} [{size}], found {x.dtype} {list(x.shape)}")
        if not 0 <= tokens < shape.most_tokens:
            raise ValueError(f"{tokens} tokens and a new one in a room for {shape.most_tokens}; make a larger room")
        entries = shape.entries(tokens + 1)
        if past.dtype != torch.int64 or past.dim() != 1 or past.numel() < entries or not past.is_contiguous():
            raise ValueError(f"past: expected int64 of at least {entries}, found {past.dtype} {list(past.shape)}")
        load(self.room, hidden, cos, sin, past, tokens)

    def run(self) -> None:
        """Append the key and value of the token that was loaded to its past, and write the layer's output to `out`.

        Only launches, which are the same whatever was loaded: this may be captured, after it ran once, which compiles.
        """
        from kernels.triton_step import run

        run(self.layer, self.room, self.key_offset)

    @property
    def out(self) -> Tensor:
        """[hidden], in the room's dtype; memory of the room."""
        return self.room.out
