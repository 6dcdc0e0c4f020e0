"""The naive product in float32: dequantise, then multiply. The truth that every kernel is tested against."""

import torch
from torch import Tensor

from kernels.packed import PackedWeight, dequantize


def dequant_matmul_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias, with W dequantised and everything accumulated in float32.

    x: [..., K], any float dtype. bias: [N] or None. Returns float32 [..., N].
    """
    y = x.float() @ dequantize(weight, torch.float32).T
    return y if bias is None else y + bias.float()
