"""The product with packed weights against what else is installed and against the memory, at the shapes of real models.

Every contender multiplies the same activations by the same weight in its own format, and rotates through copies of it
that are together larger than the caches. The limit is a loop that does nothing but read the packed weight's copies,
from the memory it lies in.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval.speed import cpu
from eval.speed.measurement import PEERS, Case, Measurement
from eval.speed.picture import draw_speedups
from kernels.packed import PackedWeight
from offload.command import Progress
from offload.errors import UsageError

if TYPE_CHECKING:
    from eval.speed import cuda  # needs triton, which a machine without a GPU may lack

MODEL_SHAPES = {
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "qwen3-8b": ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)),
}
"""(N, K) of the linears of a decoder layer: q and o, k and v, gate and up, down."""

_READS = ("read", "read mapped")
"""What only reads the packed bytes, from the memory they lie in. "X mapped" is held against the second."""

_SAMPLE_SECONDS = 0.02
_MEMORY_BOUND_BATCH = 16


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What one run measured, and the versions of the packages it was set against besides torch.

    failure: as in `eval.speed.report.Rows`.
    """

    measurements: tuple[Measurement, ...]
    peer_versions: str
    failure: None = None

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for every contender at every case."""
        return [measurement.row() | {"peer_versions": self.peer_versions} for measurement in self.measurements]

    def table(self) -> str:
        """Return a line for every contender at every case, with how many times as fast as each peer it is."""
        peers = [name for name in PEERS if any(name in item.peers for item in self.measurements)]
        header = f"{'N':>6} {'K':>6} {'M':>5}  {'contender':13} {'us':>9} {'GB/s':>6} {'GOP/s':>6} {'of read':>7}"
        lines = [header + "".join(f"{'x ' + name:>14}" for name in peers)]
        for item in self.measurements:
            row = item.row()
            of_read = "" if item.limit is None else f"{row['of_read']:.0%}"
            lines.append(
                f"{item.case.n:6} {item.case.k:6} {item.case.m:5}  {item.contender:13} {row['p50_us']:9} "
                f"{item.packed_gb_per_second:6.1f} {item.gop_per_second:6.0f} {of_read:>7}"
                + "".join(f"{row[f'x_{name}'.replace(' ', '_')]:>14}" for name in peers)
            )
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Draw the speed-up over the batch. Raises ResourceError without matplotlib."""
        draw_speedups(list(self.measurements), path)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--shapes", default="llama-3-8b", help=f"{', '.join(MODEL_SHAPES)}, or NxK, separated by commas")
    add("--batches", default="1,4,16,32,64,128,512,2048", help="activations M, separated by commas")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the products run")
    add("--bits", type=int, choices=[4, 8], default=4, help="of a weight's code")
    add("--group-size", type=int, choices=[32, 64, 128], default=128, help="weights that share a scale")
    add("--rounds", type=int, default=15, help="samples of each contender")
    add("--ggml", type=Path, metavar="DIR", help="where ggml's shared libraries are, if not in the package llama_cpp")


def measure(options: argparse.Namespace) -> KernelReport:
    """Time every contender at every shape and batch. Raises UsageError for flags that cannot be meant."""
    shapes, batches = _shapes(options.shapes), _batches(options.batches)
    for _, k in shapes:
        if k % options.group_size:
            raise UsageError(f"--group-size {options.group_size}: does not divide K={k}")
    cases = [Case(n, k, options.group_size, m, options.bits) for n, k in shapes for m in batches]
    contenders = _contenders(options)
    return KernelReport(tuple(_measurements(cases, contenders, options)), contenders.peer_versions)


def _measurements(
    cases: list[Case], contenders: "cpu.Contenders | cuda.Contenders", options: argparse.Namespace
) -> Iterator[Measurement]:
    """Time every contender at every case; the cases of a shape follow each other and share its copies."""
    progress = Progress("product", len(cases))
    for (n, k), of_shape in groupby(cases, lambda case: (case.n, case.k)):
        binds = contenders(random_weight(n, k, options.group_size, options.bits))
        for case in of_shape:
            x = contenders.activations(case.m, k)
            left_out = () if case.m <= _MEMORY_BOUND_BATCH else _READS
            bound = {name: bind(x) for name, bind in binds.items() if name not in left_out}
            steps = {name: step for name, step in bound.items() if step is not None}
            times = contenders.time(steps, case.m, options.rounds, _SAMPLE_SECONDS)
            peers = {name: time for name, time in times.items() if name in PEERS}
            for name in (name for name in times if name not in _READS):
                limit = times.get("read mapped" if name.endswith(" mapped") else "read")
                yield Measurement(case, name, times[name], limit, peers, options.device)
            progress.advance(f"N {n}, K {k}, M {case.m}")


def _contenders(options: argparse.Namespace) -> "cpu.Contenders | cuda.Contenders":
    """Return the contenders of the device that was named. Raises UsageError where there is none."""
    if options.device == "cpu":
        return cpu.Contenders(options.ggml)
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device; leave it out to measure the CPU")
    from eval.speed import cuda

    return cuda.Contenders(torch.device("cuda", torch.cuda.current_device()))


def random_weight(n: int, k: int, group_size: int, bits: int) -> PackedWeight:
    """Return a symmetric weight whose codes are random, with scales from 0.5 to 1.5."""
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    scale = torch.rand(n, k // group_size).add_(0.5).to(torch.bfloat16)
    return PackedWeight(codes, scale, None, group_size, bits)


def _shapes(text: str) -> list[tuple[int, int]]:
    """Return the shapes that are named, each once."""
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", part)
        if part in MODEL_SHAPES:
            shapes += MODEL_SHAPES[part]
        elif match:
            shapes.append((int(match[1]), int(match[2])))
        else:
            raise UsageError(f"--shapes {part!r}: expected {', '.join(MODEL_SHAPES)} or NxK, such as 4096x4096")
    return list(dict.fromkeys(shapes))


def _batches(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batches {text!r}: expected numbers above zero, separated by commas")
    return [int(part) for part in parts]
