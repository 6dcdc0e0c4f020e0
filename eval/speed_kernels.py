"""The int4 product against what else is installed and against the memory, at the shapes of real models.

Every contender multiplies the same activations by weights of the same shape in its own format. Where few activations
make the product a matter of bandwidth, each rotates through copies larger than the caches, and the limit is a loop that
does nothing but read the copies of the packed weight.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.timing import Samples, Step, paired
from kernels.cpu_matmul import LEVELS, cpu_level, dequant_matmul_cpu, read_seconds
from kernels.packed import PackedWeight
from offload.command import Progress
from offload.errors import UsageError

MODEL_SHAPES = {
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "qwen3-8b": ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)),
}
"""(N, K) of the linears of a decoder layer: q and o, k and v, gate and up, down."""

_SAMPLE_SECONDS = 0.02
_MEMORY_BOUND_BATCH = 8
_SMALLEST_POOL_BYTES = 256 << 20
_LARGEST_POOL_BYTES = 1 << 30
_MOST_COPIES = 2000


@dataclass(frozen=True, slots=True)
class Case:
    """One product: x [M, K] times an int4 weight [N, K] in groups of G."""

    n: int
    k: int
    group_size: int
    m: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.n * self.k // 2 + 2 * self.n * (self.k // self.group_size)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender at one case. limit: the read of the packed bytes in the same rounds, None where it is no limit."""

    case: Case
    contender: str
    time: Samples
    limit: Samples | None
    peers: dict[str, Samples]

    @property
    def packed_gb_per_second(self) -> float:
        """Packed bytes of the weight by the median time, in 10^9 bytes a second, whatever the contender reads."""
        return self.case.packed_bytes / self.time.median / 1e9

    @property
    def gop_per_second(self) -> float:
        """2 M N K operations by the median time, in 10^9 a second."""
        return 2 * self.case.m * self.case.n * self.case.k / self.time.median / 1e9

    def row(self) -> dict[str, str | int | float]:
        """Return the figures as columns of the results file."""
        limit = self.limit
        return {
            "n": self.case.n,
            "k": self.case.k,
            "group_size": self.case.group_size,
            "m": self.case.m,
            "contender": self.contender,
            "p20_us": round(self.time.percentile(0.2) * 1e6, 1),
            "p50_us": round(self.time.median * 1e6, 1),
            "p80_us": round(self.time.percentile(0.8) * 1e6, 1),
            "packed_gb_per_s": round(self.packed_gb_per_second, 2),
            "gop_per_s": round(self.gop_per_second, 1),
            "read_gb_per_s": "" if limit is None else round(self.case.packed_bytes / limit.median / 1e9, 2),
            "of_read": "" if limit is None else round(self.time.speedup_over(limit), 3),
            **{
                f"x_{name.replace(' ', '_')}": round(self.time.speedup_over(peer), 2)
                for name, peer in self.peers.items()
            },
        }


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What one run measured."""

    measurements: tuple[Measurement, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for every contender at every case."""
        return [measurement.row() for measurement in self.measurements]

    def table(self) -> str:
        """Return a line for every contender at every case."""
        header = (
            f"{'N':>6} {'K':>6} {'M':>5}  {'contender':12} {'median':>10} {'packed':>11} {'':>12} {'of read':>8}  over"
        )
        return "\n".join([header, *map(_line, self.measurements)])

    def draw(self, path: Path) -> None:
        """Draw the speed-up over the batch. Raises ResourceError without matplotlib."""
        from eval.picture import draw_speedups

        draw_speedups(list(self.measurements), path)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--shapes", default="llama-3-8b", help=f"{', '.join(MODEL_SHAPES)}, or NxK, separated by commas")
    add("--batches", default="1,4,16,32,64,128,512,2048", help="activations M, separated by commas")
    add("--group-size", type=int, choices=[32, 64, 128], default=128, help="weights that share a scale")
    add("--rounds", type=int, default=15, help="samples of each contender")


