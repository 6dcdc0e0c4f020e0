"""What this machine's links can do: memory, disk, the CPU kernel, and the bus to a GPU. Measured once, then cached.

Every figure is that of the code that will run: the int4 product itself, and reads of the checkpoint's own files by the
reader that streams them.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from kernels.cpu_matmul import compiled_library, cpu_backend, dequant_matmul_cpu, read_seconds, untiled_level
from kernels.matmul import dequant_matmul
from kernels.packed import PackedWeight
from kernels.triton_tuning import GpuKind
from offload.checkpoint import LayerBlob
from offload.errors import InputError
from offload.memory import PAGE_BYTES, Arena, FileReader
from offload.read_queue import read_blob
from offload.source import cache_directory
from offload.version import VERSION

_POOL_BYTES = 256 << 20
_ROWS, _INPUTS, _GROUP_SIZE = 4096, 4096, 64
_PREFILL_TOKENS, _JOINT_TOKENS = 512, 16
_SAMPLE_SECONDS = 0.4
_DISK_SECONDS = 2.0
_H100 = GpuKind(9, 132)


@dataclass(frozen=True, slots=True)
class DiskRate:
    """How fast blobs are read past the page cache: bytes a second of long reads, and what every read takes beside."""

    bytes_per_second: float
    seconds_per_read: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Links of a machine, in bytes or operations a second; those of a GPU are 0 where there is none.

    description, date: of what was measured and when. read: memory, by a loop that only reads. kernel: packed weights
    that the int4 product of one activation takes in; kernel_operations: of its products of 512 activations, two for
    a weight and activation. disk: long reads past the page cache; disk_seconds_per_read: what a read takes beside that.
    interference: seconds that the kernel takes longer for every second of a read meanwhile. copy: host to device from
    pinned memory. mapped: the product over weights in pinned host memory; device: in the device's own.
    device_runtime_bytes: what the device's memory holds before any tensor. device_capability, device_processors: what
    its kernels are launched by, see `GpuKind`. joint_operations: of the int4 product of one token of each of 16
    sequences, which is never tiled; 0 where that was not measured.
    """

    description: str
    date: str
    read_bytes_per_second: float
    kernel_bytes_per_second: float
    kernel_operations_per_second: float
    disk_bytes_per_second: float
    disk_seconds_per_read: float
    interference: float
    copy_bytes_per_second: float = 0.0
    mapped_bytes_per_second: float = 0.0
    device_bytes_per_second: float = 0.0
    device_operations_per_second: float = 0.0
    device_memory_bytes: int = 0
    device_runtime_bytes: int = 0
    device_capability: int = 0
    device_processors: int = 0
    joint_operations_per_second: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("description", "date"):
                if not isinstance(value, str):
                    raise ValueError(f"{field.name}: expected text, found {value!r}")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{field.name}: expected a number from 0 up, found {value!r}")
            if value == 0 and field.name in _ALWAYS_POSITIVE:
                raise ValueError(f"{field.name}: expected a number above 0")

    @property
    def has_device(self) -> bool:
        """Whether it has a GPU whose links are known."""
        return min(self.copy_bytes_per_second, self.mapped_bytes_per_second, self.device_bytes_per_second) > 0

    @property
    def gpu(self) -> GpuKind | None:
        """What products on its GPU are launched by, None without one; where that is not known, as of an H100."""
        if not self.has_device:
            return None
        return GpuKind(self.device_capability or _H100.capability, self.device_processors or _H100.processors)

    def with_disk(self, disk: DiskRate) -> "Machine":
        """Return the machine with another rate of its disk."""
        return replace(self, disk_bytes_per_second=disk.bytes_per_second, disk_seconds_per_read=disk.seconds_per_read)

    @classmethod
    def from_json(cls, values: object) -> "Machine":
        """Rebuild from `asdict`. Raises ValueError on unknown or missing keys and on values that are no figures."""
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.name in _REQUIRED}
        if not isinstance(values, dict) or not required <= set(values) <= known:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"expected the keys {sorted(required)}, found {found}")
        return cls(**values)


