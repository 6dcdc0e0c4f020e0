"""The shards of a finished checkpoint, read back whole for what is written out of them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kernels.packed import PackedWeight
from offload.checkpoint import Checkpoint, LayerBlob
from offload.checksums import verify
from offload.layer_view import PACKED, SCALE, SHAPE, ZERO
from offload.memory import Arena, FileReader
from offload.read_queue import read_blob


def read_shard(reader: FileReader, blob: LayerBlob) -> dict[str, Tensor]:
    """Read and verify a shard. Raises CheckpointError."""
    arena = Arena(blob.nbytes)
    read_blob(reader, blob, arena)
    verify(blob, arena)
    return {name: arena.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype) for name, spec in blob.tensors.items()}


def packed_linears(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, PackedWeight]]:
    """Yield the packed linears of a shard, by name."""
    for module in [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]:
        bits, inputs = checkpoint.recipe.bits_of(module), int(tensors[module + SHAPE][1])
        codes, group_size = tensors[module + PACKED].view(torch.uint8), checkpoint.recipe.group_size or inputs
        yield module, PackedWeight(codes, tensors[module + SCALE], tensors.get(module + ZERO), group_size, bits)
