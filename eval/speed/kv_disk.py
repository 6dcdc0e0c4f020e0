"""Attention over int8 keys and values that lie on disk: a token of several layers, against the disk and against memory.

Chunks are read ahead on the queue that streams weights, from the first layer's to the last one's and around to the
next token. Beside each round the same file is read chunk by chunk by a loop, once while nothing else runs and once
while attention runs over blocks that are whole in memory, as a disk gives less while all cores compute. That attention
is timed alone too: what is slower of the two bounds it.
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
from offload.cache import Int8Layer, int8_attention
from offload.command import Progress, format_bytes
from offload.errors import UsageError
from offload.kv_shelf import CHUNK_BLOCKS, SLOTS, SPARE, Shelf
from offload.kv_store import FileStore
from offload.memory import Arena, FileReader, whole_pages
from offload.read_queue import ReadQueue, read_blob
from offload.shelved_layer import ShelvedLayer

_READ_SECONDS = 0.5


class KVDiskReport(Rows):
    """What one run measured, one row."""

    __slots__ = ()

    def table(self) -> str:
        """Return it as lines."""
        (row,) = self.measured
        return (
            f"{row['layers']} layers, {row['context']} tokens, {format_bytes(row['disk_bytes_per_token'])} from disk a "
            f"token{'' if row['direct'] else ' (through the page cache)'}\n"
            f"from disk   {row['disk_ms']:8.2f} ms, {row['gb_per_s']:.2f} GB/s: {row['of_disk']:.0%} of the disk's "
            f"{row['disk_gb_per_s']:.2f}, {row['of_beside']:.0%} of its {row['beside_gb_per_s']:.2f} while cores compute; "
            f"a read was under way {row['reading']:.0%} of the time\n"
            f"in memory   {row['memory_ms']:8.2f} ms, {row['of_memory']:.0%} of the time from disk"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--context", type=int, default=8200, help="tokens before the one that is decoded")
    add("--layers", type=int, default=8, help="that share the file")
    add("--heads", type=int, default=32, help="of the queries")
    add("--key-heads", type=int, default=8, help="of keys and values")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add("--slots", type=int, default=4, help="chunks that are read into in turn, 2 at least")
    add("--tokens", type=int, default=8, help="steps of a round")
    add("--rounds", type=int, default=7, help="rounds of each")


def measure(options: argparse.Namespace) -> KVDiskReport:
    """Time all of it in turn. Raises UsageError for flags of which nothing would lie on disk, or nothing be read."""
    if not SLOTS <= options.slots < SLOTS + options.layers:
        raise UsageError(f"--slots {options.slots}: expected from {SLOTS} to {SLOTS + options.layers - 1}")
    shape = Shape(options.heads, options.key_heads, options.head_dim, options.context)
    reader = FileReader()
    queue = ReadQueue(reader, None)
    try:
        block = BlockShape(1, shape.key_heads, shape.head_dim, shape.head_dim)
        held = options.layers + options.slots + SPARE
        shelf = Shelf(FileStore(queue), held * whole_pages(CHUNK_BLOCKS * block.nbytes), options.layers)
        on_disk = [ShelvedLayer(index, shelf) for index in range(options.layers)]
        in_memory = [Int8Layer(direct=True) for _ in range(options.layers)]
        for layer in (*on_disk, *in_memory):
            layer.update(*shape.past())
        if not shelf.blobs:
            raise UsageError(f"--context {options.context}: all of it stays in memory; give a longer one")
        return KVDiskReport((_row(options, shape, on_disk, in_memory, shelf, queue, reader),))
    finally:
        queue.close()
        reader.close()


def _row(
    options: argparse.Namespace,
    shape: Shape,
    on_disk: Sequence[Int8Layer],
    in_memory: Sequence[Int8Layer],
    shelf: Shelf,
    queue: ReadQueue,
    reader: FileReader,
) -> dict[str, Any]:
    disk, memory, reads, beside, read = [], [], [], [], 0
    under_way: list[float] = []
    queue.on_read = lambda blob, started, ended: under_way.append(ended - started)
    progress = Progress("round", options.rounds)
    _steps(shape, on_disk, 1)
    under_way.clear()
    for _ in range(options.rounds):
        before = queue.bytes_read
        disk.append(_steps(shape, on_disk, options.tokens))
        read = (queue.bytes_read - before) // options.tokens
        memory.append(_steps(shape, in_memory, options.tokens))
        reads.append(_read_rate(shelf, reader))
        beside.append(_read_rate_beside(shelf, reader, lambda: _steps(shape, in_memory, 1)))
        progress.advance()
    carried = [read / seconds for seconds in disk]
    return {
        **{"layers": options.layers, "heads": shape.heads, "key_heads": shape.key_heads, "head_dim": shape.head_dim},
        "context": shape.context,
        "disk_bytes_per_token": read,
        "direct": reader.direct,
        "disk_ms": round(statistics.median(disk) * 1e3, 3),
        "gb_per_s": round(statistics.median(carried) / 1e9, 3),
        "disk_gb_per_s": round(statistics.median(reads) / 1e9, 3),
        "of_disk": round(statistics.median(a / b for a, b in zip(carried, reads, strict=True)), 3),
        "memory_ms": round(statistics.median(memory) * 1e3, 3),
        "slots": options.slots,
        "reading": round(sum(under_way) / (sum(disk) * options.tokens), 3),
        "beside_gb_per_s": round(statistics.median(beside) / 1e9, 3),
        "of_beside": round(statistics.median(a / b for a, b in zip(carried, beside, strict=True)), 3),
        "of_memory": round(statistics.median(a / b for a, b in zip(memory, disk, strict=True)), 3),
    }


@torch.inference_mode()
def _steps(shape: Shape, layers: Sequence[Int8Layer], count: int) -> float:
    """Return the seconds of a token in all layers, appended, attended to and taken back; the mean of `count`."""
    module, (query, key, value) = nn.Module(), shape.token()
    module.num_key_value_groups = shape.heads // shape.key_heads  # type: ignore[assignment]
    started = time.perf_counter()
    for _ in range(count):
        for layer in layers:
            int8_attention(module, query, *layer.update(key, value), None)
            layer.crop(-1)
    return (time.perf_counter() - started) / count


def _read_rate(shelf: Shelf, reader: FileReader) -> float:
    """Return the bytes a second of reading the shelf's file, chunk by chunk, over and over for a while."""
    ended = time.perf_counter() + _READ_SECONDS
    return _reading(shelf, reader, lambda: time.perf_counter() >= ended)


def _read_rate_beside(shelf: Shelf, reader: FileReader, step: Callable[[], object]) -> float:
    """Return the same of a thread, while this one takes steps."""
    ended = Event()
    with ThreadPoolExecutor(1) as pool:
        rate = pool.submit(_reading, shelf, reader, ended.is_set)
        started = time.perf_counter()
        while time.perf_counter() - started < _READ_SECONDS:
            step()
        ended.set()
        return rate.result()


def _reading(shelf: Shelf, reader: FileReader, ended: Callable[[], bool]) -> float:
    arena = Arena(max(blob.nbytes for blob in shelf.blobs))
    total, started = 0, time.perf_counter()
    while not ended():
        for blob in shelf.blobs:
            read_blob(reader, blob, arena)
            total += blob.nbytes
    return total / (time.perf_counter() - started)
