"""Keys and values beyond the memory given to them: chunks in a temporary file, read back ahead of their use.

A chunk holds CHUNK_TOKENS tokens of one layer, what attention takes at a time. It is written once, when it is full, and
never changes. Reads go through the queue that streams the weights, in the order of a pass: the next chunk of a layer,
the first of the next layer, and around the end of the model into the next token.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize

from kernels.attention import CHUNK_TOKENS
from kernels.kv_block import BLOCK_TOKENS, BlockShape, KVBlock
from offload.checkpoint import LayerBlob
from offload.command import format_bytes
from offload.errors import ResourceError
from offload.memory import Arena, whole_pages
from offload.read_queue import ReadQueue
from offload.source import cache_directory
from offload.transfer_queue import Transfer

CHUNK_BLOCKS = CHUNK_TOKENS // BLOCK_TOKENS
"""Blocks of a chunk."""

SLOTS = 2
"""Chunks that are read into in turn: one is attended to while the other is read."""


class Chunk:
    """The blocks of a chunk, side by side in one arena."""

    def __init__(self, shape: BlockShape) -> None:
        self.arena = Arena(CHUNK_BLOCKS * shape.nbytes)
        size = (shape.nbytes,)
        self.blocks = [
            KVBlock(shape, self.arena.tensor(index * size[0], size[0], size, self.arena.bytes.dtype))
            for index in range(CHUNK_BLOCKS)
        ]


def resident_chunks(budget_bytes: int, layers: int, chunk_bytes: int) -> int:
    """Return how many chunks of every layer fit the budget beside the slots, the one that is written to among them.

    A budget of 0 is for one. Raises ResourceError if one does not fit another budget.
    """
    pages = whole_pages(chunk_bytes)
    if budget_bytes == 0:
        return 1
    count = (budget_bytes - SLOTS * pages) // (layers * pages)
    if count < 1:
        raise ResourceError(
            f"--kv-memory {format_bytes(budget_bytes)}: {layers} layers take {format_bytes((layers + SLOTS) * pages)} "
            f"at least, {CHUNK_TOKENS} tokens of each and {SLOTS} times that of one to read into"
        )
    return count


def shelved_bytes(budget_bytes: int, layers: int, shape: BlockShape, tokens: int) -> int:
    """Return what so many tokens take in memory under a budget, slots included. Raises as `resident_chunks`."""
    pages = whole_pages(CHUNK_BLOCKS * shape.nbytes)
    stay = resident_chunks(budget_bytes, layers, CHUNK_BLOCKS * shape.nbytes)
    chunks = -(-tokens // CHUNK_TOKENS)
    return layers * chunks * pages if chunks <= stay else (layers * stay + SLOTS) * pages


@dataclass(frozen=True, slots=True)
class _Held:
    slot: int
    read: Transfer


class Shelf:
    """The file and the slots of one cache. budget_bytes: for all its `layers` in memory; queue: reads."""

    def __init__(self, queue: ReadQueue, budget_bytes: int, layers: int) -> None:
        self.queue, self.budget_bytes, self.layers = queue, budget_bytes, layers
        cache_directory().mkdir(parents=True, exist_ok=True)
        self._descriptor, name = tempfile.mkstemp(dir=cache_directory(), prefix="kv-")
        self.path = Path(name)
        finalize(self, _delete, self._descriptor, self.path)
        self._stored: list[list[LayerBlob]] = [[] for _ in range(layers)]
        self._owner = object()  # of the reads; the queue keeps its last one, which is not to keep the file
        self._spare: list[int] = []
        self._end = 0
        self._slots: list[Chunk] = []
        self._free: deque[int] = deque()
        self._held: dict[tuple[int, int], _Held] = {}

    @property
    def blobs(self) -> list[LayerBlob]:
        """The chunks in the file, in the order in which a pass reads them."""
        return [blob for of_layer in self._stored for blob in of_layer]

    def resident(self, shape: BlockShape) -> int:
        """Return how many chunks of each layer stay in memory. Raises ResourceError, see `resident_chunks`."""
        return resident_chunks(self.budget_bytes, self.layers, CHUNK_BLOCKS * shape.nbytes)

    def put(self, layer: int, chunk: Chunk) -> None:
        """Write a full chunk behind those of its layer. Raises ResourceError if the disk takes no more."""
        nbytes = chunk.arena.nbytes
        if not self._slots:
            self._slots = [Chunk(chunk.blocks[0].shape) for _ in range(SLOTS)]
            self._free.extend(range(SLOTS))
        place = self._spare.pop() if self._spare else self._end
        try:
            written = 0
            while written < nbytes:
                written += os.pwrite(self._descriptor, chunk.arena.view(written, nbytes - written), place + written)
        except OSError as error:
            raise ResourceError(f"{self.path}: keys and values cannot be written ({error.strerror})") from None
        self._end = max(self._end, place + nbytes)
        with self.queue.change:
            self._stored[layer].append(LayerBlob(self.path, "", place, nbytes, {}, {}))

    def forget(self, layer: int, kept: int) -> None:
        """Drop all but the first `kept` chunks of a layer."""
        with self.queue.change:
            if self._stored[layer][kept:]:
                self._reset()
                self._spare += [blob.offset for blob in self._stored[layer][kept:]]
                del self._stored[layer][kept:]

    def fetch(self, layer: int, number: int, chunk: Chunk) -> None:
        """Read a chunk into memory that is to keep it. Raises what the read raised."""
        with self.queue.change:
            self.queue.wait(self.queue.put(self._stored[layer][number], chunk.arena, self._owner, urgent=True))

    @contextmanager
    def lend(self, layer: int, number: int) -> Iterator[Chunk]:
        """Have a chunk in memory for a while, and the next ones read meanwhile. Raises what its read raised."""
        wanted = (layer, number)
        with self.queue.change:
            if wanted not in self._held and not self._free:
                self._reset()  # a pass was abandoned, or went another way
            self._fill(wanted)
            try:
                self.queue.wait(self._held[wanted].read, [held.read for held in self._held.values()])
            except BaseException:
                if not self.queue.closed:
                    self._reset()
                raise
            slot = self._held[wanted].slot
        try:
            yield self._slots[slot]
        finally:
            with self.queue.change:
                if self._held.pop(wanted, None) is not None:
                    self._free.append(slot)
                    self._fill(self._after(wanted))

    def _fill(self, wanted: tuple[int, int]) -> None:
        """Queue a chunk and those after it, as many as there are slots, unless they are held. The lock is held."""
        for _ in self._slots:
            if self._free and wanted not in self._held:
                slot = self._free.popleft()
                layer, number = wanted
                read = self.queue.put(self._stored[layer][number], self._slots[slot].arena, self._owner)
                self._held[wanted] = _Held(slot, read)
            wanted = self._after(wanted)

    def _after(self, chunk: tuple[int, int]) -> tuple[int, int]:
        layer, number = chunk[0], chunk[1] + 1
        while number >= len(self._stored[layer]):
            layer, number = (layer + 1) % self.layers, 0
        return layer, number

    def _reset(self) -> None:
        self.queue.withdraw(self._owner)
        self._held.clear()
        self._free = deque(range(len(self._slots)))


def _delete(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    path.unlink(missing_ok=True)
