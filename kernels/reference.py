"""The naive product and attention in float32: dequantise, then compute. The truth that kernels are tested against."""

import torch
from torch import Tensor

from kernels.kv_block import KVContext, dequantize_blocks
from kernels.packed import PackedWeight, dequantize


def dequant_matmul_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias, with W dequantised and everything accumulated in float32.

    x: [..., K], any float dtype. bias: [N] or None. Returns float32 [..., N].
    """
    y = x.float() @ dequantize(weight, torch.float32).T
    return y if bias is None else y + bias.float()


def attention_reference(query_BHND: Tensor, context: KVContext, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return softmax(scaling * q k^T) v over a quantised context, everything in float32: [B, H, N, value_dim].

    query_BHND: of the last N tokens of the context; heads h*G .. h*G + G - 1 share key head h. Query i sees the tokens
    up to its own. mask: bool, broadcast to [B, 1, N, T], True where a query may look, in place of that; a query that
    may look nowhere gets zeros, as torch gives it.
    """
    keys, values = dequantize_blocks(context)
    queries, tokens = query_BHND.shape[2], context.tokens
    group = query_BHND.shape[1] // keys.shape[1]
    scores = scaling * (query_BHND.float() @ keys.repeat_interleave(group, dim=1).transpose(2, 3))
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=scores.device).tril(tokens - queries)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).masked_fill(~mask, 0.0)
    return weights @ values.repeat_interleave(group, dim=1)
