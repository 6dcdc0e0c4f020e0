"""The one door to attention over 8-bit keys and values: picks how it is computed, and takes the context part by part.

On the CPU up to MOST_FUSED_QUERIES new tokens read the codes directly. For more, as in a prompt, keys and values of
some tokens at a time are dequantised and given to torch's fused attention, and the parts are merged by their
logarithmic sums (online softmax, arXiv:2112.05682, section 2): whole contexts in the model's dtype never exist. On a
GPU all read the codes, part by part too, so that a context may be larger than its memory.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.cpu_attention import CompiledAttention, append_tokens_cpu
from kernels.cpu_matmul import compiled_library
from kernels.kv_block import (
    CHUNK_TOKENS,
    MOST_FUSED_QUERIES,
    KVBlocks,
    KVContext,
    dequantize_blocks,
    write_tokens,
)


def append_tokens(
    blocks: KVBlocks, start: int, key_BKND: Tensor, value_BKND: Tensor, key_offset: Tensor | None = None
) -> None:
    """Quantise new tokens into the blocks, in place, as tokens start..start + N of the context.

    key_BKND, value_BKND: float32, bfloat16 or float16, on the blocks' device. key_offset: as in `KVContext`.
    """
    if key_BKND.is_cuda:
        from kernels.triton_attention import append_tokens_triton  # triton is no dependency without a GPU

        append_tokens_triton(blocks, start, key_BKND, value_BKND, key_offset)
    elif compiled_library() is None:
        write_tokens(blocks, start, key_BKND, value_BKND, key_offset)
    else:
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key_BKND, value_BKND))
        append_tokens_cpu(blocks, start, key, value, key_offset)


def attention(
    query_BHND: Tensor,
    context: KVContext,
    scaling: float,
    mask: Tensor | None = None,
    parts: Iterable[tuple[int, int]] | None = None,
) -> Tensor:
    """Return softmax(scaling * q k^T) v over a context, [B, H, N, value_dim] in the queries' dtype.

    query_BHND: float32, bfloat16 or float16, of the last N tokens of the context; heads h*G .. h*G + G - 1 share key
    head h. mask: bool, broadcast to [B, 1, N, T], True where a query may look; None: up to its own token. parts: ranges
    of tokens, multiples of CHUNK_TOKENS but for the last, each in memory when it is reached; None: all of it is.
    """
    if query_BHND.shape[1] % context.shape.key_heads:
        raise ValueError(f"{query_BHND.shape[1]} heads cannot share {context.shape.key_heads} key heads evenly")
    attending = _kind(query_BHND)(query_BHND, context, scaling, mask)
    for first, last in [(0, context.tokens)] if parts is None else parts:
        attending.attend(first, last)
    out: Tensor = attending.result()
    return out


def _kind(query_BHND: Tensor) -> Any:
    """Return what attends to a context for such queries."""
    if query_BHND.is_cuda:
        from kernels.triton_attention import TritonAttention  # triton is no dependency without a GPU

        return TritonAttention
    fused = query_BHND.shape[2] <= MOST_FUSED_QUERIES and compiled_library() is not None
    return CompiledAttention if fused else DequantizedAttention


class DequantizedAttention:
    """The same on the CPU through torch, over keys and values that are dequantised chunk by chunk."""

    def __init__(self, query_BHND: Tensor, context: KVContext, scaling: float, mask: Tensor | None) -> None:
        self._query, self._context, self._scaling, self._mask = query_BHND, context, scaling, mask
        self._sum = torch.zeros(*query_BHND.shape[:3], context.shape.value_dim)
        self._logsum = torch.full((*query_BHND.shape[:3], 1), -torch.inf)

    def attend(self, first: int, last: int) -> None:
        """Take the tokens first..last, whose blocks are in memory; `first` is a multiple of CHUNK_TOKENS."""
        for start in range(first, last, CHUNK_TOKENS):
            self._take(start, min(start + CHUNK_TOKENS, last))

    def result(self) -> Tensor:
        """Return [B, H, N, value_dim] in the queries' dtype, once every token was taken."""
        return self._sum.to(self._query.dtype)

    def _take(self, first: int, last: int) -> None:
        query = self._query
        keys, values = dequantize_blocks(self._context, query.dtype, first, last)
        visible = visible_tokens(query.shape[2], self._context.tokens, first, last, self._mask)
        bias = None
        if visible is not None:
            bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
        widest = max(query.shape[-1], values.shape[-1])
        out, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(pad(x, (0, widest - x.shape[-1])) for x in (query, keys, values)), attn_mask=bias, scale=self._scaling
        )
        logsum = logsum[..., None]
        if visible is not None:  # of queries that see nothing torch gives the sum as 1
            logsum = logsum.masked_fill(~visible.any(-1, keepdim=True), -torch.inf)
        self._merge(out[..., : values.shape[-1]].float(), logsum)

    def _merge(self, out: Tensor, logsum: Tensor) -> None:
        total = torch.logaddexp(self._logsum, logsum)
        held, added = (torch.where(x == -torch.inf, 0.0, (x - total).exp()) for x in (self._logsum, logsum))
        self._sum = held * self._sum + added * out
        self._logsum = total


def visible_tokens(queries: int, tokens: int, first: int, last: int, mask: Tensor | None) -> Tensor | None:
    """Return where the last `queries` of `tokens` tokens may look in first..last, bool; None: everywhere.

    mask: as for `attention`. The result is [1 or B, 1, N, last - first].
    """
    if mask is not None:
        return mask[..., first:last]
    if last <= tokens - queries + 1:
        return None
    own = torch.arange(tokens - queries, tokens)[:, None]
    return (torch.arange(first, last) <= own)[None, None]
