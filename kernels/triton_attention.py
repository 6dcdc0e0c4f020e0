"""Attention over 8-bit keys and values on the GPU, and how they get there. What a program computes:
kernels/triton_attention_kernels.py.

The context is split among programs, and a second kernel adds what they found in a fixed order. Where it is split
depends on the number of its tokens and on whether a prompt asks, not on how much of it is on the device at once.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.kv_block import BLOCK_TOKENS, CHUNK_TOKENS, MOST_FUSED_QUERIES, KVBlocks, KVContext
from kernels.triton_attention_kernels import append_kernel, attention_kernel, merge_kernel
from kernels.triton_tuning import split_tokens

_STEP_BYTES = 8 << 10
_SMALLEST_STEP, _LARGEST_PROMPT_STEP = 16, 32
_CHUNK_BLOCKS = CHUNK_TOKENS // BLOCK_TOKENS
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """How the kernel is launched for heads of some size: queries of a program, tokens of a step, elements of its tiles.

    rows: as few as tensor cores take, and for a prompt as many as registers hold without spilling.
    """

    step_tokens: int
    key_block: int
    value_block: int
    rows: int
    num_warps: int
    num_stages: int = 3

    @classmethod
    def of(cls, key_dim: int, value_dim: int, queries: int = 1) -> "AttentionTile":
        """Choose it: a step's keys, or values, are at most 8 KiB where 16 tokens allow that."""
        key_block, value_block = (max(32, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
        step = min(BLOCK_TOKENS, max(_SMALLEST_STEP, _STEP_BYTES // max(key_block, value_block)))
        if queries > MOST_FUSED_QUERIES:
            rows = 64 if max(key_block, value_block) <= 256 else 16
            return cls(min(step, _LARGEST_PROMPT_STEP), key_block, value_block, rows, num_warps=8)
        return cls(step, key_block, value_block, rows=16, num_warps=4)


class TritonAttention:
    """softmax(scaling * q k^T) v over a context on the queries' device, part by part.

    Operands as for `kernels.attention.attention`. Queries are rounded to 15 bits and weights of values to float16.
    """

    def __init__(self, query_BHND: Tensor, context: KVContext, scaling: float, mask: Tensor | None) -> None:
        self._query = query = query_BHND if query_BHND.stride(-1) == 1 else query_BHND.contiguous()
        self._context, self._scaling = context, scaling
        batch, heads, self._queries, _ = query.shape
        self._prompt = self._queries > MOST_FUSED_QUERIES
        self._tile = AttentionTile.of(context.shape.key_dim, context.shape.value_dim, self._queries)
        self._split = split_tokens(context.tokens, self._queries)
        splits = triton.cdiv(context.tokens, self._split)
        self._held = min(splits, 2) if self._prompt else splits  # of a prompt what was found, and what is added to it
        out = torch.empty(batch, self._queries, heads, context.shape.value_dim, dtype=query.dtype, device=query.device)
        whole = splits == 1
        options: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        self._parts = out[None] if whole else torch.empty(self._held, *out.shape, **options)
        self._out = None if whole else out
        self._logsums = torch.empty(self._held, *out.shape[:-1], **options)
        tokens = context.tokens
        self._seen = None
        if mask is not None:
            self._seen = mask.to(query.device).expand(batch, 1, self._queries, tokens).view(torch.uint8)

    def attend(self, first: int, last: int) -> None:
        """Take the tokens first..last, whose blocks are in memory; `first` is a multiple of CHUNK_TOKENS."""
        start, stop = first // self._split, triton.cdiv(last, self._split)
        if not self._prompt:
            self._launch(start, stop, start)
            return
        for split in range(start, stop):
            self._launch(split, split + 1, min(split, 1))
            if split:
                self._merge(self._parts[0])

    def result(self) -> Tensor:
        """Return [B, H, N, value_dim] in the queries' dtype, once every token was taken."""
        if self._out is None:
            return self._parts[0].transpose(1, 2)
        if self._prompt:
            self._out.copy_(self._parts[0])
        else:
            self._merge(self._out)
        return self._out.transpose(1, 2)

    def _launch(self, start: int, stop: int, place: int) -> None:
        """Put what splits start..stop hold from `place` on among the parts."""
        query, context, shape = self._query, self._context, self._context.shape
        batch, heads = query.shape[:2]
        group = heads // shape.key_heads
        split_blocks, seen, tile = self._split // BLOCK_TOKENS, self._seen, self._tile
        with _on(query):
            attention_kernel[batch * shape.key_heads, stop - start, triton.cdiv(self._queries * group, tile.rows)](
                query,
                context.blocks.device_addresses(query.device, start * split_blocks, stop * split_blocks),
                seen,
                self._parts[place:],
                self._logsums[place:],
                *query.stride()[:3],
                *((0, 0, 0) if seen is None else (seen.stride(0), seen.stride(2), seen.stride(3))),
                self._scaling * math.log2(math.e),
                batch,
                shape.key_heads,
                self._queries,
                context.tokens,
                start,
                self._split // tile.step_tokens,
                GROUP=group,
                KEY_DIM=shape.key_dim,
                VALUE_DIM=shape.value_dim,
                KEY_BLOCK=tile.key_block,
                VALUE_BLOCK=tile.value_block,
                STEP=tile.step_tokens,
                BLOCK_TOKENS=BLOCK_TOKENS,
                BLOCK_M=tile.rows,
                HAS_MASK=seen is not None,
                PTX=not _INTERPRETED,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

    def _merge(self, out: Tensor) -> None:
        value_dim = self._context.shape.value_dim
        rows = out.numel() // value_dim
        with _on(out):
            merge_kernel[(rows,)](
                self._parts,
                self._logsums,
                out,
                rows,
                self._held,
                VALUE_DIM=value_dim,
                VALUE_BLOCK=self._tile.value_block,
                num_warps=1,
            )


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
    first = start // CHUNK_TOKENS * _CHUNK_BLOCKS  # those before it may be elsewhere
    with _on(x):
        append_kernel[batch * key_heads, count](
            x,
            offset,
            blocks.device_addresses(x.device, first),
            *x.stride()[:3],
            key_heads,
            start - first * BLOCK_TOKENS,
            codes_byte,
            scale_byte,
            DIM=dim,
            BLOCK=triton.next_power_of_2(dim),
            BLOCK_TOKENS=BLOCK_TOKENS,
            HAS_OFFSET=offset is not None,
            num_warps=1,
        )
