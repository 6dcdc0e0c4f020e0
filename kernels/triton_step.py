"""The launches of a decode step on the GPU, see kernels/device_step.py. They allocate nothing and wait for nothing."""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from kernels.decoder import DecoderLayer, Projection
from kernels.kv_block import BLOCK_TOKENS, BlockShape
from kernels.step_room import StepRoom
from kernels.triton_attention import AttentionTile, head_block, launch_attention, launch_merge
from kernels.triton_matmul import is_mapped, launch_product, launch_sums, summed_step
from kernels.triton_step_kernels import (
    add_kernel,
    dense_attention_kernel,
    gate_kernel,
    load_kernel,
    norm_kernel,
    place_kernel,
)
from kernels.triton_tuning import plan_launch, tuning_of

_BLOCK = 1024
_NORM_ELEMENTS_PER_WARP = 512
DENSE_ROWS, DENSE_STAGES = 16, 3
"""Queries of a program of attention over a dense past, as few as tensor cores take, and what is under way to it."""

_SMALLEST_STEP = 16


def load(room: StepRoom, hidden: Tensor, cos: Tensor, sin: Tensor, past: Tensor, tokens: int) -> None:
    """Launch what brings a token's operands into the room, see `DeviceStep.load`; they have been checked."""
    entries = min(past.numel(), room["table"].numel())
    largest = max(hidden.numel(), cos.numel(), entries)
    with torch.cuda.device_of(hidden):
        load_kernel[(triton.cdiv(largest, _BLOCK),)](
            hidden,
            cos,
            sin,
            past,
            tokens,
            *(room[name] for name in ("hidden", "cos", "sin", "table", "tokens")),
            hidden.numel(),
            cos.numel(),
            entries,
            BLOCK=_BLOCK,
        )


def run(layer: DecoderLayer, room: StepRoom, key_offset: Tensor | None) -> None:
    """Launch the step of what is in the room, see `DeviceStep.run`."""
    with torch.cuda.device_of(room.out):
        _norm(room, layer.input_norm, layer.norm_epsilon)
        _products(room, "normed", layer.qkv, "qkv")
        _place(layer, room, key_offset)
        _attend(layer, room)
        _products(room, "mixed", (layer.output,), "product")
        _norm(room, layer.mlp_norm, layer.norm_epsilon, "product")
        _products(room, "normed", layer.gate_up, "gate_up")
        gated, out = room["gated"], room.out
        gate_kernel[(triton.cdiv(gated.numel(), _BLOCK),)](room["gate_up"], gated, gated.numel(), BLOCK=_BLOCK)
        _products(room, "gated", (layer.down,), "product")
        add_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            room["residual"], room["product"], out, out.numel(), BLOCK=_BLOCK
        )


def norm_warps(block: int) -> int:
    """Return the warps of the one program that takes the norm of so many elements."""
    return min(16, max(1, block // _NORM_ELEMENTS_PER_WARP))


def dense_step(head_dim: int, element_bytes: int) -> int:
    """Return the tokens of a dense past that are taken at a time: as many bytes as of one in 8 bits, if 16 allow it."""
    return max(_SMALLEST_STEP, AttentionTile.of(head_dim, head_dim).step_tokens // element_bytes)


def _norm(room: StepRoom, norm: Tensor, epsilon: float, added: str | None = None) -> None:
    hidden = room["hidden"]
    block = triton.next_power_of_2(hidden.numel())
    norm_kernel[(1,)](
        hidden,
        None if added is None else room[added],
        norm,
        room["residual"],
        room["normed"],
        epsilon,
        D=hidden.numel(),
        BLOCK=block,
        HAS_ADDED=added is not None,
        num_warps=norm_warps(block),
    )


def _products(room: StepRoom, x: str, projections: Sequence[Projection], out: str) -> None:
    """Launch the products of one vector with some weights, their outputs one behind the other."""
    x_MK, gpu, summed = room[x][None], room.shape.gpu, 0
    outputs = room[out].split([projection.weight.out_features for projection in projections])
    for projection, y in zip(projections, outputs, strict=True):
        weight = projection.weight
        mapped = is_mapped(weight, room.device)
        launch = plan_launch(1, weight, tuning_of(gpu.capability), gpu.processors, mapped)
        step = summed_step(weight, launch)
        if step not in (0, summed):
            launch_sums(x_MK, step, room["sums"])
            summed = step
        launch_product(x_MK, weight, projection.bias, y[None], launch, room["sums"] if step else None, room["splits"])


def _place(layer: DecoderLayer, room: StepRoom, key_offset: Tensor | None) -> None:
    shape = room.shape
    place_kernel[(shape.heads + 2 * shape.key_heads,)](
        room["qkv"],
        layer.query_norm,
        layer.key_norm,
        room["cos"],
        room["sin"],
        key_offset,
        room["table"],
        room["tokens"],
        room["queries"],
        layer.norm_epsilon,
        HEADS=shape.heads,
        KEY_HEADS=shape.key_heads,
        DIM=shape.head_dim,
        ROTARY=shape.rotary,
        BLOCK=head_block(shape.head_dim),
        BLOCK_TOKENS=BLOCK_TOKENS,
        HAS_QUERY_NORM=layer.query_norm is not None,
        HAS_KEY_NORM=layer.key_norm is not None,
        HAS_OFFSET=key_offset is not None,
        INT8=shape.int8,
        num_warps=1,
    )


def _attend(layer: DecoderLayer, room: StepRoom) -> None:
    shape, dim = room.shape, room.shape.head_dim
    mixed, queries = room["mixed"], room["queries"]
    parts = room["parts"] if shape.splits > 1 else mixed
    if shape.int8:
        launch_attention(
            queries.view(1, shape.heads, 1, dim),
            BlockShape(1, shape.key_heads, dim, dim),
            room["table"],
            None,
            parts,
            room["logsums"],
            layer.scaling,
            room["tokens"],
            range(shape.splits),
            shape.split_tokens,
        )
    else:
        group, step = shape.heads // shape.key_heads, dense_step(dim, shape.dtype.itemsize)
        dense_attention_kernel[shape.key_heads, shape.splits, triton.cdiv(group, DENSE_ROWS)](
            queries,
            room["table"],
            room["tokens"],
            parts,
            room["logsums"],
            layer.scaling * math.log2(math.e),
            shape.split_tokens // step,
            GROUP=group,
            DIM=dim,
            BLOCK=head_block(dim),
            STEP=step,
            BLOCK_M=DENSE_ROWS,
            num_stages=DENSE_STAGES,
        )
    if shape.splits > 1:
        launch_merge(parts, room["logsums"], mixed.view(shape.heads, dim), shape.splits)
