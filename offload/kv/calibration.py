"""What calibration found of a checkpoint's keys and values: a file beside its shards that its manifest names.

It is no part of `quantization_config`: a `kv_cache_scheme` there would let other runtimes switch their own caches, to 8
bits of another kind, without being asked.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from safetensors.torch import load
from torch import Tensor

from offload.checkpoint import MANIFEST_NAME, Checkpoint
from offload.checkpoint_writer import write_safetensors
from offload.durable_file import write_durably
from offload.errors import CheckpointError
from offload.files import check_regular, read_json

KV_NAME = "kv_calibration.safetensors"
_KEY = "kv_calibration"


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Of one layer, float32. key_offset: [key_heads, key_dim], the mean of its keys as they are cached, rotated.

    key_max, value_max: [key_heads], their largest magnitudes, of which scales for other runtimes are made.
    """

    key_offset: Tensor
    key_max: Tensor
    value_max: Tensor


def write_kv(checkpoint: Checkpoint, layers: Mapping[str, LayerKV], calibration: dict[str, Any]) -> None:
    """Write the file and then, whole, the manifest that names it. layers: by the name of the decoder layer.

    calibration: what it was made from, plain JSON. Raises ResourceError if that cannot be done; between the two writes
    the file is not the one that is named, and who reads it is told to calibrate again.
    """
    tensors = {
        f"{module}.{part}": getattr(layer, part)
        for module, layer in layers.items()
        for part in ("key_offset", "key_max", "value_max")
    }
    write_safetensors(checkpoint.directory / KV_NAME, tensors)
    content = (checkpoint.directory / KV_NAME).read_bytes()
    path = checkpoint.directory / MANIFEST_NAME
    manifest = read_json(path)
    manifest["files"] = sorted({*manifest.get("files", []), KV_NAME})
    manifest[_KEY] = {**calibration, "file": KV_NAME, "xxh3": xxhash.xxh3_64_hexdigest(content)}
    write_durably(path, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def read_kv(checkpoint: Checkpoint) -> dict[int, LayerKV]:
    """Return what was found, by the index of the decoder layer; nothing if the manifest names no such file.

    Raises CheckpointError if the file is not what the manifest says, or not of these layers.
    """
    entry = read_json(checkpoint.directory / MANIFEST_NAME).get(_KEY)
    if entry is None:
        return {}
    path = checkpoint.directory / KV_NAME
    check_regular(path)
    content = path.read_bytes()
    if not isinstance(entry, dict) or entry.get("xxh3") != xxhash.xxh3_64_hexdigest(content):
        raise CheckpointError(f"{path}: not the file that {MANIFEST_NAME} names; run `python -m quant.kv` again")
    tensors = load(content)
    found = {}
    for index, module in enumerate(blob.module for blob in checkpoint.blobs if blob.module):
        parts = {part: tensors.get(f"{module}.{part}") for part in ("key_offset", "key_max", "value_max")}
        ranks = {part: None if tensor is None else tensor.dim() for part, tensor in parts.items()}
        if set(ranks.values()) == {None}:
            continue  # a layer whose past is of another kind
        fits = ranks == {"key_offset": 2, "key_max": 1, "value_max": 1}
        tensors_of_layer = [tensor for tensor in parts.values() if tensor is not None]
        if not fits or not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors_of_layer):
            raise CheckpointError(f"{path}: layer {module!r}: no finite float32 offsets and magnitudes")
        found[index] = LayerKV(*tensors_of_layer)
    return found
