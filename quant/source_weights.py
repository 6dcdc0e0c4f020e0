"""The weights of the model to be quantized, read a tensor at a time; the whole is never in memory."""

import os
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch
import xxhash
from torch import Tensor

from offload.checkpoint import INDEX_NAME, TensorSpec, read_header, read_json
from offload.command import Progress
from offload.errors import CheckpointError, InputError


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor's file, the offset of that file's payload in bytes, and its place in the payload."""

    path: Path
    payload_offset: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """The tensors of a directory of safetensors files, by name."""

    locations: dict[str, Location]

    @classmethod
    def open(cls, directory: Path) -> "SourceWeights":
        """Read every header of a model directory. Raises CheckpointError naming the file."""
        locations: dict[str, Location] = {}
        for path in _shards(directory):
            offset, tensors = read_header(path)
            for name, spec in tensors.items():
                if name in locations:
                    raise CheckpointError(f"{path}: tensor {name!r} stands in {locations[name].path.name} as well")
                locations[name] = Location(path, offset, spec)
        return cls(locations)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(location.spec.nbytes for location in self.locations.values())

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the dtype of the file. Raises CheckpointError if it is absent or the file was cut."""
        location = self.locations.get(name)
        if location is None:
            raise CheckpointError(f"tensor {name!r} is missing from the model; it names {len(self.locations)} others")
        buffer = bytearray(location.spec.nbytes)
        with location.path.open("rb", buffering=0) as file:
            file.seek(location.payload_offset + location.spec.offset)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{location.path}: ends inside tensor {name!r}; it was truncated while in use")
        if not buffer:
            return torch.empty(location.spec.shape, dtype=location.spec.dtype)
        return torch.frombuffer(buffer, dtype=location.spec.dtype).view(location.spec.shape)

    def fingerprint(self) -> str:
        """Read everything once: return the xxh3 of names and bytes. Raises InputError on a non-finite tensor."""
        digest = xxhash.xxh3_64()
        progress = Progress("checking the source, tensor", len(self.locations))
        for name in sorted(self.locations):
            tensor = self.read(name)
            bad = 0 if not tensor.is_floating_point() else int((~torch.isfinite(tensor)).sum())
            if bad:
                path = self.locations[name].path
                raise InputError(
                    f"{path}: tensor {name!r} holds {bad} NaN or infinite values; download the model again"
                )
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            progress.advance()
        return digest.hexdigest()


def _shards(directory: Path) -> list[Path]:
    """Return the files the index names, or the single file; never both."""
    index, single = directory / INDEX_NAME, directory / "model.safetensors"
    if not os.path.lexists(index):
        return [single]
    if os.path.lexists(single):
        raise CheckpointError(f"{directory}: both {INDEX_NAME} and model.safetensors, two sets of weights; remove one")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no weight_map")
    names = sorted({str(file) for file in weight_map.values()})
    for name in names:
        if not name.endswith(".safetensors") or PureWindowsPath(name).name != name:
            raise CheckpointError(f"{index}: points to {name!r}; expected a .safetensors file beside it")
    return [directory / name for name in names]
