"""What can be had apart from the rest of its shard: experts, what is around them, blocks of the head, parts of layers.

A unit is the bytes of one file that are read, waited for and given back as one. Where the writer laid them out so, a
unit is one range of its file; in older checkpoints an expert is several.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from kernels.packed import codes_per_word
from offload.checkpoint import Checkpoint, LayerBlob, TensorSpec
from offload.embedding import plain_embedding
from offload.experts import Experts
from offload.layer_view import PACKED, SCALE, SHAPE, ZERO
from offload.memory import PAGE_BYTES, whole_pages

_BLOCK_ROWS = 64
"""Blocks are a multiple of this: zero points share a word with those of up to 8 rows, tiles of products 32."""

_BLOCK_BYTES = 32 << 20
"""The most that a block of the head takes: smaller ones are waited for more often, larger ones leave slots empty."""


_LEAST_OF_A_LAYER = 16
"""What is smaller than this part of its layer stays on a device whose layers come in parts: copying it saves little."""


@dataclass(frozen=True, slots=True)
class SplitLayer:
    """A decoder layer in parts that a device can be given one after the other.

    parts: each what one module inside the layer needs whenever it is called, in the order in which the model lists
    them, which need not be that of a pass; the layer itself where it has no such parts. rest: norms and whatever else
    is small, None if there is nothing.
    """

    parts: tuple[LayerBlob, ...]
    rest: LayerBlob | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """A packed output head that can be read in blocks of rows.

    module: its name. blob: the shard that it lies in, with other tensors maybe. rows: of the head and of a block. bits:
    of a weight.
    """

    module: str
    blob: LayerBlob
    rows: int
    block_rows: int
    bits: int

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are read in blocks."""
        return tuple(self.module + kind for kind in (PACKED, SCALE, ZERO) if self.module + kind in self.blob.tensors)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First row of each block, and the one behind its last."""
        return tuple((row, min(row + self.block_rows, self.rows)) for row in range(0, self.rows, self.block_rows))

    def blocks(self) -> tuple[LayerBlob, ...]:
        """Return the blocks, in order; no checksum is of one."""
        blocks = ({name: self._rows(name, start, stop) for name in self.names} for start, stop in self.spans)
        return tuple(part(self.blob, specs, self.module) for specs in blocks)

    def _rows(self, name: str, start: int, stop: int) -> TensorSpec:
        """Return rows [start, stop) of the weight in one of its tensors; zero points have several in a word."""
        spec, per_word = self.blob.tensors[name], codes_per_word(self.bits) if name.endswith(ZERO) else 1
        first, count = start // per_word, -(-stop // per_word) - start // per_word
        row_bytes = spec.nbytes // spec.shape[0]
        shape = (count, *spec.shape[1:])
        return replace(spec, offset=spec.offset + first * row_bytes, nbytes=count * row_bytes, shape=shape)


@dataclass(frozen=True, slots=True)
class Units:
    """What of a checkpoint can be had apart.

    embedding: shard and name of a table whose rows can be left in their file, or None. head: or None if it is not
    packed. layers: the decoder layers, whole. around: each of them without its experts. experts: of each layer, those
    of its lists one behind the other; none where it has none. split: each layer in parts.
    """

    embedding: tuple[LayerBlob, str] | None
    head: Head | None
    layers: tuple[LayerBlob, ...]
    around: tuple[LayerBlob, ...]
    experts: tuple[tuple[LayerBlob, ...], ...]
    split: tuple[SplitLayer, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, checkpoint: Checkpoint) -> "Units":
        """Find them. checkpoint: with the names of `model`, whose linears may have been replaced or not."""
        layers = tuple(blob for blob in checkpoint.blobs if blob.module)
        fixed = [blob for blob in checkpoint.blobs if not blob.module]
        parted = [_part_experts(model, blob) for blob in layers]
        around = tuple(rest for rest, _ in parted)
        head = _head(model, checkpoint, min(max(blob.nbytes for blob in around), _BLOCK_BYTES))
        experts = tuple(experts for _, experts in parted)
        split = tuple(_split(model, blob) for blob in layers)
        return cls(plain_embedding(model, fixed), head, layers, around, experts, split)

    def placed(self, experts_apart: Collection[int]) -> tuple[LayerBlob, ...]:
        """Return the layers as they are read where the experts of some are apart."""
        return tuple((self.around if at in experts_apart else self.layers)[at] for at in range(len(self.layers)))

    def staged(self, split: bool) -> tuple[SplitLayer, ...]:
        """Return the layers as they are copied to a device: in parts, or each as one."""
        return self.split if split else tuple(SplitLayer((blob,)) for blob in self.layers)


def part(blob: LayerBlob, specs: Mapping[str, TensorSpec], module: str) -> LayerBlob:
    """Return the pages of `blob`, one range of its file, that hold `specs`, each wholly or in part, for `module`.

    Only tensors that are there as a whole keep their checksums.
    """
    ranges: list[tuple[int, int]] = []  # first and behind the last byte of the payload
    moved: dict[str, TensorSpec] = {}
    place = 0  # in memory, of the range that is being filled
    for name, spec in sorted(specs.items(), key=lambda item: item[1].offset):
        start, end = spec.offset // PAGE_BYTES * PAGE_BYTES, spec.offset + spec.nbytes
        if ranges and start <= whole_pages(ranges[-1][1]):
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            place += whole_pages(ranges[-1][1] - ranges[-1][0]) if ranges else 0
            ranges.append((start, end))
        moved[name] = replace(spec, offset=place + spec.offset - ranges[-1][0])
    return LayerBlob(
        blob.path,
        module,
        blob.offset + ranges[0][0],
        place + ranges[-1][1] - ranges[-1][0],
        moved,
        {name: blob.checksums[name] for name, spec in specs.items() if spec == blob.tensors[name]},
        tuple((blob.offset + start, end - start) for start, end in ranges) if len(ranges) > 1 else (),
    )


def without(blob: LayerBlob, names: Collection[str]) -> LayerBlob | None:
    """Return what of a shard has to be read for all tensors but `names`, None if it holds no others."""
    others = {name: spec for name, spec in blob.tensors.items() if name not in names}
    return part(blob, others, blob.module) if others else None


def pieces(blob: LayerBlob, name: str, nbytes: int) -> Iterator[LayerBlob]:
    """Yield a tensor of a shard in pieces of at most `nbytes`, a multiple of its item size, each as one dimension."""
    spec = blob.tensors[name]
    for start in range(0, spec.nbytes, nbytes):
        count = min(nbytes, spec.nbytes - start)
        shape = (count // spec.dtype.itemsize,)
        piece = replace(spec, offset=spec.offset + start, nbytes=count, shape=shape)
        yield part(blob, {name: piece}, blob.module)


def _head(model: PreTrainedModel, checkpoint: Checkpoint, block_bytes: int) -> Head | None:
    module = model.get_output_embeddings()
    names = [name for name, found in model.named_modules() if module is not None and found is module]
    for blob in checkpoint.blobs:
        for name in names:
            if name + PACKED in blob.tensors and not blob.module:
                head = Head(name, blob, blob.tensors[name + SCALE].shape[0], 1, checkpoint.recipe.bits_of(name))
                row_bytes = sum(blob.tensors[tensor].nbytes for tensor in head.names) / head.rows
                block_rows = max(1, int(block_bytes / row_bytes) // _BLOCK_ROWS) * _BLOCK_ROWS
                return replace(head, block_rows=block_rows)
    return None


def _split(model: PreTrainedModel, blob: LayerBlob) -> SplitLayer:
    """Return a layer in parts of at most half of it, as far as its modules are called one by one."""
    modules = _modules_apart(model.get_submodule(blob.module), blob.module, blob)
    if len(modules) < 2:
        return SplitLayer((blob,))
    parted = [_tensors_below(name, blob) for name in modules]
    names = {name for specs in parted for name in specs}
    parts = (part(blob, specs, name) for specs, name in zip(parted, modules, strict=True))
    return SplitLayer(tuple(parts), without(blob, names))


def _modules_apart(module: nn.Module, name: str, blob: LayerBlob) -> list[str]:
    """Return the names of modules inside one of a layer that hold most of it; none if it is better left in one."""
    if isinstance(module, nn.ModuleList):  # its members are called in whichever order, or not at all
        return []
    found: list[str] = []
    for child_name, child in module.named_children():
        inner = f"{name}.{child_name}"
        nbytes = _nbytes(_tensors_below(inner, blob))
        if nbytes * _LEAST_OF_A_LAYER < blob.nbytes:
            continue
        if type(child).forward is nn.Module.forward:  # nobody calls it
            return []
        smaller = _modules_apart(child, inner, blob) if nbytes * 2 > blob.nbytes else []
        found += smaller if len(smaller) > 1 else [inner]
    return found


def _tensors_below(name: str, blob: LayerBlob) -> dict[str, TensorSpec]:
    """Return what a module takes of a shard, but for shapes, which say nothing that is not known."""
    return {
        tensor: spec
        for tensor, spec in blob.tensors.items()
        if tensor.startswith(f"{name}.") and not tensor.endswith(SHAPE)
    }


def _nbytes(specs: Mapping[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _part_experts(model: PreTrainedModel, blob: LayerBlob) -> tuple[LayerBlob, tuple[LayerBlob, ...]]:
    """Return a layer without its experts, and these."""
    layer = model.get_submodule(blob.module)
    lists = [f"{blob.module}.{name}" for name, module in layer.named_modules() if isinstance(module, Experts)]
    if not lists:
        return blob, ()
    of_expert = re.compile(rf"({'|'.join(map(re.escape, lists))})\.(\d+)\.")
    grouped: dict[tuple[str, int], dict[str, TensorSpec]] = {}
    others: dict[str, TensorSpec] = {}
    for name, spec in blob.tensors.items():
        found = of_expert.match(name)
        if found is None or name.endswith(SHAPE):
            others[name] = spec
        else:
            grouped.setdefault((found[1], int(found[2])), {})[name] = spec
    experts = tuple(part(blob, specs, f"{name}.{index}") for (name, index), specs in sorted(grouped.items()))
    return part(blob, others, blob.module), experts
