"""What a model takes of a GPU beside its weights as they lie in their files, counted before any of it is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.triton_tuning import GpuKind, WeightShape, product_bytes
from offload.checkpoint import Checkpoint, LayerBlob
from offload.gpu.copy_queue import BOUNCE_BUFFERS, BOUNCE_BYTES
from offload.layer_view import PACKED, SCALE, SHAPE, copied, copied_bytes
from offload.memory import whole_pages
from offload.planning.predict import Tier
from offload.units import Units


@dataclass(frozen=True, slots=True)
class SplitNeeds:
    """Decoder layers that can be copied to a GPU in parts, an entry a layer, in bytes.

    parts: of each, as they lie in host memory. rest: what stays on the GPU of a layer that comes in parts. converted,
    rest_converted: copies of what is wanted in another dtype than it has, the most of any part, and those of the rest.
    """

    parts_bytes: tuple[tuple[int, ...], ...]
    rest_bytes: tuple[int, ...]
    converted_bytes: tuple[int, ...]
    rest_converted_bytes: tuple[int, ...]

    @property
    def slot_bytes(self) -> int:
        """The largest part."""
        return max(map(max, self.parts_bytes))

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """What each part is of its layer."""
        return tuple(tuple(nbytes / sum(parts) for nbytes in parts) for parts in self.parts_bytes)


@dataclass(frozen=True, slots=True)
class DeviceScratch:
    """What computing on a GPU takes beside weights as they lie in their files, in bytes.

    converted: of each layer, copies of what is wanted in another dtype than it has; moved: those of a layer that is
    read across the bus, all that is not packed. product: the most that a product takes beside operands and result, see
    `product_bytes`. raw: the largest shard around the layers that is given up once it is converted. step: memory that
    captured decode steps work in; graphs: those of one layer in one place. In host memory, shard: the largest around
    the layers, on its way; bounce: buffers that copies go through where it is not pinned.
    """

    converted_bytes: tuple[int, ...] = ()
    moved_bytes: tuple[int, ...] = ()
    product_bytes: int = 0
    raw_bytes: int = 0
    step_bytes: int = 0
    graphs_bytes: int = 0
    shard_bytes: int = 0
    bounce_bytes: int = 0

    def copies_bytes(self, hows: Sequence[Tier], split: SplitNeeds | None) -> int:
        """Return what copies take of layers computed so: their own of what stays, of the others the largest.

        split: the layers in parts, if staged ones come so.
        """

        def of(sizes: Sequence[int], tier: Tier) -> list[int]:
            return [nbytes for nbytes, how in zip(sizes, hows, strict=False) if how == tier]

        stay, staged = of(self.converted_bytes, "resident"), self.converted_bytes
        if split is not None:
            stay, staged = stay + of(split.rest_converted_bytes, "staged"), split.converted_bytes
        return sum(stay) + max(of(staged, "staged") + of(self.moved_bytes, "mapped"), default=0)


def device_scratch(
    checkpoint: Checkpoint, dtype: torch.dtype, gpu: GpuKind | None, rows: int, head_rows: int
) -> DeviceScratch:
    """Return what a checkpoint takes of a GPU beside its weights, in a model of a dtype.

    gpu: None where none is used, and no product runs there. rows: activations that a layer is multiplied by at most;
    head_rows: those of what lies around the layers.
    """
    layers = [blob for blob in checkpoint.blobs if blob.module]
    around = [blob for blob in checkpoint.blobs if not blob.module]
    products = [(packed_shapes(checkpoint, layers), rows), (packed_shapes(checkpoint, around), head_rows)]
    sizes = [] if gpu is None else [product_bytes(found, most, dtype.itemsize, gpu) for found, most in products]
    return DeviceScratch(
        converted_bytes=tuple(copied_bytes(blob, dtype) for blob in layers),
        moved_bytes=tuple(copied_bytes(blob, dtype, moved=True) for blob in layers),
        product_bytes=max(sizes, default=0),
        raw_bytes=max((blob.nbytes for blob in around if is_given_up(blob, dtype)), default=0),
        shard_bytes=max((whole_pages(blob.nbytes) for blob in around), default=0),
        bounce_bytes=BOUNCE_BUFFERS * BOUNCE_BYTES,
    )


def packed_shapes(checkpoint: Checkpoint, blobs: Sequence[LayerBlob]) -> list[WeightShape]:
    """Return the shapes of the packed weights in some shards."""
    found = []
    for blob in blobs:
        for name in (name.removesuffix(PACKED) for name in blob.tensors if name.endswith(PACKED)):
            bits, rows = checkpoint.recipe.bits_of(name), blob.tensors[name + SCALE].shape[0]
            inputs = blob.tensors[name + PACKED].nbytes * 8 // bits // rows
            found.append(WeightShape(rows, inputs, checkpoint.recipe.group_size or inputs, bits))
    return found


def split_needs(units: Units, dtype: torch.dtype) -> SplitNeeds | None:
    """Return what layers in parts take of a GPU, in a model of a dtype, None if that is no less than in one."""
    found = SplitNeeds(
        parts_bytes=tuple(tuple(whole_pages(part.nbytes) for part in layer.parts) for layer in units.split),
        rest_bytes=tuple(0 if layer.rest is None else whole_pages(layer.rest.nbytes) for layer in units.split),
        converted_bytes=tuple(max(copied_bytes(part, dtype) for part in layer.parts) for layer in units.split),
        rest_converted_bytes=tuple(
            0 if layer.rest is None else copied_bytes(layer.rest, dtype) for layer in units.split
        ),
    )
    largest = max(whole_pages(blob.nbytes) for blob in units.layers)
    return found if found.slot_bytes < largest else None


def is_given_up(blob: LayerBlob, dtype: torch.dtype) -> bool:
    """Whether nothing of a shard is used as it lies: all of it is wanted in another dtype."""
    return set(copied(blob, dtype)) == {name for name in blob.tensors if not name.endswith(SHAPE)}
