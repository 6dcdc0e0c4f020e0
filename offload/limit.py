"""What bounds decoding, measured on the loaded model: of the links that weights take for every token, the slowest kind.

Disk is slower than the bus to a device, and that than memory, whatever share of the weights takes each.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernels.cpu_matmul import read_seconds
from offload.copy_queue import Bounce
from offload.device import Device
from offload.device_side import DeviceSide
from offload.memory import Arena
from offload.read_queue import read_blob
from offload.streaming import Executor

Link = Literal["disk", "bus", "memory", "device memory"]

_DISK_SECONDS = 0.5
_MEMORY_READS = 5
_MEMORY_BYTES = 128 << 20
_COPY_BYTES, _COPIES = 16 << 20, 16


@dataclass(frozen=True, slots=True)
class Limit:
    """The link that bounds decoding, and how fast it is while nothing else runs.

    link: "bus" is between the host's memory and a device's. bytes_per_token: of weights that a token takes over it;
    from disk, what is planned, of which experts may take another share.
    """

    link: Link
    bytes_per_second: float
    bytes_per_token: int


def measure_limit(executor: Executor) -> Limit:
    """Measure what bounds decoding. Not while the model runs: what was read ahead is forgotten."""
    placement = executor.placement
    if executor.queue is not None:
        return Limit("disk", _disk_rate(executor), placement.disk_bytes)
    side = executor.device_side
    device = None if side is None else side.device
    if side is not None and (crossing := placement.bytes_in("staged", "mapped")):
        return Limit("bus", _copy_rate(side), crossing)
    if device is not None and not placement.bytes_in("host"):
        return Limit("device memory", _device_rate(device, executor.head_memory), executor.bytes_per_token)
    if device is not None:
        return Limit("memory", _memory_rate(Arena(_MEMORY_BYTES).bytes.fill_(1)), placement.bytes_in("host"))
    return Limit("memory", _memory_rate(executor.head_memory), executor.bytes_per_token)


def _disk_rate(executor: Executor) -> float:
    blobs = executor.streamed_blobs or executor.expert_blobs
    if executor.slots is None:
        arena = Arena(max(blob.nbytes for blob in blobs))
    else:
        side = executor.device_side
        if side is not None and side.ring is not None:
            side.ring.reset()  # first: its copies wait for the ring that disk is read into
        executor.slots.reset()
        if side is not None:
            side.device.settle()
        arena = executor.slots.arenas[0]
    started = time.perf_counter()
    total = 0
    while (elapsed := time.perf_counter() - started) < _DISK_SECONDS:
        for blob in blobs:
            read_blob(executor.reader, blob, arena)
            total += blob.nbytes
    return total / elapsed


def _copy_rate(side: DeviceSide) -> float:
    """Return the bytes a second of copies one behind the other: out of pinned memory, or around it if none is given.

    They go where layers are copied to, so that nothing is asked of a device that may be full.
    """
    assert side.spare is not None, "what crosses the bus has somewhere to go"
    device = side.device
    if side.ring is not None:
        side.ring.reset()
    target = side.spare.bytes[:_COPY_BYTES]
    arena = Arena(target.nbytes)
    arena.bytes.fill_(1)
    arena.pinned = device.pin(arena)
    bounce = None if arena.pinned else Bounce(device)
    copy = device.copy if bounce is None else bounce.copy

    def copies() -> None:
        for _ in range(_COPIES):
            copy(target, arena.bytes[: target.nbytes])
        device.mark_copies().synchronize()

    try:
        device.settle()
        return _COPIES * target.nbytes / _fastest_seconds(copies)
    finally:
        device.settle()
        if arena.pinned:
            device.unpin(arena)
        if bounce is not None:
            bounce.close()


def _memory_rate(memory: Tensor) -> float:
    return memory.nbytes / min(read_seconds(memory) for _ in range(_MEMORY_READS))


def _device_rate(device: Device, memory: Tensor) -> float:
    """Return the bytes a second of a kernel that only reads `memory`, uint8, on the device."""
    if device.torch_device.type == "cpu":  # a device whose memory is the host's
        return _memory_rate(memory)
    from kernels.triton_matmul import read_sums  # needs triton, which a machine without a GPU may lack

    whole = memory[: memory.nbytes // 4 * 4]

    def read() -> None:
        read_sums(whole, device.torch_device)
        device.mark_compute().synchronize()

    return whole.nbytes / _fastest_seconds(read)


def _fastest_seconds(step: Callable[[], None]) -> float:
    """Return the least of several; the first, which may compile, does not count."""
    step()
    taken = []
    for _ in range(_MEMORY_READS):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return min(taken)
