"""Attention over int8 keys and values that lie elsewhere: a token of several layers, against the link and memory.

They lie on disk, or for a GPU in host memory. Chunks are brought back ahead of their use, from the first layer's to the
last one's and around to the next token. Beside each round a loop brings them back that does nothing else, once while
nothing else runs and once while attention runs over blocks that are whole at hand, as a disk gives less while all cores
compute. That attention is timed alone too: what is slower of the two bounds it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from torch import nn

from eval.speed.kv import Shape
from eval.speed.report import Rows
from kernels.kv_block import BlockShape
from offload.command import Progress, format_bytes
from offload.errors import UsageError
from offload.gpu.copy_queue import CopyLog
from offload.gpu.device import Device, find_device
from offload.kv.cache import Int8Layer, int8_attention
from offload.kv.shelf import CHUNK_BLOCKS, SLOTS, SPARE, Shelf, Store
from offload.kv.shelved_layer import ShelvedLayer
from offload.kv.store import FileStore, HostStore
from offload.memory import Arena, FileReader, whole_pages
from offload.read_queue import ReadQueue, read_blob

_LINK_SECONDS = 0.5
_COPIES = 64


class KVDiskReport(Rows):
    """What one run measured, one row."""

    __slots__ = ()

    def table(self) -> str:
        """Return it as lines."""
        (row,) = self.measured
        reading = f"; a read was under way {row['reading']:.0%} of the time" if row["reading"] else ""
        return (
            f"{row['layers']} layers, {row['context']} tokens, {format_bytes(row['disk_bytes_per_token'])} a token "
            f"over the {row['link']}{'' if row['direct'] else ' (through the page cache)'}\n"
            f"from there  {row['disk_ms']:8.2f} ms, {row['gb_per_s']:.2f} GB/s: {row['of_disk']:.0%} of the "
            f"{row['link']}'s {row['disk_gb_per_s']:.2f}, {row['of_beside']:.0%} of its {row['beside_gb_per_s']:.2f} "
            "beside attention\n"
            f"{'':12}{row['slots']} slots{reading}\n"
            f"at hand     {row['memory_ms']:8.2f} ms, {row['of_memory']:.0%} of the time from there"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: in host memory, attention on the GPU")
    add("--context", type=int, default=8200, help="tokens before the one that is decoded")
    add("--layers", type=int, default=8, help="that share the memory given to keys and values")
    add("--heads", type=int, default=32, help="of the queries")
    add("--key-heads", type=int, default=8, help="of keys and values")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add("--slots", type=int, default=4, help="chunks that are brought back into in turn, 2 at least")
    add("--tokens", type=int, default=8, help="steps of a round")
    add("--rounds", type=int, default=7, help="rounds of each")


class Disk:
    """A file, read by a thread."""

    name, device = "disk", torch.device("cpu")

    def __init__(self) -> None:
        self._reader = FileReader()
        self._queue = ReadQueue(self._reader, None)
        self._under_way: list[float] = []
        self._queue.on_read = lambda blob, started, ended: self._under_way.append(ended - started)
        self.store: Store = FileStore(self._queue)

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._reader.direct

    def rate(self, shelf: Shelf) -> float:
        """Return the bytes a second of a loop that reads chunks and does nothing else."""
        ended = time.perf_counter() + _LINK_SECONDS
        return self._reading(shelf, lambda: time.perf_counter() >= ended)

    def rate_beside(self, shelf: Shelf, step: Callable[[], object]) -> float:
        """Return the same of a thread, while this one takes steps."""
        ended = Event()
        with ThreadPoolExecutor(1) as pool:
            rate = pool.submit(self._reading, shelf, ended.is_set)
            started = time.perf_counter()
            while time.perf_counter() - started < _LINK_SECONDS:
                step()
            ended.set()
            return rate.result()

    def _reading(self, shelf: Shelf, ended: Callable[[], bool]) -> float:
        arena = Arena(max(blob.nbytes for blob in shelf.blobs))
        total, started = 0, time.perf_counter()
        while not ended():
            for blob in shelf.blobs:
                read_blob(self._reader, blob, arena)
                total += blob.nbytes
        return total / (time.perf_counter() - started)

    def settle(self) -> None:
        """Do nothing: attention is done when it returns."""

    def share_under_way(self, seconds: float) -> float:
        """Return of so many seconds the share in which a read was under way since this was asked."""
        share = sum(self._under_way) / seconds
        self._under_way.clear()
        return share

    def close(self) -> None:
        """Stop reading."""
        self._queue.close()
        self._reader.close()


class Bus:
    """Pinned host memory, copied to a GPU."""

    name, direct = "bus", True

    def __init__(self, device: Device) -> None:
        self._device, self.device = device, device.torch_device
        self.store: Store = HostStore(device, CopyLog(device), CopyLog(device))

    def rate(self, shelf: Shelf) -> float:
        """Return the bytes a second of copies one behind the other, while nothing else runs."""
        return self.rate_beside(shelf, lambda: None)

    def rate_beside(self, shelf: Shelf, step: Callable[[], object]) -> float:
        """Return the same while steps are taken."""
        nbytes, device = max(blob.nbytes for blob in shelf.blobs), self._device
        source, target = device.allocate_pinned(nbytes), device.allocate(nbytes)
        device.settle()
        started = device.stamp_copies()
        for _ in range(_COPIES):
            device.copy(target.bytes, source[:nbytes])
        ended = device.stamp_copies()
        step()
        device.settle()
        device.free_pinned(source)
        return _COPIES * nbytes / ended.seconds_after(started)

    def settle(self) -> None:
        """Wait for what is queued."""
        self._device.settle()

    def share_under_way(self, seconds: float) -> None:
        """Return None: copies are not timed one by one."""

    def close(self) -> None:
        """Do nothing: memory is given back with the store."""


Link = Disk | Bus


def measure(options: argparse.Namespace) -> KVDiskReport:
    """Time all of it in turn. Raises UsageError for flags of which nothing would lie elsewhere, and without a GPU."""
    if not SLOTS <= options.slots < SLOTS + options.layers:
        raise UsageError(f"--slots {options.slots}: expected from {SLOTS} to {SLOTS + options.layers - 1}")
    device = find_device() if options.device == "cuda" else None
    if options.device == "cuda" and device is None:
        raise UsageError("--device cuda: torch finds no CUDA device; leave it out to measure the disk")
    link: Link = Disk() if device is None else Bus(device)
    shape = Shape(options.heads, options.key_heads, options.head_dim, options.context, link.device)
    block = BlockShape(1, shape.key_heads, shape.head_dim, shape.head_dim)
    held = options.layers + options.slots + SPARE
    try:
        shelf = Shelf(link.store, held * whole_pages(CHUNK_BLOCKS * block.nbytes), options.layers)
        away = [ShelvedLayer(index, shelf) for index in range(options.layers)]
        at_hand = [Int8Layer(direct=True) for _ in range(options.layers)]
        for layer in (*away, *at_hand):
            layer.update(*shape.past())
        if not shelf.blobs:
            raise UsageError(f"--context {options.context}: all of it stays in memory; give a longer one")
        return KVDiskReport((_row(options, shape, away, at_hand, shelf, link),))
    finally:
        link.close()


def _row(
    options: argparse.Namespace,
    shape: Shape,
    away: Sequence[Int8Layer],
    at_hand: Sequence[Int8Layer],
    shelf: Shelf,
    link: Link,
) -> dict[str, Any]:
    times, memory, alone, beside, under_way = [], [], [], [], []
    progress = Progress("round", options.rounds)
    for layers in (away, at_hand):
        _steps(shape, layers, 1, link)
    for _ in range(options.rounds):
        link.share_under_way(1.0)
        times.append(_steps(shape, away, options.tokens, link))
        under_way.append(link.share_under_way(times[-1] * options.tokens))
        memory.append(_steps(shape, at_hand, options.tokens, link))
        alone.append(link.rate(shelf))
        beside.append(link.rate_beside(shelf, lambda: _steps(shape, at_hand, 1, link)))
        progress.advance()
    per_token = sum(blob.nbytes for blob in shelf.blobs)
    carried = [per_token / seconds for seconds in times]
    known = [share for share in under_way if share is not None]
    return {
        **{"layers": options.layers, "heads": shape.heads, "key_heads": shape.key_heads, "head_dim": shape.head_dim},
        "context": shape.context,
        "disk_bytes_per_token": per_token,
        "direct": link.direct,
        "disk_ms": round(statistics.median(times) * 1e3, 3),
        "gb_per_s": round(statistics.median(carried) / 1e9, 3),
        "disk_gb_per_s": round(statistics.median(alone) / 1e9, 3),
        "of_disk": _share(carried, alone),
        "slots": options.slots,
        "reading": round(statistics.median(known), 3) if known else "",
        "beside_gb_per_s": round(statistics.median(beside) / 1e9, 3),
        "of_beside": _share(carried, beside),
        "memory_ms": round(statistics.median(memory) * 1e3, 3),
        "of_memory": _share(memory, times),
        "link": link.name,
    }


def _share(parts: Sequence[float], wholes: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(parts, wholes, strict=True)), 3)


@torch.inference_mode()
def _steps(shape: Shape, layers: Sequence[Int8Layer], count: int, link: Link) -> float:
    """Return the seconds of a token in all layers, appended, attended to and taken back; the mean of `count`."""
    module, (query, key, value) = nn.Module(), shape.token()
    module.num_key_value_groups = shape.heads // shape.key_heads  # type: ignore[assignment]
    link.settle()
    started = time.perf_counter()
    for _ in range(count):
        for layer in layers:
            int8_attention(module, query, *layer.update(key, value), None)
            layer.crop(-1)
    link.settle()
    return (time.perf_counter() - started) / count
