"""How other tools store a checkpoint of this toolkit: AWQ, GPTQ, and compressed-tensors with scales for a cache.

Codes, zero points and scales of weights stay what they are in each; what a layout cannot hold is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.packed import PackedWeight
from kernels.repack import to_awq, to_gptq
from offload.checkpoint import PLAIN, Checkpoint, LayerBlob
from offload.errors import InputError
from offload.kv.calibration import read_kv
from offload.layer_view import PACKED

Strategy = Literal["tensor", "attn_head"]

FORMATS: Mapping[str, str] = {"awq": "AutoAWQ's gemm", "gptq": "GPTQ, version 1 or 2"}
"""What is a directory; `gguf` is a file (`quant.export_gguf`)."""

CACHES: Mapping[str, tuple[str, float]] = {"vllm-fp8": ("float", 448.0), "ct-int8": ("int", 127.0)}
"""What caches there are scales for: the type of compressed-tensors' scheme, and the largest magnitude that it holds."""

_ATTENTION = (".k_proj.", ".qkv_proj.")
"""In the names of what an attention module holds, to whose name runtimes append that of a scale."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How another tool stores a checkpoint.

    config: its `quantization_config`. opens: who does. repack: what becomes of a packed linear, None where it stays as
    it is. extra: tensors beside those of the checkpoint, by name.
    """

    name: str
    config: dict[str, Any]
    opens: str
    repack: Callable[[PackedWeight], dict[str, Tensor]] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


def layout_of(name: str, checkpoint: Checkpoint) -> Layout:
    """Return the layout of one of FORMATS for a checkpoint. Raises InputError if it cannot hold one of its recipe."""
    recipe = checkpoint.recipe
    _check_quantized(f"--format {name}", checkpoint)
    if recipe.wide:
        raise InputError(f"--format {name}: weights of two widths, 4 bits and 8, are more than it can say")
    head = any(_packed(blob) for blob in checkpoint.blobs if not blob.module)
    group_size = recipe.group_size or -1
    if name == "awq":
        if recipe.bits != 4:
            raise InputError(f"--format awq: weights of {recipe.bits} bits; it holds 4, --format gptq holds these")
        config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
        config |= {"modules_to_not_convert": list(recipe.ignore)} | ({"lm_head": True} if head else {})
        return Layout(name, config, "gptqmodel (for transformers), vLLM, SGLang", to_awq)
    first_version = recipe.symmetric
    config = {
        "quant_method": "gptq",
        "bits": recipe.bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": recipe.symmetric,
        "lm_head": head,
        "checkpoint_format": "gptq" if first_version else "gptq_v2",
        "pack_dtype": "int32",
    }
    layers = [blob for blob in checkpoint.blobs if blob.module]
    if any(name.startswith(f"{blob.module}.") for name in recipe.ignore for blob in layers):  # else all of a layer
        config["modules_in_block_to_quantize"] = [[name for blob in layers for name in _packed(blob)]]
    opens = "gptqmodel (for transformers)" + (", vLLM, SGLang" if recipe.symmetric else "; vLLM takes no zero points")
    return Layout(name, config, opens, lambda weight: to_gptq(weight, first_version))


def _packed(blob: LayerBlob) -> list[str]:
    """Return the packed linears of a shard."""
    return [name.removesuffix(PACKED) for name in blob.tensors if name.endswith(PACKED)]


def cache_layout(name: str, strategy: Strategy, checkpoint: Checkpoint) -> Layout:
    """Return compressed-tensors' layout with the scales of one of CACHES.

    Raises InputError if `quant.kv` has not calibrated every layer, or what the checkpoint is has no such layout;
    CheckpointError if what it found is damaged.
    """
    _check_quantized(f"--kv-export {name}", checkpoint)
    kind, largest = CACHES[name]
    scheme = {"num_bits": 8, "type": kind, "strategy": strategy, "dynamic": False, "symmetric": True}
    config = {**(checkpoint.recipe.quantization_config() or {}), "kv_cache_scheme": scheme}
    opens = "transformers with compressed-tensors" + (", vLLM" if kind == "float" else "")
    return Layout(name, config, opens, extra=_cache_scales(f"--kv-export {name}", largest, strategy, checkpoint))


def _check_quantized(flag: str, checkpoint: Checkpoint) -> None:
    if checkpoint.recipe.method == PLAIN:
        raise InputError(f"{flag}: nothing in {checkpoint.directory} is quantized; export what `quant.awq` makes of it")
    if checkpoint.recipe.settings.get("reordered"):
        raise InputError(f"{flag}: inputs in an order of their own; export the checkpoint it was made from")


def _cache_scales(flag: str, largest: float, strategy: Strategy, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return k_scale and v_scale of every layer, float32 [1] or [key_heads, 1, 1], under the names that vLLM loads."""
    found = read_kv(checkpoint)
    if not found:
        raise InputError(
            f"{flag}: the cache of {checkpoint.directory} is not calibrated; "
            f"`python -m quant.kv --model {checkpoint.directory}` does it, then export again"
        )
    scales = {}
    for index, blob in enumerate(blob for blob in checkpoint.blobs if blob.module):
        parents = {name.partition(mark)[0] for name in blob.tensors for mark in _ATTENTION if mark in name}
        if index not in found or len(parents) != 1:
            raise InputError(
                f"{flag}: layer {blob.module!r} keeps no plain keys and values of its whole past, and the scheme is "
                "one for all layers; use the checkpoint as it is"
            )
        attention = parents.pop()
        scales[f"{attention}.k_scale"] = _scale(found[index].key_max, largest, strategy)
        scales[f"{attention}.v_scale"] = _scale(found[index].value_max, largest, strategy)
    return scales


def _scale(magnitudes: Tensor, largest: float, strategy: Strategy) -> Tensor:
    """Return the scale under which magnitudes [key_heads] come to `largest`; 1 where all is zero."""
    magnitudes = magnitudes.max()[None] if strategy == "tensor" else magnitudes[:, None, None]
    return torch.where(magnitudes > 0, magnitudes / largest, 1.0)