_ALWAYS_POSITIVE = tuple(field.name for field in fields(Machine))[2:6]
_REQUIRED = tuple(field.name for field in fields(Machine))[:8]


def read_machine(path: Path) -> Machine:
    """Read figures that `--save-machine` wrote, or a person. Raises InputError."""
    try:
        return Machine.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--machine {path}: cannot be used ({error})") from None


def measure(blobs: Sequence[LayerBlob]) -> Machine:
    """Measure this machine, and the disk that the shards `blobs` lie on, in some seconds.

    Raises CheckpointError if the shards cannot be read.
    """
    weights = _weights(_POOL_BYTES)
    pool_bytes = sum(weight.nbytes for weight in weights)
    activation = torch.randn(1, _INPUTS)
    many = torch.randn(_PREFILL_TOKENS, _INPUTS)

    def multiply(rows: torch.Tensor) -> Callable[[int], object]:
        return lambda index: dequant_matmul(rows, weights[index % len(weights)])

    with torch.inference_mode():
        seconds_per_product = _seconds_per_call(multiply(activation))
        seconds_per_tile = _seconds_per_call(multiply(many))
        joint = _joint_operations_per_second(weights)
        disk = disk_rate(blobs)
        beside_reads = _beside(lambda: _seconds_per_call(multiply(activation)), blobs)
    memory = torch.empty(pool_bytes, dtype=torch.uint8).fill_(1)
    device: dict[str, Any] = _device_links() if torch.cuda.is_available() else {}
    return Machine(
        description=describe_machine(),
        date=datetime.now(UTC).isoformat(timespec="minutes"),
        read_bytes_per_second=pool_bytes / _read_seconds(memory),
        kernel_bytes_per_second=pool_bytes / len(weights) / seconds_per_product,
        kernel_operations_per_second=2 * _ROWS * _INPUTS * _PREFILL_TOKENS / seconds_per_tile,
        disk_bytes_per_second=disk.bytes_per_second,
        disk_seconds_per_read=disk.seconds_per_read,
        interference=max(0.0, beside_reads / seconds_per_product - 1),
        joint_operations_per_second=joint,
        **device,
    )


def cache_file(directory: Path) -> Path:
    """Return where the figures of this machine, and of the disk that `directory` lies on, are kept."""
    identity = f"{describe_machine()} {os.stat(directory).st_dev} {VERSION} {torch.__version__}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_directory() / f"machine-{name}.json"


def load_cache(path: Path) -> dict[str, Any]:
    """Read a cache file: {"machine": figures, "models": overheads by key}; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text())
        return {"machine": asdict(Machine.from_json(values["machine"])), "models": dict(values["models"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def save_json(path: Path, values: Any) -> None:
    """Write JSON; the file appears under its name complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(values, file, indent=1)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def describe_machine() -> str:
    """Return the processor, the threads and what multiplies."""
    name = "processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            name = line.partition(":")[2].strip()
            break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads, {cpu_backend()}{gpu}"


