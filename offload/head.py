"""An output head whose rows are multiplied block by block, each block in memory for good or lent by the ring of slots.

A row of the product depends on its own row of the weight alone, in every kernel, so the result is that of one product,
bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import xxhash
from torch import Tensor, nn

from kernels.packed import PackedWeight
from offload.checksums import check_digest, check_finite
from offload.layer_view import PACKED, SCALE, ZERO
from offload.linear import JointProduct, PackedLinear
from offload.memory import Arena, FileReader
from offload.read_queue import read_blob
from offload.transfer import Slots
from offload.units import Head, pieces

_CHUNK_BYTES = 4 << 20


class StreamedHead(nn.Module):
    """Stands where a packed head was.

    Every block is to be kept or streamed before it is called. group_size: of the weight, None for one group a row.
    order: of its first block in a pass. joints: of its blocks.
    """

    def __init__(self, linear: PackedLinear, head: Head, group_size: int | None, order: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.mode, self.bias = linear.bits, linear.mode, linear.bias
        self._spans, self._blocks = head.spans, head.blocks()
        self._module, self._group_size = head.module, group_size or linear.in_features
        self.joints = [JointProduct(order + index) for index in range(len(head.spans))]
        self._kept: dict[int, PackedWeight] = {}
        self._streamed: dict[int, int] = {}
        self._slots: Slots | None = None

    def keep(self, index: int, reader: FileReader) -> None:
        """Read block `index`, to stay."""
        arena = Arena(self._blocks[index].nbytes)
        read_blob(reader, self._blocks[index], arena)
        self._kept[index] = self._weight(index, arena)

    def stream(self, index: int, slots: Slots, position: int) -> None:
        """Take block `index` from `position` of the ring whenever it is multiplied."""
        self._slots = slots
        self._streamed[index] = position

    @property
    def memory(self) -> Tensor:
        """One of its blocks as it lies in memory, uint8 [bytes]."""
        kept = next(iter(self._kept.values()), None)
        if kept is not None:
            return kept.codes.reshape(-1)
        assert self._slots is not None, "a block is kept or streamed"
        memory: Tensor = self._slots.arenas[0].bytes
        return memory

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, in x's dtype."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for index, (start, stop) in enumerate(self._spans):
            with self._lent(index) as weight:
                bias = None if self.bias is None else self.bias[start:stop]
                out[..., start:stop] = self.joints[index].product(x, weight, bias, self.mode)
        return out

    @contextmanager
    def _lent(self, index: int) -> Iterator[PackedWeight]:
        if index in self._kept:
            yield self._kept[index]
            return
        assert self._slots is not None, "a block is kept or streamed"
        position = self._streamed[index]
        slot = self._slots.wait(position)
        try:
            yield self._weight(index, self._slots.arenas[slot])
        finally:
            self._slots.release(position)

    def _weight(self, index: int, arena: Arena) -> PackedWeight:
        """Return block `index` as it lies in an arena."""
        specs = self._blocks[index].tensors
        found = {
            kind: arena.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype)
            for kind in (PACKED, SCALE, ZERO)
            if (spec := specs.get(self._module + kind)) is not None
        }
        codes = found[PACKED].view(torch.uint8)
        return PackedWeight(codes, found[SCALE], found.get(ZERO), self._group_size, self.bits)


def verify_head(head: Head, reader: FileReader) -> None:
    """Compare its tensors with the manifest, some MiB at a time, and demand finite scales. Raises CheckpointError.

    No checksum is of a block, and a token needs all of them: so this comes before the first.
    """
    arena = Arena(_CHUNK_BYTES + 2 * 4096)
    for name in head.names:
        digest = xxhash.xxh3_64()
        for piece in pieces(head.blob, name, _CHUNK_BYTES):
            read_blob(reader, piece, arena)
            spec = piece.tensors[name]
            digest.update(arena.view(spec.offset, spec.nbytes))
            if name.endswith(SCALE):
                check_finite(piece, name, arena.tensor(spec.offset, spec.nbytes, (-1,), spec.dtype))
        check_digest(head.blob, name, digest.hexdigest())
