"""The checkpoint on disk, as it is read.

A directory that Hugging Face tools accept: config.json with compressed-tensors' `pack-quantized` settings, an index,
and one safetensors shard a decoder layer (the first holds the embeddings, the last the final norm and head), so that a
layer is one contiguous range of one file and one read. `manifest.json` is written last; without it a directory is
unfinished.

The header of every shard is checked by safetensors itself before an offset of it is used. No name out of a file becomes
a path unless it is a single component ending in .safetensors, and nothing is ever unpickled.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kernels.packed import BITS
from offload.errors import CheckpointError
from offload.files import check_regular, parse_json, read_json, reading

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"
"""What the making of the checkpoint took: the one file that differs between two runs of one recipe."""

PARTIAL_NAME = "partial"
"""Where the writer keeps its records until all is written."""

SENSITIVITY_NAME = "sensitivity.json"
PAYLOAD_ALIGNMENT = 4096
"""Payloads start on a multiple of this, so that they can be read past the page cache."""

PLAIN = "plain"
"""Method of a recipe that quantizes nothing: bits and groups say nothing then."""

WIDE_BITS = 8
"""Of the modules that a recipe of 4 bits leaves wider."""

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM and SGLang multiply as one, by the name that they give it."""

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of a checkpoint; two runs with equal recipes write equal files.

    group_size: consecutive inputs that share a scale, None for one group a row. source: the model as the user named it,
    None for the embedded default; source_xxh3 identifies its weights. calibration_*: what the method saw (None for
    methods that see nothing). ignore: modules left in the source's dtype, by full name. settings: the method's own.
    wide: modules in 8 bits where the others have 4, by full name.
    """

    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    ignore: tuple[str, ...]
    source: str | None
    source_xxh3: str
    seed: int
    calibration_name: str | None = None
    calibration_sha256: str | None = None
    num_samples: int | None = None
    seq_len: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: expected 4 or 8")
        if self.group_size not in (None, 32, 64, 128):
            raise ValueError(f"group_size={self.group_size}: expected 32, 64, 128 or None for the whole row")
        if not isinstance(self.settings, dict):
            raise ValueError(f"settings: expected an object, found {type(self.settings).__name__}")
        if not all(isinstance(name, str) for name in (*self.ignore, *self.wide)):
            raise ValueError("ignore, wide: expected names of modules")
        if self.wide and self.bits != 4:
            raise ValueError(f"wide: {len(self.wide)} modules in 8 bits beside others in {self.bits}, expected 4")

    @classmethod
    def from_json(cls, values: object) -> "Recipe":
        """Rebuild a recipe from `to_json`. Raises ValueError on unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) | {"wide"} != known:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"recipe: expected the keys {sorted(known)}, found {found}")
        return cls(**{**values, "ignore": tuple(values["ignore"]), "wide": tuple(values.get("wide", ()))})

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values, `wide` only where there is any."""
        values = {**asdict(self), "ignore": list(self.ignore), "wide": list(self.wide)}
        return values if self.wide else {key: value for key, value in values.items() if key != "wide"}

    def bits_of(self, module: str) -> int:
        """Return the bits of a quantized module's weight."""
        return WIDE_BITS if module in self.wide else self.bits

    def quantization_config(self, joined: bool = True) -> dict[str, Any] | None:
        """Return config.json's `quantization_config`, in compressed-tensors' words, None where nothing is quantized.

        joined: beside linears of another width, name what vLLM makes of several of them. Inputs in an order of their
        own are more than the words can say: then the method is one that others refuse.
        """
        if self.method == PLAIN:
            return None
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        if self.group_size is None:
            weights["strategy"] = "channel"
        else:
            weights |= {"strategy": "group", "group_size": self.group_size}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        if self.wide:  # a module's own name goes before that of its class
            targets = [*self.wide, *(_joined(self.wide) if joined else ())]
            groups["group_1"] = {"targets": targets, "weights": {**weights, "num_bits": WIDE_BITS}}
        return {
            "quant_method": "int4-offload" if self.settings.get("reordered") else "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
        }


