"""The checksums of the manifest, held against what was read: once a shard, before a byte of it is multiplied."""

import torch
import xxhash
from torch import Tensor

from offload.checkpoint import LayerBlob
from offload.errors import CheckpointError
from offload.layer_view import SCALE
from offload.memory import Arena


def verify(blob: LayerBlob, arena: Arena) -> None:
    """Compare every tensor in an arena with the manifest, and demand finite scales. Raises CheckpointError."""
    for name, spec in blob.tensors.items():
        found = xxhash.xxh3_64_hexdigest(arena.view(spec.offset, spec.nbytes))
        check_digest(blob, name, found)
        if name.endswith(SCALE):
            check_finite(blob, name, arena.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype))


def check_digest(blob: LayerBlob, name: str, found: str) -> None:
    """Raise CheckpointError unless `found`, the xxh3-64 of a tensor's bytes in hex, is the manifest's."""
    if found != blob.checksums[name]:
        raise CheckpointError(
            f"{blob.path}: tensor {name!r} is damaged (checksum {found}, {blob.checksums[name]} in the manifest); "
            "copy or download the checkpoint again"
        )


def check_finite(blob: LayerBlob, name: str, scale: Tensor) -> None:
    """Raise CheckpointError if any of the scales of tensor `name` is NaN or infinite."""
    if not torch.isfinite(
        scale.abs().amax()
    ):  # which a NaN passes through; to ask each element takes ten times as long
        bad = int((~torch.isfinite(scale)).sum())
        raise CheckpointError(
            f"{blob.path}: tensor {name!r} holds {bad} NaN or infinite scales; quantize the model again"
        )
