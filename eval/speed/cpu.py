"""The contenders on the CPU: our levels, torch's linears and its products with codes, ggml, and the read of memory."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.speed.ggml import Ggml, GgmlWeight, find_directory, survived
from eval.speed.timing import Bind, Samples, Step, copies_in, paired
from kernels.cpu_matmul import LEVELS, cpu_level, dequant_matmul_cpu, dequantize_cpu, read_seconds
from kernels.packed import PackedWeight, symmetric_zero, unpack
from offload.command import format_bytes, say

_SMALLEST_POOL_BYTES = 256 << 20
_LARGEST_POOL_BYTES = 1 << 30
_SHARE_OF_FREE_MEMORY = 4


class Contenders:
    """What is timed on the CPU."""

    def __init__(self, ggml: Path | None) -> None:
        """ggml: the directory of its libraries, None for that of an installed llama_cpp, if there is one."""
        directory = find_directory(ggml)
        self._ggml = None if directory is None else Ggml(directory)
        self.peer_versions = "" if self._ggml is None else f"ggml {self._ggml.version}"
        self._pool_bytes = _pool_bytes()

    def __call__(self, weight: PackedWeight) -> dict[str, Bind]:
        """Return contenders for one weight, by name, each with its own copies; "read" reads those of the packed one.

        Left out, which is said, is what might take more than a quarter of the memory that is free.
        """
        size = self._pool_bytes
        count = copies_in(size, weight.nbytes)
        packed = [
            PackedWeight(codes, scale, None, weight.group_size, weight.bits)
            for codes, scale in zip(_copies(weight.codes, count), _copies(weight.scale, count), strict=True)
        ]
        binds: dict[str, Bind] = {LEVELS[level]: _ours(packed, level) for level in range(1, cpu_level() + 1)}
        for name, (largest_bytes, prepare) in _TORCH.items():
            if has_room(name, weight, size, largest_bytes, _free_bytes()) and (bind := prepare(weight, size)):
                binds[name] = bind
        if self._ggml is not None and has_room("ggml", weight, 2 * size, 4, _free_bytes()):
            binds |= _of_ggml(self._ggml, weight, size)
        if cpu_level():
            binds["read"] = lambda x: _read(packed)
        return binds

    def activations(self, m: int, k: int) -> Tensor:
        """Return float32 [M, K]."""
        return torch.randn(m, k)

    def time(self, steps: Mapping[str, Step], m: int, rounds: int, sample_seconds: float) -> dict[str, Samples]:
        """Time the steps in turn."""
        return paired(steps, rounds, sample_seconds)


def _ours(packed: list[PackedWeight], level: int) -> Bind:
    return lambda x: lambda i: dequant_matmul_cpu(x, packed[i % len(packed)], None, "fast", level)


def _read(packed: list[PackedWeight]) -> Step:
    return lambda i: (
        read_seconds(packed[i % len(packed)].codes),
        read_seconds(packed[i % len(packed)].scale.view(-1).view(torch.uint8)),
    )


def _torch_fp32(weight: PackedWeight, pool_bytes: int) -> Bind:
    dense = pool(dequantize_cpu(weight, 0, weight.out_features), pool_bytes)
    return lambda x: lambda i: F.linear(x, dense[i % len(dense)])


def _torch_bf16(weight: PackedWeight, pool_bytes: int) -> Bind:
    dense = pool(dequantize_cpu(weight, 0, weight.out_features).to(torch.bfloat16), pool_bytes)

    def bind(x: Tensor) -> Step:
        x = x.to(torch.bfloat16)
        return lambda i: F.linear(x, dense[i % len(dense)])

    return bind


def _torch_int4(weight: PackedWeight, pool_bytes: int) -> Bind | None:
    if weight.bits != 4 or weight.out_features % 64:
        return None
    codes = unpack(weight)[0].to(torch.int32)
    packed = pool(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), pool_bytes)
    scale = weight.scale.to(torch.bfloat16)
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous()

    def bind(x: Tensor) -> Step:
        x = x.to(torch.bfloat16)
        return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed[i % len(packed)], weight.group_size, scale_and_zero
        )

    return bind


def _torch_int8(weight: PackedWeight, pool_bytes: int) -> Bind | None:
    """torch's operation has one scale a row, the first of its groups here: less work than ours, and another product."""
    if weight.bits != 8 or weight.in_features % 32:
        return None
    codes = pool((unpack(weight)[0].to(torch.int16) - symmetric_zero(8)).to(torch.int8), pool_bytes)
    scale = weight.scale[:, 0].to(torch.bfloat16).contiguous()

    def bind(x: Tensor) -> Step:
        x = x.to(torch.bfloat16)
        return lambda i: torch.ops.aten._weight_int8pack_mm(x, codes[i % len(codes)], scale)

    return bind


_TORCH: dict[str, tuple[int, Callable[[PackedWeight, int], Bind | None]]] = {
    "torch fp32": (4, _torch_fp32),
    "torch bf16": (6, _torch_bf16),
    "torch int4": (5, _torch_int4),
    "torch int8": (4, _torch_int8),
}
"""By name: the most bytes that an element of the weight takes while it is prepared, and what prepares it."""


def _of_ggml(ggml: Ggml, weight: PackedWeight, pool_bytes: int) -> dict[str, Bind]:
    """Return ggml's layouts that take the weight, the plain one only where REPACK does not."""
    binds: dict[str, Bind] = {}
    for name, layout in ggml.layouts().items():
        if name == "ggml plain" and "ggml repack" in binds:
            continue
        in_layout = GgmlWeight(ggml, layout, weight, pool_bytes)
        if in_layout.supported:
            batches = survived(ggml.directory, name, weight.bits)
            binds[name] = _bind_ggml(in_layout, batches)
    return binds


def _bind_ggml(weight: GgmlWeight, batches: frozenset[int]) -> Bind:
    return lambda x: weight.product(x) if min(len(x), 2) in batches else None


def _copies(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return copies in one allocation, as ggml has them: neighbouring pages are translated faster."""
    return tensor.expand(count, *tensor.shape).contiguous().unbind()


def pool(tensor: Tensor, pool_bytes: int) -> tuple[Tensor, ...]:
    """Return as many copies as fill a pool."""
    return _copies(tensor, copies_in(pool_bytes, tensor.nbytes))


def has_room(name: str, weight: PackedWeight, pool_bytes: int, element_bytes: int, free_bytes: int) -> bool:
    """Whether copies for a pool, with what preparing them takes, leave three quarters of the free memory alone.

    Says so if not.
    """
    needed = pool_bytes + weight.out_features * weight.in_features * element_bytes
    fits = needed <= free_bytes // _SHARE_OF_FREE_MEMORY
    if not fits:
        shape = f"N {weight.out_features}, K {weight.in_features}"
        say(f"{name}: left out at {shape}, it may take {format_bytes(needed)} of {format_bytes(free_bytes)} free")
    return fits


def _free_bytes() -> int:
    """Return what can be had without swapping, the page cache in it."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) << 10


def _pool_bytes() -> int:
    """Return twice the last cache, between 256 MiB and 1 GiB: copies that rotate come from memory."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    largest = max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=0)
    return min(max(2 * largest, _SMALLEST_POOL_BYTES), _LARGEST_POOL_BYTES)
