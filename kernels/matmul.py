"""The one door to the kernels: checks the operands, then picks the kernel of their device."""

from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.packed import PackedWeight

Mode = Literal["fast", "exact"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequant_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, mode: Mode = "fast") -> Tensor:
    """Multiply activations by an int4 weight without materialising it: x @ W.T + bias.

    x: [..., K] float32, bfloat16 or float16, on the weight's device. bias: [N] on the same device, or None.
    mode: "fast" may quantise activations to int8 by group (the CPU kernel does); "exact" keeps them in float32.
    Returns [..., N] in x's dtype, accumulated in float32.
    Raises ValueError if K, dtype or device differ, or for another mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}; expected {' or '.join(map(repr, get_args(Mode)))}")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has K={x.shape[-1]}, the weight has K={weight.in_features}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}; expected float32, bfloat16 or float16")
    if x.device != weight.codes.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.codes.device}")
    if bias is not None and (bias.shape != (weight.out_features,) or bias.device != x.device):
        raise ValueError(
            f"bias: expected [{weight.out_features}] on {x.device}, found {list(bias.shape)} on {bias.device}"
        )
    if x.is_cuda:
        from kernels.triton_matmul import dequant_matmul_triton

        return dequant_matmul_triton(x, weight, bias)
    from kernels.cpu_matmul import dequant_matmul_cpu

    return dequant_matmul_cpu(x, weight, bias, mode)
