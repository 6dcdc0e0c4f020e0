"""The product on the GPU: compute capability 8.0 and newer. What a program computes: kernels/triton_kernels.py.

Few activations leave too few programs to fill the device; K is then split among several, whose float32 sums another
kernel adds in a fixed order. Above `Tuning.fused_batch` activations the weight is dequantised once and left to cuBLAS.
The weight may also lie in pinned host memory, from where the same kernel reads it across the bus.
"""

from contextlib import nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

from kernels.packed import PackedWeight
from kernels.triton_kernels import dequantize_kernel, matmul_kernel, read_kernel, reduce_kernel, sums_kernel
from kernels.triton_tuning import OLDEST, GpuKind, Launch, Tuning, group_codes, plan_launch, split_elements, tuning_of

_INTERPRETED = bool(triton.knobs.runtime.interpret)

_READ_BLOCK, _READS_PER_PROCESSOR = 1024, 8
_SUMS = 8
"""Of a program."""


def workspace_elements(M: int, weight: PackedWeight, device: torch.device) -> int:
    """Return how many float32 a product of M activations needs between its two kernels; 0 where it needs none."""
    tuning, processors = _tuning(device)
    return split_elements(M, weight, tuning, processors, is_mapped(weight, device))


def dequant_matmul_triton(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, workspace: Tensor | None = None
) -> Tensor:
    """Return x @ W.T + bias for operands that `dequant_matmul` has checked.

    x: on a CUDA device; the weight there or in pinned host memory. workspace: float32 of at least
    `workspace_elements`, owned by the caller, who runs several products one after the other with it; None allocates.
    Raises ValueError on a device older than compute capability 8.0, and for more activations than a tile has where the
    weight lies in host memory: it would cross the bus several times.
    """
    tuning, processors = _tuning(x.device)
    rows = x.reshape(-1, weight.in_features).contiguous()
    mapped = is_mapped(weight, x.device)
    if mapped and len(rows) > tuning.mapped.block_m:
        raise ValueError(
            f"{len(rows)} activations, the weight in host memory: at most {tuning.mapped.block_m}; copy it first"
        )
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if len(rows) > tuning.fused_batch:
            product = rows @ _dequantize(weight, x.dtype).T
            y = product if bias is None else (product + bias).to(x.dtype)
        else:
            y = fused(rows, weight, bias, workspace, plan_launch(len(rows), weight, tuning, processors, mapped))
    return y.view(*x.shape[:-1], weight.out_features)


def most_mapped(device: torch.device) -> int:
    """Return how many activations a weight in host memory is multiplied by at once."""
    return _tuning(device)[0].mapped.block_m


def read_sums(buffer: Tensor, device: torch.device) -> Tensor:
    """Read a buffer once, as fast as the memory it lies in gives it: the limit of a product with so many bytes.

    buffer: uint8, a multiple of 4 bytes, on the device or in pinned host memory. Returns int32 sums of its words, one a
    program, on the device.
    """
    words = buffer.view(torch.int32)
    programs = _READS_PER_PROCESSOR * _tuning(device)[1]
    sums = torch.empty(programs, dtype=torch.int32, device=device)
    steps = triton.cdiv(len(words), programs * _READ_BLOCK)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        read_kernel[(programs,)](words, sums, len(words), steps, BLOCK=_READ_BLOCK, num_warps=4)
    return sums


@cache
def _tuning(device: torch.device) -> tuple[Tuning, int]:
    """Return what is chosen for a device, and the number of its multiprocessors."""
    gpu = GpuKind.of(device)
    if gpu.capability < OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(f"{device} has compute capability {found}; the kernels need 8.0 (Ampere) or newer")
    return tuning_of(gpu.capability), gpu.processors


def is_mapped(weight: PackedWeight, device: torch.device) -> bool:
    """Whether the weight is read across the bus, or multiplied as if it were."""
    return weight.as_mapped or (device.type == "cuda" and not weight.codes.is_cuda)


def fused(x: Tensor, weight: PackedWeight, bias: Tensor | None, workspace: Tensor | None, launch: Launch) -> Tensor:
    """Return x @ W.T + bias as `launch` says; x [M, K]. Raises ValueError if the workspace is too small."""
    M, N = len(x), weight.out_features
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    if launch.splits > 1 and workspace is None:
        workspace = torch.empty(launch.splits * M * N, dtype=torch.float32, device=x.device)
    sums, step = None, summed_step(weight, launch)
    if step:
        sums = torch.empty(M, triton.cdiv(weight.in_features, step), dtype=torch.float32, device=x.device)
        launch_sums(x, step, sums)
    launch_product(x, weight, bias, out, launch, sums, workspace)
    return out


def summed_step(weight: PackedWeight, launch: Launch) -> int:
    """Return of how many activations each the product wants sums, see `launch_sums`; 0 where it wants none."""
    if weight.zero is None or launch.tile.scale_weights:
        return 0
    return launch.tile.step(group_codes(weight), weight.bits)


def launch_sums(x: Tensor, step: int, sums: Tensor) -> None:
    """Launch the sums of every `step` activations of x [M, K], contiguous: float32 [M, ceil(K / step)], or longer.

    Raises ValueError if `sums` is too small.
    """
    M, K = x.shape
    steps = triton.cdiv(K, step)
    if sums.numel() < M * steps or sums.dtype != torch.float32:
        raise ValueError(f"sums: expected float32 of {M * steps} elements, found {sums.numel()}")
    sums_kernel[triton.cdiv(steps, _SUMS), M](x, sums, K, STEP=step, STEPS=_SUMS, num_warps=1)


def launch_product(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    launch: Launch,
    sums: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """Launch out = x @ W.T + bias as `launch` says, allocating nothing; x [M, K] and out [M, N] contiguous, M not 0.

    sums: of `launch_sums` where `summed_step` wants them. workspace: float32, contiguous, where `launch` has splits.
    Raises ValueError if the workspace is too small.
    """
    M, N, K = len(x), weight.out_features, weight.in_features
    tile, step = launch.tile, launch.tile.step(group_codes(weight), weight.bits)
    split, size = launch.splits > 1, launch.splits * M * N
    if split and (workspace is None or workspace.numel() < size or workspace.dtype != torch.float32):
        found = None if workspace is None else workspace.numel()
        raise ValueError(f"workspace: expected float32 of {size} elements, found {found}")
    matmul_kernel[triton.cdiv(N, tile.block_n), triton.cdiv(M, tile.block_m), launch.splits](
        x,
        sums,
        weight.codes,
        weight.scale,
        weight.zero,
        None if split else bias,
        workspace if split else out,
        M,
        N,
        K,
        weight.codes.shape[1],
        weight.scale.shape[1],
        launch.steps_per_split,
        BITS=weight.bits,
        GROUP=group_codes(weight),
        STEP=step,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        WHOLE_STEPS=K % step == 0,
        SCALE_WEIGHTS=tile.scale_weights,
        HAS_ZERO=weight.zero is not None,
        HAS_BIAS=bias is not None and not split,
        PTX=not _INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    if split:
        reduce_kernel[(triton.cdiv(M * N, 1024),)](
            workspace,
            bias,
            out,
            M * N,
            N,
            SPLITS=launch.splits,
            BLOCK=1024,
            HAS_BIAS=bias is not None,
            enable_fp_fusion=True,
        )


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
        BITS=weight.bits,
        GROUP=group_codes(weight),
        STEP=1024,
        HAS_ZERO=weight.zero is not None,
        enable_fp_fusion=True,
    )
    return out
