"""The checkpoint on disk, as it is written: shard by shard, each durable before the next, `manifest.json` last.

Every file is written under a temporary name in the same directory, synced, renamed, and the directory synced; so at any
moment, power loss included, the directory is absent, resumable or complete. While it is unfinished `partial/` holds the
recipe and a record of each finished shard; what a resumed run trusts is what still matches those records on disk. The
manifest lies there too while the files that it names are being written or deleted.
"""

import fcntl
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from offload.checkpoint import (
    CONFIG_NAME,
    DTYPES,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    PARTIAL_NAME,
    PAYLOAD_ALIGNMENT,
    Recipe,
    read_header,
)
from offload.durable_file import write_durably, write_pieces
from offload.errors import BusyError, CheckpointError, ResourceError, UsageError
from offload.files import read_json, reading
from offload.source_weights import StoredTensor

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TENSOR_ALIGNMENT = 64
_PIECE_BYTES = 1 << 20  # which the caches hold from the checksum to the copy that is written
_EXPERT = re.compile(r".*\.experts\.\d+\.")
_LOCK = ".lock"


class CheckpointWriter:
    """Writes one checkpoint of `num_shards` shards. Use `open_writer`, which locks the directory and resumes."""

    def __init__(self, directory: Path, recipe: Recipe, num_shards: int) -> None:
        self.directory, self.recipe, self.num_shards = directory, recipe, num_shards
        self._partial = directory / PARTIAL_NAME
        self._records: dict[int, dict[str, Any]] = {}

    @property
    def complete(self) -> bool:
        """Whether the manifest of this very recipe is in place."""
        return (self.directory / MANIFEST_NAME).exists()

    def done(self, index: int) -> dict[str, Any] | None:
        """Return the record of shard `index` if its file still matches it, so that it need not be made again."""
        path = self._partial / f"{index:05d}.json"
        if index not in self._records and path.exists():
            try:
                record = read_json(path)
                if self._matches(record):
                    self._records[index] = record
            except (CheckpointError, KeyError, TypeError):
                return None  # a damaged record or shard, or one that cannot be read, is as good as none
        return self._records.get(index)

    def write_shard(
        self, index: int, module: str, tensors: Mapping[str, Tensor | StoredTensor], report: dict[str, Any]
    ) -> None:
        """Write shard `index` (0-based) durably, then its record. `report` is what the manifest says of the layer."""
        path = self.directory / self._shard_name(index)
        checksums = write_safetensors(path, tensors)
        record = {
            "file": path.name,
            "module": module,
            "size_bytes": path.stat().st_size,
            "xxh3": checksums,
            "report": report,
        }
        write_durably(self._partial / f"{index:05d}.json", _json_bytes(record))
        self._records[index] = record

    def finish(self, config: dict[str, Any], extra_files: dict[str, bytes]) -> None:
        """Write config, index, the files around the weights, and the manifest last; then drop the partial records."""
        records = [self._records[index] for index in range(self.num_shards)]
        manifest = _json_bytes(self._manifest(records, extra_files))
        write_durably(self._partial / MANIFEST_NAME, manifest)
        for name, content in extra_files.items():
            write_durably(self.directory / name, content)
        if (quantization := self.recipe.quantization_config()) is not None:
            config = {**config, "quantization_config": quantization}
        write_durably(self.directory / CONFIG_NAME, _json_bytes(config))
        weight_map = {name: record["file"] for record in records for name in record["xxh3"]}
        total_bytes = sum(spec.nbytes for r in records for spec in read_header(self.directory / r["file"])[1].values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(self.directory / INDEX_NAME, _json_bytes(index))
        write_durably(self.directory / MANIFEST_NAME, manifest)
        shutil.rmtree(self._partial, ignore_errors=True)

    def _manifest(self, records: list[dict[str, Any]], extra_files: dict[str, bytes]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.to_json(),
            "shards": [{k: record[k] for k in ("file", "module", "size_bytes", "xxh3")} for record in records],
            "files": sorted(extra_files),
            "layer_errors": {record["module"]: record["report"] for record in records if record["report"]},
        }

    def _shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def _matches(self, record: dict[str, Any]) -> bool:
        """Whether the shard on disk is the one that was recorded, every byte of it."""
        if set(record) != {"file", "module", "size_bytes", "xxh3", "report"}:
            return False
        path = self.directory / record["file"]
        offset, tensors = read_header(path)
        if path.stat().st_size != record["size_bytes"] or set(tensors) != set(record["xxh3"]):
            return False
        with reading(path), path.open("rb") as file:
            for name, spec in tensors.items():
                file.seek(offset + spec.offset)
                if xxhash.xxh3_64_hexdigest(file.read(spec.nbytes)) != record["xxh3"][name]:
                    return False
        return True


@contextmanager
def open_writer(directory: Path, recipe: Recipe, num_shards: int, overwrite: bool) -> Iterator[CheckpointWriter]:
    """Lock `directory` and yield a writer that resumes what an interrupted run with the same recipe left there.

    Raises UsageError, with nothing changed, if the directory holds anything else (with `overwrite`: anything that this
    toolkit did not write), BusyError if another process writes there, ResourceError if it cannot be created.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--output {directory}: a file is in the way; name a directory")
    lock = _take_lock(directory)
    try:
        try:
            _prepare(directory, recipe, overwrite)
        except OSError as error:
            raise ResourceError(f"--output {directory}: cannot be written ({error.strerror})") from None
        yield CheckpointWriter(directory, recipe, num_shards)
    finally:
        with suppress(OSError):  # the lock is the descriptor's, a file that stays holds nobody up
            (directory / _LOCK).unlink()
        os.close(lock)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> dict[str, str]:
    """Write a shard whose payload starts on a 4096-byte boundary; return the xxh3-64 of each tensor by name.

    One that is still in a file of another checkpoint is copied from there, a piece in memory at a time.

    Tensors whose size keeps a 64-byte alignment come first, largest first, those of an expert together behind the
    others; the odd ones follow by falling item size, so that each starts on a multiple of its own. The format allows
    spaces behind its header and no hole between tensors.
    """
    order = sorted(tensors, key=lambda name: _placement_key(name, tensors[name]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        end = offset + tensors[name].nbytes
        dtype, shape = _DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    padded = encoded.ljust(-(-(8 + len(encoded)) // PAYLOAD_ALIGNMENT) * PAYLOAD_ALIGNMENT - 8)
    digests = {name: xxhash.xxh3_64() for name in order}

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(padded).to_bytes(8, "little")
        yield padded
        for name in order:
            for piece in _pieces(tensors[name]):
                digests[name].update(piece)
                yield piece

    write_pieces(path, pieces(), 8 + len(padded) + offset)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _pieces(tensor: Tensor | StoredTensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in order."""
    if isinstance(tensor, StoredTensor):
        yield from tensor.pieces()
        return
    data: memoryview = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    for start in range(0, data.nbytes, _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]


def _placement_key(name: str, tensor: Tensor | StoredTensor) -> tuple[bool, int, str, int, str]:
    if tensor.nbytes % _TENSOR_ALIGNMENT:
        return True, -tensor.dtype.itemsize, "", -tensor.nbytes, name
    expert = _EXPERT.match(name)
    return False, 0, expert[0] if expert else "", -tensor.nbytes, name


def _take_lock(directory: Path) -> int:
    """Take the directory's lock, which the kernel drops with the process, and leave our pid in it."""
    path = directory / _LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ResourceError(f"--output {directory}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = path.exists() and path.stat().st_ino == os.fstat(lock).st_ino  # not one just removed by its owner
        if held:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        held = False
    except OSError as error:
        os.close(lock)
        raise ResourceError(f"--output {directory}: cannot be written ({error.strerror})") from None
    if not held:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "another"
        os.close(lock)
        raise BusyError(f"{directory}: process {holder} is writing here; wait for it or choose another --output")
    return lock


def _prepare(directory: Path, recipe: Recipe, overwrite: bool) -> None:
    """Leave `directory` empty with our recipe in it, or resumable, or complete; or refuse."""
    entries = {entry.name for entry in directory.iterdir()} - {_LOCK}
    partial = directory / PARTIAL_NAME
    if overwrite:
        _delete_ours(directory, entries)
        entries = set()
    if MANIFEST_NAME in entries:
        _refuse_other(directory, recipe, read_json(directory / MANIFEST_NAME).get("recipe"), "a finished checkpoint")
        shutil.rmtree(partial, ignore_errors=True)
    elif (partial / "recipe.json").exists():
        _refuse_other(directory, recipe, read_json(partial / "recipe.json"), "an unfinished run")
    else:
        _refuse_foreign(directory, entries - {PARTIAL_NAME})
        partial.mkdir(exist_ok=True)
        write_durably(partial / "recipe.json", _json_bytes(recipe.to_json()))


def recipe_in(directory: Path) -> dict[str, Any] | None:
    """Return the recipe of the finished checkpoint or of the unfinished run in `directory`, as JSON has it, or None.

    Raises CheckpointError if a file that should hold it cannot be read.
    """
    manifest, unfinished = directory / MANIFEST_NAME, directory / PARTIAL_NAME / "recipe.json"
    found = read_json(manifest).get("recipe") if manifest.exists() else None
    if found is None and unfinished.exists():
        found = read_json(unfinished)
    return found if isinstance(found, dict) else None


def _refuse_foreign(directory: Path, entries: set[str]) -> None:
    if entries:
        some = ", ".join(sorted(entries)[:3])
        raise UsageError(f"--output {directory}: not empty ({some}); choose another directory or empty this one")


def _refuse_other(directory: Path, recipe: Recipe, found: object, what: str) -> None:
    wanted = json.loads(_json_bytes(recipe.to_json()))
    if found == wanted:
        return
    known = found if isinstance(found, dict) else {}
    differing = [
        f"{key}: {known.get(key)!r} there, {wanted.get(key)!r} asked"
        for key in {**wanted, **known}
        if known.get(key) != wanted.get(key)
    ]
    raise UsageError(
        f"--output {directory}: holds {what} of another recipe ({'; '.join(differing)}); "
        "use --overwrite to replace it or another --output"
    )


def _delete_ours(directory: Path, entries: set[str]) -> None:
    """Remove what this toolkit wrote; raise UsageError, and remove nothing, if `entries` has anything else.

    The manifest goes first, to `partial/`: no one takes what is left for a checkpoint, and a deletion that was
    interrupted still knows which files are ours.
    """
    manifest, partial = directory / MANIFEST_NAME, directory / PARTIAL_NAME
    kept = partial / MANIFEST_NAME
    ours: set[str] = set()
    if manifest.exists() or kept.exists() or (partial / "recipe.json").exists():
        ours = {INDEX_NAME, CONFIG_NAME, MANIFEST_NAME, *fnmatch.filter(entries, "model-*-of-*.safetensors")}
        for path in filter(Path.exists, (manifest, kept)):
            ours.update(read_json(path).get("files", []))
        ours.update([f".{name}.tmp" for name in ours], fnmatch.filter(entries, ".model-*-of-*.safetensors.tmp"))
    _refuse_foreign(directory, entries - ours - {PARTIAL_NAME})
    if manifest.exists():
        partial.mkdir(exist_ok=True)
        manifest.rename(kept)
    for name in sorted(entries & ours - {MANIFEST_NAME}):
        (directory / name).unlink()
    shutil.rmtree(partial, ignore_errors=True)


def _json_bytes(values: object) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
