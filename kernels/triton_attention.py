"""Attention over 8-bit keys and values on the GPU, and how they get there. What a program computes:
kernels/triton_attention_kernels.py.

The context is split among programs, and a second kernel adds what they found in a fixed order. Where it is split
depends on the number of its tokens alone: a query does not see who else asks.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.kv_block import BLOCK_TOKENS, KVBlocks, KVContext
from kernels.triton_attention_kernels import append_kernel, attention_kernel, merge_kernel

SPLIT_TOKENS, MOST_SPLITS = 256, 64
"""A split has at least so many tokens, and more where there would be more of them."""

ROWS = 16
"""Queries of a program: as few as tensor cores take."""

_STEP_BYTES = 8 << 10
_SMALLEST_STEP = 16
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """How the kernel is launched for heads of some size: tokens of a step, elements of its tiles."""

    step_tokens: int
    key_block: int
    value_block: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def of(cls, key_dim: int, value_dim: int) -> "AttentionTile":
        """Choose it: a step's keys, or values, are at most 8 KiB where 16 tokens allow that."""
        key_block, value_block = (max(32, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
        step = min(BLOCK_TOKENS, max(_SMALLEST_STEP, _STEP_BYTES // max(key_block, value_block)))
        return cls(step, key_block, value_block)


def split_tokens(tokens: int) -> int:
    """Return the tokens of every split but the last, a power of two: of a context of so many."""
    return max(SPLIT_TOKENS, int(triton.next_power_of_2(triton.cdiv(tokens, MOST_SPLITS))))


def attention_triton(query_BHND: Tensor, context: KVContext, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return softmax(scaling * q k^T) v over a context on the queries' device, [B, H, N, value_dim] in their dtype.

    Operands as for `kernels.attention.attention`. Queries are rounded to 15 bits and weights of values to float16.
    """
    query = query_BHND if query_BHND.stride(-1) == 1 else query_BHND.contiguous()
    shape, tokens = context.shape, context.tokens
    batch, heads, queries, _ = query.shape
    group = heads // shape.key_heads
    tile = AttentionTile.of(shape.key_dim, shape.value_dim)
    split = split_tokens(tokens)
    splits = triton.cdiv(tokens, split)
    out = torch.empty(batch, queries, heads, shape.value_dim, dtype=query.dtype, device=query.device)
    whole = splits == 1
    parts = out if whole else torch.empty(splits, *out.shape, dtype=torch.float32, device=query.device)
    logsums = torch.empty(splits, *out.shape[:-1], dtype=torch.float32, device=query.device)
    seen = None if mask is None else mask.to(query.device).expand(batch, 1, queries, tokens).view(torch.uint8)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        attention_kernel[batch * shape.key_heads, splits, triton.cdiv(queries * group, ROWS)](
            query,
            context.blocks.device_addresses(query.device),
            seen,
            parts,
            logsums,
            *query.stride()[:3],
            *((0, 0, 0) if seen is None else (seen.stride(0), seen.stride(2), seen.stride(3))),
            scaling * math.log2(math.e),
            batch,
            shape.key_heads,
            queries,
            tokens,
            split // tile.step_tokens,
            GROUP=group,
            KEY_DIM=shape.key_dim,
            VALUE_DIM=shape.value_dim,
            KEY_BLOCK=tile.key_block,
            VALUE_BLOCK=tile.value_block,
            STEP=tile.step_tokens,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_M=ROWS,
            HAS_MASK=seen is not None,
            PTX=not _INTERPRETED,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if not whole:
            rows = batch * queries * heads
            merge_kernel[(rows,)](
                parts,
                logsums,
                out,
                rows,
                splits,
                VALUE_DIM=shape.value_dim,
                VALUE_BLOCK=tile.value_block,
                num_warps=1,
            )
    return out.transpose(1, 2)


def append_tokens_triton(
    blocks: KVBlocks, start: int, key_BKND: Tensor, value_BKND: Tensor, key_offset: Tensor | None = None
) -> None:
    """Do what `kernels.kv_block.write_tokens` does, bit for bit, in two launches whatever the number of tokens."""
    shape = blocks.shape
    _append(blocks, start, key_BKND, key_offset, 0, shape.nbytes - 4 * shape.rows)
    _append(blocks, start, value_BKND, None, shape.rows * shape.key_dim, shape.nbytes - 2 * shape.rows)


def _append(
    blocks: KVBlocks, start: int, x_BKND: Tensor, offset: Tensor | None, codes_byte: int, scale_byte: int
) -> None:
    x = x_BKND if x_BKND.stride(-1) == 1 else x_BKND.contiguous()
    batch, key_heads, count, dim = x.shape
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        append_kernel[batch * key_heads, count](
            x,
            offset,
            blocks.device_addresses(x.device),
            *x.stride()[:3],
            key_heads,
            start,
            codes_byte,
            scale_byte,
            DIM=dim,
            BLOCK=triton.next_power_of_2(dim),
            BLOCK_TOKENS=BLOCK_TOKENS,
            HAS_OFFSET=offset is not None,
            num_warps=1,
        )
