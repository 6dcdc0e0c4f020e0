"""The product on the GPU: compute capability 8.0 and newer. What a program computes: kernels/triton_kernels.py.

Few activations leave too few programs to fill the device; K is then split among several, whose float32 sums another
kernel adds in a fixed order. Above `Tuning.fused_batch` activations the weight is dequantised once and left to cuBLAS.
The weight may also lie in pinned host memory, from where the same kernel reads it across the bus.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from kernels.packed import PackedWeight
from kernels.triton_kernels import dequantize_kernel, matmul_kernel, read_kernel, reduce_kernel

_OLDEST = 8
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class Tile:
    """How the fused kernel is launched: activations and outputs of a program, the most codes of 4 bits at a time.

    scale_weights: the codes are scaled, not their sums, so that a step may take several groups.
    """

    block_m: int
    block_n: int
    largest_step: int
    num_warps: int
    num_stages: int
    scale_weights: bool = False

    def step(self, group: int, bits: int) -> int:
        """Return the codes of one step, of as many bytes for all bits; groups are of `group` codes, 0 the whole row."""
        largest = self.largest_step * 4 // bits
        return largest if self.scale_weights else min(group or largest, largest)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is chosen for an architecture.

    tiles: in order of the activations they are for. mapped: for weights in host memory, whose rows are asked for in
    whole 128-byte lines. fused_batch: activations up to which dequantising in the kernel costs less than doing it once.
    programs_per_processor: how many the device should be given, at least, before K is left in one piece.
    """

    tiles: tuple[Tile, ...]
    mapped: Tile
    fused_batch: int
    programs_per_processor: int


_DECODE, _SMALL, _MAPPED = (
    Tile(16, 64, 128, 2, 4),
    Tile(32, 128, 128, 4, 3),
    Tile(16, 32, 256, 4, 3, scale_weights=True),
)
_AMPERE = Tuning((_DECODE, _SMALL, Tile(64, 128, 128, 8, 3)), _MAPPED, fused_batch=64, programs_per_processor=4)
_HOPPER = Tuning((_DECODE, _SMALL, Tile(64, 128, 64, 4, 3)), _MAPPED, fused_batch=128, programs_per_processor=4)
TUNINGS = {8: _AMPERE, 9: _HOPPER, 10: _HOPPER, 12: _AMPERE}
"""By major compute capability. The tiles were chosen by their machine code (`python -m kernels.ahead_of_time`): nothing
spills, and the decode loop keeps to 4 instructions a weight. `fused_batch` and `programs_per_processor` follow from
what each path moves and issues, and have not met a GPU yet."""

_LARGEST_SPLIT = 16
_READ_BLOCK, _READS_PER_PROCESSOR = 1024, 8


@dataclass(frozen=True, slots=True)
class Launch:
    """How one fused product runs: its tile, and the splits of K with the steps in each."""

    tile: Tile
    splits: int
    steps_per_split: int


def plan_launch(M: int, weight: PackedWeight, tuning: Tuning, processors: int, mapped: bool) -> Launch:
    """Choose tile and splits for M activations on a device of that many multiprocessors."""
    largest = tuning.tiles[-1]
    tile = tuning.mapped if mapped else next((t for t in tuning.tiles if t.block_m >= M), largest)
    steps = triton.cdiv(weight.in_features, tile.step(_group(weight), weight.bits))
    programs = triton.cdiv(weight.out_features, tile.block_n) * triton.cdiv(M, tile.block_m)
    wanted = triton.cdiv(tuning.programs_per_processor * processors, max(1, programs))
    splits = max(1, min(wanted, _LARGEST_SPLIT, steps // 2))
    steps_per_split = triton.cdiv(steps, splits)
    return Launch(tile, triton.cdiv(steps, steps_per_split), steps_per_split)


def workspace_elements(M: int, weight: PackedWeight, device: torch.device) -> int:
    """Return how many float32 a product of M activations needs between its two kernels; 0 where it needs none."""
    tuning, processors = _tuning(device)
    if tuning.fused_batch < M:
        return 0
    launch = plan_launch(M, weight, tuning, processors, _mapped(weight, device))
    return 0 if launch.splits == 1 else launch.splits * M * weight.out_features


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
    mapped = _mapped(weight, x.device)
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
    """Return what is chosen for a device, and the number of its multiprocessors; the interpreter gets a small one."""
    if device.type != "cuda":
        return _AMPERE, 4
    major, minor = torch.cuda.get_device_capability(device)
    if major < _OLDEST:
        raise ValueError(f"{device} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer")
    return TUNINGS.get(major, TUNINGS[max(TUNINGS)]), torch.cuda.get_device_properties(device).multi_processor_count


def _mapped(weight: PackedWeight, device: torch.device) -> bool:
    """Whether the weight is read across the bus."""
    return device.type == "cuda" and not weight.codes.is_cuda


def _group(weight: PackedWeight) -> int:
    return 0 if weight.group_size == weight.in_features else weight.group_size


def fused(x: Tensor, weight: PackedWeight, bias: Tensor | None, workspace: Tensor | None, launch: Launch) -> Tensor:
    """Return x @ W.T + bias as `launch` says; x [M, K]. Raises ValueError if the workspace is too small."""
    M, N, K = len(x), weight.out_features, weight.in_features
    tile, step = launch.tile, launch.tile.step(_group(weight), weight.bits)
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    split = launch.splits > 1
    if split:
        size = launch.splits * M * N
        if workspace is None:
            workspace = torch.empty(size, dtype=torch.float32, device=x.device)
        elif workspace.numel() < size or workspace.dtype != torch.float32:
            raise ValueError(f"workspace: expected float32 of {size} elements, found {workspace.numel()}")
    x_sum = None if weight.zero is None or tile.scale_weights else _sums(x, step)
    matmul_kernel[triton.cdiv(N, tile.block_n), triton.cdiv(M, tile.block_m), launch.splits](
        x,
        x_sum,
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
        GROUP=_group(weight),
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
    return out


def _sums(x: Tensor, step: int) -> Tensor:
    """Return the sum of every step of x [M, K], float32 [M, steps]: what a zero point is multiplied by."""
    whole = x.shape[1] // step * step
    sums = x[:, :whole].unflatten(1, (-1, step)).sum(-1, dtype=torch.float32)
    return sums if whole == x.shape[1] else torch.cat((sums, x[:, whole:].sum(-1, True, dtype=torch.float32)), dim=1)


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
        GROUP=_group(weight),
        STEP=1024,
        HAS_ZERO=weight.zero is not None,
        enable_fp_fusion=True,
    )
    return out
