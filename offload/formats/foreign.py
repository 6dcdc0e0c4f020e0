"""Checkpoints that other tools made: what their configuration says, and what their tensors become here.

AWQ's "gemm", GPTQ's two versions and compressed-tensors' `pack-quantized`, as of integers with one scale a group. What
a configuration says and this toolkit cannot keep to is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.packed import BITS, GROUP_SIZES, PackedWeight, codes_per_word
from kernels.repack import from_awq, from_gptq, on_one_thread
from offload.checkpoint import CONFIG_NAME, is_ours
from offload.errors import CheckpointError, InputError
from offload.files import read_json
from offload.layer_view import ORDER, PACKED, SCALE, SHAPE, ZERO

Format = Literal["awq", "gptq", "compressed-tensors"]

_PARTS: Mapping[Format, tuple[str, ...]] = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
}
"""Of a linear; the first is there for each that is packed."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """What a foreign `quantization_config` says. group_size: None for one a row. first_version: of GPTQ's layout.

    cache: what kind of cache of keys and values it has scales for, "float8" or the like; None for none.
    """

    kind: Format
    bits: int
    group_size: int | None
    symmetric: bool
    first_version: bool = False
    cache: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The last parts of the names of a packed linear's tensors."""
        return _PARTS[self.kind]

    def packed_modules(self, names: Mapping[str, Any]) -> list[str]:
        """Return the linears that are packed, out of the names of all tensors."""
        marker = f".{self.parts[0]}"
        return [name.removesuffix(marker) for name in names if name.endswith(marker)]

    def repack(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a linear's tensors as this toolkit stores them. tensors: by the last part of their names.

        Raises CheckpointError if they do not fit the configuration or each other.
        """
        try:
            weight, order = self._weight(tensors)
            if weight.group_size != (self.group_size or weight.in_features):
                raise ValueError(f"groups of {weight.group_size}, the configuration says {self.group_size}")
        except (KeyError, ValueError, RuntimeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{module}: {what}; the {self.kind} checkpoint is damaged") from None
        found = {
            module + PACKED: weight.codes.view(torch.int32),
            module + SCALE: weight.scale,
            module + SHAPE: torch.tensor([weight.out_features, weight.in_features]),
        }
        if weight.zero is not None:
            found[module + ZERO] = weight.zero
        if order is not None:
            found[module + ORDER] = order.to(torch.int32)
        return found

    def _weight(self, tensors: Mapping[str, Tensor]) -> tuple[PackedWeight, Tensor | None]:
        if self.kind == "awq":
            return from_awq(tensors["qweight"], tensors["qzeros"], _scales(tensors["scales"]), self.symmetric), None
        if self.kind == "gptq":
            return from_gptq(
                tensors["qweight"],
                tensors["qzeros"],
                _scales(tensors["scales"]),
                tensors.get("g_idx"),
                bits=self.bits,
                first_version=self.first_version,
                symmetric=self.symmetric,
            )
        packed, scale = tensors["weight_packed"], _scales(tensors["weight_scale"])
        rows, inputs = packed.shape[0], packed.shape[1] * codes_per_word(self.bits)
        if tensors["weight_shape"].tolist() != [rows, inputs]:
            raise ValueError(f"weight_shape {tensors['weight_shape'].tolist()}, weight_packed holds {[rows, inputs]}")
        zero = None if self.symmetric else tensors["weight_zero_point"]
        return PackedWeight(packed.view(torch.uint8), scale, zero, inputs // scale.shape[1], self.bits), None


@on_one_thread()
def _scales(scale: Tensor) -> Tensor:
    """Return scales in a dtype that is kept here. Raises ValueError if one is not finite, or would be rounded."""
    if not scale.isfinite().all():
        raise ValueError("scales that are not finite")
    if scale.dtype in (torch.float16, torch.bfloat16):
        return scale
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale.to(dtype).to(scale.dtype), scale):
            return scale.to(dtype)
    raise ValueError(f"{scale.dtype} scales that no 16 bits hold")


def foreign_format(directory: Path) -> Foreign | None:
    """Return what another tool's checkpoint says of itself; None for one of ours, finished or not, and for none at all.

    Raises InputError for a quantization that cannot be kept to.
    """
    if is_ours(directory) or not (directory / CONFIG_NAME).is_file():
        return None
    config = read_json(directory / CONFIG_NAME).get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}
    if method not in readers:
        raise InputError(
            f"{directory}: quantized by {method!r}; expected one of {', '.join(readers)}, or a model without "
            "quantization_config, which `python -m quant.awq --model DIR` quantizes"
        )
    try:
        found = readers[method](config)
        if found.bits not in BITS or found.group_size not in (None, *GROUP_SIZES):
            raise ValueError(f"{found.bits} bits in groups of {found.group_size}; expected 4 or 8, in 32, 64 or 128")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{directory / CONFIG_NAME}: {method} quantization_config: {what}: cannot be opened") from None
    return found


def _awq(config: dict[str, Any]) -> Foreign:
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"version {config['version']!r}, expected 'gemm'")
    if config["bits"] != 4:
        raise ValueError(f"bits {config['bits']}, expected 4")
    return Foreign("awq", 4, _group_size(config["group_size"]), not config["zero_point"])


def _gptq(config: dict[str, Any]) -> Foreign:
    layout = config.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format {layout!r}, expected 'gptq' or 'gptq_v2'")
    if config.get("dynamic"):
        raise ValueError("`dynamic` gives modules settings of their own")
    group_size = _group_size(config["group_size"])
    return Foreign("gptq", config["bits"], group_size, bool(config["sym"]), first_version=layout == "gptq")


def _compressed_tensors(config: dict[str, Any]) -> Foreign:
    if config["format"] != "pack-quantized":
        raise ValueError(f"format {config['format']!r}, expected 'pack-quantized'")
    groups = list(config["config_groups"].values())
    weights = groups[0]["weights"]
    if any(group["weights"] != weights for group in groups):
        raise ValueError("groups of modules with different weights")
    if any(group.get("input_activations") for group in groups):
        raise ValueError("quantized activations")
    if weights["type"] != "int" or weights.get("dynamic") or weights.get("actorder") not in (None, "static", "weight"):
        raise ValueError(f"weights {weights}, expected static integers, their columns in order")
    if weights["strategy"] not in ("group", "channel"):
        raise ValueError(f"strategy {weights['strategy']!r}, expected 'group' or 'channel'")
    group_size = weights["group_size"] if weights["strategy"] == "group" else None
    cache = config.get("kv_cache_scheme")
    kept = None if cache is None else f"{cache['type']}{cache['num_bits']}"
    return Foreign("compressed-tensors", weights["num_bits"], group_size, bool(weights["symmetric"]), cache=kept)


def _group_size(value: int) -> int | None:
    return None if value == -1 else value