def _weights(pool_bytes: int) -> list[PackedWeight]:
    """Return as many weights as fill `pool_bytes`: taken in turn they come from memory, not from a cache."""
    scale = torch.full((_ROWS, _INPUTS // _GROUP_SIZE), 0.01, dtype=torch.bfloat16)
    codes = torch.randint(256, (_ROWS, _INPUTS // 2), dtype=torch.uint8)
    count = max(2, pool_bytes // (codes.nbytes + scale.nbytes))
    return [PackedWeight(codes.clone(), scale.clone(), None, _GROUP_SIZE) for _ in range(count)]


def _joint_operations_per_second(weights: Sequence[PackedWeight]) -> float:
    """Return what the product of a round makes in a second; 0 where each sequence has one of its own."""
    if compiled_library() is None:
        return 0.0
    rows = torch.randn(_JOINT_TOKENS, _INPUTS)
    seconds = _seconds_per_call(
        lambda index: dequant_matmul_cpu(rows, weights[index % len(weights)], None, "fast", untiled_level())
    )
    return 2 * _ROWS * _INPUTS * _JOINT_TOKENS / seconds


def _seconds_per_call(step: Callable[[int], object]) -> float:
    """Return the median seconds of a call, over `_SAMPLE_SECONDS` of them."""
    step(0)
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 5 or time.perf_counter() - began < _SAMPLE_SECONDS:
        started = time.perf_counter()
        step(len(taken) + 1)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def _read_seconds(memory: torch.Tensor) -> float:
    if cpu_backend() == "torch":
        return _seconds_per_call(lambda _: memory.view(torch.int64).sum())
    return min(read_seconds(memory) for _ in range(5))


def time_disk(blobs: Sequence[LayerBlob], reader: FileReader, arena: Arena) -> DiskRate:
    """Read blobs in circles into an arena of the largest one's size, for some seconds. Raises CheckpointError.

    Long reads are whole blobs, short ones single pages of the same files. A shared disk changes its rate by 10 to 20%
    from one half second to the next (measured), so it is the mean over several that counts.
    """
    page = arena.view(0, PAGE_BYTES)

    def short(index: int) -> None:
        blob = blobs[index % len(blobs)]
        reader.read_into(blob.path, blob.offset, min(PAGE_BYTES, blob.nbytes), page)

    per_page = _seconds_per_call(short)
    began, reads, total = time.perf_counter(), 0, 0
    while (elapsed := time.perf_counter() - began) < _DISK_SECONDS or not reads:
        read_blob(reader, blobs[reads % len(blobs)], arena)
        total += blobs[reads % len(blobs)].nbytes
        reads += 1
    return DiskRate(total / max(elapsed - reads * per_page, elapsed / 2), per_page)


def disk_rate(blobs: Sequence[LayerBlob]) -> DiskRate:
    """Time the disk that blobs lie on, see `time_disk`. Raises CheckpointError."""
    reader = FileReader()
    try:
        return time_disk(blobs, reader, Arena(max(blob.nbytes for blob in blobs)))
    finally:
        reader.close()


def _beside(timed: Callable[[], float], blobs: Sequence[LayerBlob]) -> float:
    """Return what `timed` returns while another thread reads shards without a pause."""
    reader, arena, stop = FileReader(), Arena(max(blob.nbytes for blob in blobs)), Event()

    def read() -> None:
        while not stop.is_set():
            for blob in blobs:
                read_blob(reader, blob, arena)
                if stop.is_set():
                    return

    thread = Thread(target=read, name="read-beside")
    thread.start()
    try:
        return timed()
    finally:
        stop.set()
        thread.join()
        reader.close()


def _device_links() -> dict[str, Any]:
    free_before, total = torch.cuda.mem_get_info()
    host = _weights(_POOL_BYTES)[0]
    pinned = PackedWeight(host.codes.pin_memory(), host.scale.pin_memory(), None, _GROUP_SIZE)
    resident = PackedWeight(host.codes.cuda(), host.scale.cuda(), None, _GROUP_SIZE)
    one, many = (torch.randn(tokens, _INPUTS, device="cuda", dtype=torch.float16) for tokens in (1, _PREFILL_TOKENS))
    target, source = torch.empty(_POOL_BYTES, dtype=torch.uint8, device="cuda"), torch.empty(_POOL_BYTES).byte()
    source, gpu = source.pin_memory(), GpuKind.of(one.device)

    def seconds(step: Callable[[], object]) -> float:
        def finished(_: int) -> None:
            step()
            torch.cuda.synchronize()

        return _seconds_per_call(finished)

    return {
        "copy_bytes_per_second": _POOL_BYTES / seconds(lambda: target.copy_(source, non_blocking=True)),
        "mapped_bytes_per_second": host.nbytes / seconds(lambda: dequant_matmul(one, pinned)),
        "device_bytes_per_second": host.nbytes / seconds(lambda: dequant_matmul(one, resident)),
        "device_operations_per_second": 2
        * _ROWS
        * _INPUTS
        * _PREFILL_TOKENS
        / seconds(lambda: dequant_matmul(many, resident)),
        "device_memory_bytes": int(total),
        "device_runtime_bytes": int(total - free_before),
        "device_capability": gpu.capability,
        "device_processors": gpu.processors,
    }
