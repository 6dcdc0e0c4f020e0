"""Write a checkpoint as one GGUF file, llama.cpp's, code by code; one shard of it is in memory at a time.

4 bits become Q4_0, with zero points Q4_1; 8 bits Q8_0 (`kernels.repack.to_ggml`). What is not packed stays as it is,
vectors widened to float32, which llama.cpp wants of norms and biases.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig

from kernels.packed import PackedWeight
from kernels.repack import to_ggml
from offload.checkpoint import Checkpoint, Recipe, TensorSpec
from offload.command import Progress
from offload.durable_file import sync_directory
from offload.errors import InputError, ResourceError, UsageError
from offload.layer_view import PACKED, SCALE, SHAPE, ZERO
from offload.memory import FileReader
from offload.skeleton import read_config
from quant.export_card import gguf_description
from quant.gguf_metadata import add_model, add_tokenizer, check_config, rope_factors
from quant.shards import packed_linears, read_shard

_FLOAT = np.dtype(np.float32)
_PLAIN = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
_PACKED = {
    (4, True): (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    (4, False): (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    (8, True): (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""By bits and symmetry."""


@torch.inference_mode()
def export_gguf(checkpoint: Checkpoint, output: Path) -> None:
    """Write a checkpoint as a GGUF file, which appears under its name complete.

    Raises InputError for a checkpoint or model that GGUF, or llama.cpp, cannot have exactly, UsageError if there is
    something at `output` or it is no name of a GGUF file, ResourceError if it cannot be written.
    """
    if output.suffix != ".gguf":
        raise UsageError(f"--output {output}: --format gguf writes one file; expected a name that ends in .gguf")
    if output.exists():
        raise UsageError(f"--output {output}: exists; name another file, or remove it")
    config = read_config(checkpoint.directory)
    check_config(config)
    _check_recipe(checkpoint.recipe)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write(checkpoint, config, output.stem, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.rename(temporary, output)
        sync_directory(output.parent)
    except OSError as error:
        raise ResourceError(f"--output {output}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _check_recipe(recipe: Recipe) -> None:
    widths = {recipe.bits, *([8] if recipe.wide else [])}
    if not recipe.symmetric and 8 in widths:
        raise InputError(
            "--format gguf: 8 bits with zero points, where Q8_0 has none; --format gptq holds 8 bits with them, or "
            "quantize again with --symmetric"
        )
    if recipe.settings.get("reordered"):
        raise InputError("--format gguf: inputs in an order of their own; export the checkpoint it was made from")


def _write(checkpoint: Checkpoint, config: PretrainedConfig, name: str, path: Path) -> None:
    recipe, factors = checkpoint.recipe, rope_factors(config)
    writer = GGUFWriter(path, config.model_type)
    add_model(writer, config, name, _PACKED[recipe.bits, recipe.symmetric][1])
    writer.add_description(gguf_description(checkpoint))
    add_tokenizer(writer, checkpoint.directory, config.vocab_size)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, _FLOAT, factors.nbytes)
    names = _names(checkpoint, config)
    for blob in checkpoint.blobs:
        for stored, spec in blob.tensors.items():
            if stored in names:
                _add_info(writer, names[stored], spec, recipe, stored)
    reader, progress = FileReader(), Progress("exporting, shard", len(checkpoint.blobs))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for blob in checkpoint.blobs:
            tensors = read_shard(reader, blob)
            packed = dict(packed_linears(checkpoint, tensors))
            for stored in (name for name in tensors if name in names):
                writer.write_tensor_data(_values(stored, tensors[stored], packed, config))
            progress.advance()
    finally:
        reader.close()
        writer.close()


def _add_info(writer: GGUFWriter, place: str, spec: TensorSpec, recipe: Recipe, stored: str) -> None:
    shape, kind = spec.shape, GGMLQuantizationType.F32 if len(spec.shape) == 1 else _PLAIN.get(spec.dtype)
    if stored.endswith(PACKED):
        bits = recipe.bits_of(stored.removesuffix(PACKED))
        shape, kind = (shape[0], shape[1] * 32 // bits), _PACKED[bits, recipe.symmetric][0]
    if kind is None or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        raise InputError(
            f"--format gguf: tensor {stored!r} of {spec.dtype} {list(shape)}: GGUF's blocks do not hold it"
        )
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(place, shape, _FLOAT, math.prod(shape) // elements * nbytes, raw_dtype=kind)


def _names(checkpoint: Checkpoint, config: PretrainedConfig) -> dict[str, str]:
    """Return GGUF's name of each tensor, under that of a packed linear's codes. Raises InputError if one has none."""
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    table, names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers), {}
    for name in (name for blob in checkpoint.blobs for name in blob.tensors):
        if name.endswith((SCALE, ZERO, SHAPE)):
            continue
        weight = name.removesuffix(PACKED) + ".weight" if name.endswith(PACKED) else name
        names[name] = table.get_name(weight, (".weight", ".bias"))
        if names[name] is None:
            raise InputError(
                f"--format gguf: tensor {name!r} has no place in llama.cpp's {config.model_type}; export as gptq or awq"
            )
    return names


def _values(
    stored: str, tensor: Tensor, packed: Mapping[str, PackedWeight], config: PretrainedConfig
) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes in the file. Raises InputError naming a linear that has none."""
    if stored.endswith(PACKED):
        module = stored.removesuffix(PACKED)
        try:
            tensor = to_ggml(packed[module])
        except ValueError as error:
            raise InputError(f"{module}: {error}; export as gptq or awq, or use the checkpoint as it is") from None
    elif tensor.dim() == 1:
        tensor = tensor.float()
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    for part, count in heads.items():
        if config.model_type == "llama" and part in stored:  # llama.cpp has the halves of a head interleaved
            tensor = tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    values: np.ndarray[Any, Any] = tensor.contiguous().view(torch.uint8).numpy()
    return values
