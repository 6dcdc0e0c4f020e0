"""What bounds decoding, measured on the loaded model: the link that a token's weights keep busy for longest.

How long that is, is what a token takes over a link by what the link carries in a second while nothing else runs: a disk
that holds one small layer may bound less than the memory that holds all the others.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels.cpu_matmul import cpu_backend, read_seconds
from offload.gpu.copy_queue import Bounce
from offload.gpu.device import Device
from offload.gpu.device_side import DeviceSide
from offload.memory import Arena
from offload.read_queue import read_blob
from offload.streaming import Executor

Link = Literal["disk", "bus", "memory", "device memory"]

_DISK_SECONDS = 0.5
_TIMED_SECONDS, _TIMED_RUNS = 0.25, 5
_MEMORY_BYTES = 256 << 20
"""To read through, so that no cache of a processor holds it from one time to the next."""

_PIECE_BYTES = 1 << 20
"""What is smaller says more of how reading begins than of memory."""

_COPY_BYTES, _COPIES = 16 << 20, 16


@dataclass(frozen=True, slots=True)
class Limit:
    """A link, what of the weights a token takes over it, and how fast it is while nothing else runs.

    link: "bus" is between the host's memory and a device's. bytes_per_token: from disk, what is planned, of which
    experts may take another share; across the bus, with the keys and values that were counted.
    """

    link: Link
    bytes_per_second: float
    bytes_per_token: int

    @property
    def seconds_per_token(self) -> float:
        """How long a token keeps the link busy, at least."""
        return self.bytes_per_token / self.bytes_per_second


def measure_limit(executor: Executor, disk_bytes_per_token: int | None = None, cache_bytes_per_token: int = 0) -> Limit:
    """Return which link bounds decoding, as `measure_links` finds it."""
    return bounding(measure_links(executor, disk_bytes_per_token, cache_bytes_per_token))


def bounding(links: Sequence[Limit]) -> Limit:
    """Return the link that a token keeps busy for longest."""
    return max(links, key=lambda link: link.seconds_per_token)


def measure_links(
    executor: Executor, disk_bytes_per_token: int | None = None, cache_bytes_per_token: int = 0
) -> tuple[Limit, ...]:
    """Measure every link that weights, or keys and values that are not at hand, take for a token, in under two seconds.

    disk_bytes_per_token: as counted, None for what is planned; its disk is the checkpoint's, also where keys and values
    alone are read. cache_bytes_per_token: of keys and values across the bus, as counted. Not while the model runs: what
    was read ahead is forgotten.
    """
    side = executor.device_side
    _rest(executor)
    found: list[Limit] = []
    for link, nbytes in bytes_by_link(executor).items():
        taken = disk_bytes_per_token if link == "disk" and disk_bytes_per_token is not None else nbytes
        away = executor.kv_bytes is not None and link == ("disk" if side is None else "bus")
        if away:  # how many bytes it will be, a context that grows decides
            taken += cache_bytes_per_token
        elif not taken:
            continue
        elif link == "memory":
            taken += cache_bytes_per_token
        if link == "disk":
            rate = _disk_rate(executor)
        elif link == "memory":
            rate = _memory_rate(_host_pieces(executor))
        elif side is not None and link == "bus":
            rate = _copy_rate(side)
        elif side is not None:
            rate = _device_rate(side.device, _large([executor.head_memory, *side.memory]))
        found.append(Limit(link, rate, taken))
    return tuple(found)


def bytes_by_link(executor: Executor) -> dict[Link, int]:
    """Return the weights that a token is planned to take over each link, in bytes; 0 for what it does not take.

    memory: of the host, what is multiplied there and what a device reads or is sent out of it.
    """
    placement, computed, head_bytes = executor.placement, executor.layer_token_bytes, executor.head_bytes

    def of(how: str) -> int:
        return sum(nbytes for nbytes, one in zip(computed, placement.hows, strict=True) if one == how)

    bus, on_device = _staged_bytes(executor) + of("mapped"), executor.device_side is not None
    return {
        "disk": placement.disk_bytes,
        "bus": bus,
        "memory": bus + of("host") + (0 if on_device else head_bytes),
        "device memory": of("resident") + of("staged") + head_bytes if on_device else 0,
    }


def _staged_bytes(executor: Executor) -> int:
    """Return what a pass copies of layers to a device, whoever takes part and whichever experts are routed to."""
    hows, staged = executor.placement.hows, executor.units.staged(executor.placement.split)
    sent = (sum(blob.nbytes for blob in layer.parts) for layer in staged)
    return sum(nbytes for nbytes, how in zip(sent, hows, strict=True) if how == "staged")


def _rest(executor: Executor) -> None:
    """Let everything that is read or copied ahead come to an end: the rings hold nothing then."""
    side = executor.device_side
    if side is not None and side.ring is not None:
        side.ring.reset()  # first: its copies wait for the ring that disk is read into
    if executor.slots is not None:
        executor.slots.reset()
    if side is not None:
        side.device.settle()


def _disk_rate(executor: Executor) -> float:
    blobs = executor.streamed_blobs or executor.expert_blobs
    if not blobs:  # no memory was planned for whole layers
        blobs = [replace(blob, nbytes=min(blob.nbytes, _COPY_BYTES), ranges=()) for blob in executor.blobs]
    arena = Arena(max(blob.nbytes for blob in blobs)) if executor.slots is None else executor.slots.arenas[0]
    started, total, elapsed = time.perf_counter(), 0, 0.0
    while True:
        for blob in blobs:
            read_blob(executor.reader, blob, arena)
            total += blob.nbytes
            elapsed = time.perf_counter() - started
            if elapsed >= _DISK_SECONDS:
                return total / elapsed


def _copy_rate(side: DeviceSide) -> float:
    """Return the bytes a second of copies one behind the other: out of pinned memory, or around it if none is given.

    They go where layers are copied to, so that nothing is asked of a device that may be full; where all layers stay,
    they come out of one of them.
    """
    if side.spare is None:
        return _copy_back_rate(side)
    device = side.device
    target = side.spare.bytes[:_COPY_BYTES]
    arena = Arena(target.nbytes)
    arena.bytes.fill_(1)
    arena.pinned = device.pin(arena)
    bounce = None if arena.pinned else Bounce(device)
    copy = device.copy if bounce is None else bounce.copy
    try:
        return _copied_per_second(device, lambda: copy(target, arena.bytes[: target.nbytes]), target.nbytes)
    finally:
        device.settle()
        if arena.pinned:
            device.unpin(arena)
        if bounce is not None:
            bounce.close()


def _copy_back_rate(side: DeviceSide) -> float:
    device, source = side.device, max(side.memory, key=lambda memory: memory.nbytes)[:_COPY_BYTES]
    target = device.allocate_pinned(source.nbytes)
    try:
        return _copied_per_second(device, lambda: device.copy_back(target, source), source.nbytes)
    finally:
        device.settle()
        device.free_pinned(target)


def _copied_per_second(device: Device, copy: Callable[[], None], nbytes: int) -> float:
    def copies() -> None:
        for _ in range(_COPIES):
            copy()
        device.mark_copies().synchronize()

    return _COPIES * nbytes / _fastest_seconds(copies)


def _host_pieces(executor: Executor) -> list[Tensor]:
    """Return memory of the host to read through: the model's own, and what lacks of it as far as the budget has room.

    What lies in a processor's cache from one time to the next is faster than memory; a ring alone may be so small.
    """
    pieces = _large(executor.host_memory)
    lacking, placement = _MEMORY_BYTES - sum(piece.nbytes for piece in pieces), executor.placement
    if placement.budget_bytes is not None:  # between passes nothing is activated
        room = placement.budget_bytes - placement.expected_bytes + placement.needs.working_bytes
        lacking = min(lacking, room)
    if lacking >= _PIECE_BYTES:
        with suppress(OSError):  # the system gives no more: what the model has is to do
            pieces.append(Arena(lacking).bytes.fill_(1))
    return pieces or executor.host_memory


def _large(memory: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest pieces of memory, as many as take to read through; one at least, if there is one."""
    found: list[Tensor] = []
    for piece in sorted(memory, key=lambda piece: piece.nbytes, reverse=True):
        if found and (piece.nbytes < _PIECE_BYTES or sum(one.nbytes for one in found) >= _MEMORY_BYTES):
            break
        found.append(piece[:_MEMORY_BYTES])
    return found


