"""Attention over 8-bit keys and values on the GPU, and how they get there. What a program computes:
kernels/triton_attention_kernels.py.

The context is split among programs, and a second kernel adds what they found in a fixed order. Where it is split
depends on the number of its tokens and on whether a prompt asks, not on how much of it is on the device at once.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.kv_block import BLOCK_TOKENS, CHUNK_TOKENS, MOST_FUSED_QUERIES, BlockShape, KVBlocks, KVContext
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
        keys, values = head_block(key_dim), head_block(value_dim)
        step = min(BLOCK_TOKENS, max(_SMALLEST_STEP, _STEP_BYTES // max(keys, values)))
        if queries > MOST_FUSED_QUERIES:
            rows = 64 if max(keys, values) <= 256 else 16
            return cls(min(step, _LARGEST_PROMPT_STEP), keys, values, rows, num_warps=8)
        return cls(step, keys, values, rows=16, num_warps=4)


def head_block(dim: int) -> int:
    """Return the elements of a tile that holds heads of `dim` elements."""
    return max(32, int(triton.next_power_of_2(dim)))


class TritonAttention:
    """softmax(scaling * q k^T) v over a context on the queries' device, part by part.

    Operands as for `kernels.attention.attention`. Queries are rounded to 15 bits and weights of values to float16.
    """

    def __init__(self, query_BHND: Tensor, context: KVContext, scaling: float, mask: Tensor | None) -> None:
        self._query = query = query_BHND if query_BHND.stride(-1) == 1 else query_BHND.contiguous()
        self._context, self._scaling = context, scaling
        batch, heads, self._queries, _ = query.shape
        self._prompt = self._queries > MOST_FUSED_QUERIES
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
        blocks, split_blocks = self._context.blocks, self._split // BLOCK_TOKENS
        launch_attention(
            self._query,
            blocks.shape,
            blocks.device_addresses(self._query.device, start * split_blocks, stop * split_blocks),
            self._seen,
            self._parts[place:],
            self._logsums[place:],
            self._scaling,
            self._context.tokens,
            range(start, stop),
            self._split,
        )

    def _merge(self, out: Tensor) -> None:
        launch_merge(self._parts, self._logsums, out, self._held)


def launch_attention(
    query_BHND: Tensor,
    shape: BlockShape,
    addresses: Tensor,
    seen_BKNT: Tensor | None,
    parts_SBNHD: Tensor,
    logsums_SBNH: Tensor,
    scaling: float,
    tokens: int | Tensor,
    splits: range,
    split: int,
) -> None:
    """Launch attention over some splits of `split` tokens each, whose blocks begin at `addresses`.

    tokens: those of the context; in memory, int32 [1], those before the one query. seen: uint8, see `attention`. parts,
    logsums: what it writes, one for each of these splits, contiguous.
    """
    batch, heads, queries, _ = query_BHND.shape
    tile = AttentionTile.of(shape.key_dim, shape.value_dim, queries)
    group = heads // shape.key_heads
    with torch.cuda.device_of(query_BHND):
        attention_kernel[batch * shape.key_heads, len(splits), triton.cdiv(queries * group, tile.rows)](
            query_BHND,
            addresses,
            seen_BKNT,
            parts_SBNHD,
            logsums_SBNH,
            *query_BHND.stride()[:3],
            *((0, 0, 0) if seen_BKNT is None else (seen_BKNT.stride(0), *seen_BKNT.stride()[2:])),
            scaling * math.log2(math.e),
            batch,
            shape.key_heads,
            queries,
            tokens,
            splits.start,
            split // tile.step_tokens,
            GROUP=group,
            KEY_DIM=shape.key_dim,
            VALUE_DIM=shape.value_dim,
            KEY_BLOCK=tile.key_block,
            VALUE_BLOCK=tile.value_block,
            STEP=tile.step_tokens,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_M=tile.rows,
            HAS_MASK=seen_BKNT is not None,
            PTX=not _INTERPRETED,
            TOKENS_IN_MEMORY=isinstance(tokens, Tensor),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def launch_merge(parts_SRD: Tensor, logsums_SR: Tensor, out_RD: Tensor, splits: int) -> None:
    """Launch what adds the first `splits` parts, each of the size of `out`, in order; the first logsums become all's.

    R: any number of axes, of which only the product counts.
    """
    value_dim = out_RD.shape[-1]
    rows = out_RD.numel() // value_dim
    with torch.cuda.device_of(out_RD):
        merge_kernel[(rows,)](
            parts_SRD,
            logsums_SR,
            out_RD,
            rows,
            splits,
            VALUE_DIM=value_dim,
            VALUE_BLOCK=head_block(value_dim),
            num_warps=1,
        )


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
    with torch.cuda.device_of(x):
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
