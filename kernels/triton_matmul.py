"""The int4 product on the GPU, in Triton: compute capability 8.0 and newer.

Every packed byte is loaded once; its two nibbles meet the even and the odd activations in two dots, so nothing is
interleaved. Codes minus zero point are small integers, exact in any float, and the scale of a group multiplies the
group's partial sum in float32. Above a few tiles of activations the weight is dequantised once and left to cuBLAS.

Letters: M activations, N outputs, K inputs, C groups in a row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import PackedWeight

FUSED_BATCH = 64
"""Activations up to which the fused kernel runs; beyond, dequantising once costs less than dequantising per tile."""

_OLDEST = (8, 0)


@dataclass(frozen=True, slots=True)
class Tile:
    """How the fused kernel is launched: outputs of a program, the most codes of a row it takes at a time, its warps."""

    block_m: int
    block_n: int
    largest_step: int
    num_warps: int
    num_stages: int

    def step(self, group: int) -> int:
        """Return the codes of one step: at most a group of `group`, 0 being the whole row."""
        return min(group or self.largest_step, self.largest_step)


TILES = (Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 8, 3))
"""For up to 16 activations, and for more; chosen so that nothing spills (`python -m kernels.ahead_of_time`)."""


@triton.jit
def matmul_kernel(
    x_MK,
    codes_NK,
    scale_NC,
    zero_NC,
    bias_N,
    out_MN,
    M,
    N,
    K,
    C,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One tile of x @ W.T; STEP codes of a row at a time, all of one group. GROUP is 0 for one group a row."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m[:, None] < M, n < N
    byte = tl.arange(0, STEP // 2)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, STEP)):
        j = step * (STEP // 2) + byte
        inside_k = j < K // 2
        pairs = tl.load(
            codes_NK + n[:, None].to(tl.int64) * (K // 2) + j[None, :],
            mask=inside_n[:, None] & inside_k[None, :],
            other=0,
        )
        group = 0 if GROUP == 0 else step * STEP // GROUP
        scale = tl.load(scale_NC + n * C + group, mask=inside_n, other=0.0).to(tl.float32)
        if HAS_ZERO:
            word = tl.load(zero_NC + (n // 8) * C + group, mask=inside_n, other=0)
            zero = (word >> ((n % 8) * 4)) & 15
        else:
            zero = tl.full((BLOCK_N,), 8, dtype=tl.int32)
        low = ((pairs & 15).to(tl.int32) - zero[:, None]).to(x_MK.dtype.element_ty)
        high = ((pairs >> 4).to(tl.int32) - zero[:, None]).to(x_MK.dtype.element_ty)
        k = step * STEP + tl.arange(0, STEP)
        x = tl.load(x_MK + m[:, None].to(tl.int64) * K + k[None, :], mask=inside_m & (k < K)[None, :], other=0.0)
        even, odd = tl.split(tl.reshape(x, (BLOCK_M, STEP // 2, 2)))
        partial = tl.dot(even, tl.trans(low), input_precision="ieee")
        partial = tl.dot(odd, tl.trans(high), acc=partial, input_precision="ieee")
        total += partial * scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias_N + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_MN + m[:, None].to(tl.int64) * N + n[None, :],
        total.to(out_MN.dtype.element_ty),
        mask=inside_m & inside_n[None, :],
    )


@triton.jit
def dequantize_kernel(
    codes_NK, scale_NC, zero_NC, out_NK, N, K, C, GROUP: tl.constexpr, STEP: tl.constexpr, HAS_ZERO: tl.constexpr
):
    """STEP values of one row of the weight, in out's dtype."""
    n = tl.program_id(0)
    j = tl.program_id(1) * (STEP // 2) + tl.arange(0, STEP // 2)
    inside = j < K // 2
    pairs = tl.load(codes_NK + n.to(tl.int64) * (K // 2) + j, mask=inside, other=0)
    group = tl.zeros_like(j) if GROUP == 0 else 2 * j // GROUP
    scale = tl.load(scale_NC + n * C + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.full((STEP // 2,), 8, dtype=tl.int32)
    if HAS_ZERO:
        zero = (tl.load(zero_NC + (n // 8) * C + group, mask=inside, other=0) >> ((n % 8) * 4)) & 15
    out = out_NK + n.to(tl.int64) * K + 2 * j
    tl.store(out, (((pairs & 15).to(tl.int32) - zero) * scale).to(out_NK.dtype.element_ty), mask=inside)
    tl.store(out + 1, (((pairs >> 4).to(tl.int32) - zero) * scale).to(out_NK.dtype.element_ty), mask=inside)


def dequant_matmul_triton(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias for operands that `dequant_matmul` has checked, all on one CUDA device.

    Raises ValueError on a device older than compute capability 8.0.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < _OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability(x.device)))
        raise ValueError(f"{x.device} has compute capability {found}; the int4 kernels need 8.0 (Ampere) or newer")
    rows = x.reshape(-1, weight.in_features).contiguous()
    if len(rows) > FUSED_BATCH:
        product = rows @ _dequantize(weight, x.dtype).T
        y = product if bias is None else (product + bias).to(x.dtype)
    else:
        y = _fused(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.out_features)


def _group(weight: PackedWeight) -> int:
    return 0 if weight.group_size == weight.in_features else weight.group_size


def _fused(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    tile = TILES[0] if len(x) <= TILES[0].block_m else TILES[1]
    grid = (triton.cdiv(weight.out_features, tile.block_n), triton.cdiv(len(x), tile.block_m))
    matmul_kernel[grid](
        x,
        weight.codes,
        weight.scale,
        weight.zero,
        bias,
        out,
        len(x),
        weight.out_features,
        weight.in_features,
        weight.scale.shape[1],
        GROUP=_group(weight),
        STEP=tile.step(_group(weight)),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_ZERO=weight.zero is not None,
        HAS_BIAS=bias is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return out


def _dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.codes.device)
    grid = (weight.out_features, triton.cdiv(weight.in_features, 1024))
    dequantize_kernel[grid](
        weight.codes,
        weight.scale,
        weight.zero,
        out,
        weight.out_features,
        weight.in_features,
        weight.scale.shape[1],
        GROUP=_group(weight),
        STEP=1024,
        HAS_ZERO=weight.zero is not None,
        enable_fp_fusion=True,
    )
    return out