def _memory_rate(pieces: Sequence[Tensor]) -> float:
    words = [piece[: piece.nbytes // 8 * 8] for piece in pieces]
    if cpu_backend() == "torch":

        def read() -> float:
            for piece in words:
                piece.view(torch.int64).sum()
            return 0.0
    else:

        def read() -> float:
            return sum(read_seconds(piece) for piece in words)

    return sum(piece.nbytes for piece in words) / _fastest_seconds(read)


def _device_rate(device: Device, pieces: Sequence[Tensor]) -> float:
    """Return the bytes a second of a kernel that only reads memory on the device."""
    if device.torch_device.type == "cpu":  # a device whose memory is the host's
        return _memory_rate(pieces)
    from kernels.triton_matmul import read_sums  # needs triton, which a machine without a GPU may lack

    words = [piece[: piece.nbytes // 4 * 4] for piece in pieces]

    def read() -> None:
        for piece in words:
            read_sums(piece, device.torch_device)
        device.mark_compute().synchronize()

    return sum(piece.nbytes for piece in words) / _fastest_seconds(read)


def _fastest_seconds(step: Callable[[], float | None]) -> float:
    """Return the least of several, as timed here or by the step itself; not the first, which may compile."""
    step()
    taken: list[float] = []
    began = time.perf_counter()
    while not taken or (len(taken) < _TIMED_RUNS and time.perf_counter() - began < _TIMED_SECONDS):
        started = time.perf_counter()
        told = step()
        taken.append(told or time.perf_counter() - started)
    return min(taken)
