"""Keys and values beyond the memory given to them: chunks that are elsewhere, brought back ahead of their use.

A chunk holds CHUNK_TOKENS tokens of one layer, what attention takes at a time. It is put away once, when it is full,
and never changes. It comes back through a queue, in the order of a pass: the next chunk of a layer, the first of the
next layer, and around the end of the model into the next token. Where chunks are meanwhile: `offload/kv/store.py`.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.kv_block import BLOCK_TOKENS, CHUNK_TOKENS, BlockShape, KVBlock
from offload.checkpoint import LayerBlob
from offload.command import format_bytes
from offload.errors import ResourceError
from offload.gpu.device import Fence
from offload.memory import Memory, whole_pages
from offload.transfer_queue import Transfer, TransferQueue

CHUNK_BLOCKS = CHUNK_TOKENS // BLOCK_TOKENS
"""Blocks of a chunk."""

SLOTS = 2
"""Chunks at least that are brought back into in turn: one is attended to while the other is on its way."""

SPARE = 1
"""Full chunks whose memory is not yet free while others are filled: they are on their way out."""


class Chunk:
    """The blocks of a chunk, side by side in one memory, where attention reads them.

    free: behind what still reads the memory, of one that is to be written to again; None for nothing.
    """

    def __init__(self, shape: BlockShape, memory: Memory) -> None:
        self.memory = memory
        self.free: Fence | None = None
        size = (shape.nbytes,)
        self.blocks = [
            KVBlock(shape, memory.tensor(index * size[0], size[0], size, memory.bytes.dtype))
            for index in range(CHUNK_BLOCKS)
        ]


class Store(Protocol):
    """Where chunks are that attention does not have at hand."""

    @property
    def queue(self) -> TransferQueue:
        """The way back."""

    def allocate(self, nbytes: int) -> Memory:
        """Return memory where attention reads it."""

    def put(self, chunk: Chunk, together: int) -> LayerBlob:
        """Keep what is in a full chunk. Raises ResourceError if there is no room.

        together: chunks that are filled one after the other, this one among them.
        """

    def drop(self, blob: LayerBlob) -> None:
        """Forget what was kept."""

    def fence(self) -> Fence | None:
        """Return one behind everything that still reads a chunk, None where only this thread does."""

    def wait_for(self, fence: Fence | None) -> None:
        """Let what attention does from now on begin behind a fence."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a budget is shared out to: chunks of every layer that stay at hand, the one that is written to among them,
    and slots that all layers share.
    """

    chunks: int
    slots: int


def share_out(budget_bytes: int, layers: int, chunk_bytes: int) -> Room:
    """Share a budget out; what does not do for one chunk more of every layer becomes slots.

    A budget of 0 is for one chunk of each, and two slots. Raises ResourceError if that does not fit another budget.
    """
    if budget_bytes == 0:
        return Room(1, SLOTS)
    pages = whole_pages(chunk_bytes)
    held = budget_bytes // pages - SPARE
    if held < layers + SLOTS:
        raise ResourceError(
            f"--kv-memory {format_bytes(budget_bytes)}: {layers} layers take "
            f"{format_bytes((layers + SLOTS + SPARE) * pages)} at least, {CHUNK_TOKENS} tokens of each and "
            f"{SLOTS + SPARE} times that of one on the way"
        )
    chunks = (held - SLOTS) // layers
    return Room(chunks, held - layers * chunks)


def shelved_bytes(budget_bytes: int, layers: int, shape: BlockShape, tokens: int) -> tuple[int, int]:
    """Return what so many tokens take under a budget: at hand, slots included, and elsewhere. Raises as `share_out`."""
    pages = whole_pages(CHUNK_BLOCKS * shape.nbytes)
    room = share_out(budget_bytes, layers, CHUNK_BLOCKS * shape.nbytes)
    away = tokens // CHUNK_TOKENS - room.chunks + 1  # the last at hand is put away once it is full
    if away <= 0:
        return layers * -(-tokens // CHUNK_TOKENS) * pages, 0
    return (layers * room.chunks + room.slots + SPARE) * pages, layers * away * pages


@dataclass(frozen=True, slots=True)
class _Held:
    slot: int
    way: Transfer


class Shelf:
    """The slots of one cache. budget_bytes: for all its `layers` at hand. poison: freed slots become NaN, for tests."""

    def __init__(self, store: Store, budget_bytes: int, layers: int, poison: bool = False) -> None:
        self.store, self.budget_bytes, self.layers, self._poison = store, budget_bytes, layers, poison
        self._stored: list[list[LayerBlob]] = [[] for _ in range(layers)]
        self._owner = object()  # of the transfers; the queue keeps its last one, which is not to keep what is stored
        self._written: deque[Chunk] = deque()
        self._slots: list[Chunk] = []
        self._free: deque[int] = deque()
        self._held: dict[tuple[int, int], _Held] = {}

    @property
    def queue(self) -> TransferQueue:
        """The way back."""
        return self.store.queue

    @property
    def blobs(self) -> list[LayerBlob]:
        """The chunks that are stored, in the order in which a pass takes them."""
        return [blob for of_layer in self._stored for blob in of_layer]

    def room(self, shape: BlockShape) -> Room:
        """Return what stays at hand. Raises ResourceError, see `share_out`."""
        return share_out(self.budget_bytes, self.layers, CHUNK_BLOCKS * shape.nbytes)

    def take(self, shape: BlockShape) -> Chunk:
        """Return a chunk to write to, at hand."""
        if len(self._written) <= SPARE:
            return self._new(shape)
        chunk = self._written.popleft()
        self.store.wait_for(chunk.free)
        return chunk

    def put(self, layer: int, chunk: Chunk) -> None:
        """Put a full chunk away, behind those of its layer; its memory is for others then. Raises ResourceError."""
        shape = chunk.blocks[0].shape
        if not self._slots:
            self._slots = [self._new(shape) for _ in range(self.room(shape).slots)]
            self._free.extend(range(len(self._slots)))
        blob = self.store.put(chunk, self.layers)
        self._written.append(chunk)
        with self.queue.change:
            self._stored[layer].append(blob)

    def forget(self, layer: int, kept: int) -> None:
        """Drop all but the first `kept` chunks of a layer."""
        with self.queue.change:
            if self._stored[layer][kept:]:
                self._reset()
                for blob in self._stored[layer][kept:]:
                    self.store.drop(blob)
                del self._stored[layer][kept:]

    def fetch(self, layer: int, number: int, chunk: Chunk) -> None:
        """Bring a chunk back into memory that is to keep it. Raises what the transfer raised."""
        with self.queue.change:
            blob, after = self._stored[layer][number], self.store.fence()
            self.queue.wait(self.queue.put(blob, chunk.memory, self._owner, urgent=True, after=after))

    @contextmanager
    def lend(self, layer: int, number: int) -> Iterator[Chunk]:
        """Have a chunk at hand for a while, and the next ones on their way. Raises what its transfer raised."""
        wanted = (layer, number)
        with self.queue.change:
            if wanted not in self._held and not self._free:
                self._reset()  # a pass was abandoned, or went another way
            self._fill(wanted)
            try:
                self.queue.wait(self._held[wanted].way, [held.way for held in self._held.values()])
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
                    self._put_back(slot)
                    self._fill(self._after(wanted))

    def _new(self, shape: BlockShape) -> Chunk:
        with torch.inference_mode(False):  # it outlives the mode of the caller
            return Chunk(shape, self.store.allocate(CHUNK_BLOCKS * shape.nbytes))

    def _fill(self, wanted: tuple[int, int]) -> None:
        """Queue a chunk and those after it, as many as there are slots, unless they are held. The lock is held."""
        for _ in self._slots:
            if self._free and wanted not in self._held:
                number = self._free.popleft()
                slot, blob = self._slots[number], self._stored[wanted[0]][wanted[1]]
                after, slot.free = slot.free, None
                way = self.queue.put(blob, slot.memory, self._owner, after=after)
                self._held[wanted] = _Held(number, way)
            wanted = self._after(wanted)

    def _after(self, chunk: tuple[int, int]) -> tuple[int, int]:
        layer, number = chunk[0], chunk[1] + 1
        while number >= len(self._stored[layer]):
            layer, number = (layer + 1) % self.layers, 0
        return layer, number

    def _reset(self) -> None:
        self.queue.withdraw(self._owner)
        self._held.clear()
        self._free.clear()
        for number in range(len(self._slots)):
            self._put_back(number)

    def _put_back(self, number: int) -> None:
        slot, fence = self._slots[number], self.store.fence()
        if self._poison:
            if fence is not None:
                fence.synchronize()
            slot.memory.poison()
        slot.free = fence
        self._free.append(number)
