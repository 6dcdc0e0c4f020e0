"""A layer of the int8 cache that keeps at hand what it may, and the rest on a shelf."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.kv_block import BLOCK_TOKENS, CHUNK_TOKENS, select_sequences
from offload.errors import UsageError
from offload.kv.cache import INT8_ATTENTION, Int8Layer, KVCache
from offload.kv.shelf import CHUNK_BLOCKS, Chunk, Shelf, Store


class ShelvedLayer(Int8Layer):
    """As `Int8Layer`, of which the first chunks and the one that is written to stay at hand, the others on a shelf.

    index: of the layer on its shelf. Its attention has to read the blocks, chunk by chunk as `parts` says.
    """

    def __init__(self, index: int, shelf: Shelf, key_offset: Tensor | None = None) -> None:
        super().__init__(key_offset, direct=True)
        self._index, self._shelf = index, shelf
        self._chunks: list[Chunk | None] = []  # None: on the shelf
        self._orders: dict[int, Tensor] = {}  # of chunks on the shelf: which of their sequences each one goes on from

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Add N tokens, [B, K, N, D], no more than a chunk of them in memory at once; return stand-ins of all."""
        start, count = 0, key_states.shape[2]
        while start < count or count == 0:
            stop = min(count, start + CHUNK_TOKENS - self.tokens % CHUNK_TOKENS)
            found = super().update(key_states[:, :, start:stop], value_states[:, :, start:stop])
            start = stop
        return found

    def make_room(self, tokens: int) -> None:
        """Let an initialised layer have chunks for so many tokens more."""
        while len(self.blocks) * BLOCK_TOKENS < self.tokens + tokens:
            chunk = self._shelf.take(self.blocks.shape)
            self._chunks.append(chunk)
            for block in chunk.blocks:
                self.blocks.append(block)

    def count(self, tokens: int) -> None:
        """Count so many tokens more, and put away what is full and not to stay."""
        super().count(tokens)
        for number in range(self._first, self.tokens // CHUNK_TOKENS):
            chunk = self._chunks[number]
            if chunk is not None:
                self._shelf.put(self._index, chunk)
                self._place(number, None)
                self._chunks[number] = None

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of the tokens held, each in memory until the next is asked for."""
        for number, chunk in enumerate(self._chunks):
            part = number * CHUNK_TOKENS, min((number + 1) * CHUNK_TOKENS, self.tokens)
            if chunk is not None:
                yield part
                continue
            with self._shelf.lend(self._index, number - self._first) as lent:
                self._reorder(number, lent)  # what was read is given up afterwards
                self._place(number, lent)
                try:
                    yield part
                finally:
                    self._place(number, None)

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks at hand; the shelf's slots, which all layers share, are not among them."""
        return sum(chunk.memory.nbytes for chunk in self._chunks if chunk is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. Raises ValueError as `Int8Layer`, and what a read raises."""
        super().crop(tokens_to_remove)
        number = self.tokens // CHUNK_TOKENS
        del self._chunks[-(-self.tokens // CHUNK_TOKENS) :]
        if number < len(self._chunks):  # it is written to again
            chunk = self._chunks[number]
            if chunk is None:
                chunk = self._chunks[number] = self._shelf.take(self.blocks.shape)
                self._shelf.fetch(self._index, number - self._first, chunk)
                self._reorder(number, chunk)
            self.blocks.truncate(number * CHUNK_BLOCKS)
            for block in chunk.blocks:
                self.blocks.append(block)
        self._shelf.forget(self._index, self._chunks.count(None))
        shelved = [place for place, one in enumerate(self._chunks) if one is None]
        self._orders = {place: order for place, order in self._orders.items() if place in shelved}

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._chunks.clear()
        self._orders.clear()
        self._shelf.forget(self._index, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let sequence i go on from what sequence `indices[i]` held, int64 [B], as beams do.

        What is on the shelf stays as it was written, and is put in order whenever it is read. Raises UsageError if
        there are to be more sequences or fewer.
        """
        if self._blocks is None:
            return
        chosen = (indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).cpu()
        everyone = torch.arange(self._blocks.shape.batch)
        if len(chosen) != len(everyone):
            raise UsageError("--kv-memory: batches that grow or shrink need all keys and values in memory")
        if torch.equal(chosen, everyone):
            return
        for number, chunk in enumerate(self._chunks):
            if chunk is None:
                self._orders[number] = self._orders.get(number, everyone)[chosen]
            else:
                _select(chunk, chosen)

    def on_host(self) -> Int8Layer:
        """Return a layer that has all of this in host memory. Raises what a transfer raises."""
        whole = Int8Layer(None if self.key_offset is None else self.key_offset.cpu(), direct=True)
        if self._blocks is not None:
            blocks = []
            for first, last in self.parts():
                for index in range(first // BLOCK_TOKENS, -(-last // BLOCK_TOKENS)):
                    blocks.append(self.blocks[index].copy(torch.device("cpu")))
            whole.begin_with(blocks, self.dtype, self.tokens)
        return whole

    def _reorder(self, number: int, chunk: Chunk) -> None:
        """Put a chunk, as it was read, in the order of the sequences."""
        if number in self._orders:
            _select(chunk, self._orders[number])

    @property
    def _first(self) -> int:
        """The first chunk that may go to the shelf."""
        return self._shelf.room(self.blocks.shape).chunks - 1

    def _place(self, number: int, chunk: Chunk | None) -> None:
        for at in range(CHUNK_BLOCKS):
            self.blocks.place(number * CHUNK_BLOCKS + at, None if chunk is None else chunk.blocks[at])


def _select(chunk: Chunk, sequences: Tensor) -> None:
    for block in chunk.blocks:
        block.memory.copy_(select_sequences(block, sequences.to(block.memory.device)).memory)


def shelved_cache(
    model: PreTrainedModel, store: Store, budget_bytes: int, whole: Collection[int] = (), poison: bool = False
) -> KVCache:
    """Return an empty int8 cache of which so much is kept at hand, the rest in a store that goes with the cache.

    whole: layers that are not of it, and keep everything where they are computed. Raises UsageError if the model's
    attention does not read int8 blocks.
    """
    cache = KVCache.of(model)
    if model.config.get_text_config(decoder=True)._attn_implementation != INT8_ATTENTION:
        raise UsageError(f"--kv-memory: the attention of {type(model).__name__} takes no int8 keys and values in parts")
    places = [at for at, layer in enumerate(cache.layers) if isinstance(layer, Int8Layer) and at not in whole]
    shelf = Shelf(store, budget_bytes, len(places), poison)
    for index, place in enumerate(places):
        cache.layers[place] = ShelvedLayer(index, shelf, cache.layers[place].key_offset)
    return cache