def _joined(names: tuple[str, ...]) -> list[str]:
    """Return vLLM's names for those linears among `names` that it joins.

    Until vllm-project/vllm#49483 it looks for the class of what it joined before it looks for the parts, and would find
    the group of the other width.
    """
    known, found = set(names), []
    for name in names:
        parent, _, last = name.rpartition(".")
        for joined, parts in JOINED.items():
            if last == parts[0] and all(f"{parent}.{part}" in known for part in parts):
                found.append(f"{parent}.{joined}")
    return found


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies: `offset` and `nbytes` in bytes from the start of its shard's payload."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """One shard, or what of it is read as one: bytes of one file and the tensors in them.

    module: the decoder layer it holds ("model.layers.3"), "" for the first and last shard.
    offset, nbytes: the payload in `path`. checksums: xxh3-64 of each tensor's bytes, by name.
    ranges: where it is not one range of the file, the offset and size of each; they lie in memory one behind the other,
    each from a page on, and nbytes is what they take there.
    """

    path: Path
    module: str
    offset: int
    nbytes: int
    tensors: dict[str, TensorSpec]
    checksums: dict[str, str]
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint whose files are what its index and manifest say; no tensor has been read yet."""

    directory: Path
    recipe: Recipe
    blobs: tuple[LayerBlob, ...]
    layer_errors: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(blob.nbytes for blob in self.blobs)

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Check a directory and describe it. Raises CheckpointError naming file and tensor."""
        directory = Path(directory)
        if not (directory / MANIFEST_NAME).exists():
            raise CheckpointError(_why_no_manifest(directory))
        manifest = read_json(directory / MANIFEST_NAME)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{directory / MANIFEST_NAME}: format {version}, this version reads {FORMAT_VERSION}")
        try:
            recipe = Recipe.from_json(manifest["recipe"])
            layer_errors = manifest["layer_errors"]
            entries = [_shard_entry(number, shard) for number, shard in enumerate(manifest["shards"], start=1)]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory / MANIFEST_NAME}: {type(error).__name__} {error}") from None
        _check_config(directory, recipe)
        weight_map = _read_index(directory)
        if sorted(set(weight_map.values())) != sorted(entry[0] for entry in entries):
            raise CheckpointError(f"{directory / INDEX_NAME} and {MANIFEST_NAME} name different shards")
        blobs = tuple(_open_shard(directory, weight_map, *entry) for entry in entries)
        placed = sum(len(blob.tensors) for blob in blobs)
        if placed != len(weight_map):
            raise CheckpointError(f"{directory / INDEX_NAME}: {len(weight_map)} tensors, the shards hold {placed}")
        return cls(directory, recipe, blobs, layer_errors)


def is_ours(directory: Path) -> bool:
    """Whether a directory was begun by this toolkit's writer, finished or not."""
    return (directory / MANIFEST_NAME).exists() or (directory / PARTIAL_NAME).is_dir()


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory looks like one of ours, finished or damaged; plain models have neither mark."""
    if (directory / MANIFEST_NAME).exists():
        return True
    config = directory / CONFIG_NAME
    return config.is_file() and "quantization_config" in read_json(config)


def read_header(path: Path) -> tuple[int, dict[str, TensorSpec]]:
    """Return a shard's payload offset and tensors, after safetensors has accepted the file. Raises CheckpointError."""
    check_regular(path)
    try:
        with safe_open(path, framework="np"):  # "pt" maps a file so that the system has to have memory for all of it
            pass
    except (SafetensorError, OSError, RecursionError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path}: {size} bytes, refused by safetensors ({error}); truncated or damaged") from None
    with reading(path), path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        raw = file.read(header_bytes)
    try:
        header = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header: {error}") from None
    header.pop("__metadata__", None)
    return 8 + header_bytes, {name: _spec(path, name, entry) for name, entry in header.items()}


def _spec(path: Path, name: str, entry: dict[str, Any]) -> TensorSpec:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}"
        )
    start, end = entry["data_offsets"]
    return TensorSpec(start, end - start, tuple(entry["shape"]), dtype)


def _shard_entry(number: int, shard: Any) -> tuple[str, str, int, dict[str, str]]:
    file, module, size_bytes, checksums = shard["file"], shard["module"], shard["size_bytes"], shard["xxh3"]
    if not (isinstance(file, str) and isinstance(module, str)):
        raise ValueError(f"shard {number}: file and module are not text")
    if not (isinstance(size_bytes, int) and isinstance(checksums, dict)):
        raise ValueError(f"shard {number}: size_bytes is no number or xxh3 no object")
    return file, module, size_bytes, checksums


def _why_no_manifest(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory"
    if (directory / PARTIAL_NAME).is_dir():
        return f"{directory}: calibration has not finished; run the same quant command again to resume it"
    return f"{directory}: no {MANIFEST_NAME}; not a checkpoint of this toolkit, or an incomplete copy of one"


def _check_config(directory: Path, recipe: Recipe) -> None:
    found = read_json(directory / CONFIG_NAME).get("quantization_config")
    if found not in (recipe.quantization_config(), recipe.quantization_config(joined=False)):
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: quantization_config differs from the recipe in {MANIFEST_NAME}"
        )


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or PureWindowsPath(shard).name != shard:
            raise CheckpointError(
                f"{path}: tensor {name!r} points to {shard!r}; expected a .safetensors file beside it"
            )
    return weight_map


def _open_shard(
    directory: Path, weight_map: dict[str, str], file: str, module: str, size_bytes: int, checksums: dict[str, str]
) -> LayerBlob:
    path = directory / file
    check_regular(path)
    found_bytes = path.stat().st_size
    if found_bytes != size_bytes:
        state = "truncated" if found_bytes < size_bytes else "longer than it was written"
        raise CheckpointError(f"{path}: {found_bytes} bytes, {size_bytes} in the manifest: {state}; copy it again")
    offset, tensors = read_header(path)
    expected = {name for name, shard in weight_map.items() if shard == file}
    if set(tensors) != expected:
        raise CheckpointError(f"{path}: {describe_difference(set(tensors), expected, f'in {INDEX_NAME}')}")
    if set(checksums) != expected:
        raise CheckpointError(
            f"{path}: {describe_difference(set(checksums), expected, f'in {INDEX_NAME}')} (checksums)"
        )
    return LayerBlob(path, module, offset, size_bytes - offset, tensors, checksums)


def describe_difference(found: set[str], expected: set[str], where: str) -> str:
    """Say which names are missing from and which are too many in `found`, at most five of each."""
    parts = []
    for names, verb in ((expected - found, "missing"), (found - expected, "unexpected")):
        if names:
            some = ", ".join(repr(name) for name in sorted(names)[:5])
            parts.append(f"{len(names)} tensors {verb} ({some}{', ...' if len(names) > 5 else ''})")
    return f"{' and '.join(parts)}; {len(expected)} expected {where}"
