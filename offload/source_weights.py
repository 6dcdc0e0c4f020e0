"""The weights in a directory of safetensors files, read a tensor at a time; the whole is never in memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from offload.checkpoint import INDEX_NAME, TensorSpec, read_header
from offload.command import Progress
from offload.errors import CheckpointError, InputError
from offload.experts import fused_names
from offload.files import read_json, reading
from offload.memory import PAGE_BYTES, Arena, FileReader
from offload.names import names_in_model

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor's file, the offset of that file's payload in bytes, and its place in the payload."""

    path: Path
    payload_offset: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that stays in its file until it is copied out of it, a piece in memory at a time. name: for errors."""

    name: str
    location: Location

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the file."""
        return self.location.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.location.spec.shape

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.location.spec.nbytes

    def pieces(self) -> Iterator[memoryview]:
        """Yield its bytes in order, read past the page cache; each piece lies in memory that the next is read into.

        Raises CheckpointError if the file cannot be read or was cut.
        """
        start = self.location.payload_offset + self.location.spec.offset
        page, end = start - start % PAGE_BYTES, start + self.nbytes
        arena, reader = Arena(min(_PIECE_BYTES, end - page)), FileReader()
        try:
            while page < end:
                count = min(arena.nbytes, end - page)
                reader.read_into(self.location.path, page, count, arena.view(0, arena.nbytes))
                skipped = max(start - page, 0)
                yield arena.view(skipped, count - skipped)
                page += count
        except CheckpointError as error:
            raise CheckpointError(f"tensor {self.name!r}: {error}") from None
        finally:
            reader.close()


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """The tensors of a directory of safetensors files, by name.

    stored_names: for names in a model (`placed`), those in the files, where they differ. unplaced: what is in the
    files and not in the model.
    """

    locations: dict[str, Location]
    stored_names: dict[str, str] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()

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

    def placed(self, model: PreTrainedModel) -> "SourceWeights":
        """Return the same tensors under the names they have in `model`, fused experts cut into those of each linear.

        Raises CheckpointError if two tensors have one place.
        """
        names, fused = names_in_model(model, self.locations), fused_names(model)
        locations: dict[str, Location] = {}
        stored_names: dict[str, str] = {}
        for name, location in self.locations.items():
            place = names.get(name)
            if place is None:
                continue
            if place in locations:
                first = stored_names.get(place, place)
                raise CheckpointError(f"{location.path}: tensors {first!r} and {name!r} are the same one, {place!r}")
            if place in fused:
                locations |= _slices(location, place.rpartition(".")[0], fused[place])
                continue
            locations[place] = location
            if place != name:
                stored_names[place] = name
        return SourceWeights(locations, stored_names, tuple(name for name in self.locations if name not in names))

    def stored(self, name: str) -> str:
        """Return the name that a tensor in a model, or a packed part of it, has in the files of source and result."""
        if name in self.locations:
            return self.stored_names.get(name, name)
        stem, _, part = name.rpartition(".")
        weight = self.stored_names.get(f"{stem}.weight", f"{stem}.weight")
        return f"{weight.removesuffix('.weight')}.{part}" if weight.endswith(".weight") else name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(location.spec.nbytes for location in self.locations.values())

    def stored_tensor(self, name: str) -> StoredTensor:
        """Return one tensor as it lies in its file. Raises CheckpointError if it is absent."""
        location = self.locations.get(name)
        if location is None:
            raise CheckpointError(f"tensor {name!r} is missing from the model; it names {len(self.locations)} others")
        return StoredTensor(name, location)

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the dtype of the file. Raises CheckpointError if it is absent or the file was cut."""
        location = self.stored_tensor(name).location
        return _read(name, location, 0, location.spec.nbytes).view(location.spec.shape)

    def read_as_float(self, name: str) -> Tensor:
        """Read one tensor as `read` does, as float32 if it holds floats: piece by piece, never whole in both dtypes."""
        location = self.locations.get(name)
        if location is None or not location.spec.dtype.is_floating_point or location.spec.dtype == torch.float32:
            return self.read(name)
        itemsize, nbytes = location.spec.dtype.itemsize, location.spec.nbytes
        values = torch.empty(nbytes // itemsize)
        for start in range(0, nbytes, _PIECE_BYTES):
            piece = _read(name, location, start, min(_PIECE_BYTES, nbytes - start))
            values[start // itemsize :][: len(piece)] = piece
        return values.view(location.spec.shape)

    def fingerprint(self) -> str:
        """Read everything once: return the xxh3 of names and bytes. Raises InputError on a non-finite tensor."""
        digest = xxhash.xxh3_64()
        progress = Progress("checking the source, tensor", len(self.locations))
        for name in sorted(self.locations):
            location = self.locations[name]
            digest.update(f"{name} {location.spec.dtype} {list(location.spec.shape)}".encode())
            bad = 0
            for start in range(0, location.spec.nbytes, _PIECE_BYTES):
                piece = _read(name, location, start, min(_PIECE_BYTES, location.spec.nbytes - start))
                bad += 0 if not piece.is_floating_point() else int((~torch.isfinite(piece)).sum())
                digest.update(piece.view(torch.uint8).numpy().data)
            if bad:
                raise InputError(
                    f"{location.path}: tensor {name!r} holds {bad} NaN or infinite values; download the model again"
                )
            progress.advance()
        return digest.hexdigest()


def _read(name: str, location: Location, start: int, nbytes: int) -> Tensor:
    """Read some bytes of a tensor, flat, in the dtype of the file. Raises CheckpointError if the file was cut."""
    values = torch.empty(nbytes // location.spec.dtype.itemsize, dtype=location.spec.dtype)
    with reading(location.path), location.path.open("rb", buffering=0) as file:
        file.seek(location.payload_offset + location.spec.offset + start)
        view = values.view(torch.uint8).numpy().data
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{location.path}: ends inside tensor {name!r}; it was truncated while in use")
            view = view[count:]
    return values


def _slices(location: Location, experts: str, parts: tuple[str, ...]) -> dict[str, Location]:
    """Return where the linears of every expert lie in a fused tensor [E, rows of all parts, columns]."""
    count, rows, columns = location.spec.shape
    shape, nbytes = (rows // len(parts), columns), location.spec.nbytes // (count * len(parts))
    names = (f"{experts}.{index}.{part}.weight" for index in range(count) for part in parts)
    return {
        name: replace(
            location, spec=replace(location.spec, offset=location.spec.offset + i * nbytes, nbytes=nbytes, shape=shape)
        )
        for i, name in enumerate(names)
    }


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