def measure(options: argparse.Namespace) -> KernelReport:
    """Time every contender at every shape and batch. Raises UsageError for flags that cannot be meant."""
    cases = [Case(n, k, options.group_size, m) for n, k in _shapes(options.shapes) for m in _batches(options.batches)]
    for case in cases:
        if case.k % case.group_size:
            raise UsageError(f"--group-size {case.group_size}: does not divide K={case.k}")
    return KernelReport(tuple(_measurements(cases, options.rounds)))


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", part)
        if part in MODEL_SHAPES:
            shapes += MODEL_SHAPES[part]
        elif match:
            shapes.append((int(match[1]), int(match[2])))
        else:
            raise UsageError(f"--shapes {part!r}: expected {', '.join(MODEL_SHAPES)} or NxK, such as 4096x4096")
    return shapes


def _batches(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batches {text!r}: expected numbers above zero, separated by commas")
    return [int(part) for part in parts]


def _line(item: Measurement) -> str:
    row = item.row()
    of_read = f"{row['of_read']:.0%}" if row["of_read"] != "" else "-"
    peers = "  ".join(
        f"{name} {item.time.speedup_over(peer):.2f}x" for name, peer in item.peers.items() if name != item.contender
    )
    return (
        f"{item.case.n:6} {item.case.k:6} {item.case.m:5}  {item.contender:12} {row['p50_us']:>7} us "
        f"{row['packed_gb_per_s']:6.1f} GB/s {row['gop_per_s']:6.0f} GOP/s {of_read:>8}  {peers}"
    )


def _measurements(cases: list[Case], rounds: int) -> Iterator[Measurement]:
    """Time every contender at every case. Progress on stderr."""
    progress = Progress("product", len(cases))
    for case in cases:
        memory_bound = case.m <= _MEMORY_BOUND_BATCH
        contenders = _contenders(case, _pool_bytes() if memory_bound else 0)
        times = paired(contenders, rounds, _SAMPLE_SECONDS)
        limit = times.pop("read", None)
        peers = {name: time for name, time in times.items() if name.startswith("torch")}
        for name, time in times.items():
            yield Measurement(case, name, time, limit, peers)
        progress.advance(f"N {case.n}, K {case.k}, M {case.m}")


def _contenders(case: Case, pool_bytes: int) -> dict[str, Step]:
    """Return what is timed, each with its own copies of the weight, at least two and `pool_bytes` together."""
    groups = case.k // case.group_size
    codes = torch.randint(0, 256, (case.n, case.k // 2), dtype=torch.uint8)
    scale = torch.rand(case.n, groups).add_(0.5).to(torch.bfloat16)
    packed = [PackedWeight(copy, scale.clone(), None, case.group_size) for copy in _copies(codes, pool_bytes)]
    x = torch.randn(case.m, case.k)
    x_bf16 = x.to(torch.bfloat16)
    dense = _copies(torch.rand(case.n, case.k), pool_bytes)
    dense_bf16 = _copies(dense[0].to(torch.bfloat16), pool_bytes)
    contenders: dict[str, Step] = {}
    for level in range(1, cpu_level() + 1):
        contenders[LEVELS[level]] = _ours(x, packed, level)
    contenders["torch fp32"] = lambda i: F.linear(x, dense[i % len(dense)])
    contenders["torch bf16"] = lambda i: F.linear(x_bf16, dense_bf16[i % len(dense_bf16)])
    if case.n % 64 == 0:
        of_torch = _copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(_codes(codes), 1), pool_bytes)
        scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous()
        contenders["torch int4"] = lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_bf16, of_torch[i % len(of_torch)], case.group_size, scale_and_zero
        )
    if pool_bytes:
        contenders["read"] = lambda i: (
            read_seconds(packed[i % len(packed)].codes),
            read_seconds(_bytes(packed[i % len(packed)].scale)),
        )
    return contenders


def _ours(x: Tensor, packed: list[PackedWeight], level: int) -> Step:
    return lambda i: dequant_matmul_cpu(x, packed[i % len(packed)], None, "fast", level)


def _codes(pairs: Tensor) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).to(torch.int32)


def _copies(tensor: Tensor, pool_bytes: int) -> list[Tensor]:
    count = min(max(1, pool_bytes // tensor.nbytes), _MOST_COPIES)
    return [tensor, *(tensor.clone() for _ in range(count))]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _pool_bytes() -> int:
    """Return twice the last cache, between 256 MiB and 1 GiB: copies that rotate come from memory."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    largest = max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=0)
    return min(max(2 * largest, _SMALLEST_POOL_BYTES), _LARGEST_POOL_BYTES)
