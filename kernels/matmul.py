"""The one door to the kernels: checks the operands, then picks the kernel of their device.

The product is also an operator of torch, `torch.ops.int4_offload.dequant_matmul`, which torch.compile passes through; a
direct call does not go through torch's dispatcher, whose cost is that of a small product.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.packed import PackedWeight

Mode = Literal["fast", "exact"]
_MODES = get_args(Mode)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequant_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, mode: Mode = "fast") -> Tensor:
    """Multiply activations by a packed weight without materialising it: x @ W.T + bias.

    x: [..., K] float32, bfloat16 or float16, on the weight's device; or on a CUDA device, the weight in pinned host
    memory, where it is read across the bus. bias: [N] on x's device, or None.
    mode: "fast" may quantise activations to int8 by group (the CPU kernel does); "exact" keeps them in float32.
    Returns [..., N] in x's dtype, accumulated in float32.
    Raises ValueError if K, dtype or device differ, or for another mode.
    """
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r}; expected {' or '.join(map(repr, _MODES))}")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has K={x.shape[-1]}, the weight has K={weight.in_features}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}; expected float32, bfloat16 or float16")
    if x.device != weight.codes.device and not (x.is_cuda and weight.codes.is_pinned()):
        raise ValueError(f"x is on {x.device}, the weight on {weight.codes.device}")
    if bias is not None and (bias.shape != (weight.out_features,) or bias.device != x.device):
        raise ValueError(
            f"bias: expected [{weight.out_features}] on {x.device}, found {list(bias.shape)} on {bias.device}"
        )
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.int4_offload.dequant_matmul(
            x, weight.codes, weight.scale, weight.zero, bias, weight.group_size, weight.bits, mode, weight.as_mapped
        )
        return product
    return _product(x, weight, bias, mode)


def _product(x: Tensor, weight: PackedWeight, bias: Tensor | None, mode: Mode) -> Tensor:
    if x.is_cuda:
        from kernels.triton_matmul import dequant_matmul_triton

        return dequant_matmul_triton(x, weight, bias)
    from kernels.cpu_matmul import dequant_matmul_cpu

    return dequant_matmul_cpu(x, weight, bias, mode)


def _operator(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    bits: int,
    mode: Mode,
    as_mapped: bool = False,
) -> Tensor:
    return _product(x, PackedWeight(codes, scale, zero, group_size, bits, as_mapped), bias, mode)


def _fake(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    """Say what comes out, of which shape, dtype and device, without computing it."""
    return x.new_empty(*x.shape[:-1], codes.shape[0])


_LIBRARY = torch.library.Library("int4_offload", "FRAGMENT")
_LIBRARY.define(
    "dequant_matmul(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int group_size, int bits,"
    " str mode, bool as_mapped=False) -> Tensor"
)
_LIBRARY.impl("dequant_matmul", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("int4_offload::dequant_matmul", _fake, lib=_LIBRARY)
