"""GGUF files, llama.cpp's: Q4_0 and Q8_0 re-laid code by code, under the names and the row order of transformers.

Both are symmetric in groups of 32 under a float16 scale, which is what this toolkit stores. Q4_1 adds a minimum, a
number of its own where a zero point here is a whole number of steps: it is taken where all minima are such, as in files
of `quant.export`. The K-quants have groups of 16 or scales in two steps: linears of these are refused, and of other
Q4_1. Tables (embeddings, an output head) of any type are dequantised to float16.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from kernels.packed import pack_zero, symmetric_zero
from kernels.repack import from_ggml
from offload.errors import CheckpointError, InputError
from offload.formats.gguf_tokenizer import load_gguf_tokenizer
from offload.layer_view import PACKED, SCALE, SHAPE, ZERO
from offload.source import files_around

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose tensors transformers takes as they are, but for llama's queries and keys."""

_PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TABLE_CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened file. tensors: those of gguf's reader, by GGUF's names; their bytes are mapped, not read."""

    path: Path
    architecture: str
    tensors: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read the header. Raises CheckpointError for a damaged file, InputError for a model that cannot be had."""
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the reader has no error of its own
            raise CheckpointError(
                f"{path}: no whole GGUF file ({type(error).__name__}: {error}); download it again"
            ) from None
        architecture = str(fields.get("general.architecture"))
        if architecture not in _ARCHITECTURES:
            raise InputError(f"{path}: architecture {architecture!r}; expected one of {', '.join(_ARCHITECTURES)}")
        scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise InputError(f"{path}: rope scaling {scaling!r}, which transformers does not read out of GGUF files")
        return cls(path, architecture, {tensor.name: tensor for tensor in reader.tensors})

    def config(self) -> dict[str, Any]:
        """Return config.json. Raises CheckpointError if the metadata are not those of a model."""
        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
            values: dict[str, Any] = config.to_dict()
        except Exception as error:
            raise CheckpointError(f"{self.path}: metadata: {type(error).__name__}: {error}") from None
        return values | {"dtype": "bfloat16"}

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer and chat template as transformers stores them.

        Raises CheckpointError, or InputError for one that cuts text in a way unknown here.
        """
        with TemporaryDirectory() as directory:
            load_gguf_tokenizer(self.path).save_pretrained(directory)
            return files_around(Path(directory))

    def places(self, model: PreTrainedModel) -> dict[str, str]:
        """Return the file's name of each of the model's tensors. Raises CheckpointError if the two do not fit."""
        from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

        names = get_gguf_hf_weights_map(model, TensorProcessor(), self.architecture)
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        places = {names[name]: name for name in self.tensors if name in names}
        missing = sorted(set(model.state_dict()) - set(places) - tied)
        unexpected = sorted(set(self.tensors) - set(places.values()))
        if missing or unexpected:
            what = f"tensor {missing[0]!r} is missing" if missing else f"tensor {unexpected[0]!r} is not one of it"
            raise CheckpointError(f"{self.path}: not the tensors of {type(model).__name__}: {what}")
        for name, place in places.items():
            shape, found = list(model.state_dict()[name].shape), self.tensors[place].shape.tolist()[::-1]
            if shape != found:
                raise CheckpointError(f"{self.path}: tensor {place!r} is {found}, expected {shape}")
        return places

    def packed_bits(self, model: PreTrainedModel, places: Mapping[str, str]) -> dict[str, int]:
        """Return the linears that are packed and their bits. Raises InputError for one of another type."""
        bits: dict[str, int] = {}
        for module, linear in model.named_modules():
            place = places.get(f"{module}.weight")
            if not isinstance(linear, nn.Linear) or place is None:
                continue
            kind = self.tensors[place].tensor_type.name
            if kind in _PACKED_BITS and self._has_codes(place):
                bits[module] = _PACKED_BITS[kind]
            elif kind not in _PLAIN and linear is not model.get_output_embeddings():
                raise InputError(
                    f"{self.path}: tensor {place!r} is {kind}, which no codes of this toolkit hold exactly; expected "
                    f"Q4_0, Q8_0, {', '.join(_PLAIN)}: download the model as Q4_0 or Q8_0, or quantize its "
                    "safetensors with `python -m quant.awq --model DIR`"
                )
        return bits

    def symmetric(self, places: Mapping[str, str], packed: Iterable[str]) -> bool:
        """Whether none of the packed linears has minima."""
        return all(self.tensors[places[f"{module}.weight"]].tensor_type.name != "Q4_1" for module in packed)

    def read_packed(self, module: str, place: str, bits: int, heads: int | None, symmetric: bool) -> dict[str, Tensor]:
        """Return the tensors of a packed linear, without zero points if symmetric. Raises CheckpointError.

        heads: see `_in_order`.
        """
        minima = self.tensors[place].tensor_type.name == "Q4_1"
        weight = from_ggml(_in_order(torch.from_numpy(self.tensors[place].data.copy()), heads), bits, minima)
        if not weight.scale.isfinite().all():
            raise CheckpointError(f"{self.path}: tensor {place!r} has scales that are not finite; download it again")
        found = {
            module + PACKED: weight.codes.view(torch.int32),
            module + SCALE: weight.scale,
            module + SHAPE: torch.tensor([weight.out_features, weight.in_features]),
        }
        if not symmetric:
            middle = torch.full(weight.scale.shape, symmetric_zero(bits))
            found[module + ZERO] = pack_zero(middle, bits) if weight.zero is None else weight.zero
        return found

    def _has_codes(self, place: str) -> bool:
        """Whether a tensor of a type that is packed has no minimum between two steps."""
        tensor = self.tensors[place]
        if tensor.tensor_type.name == "Q4_1":
            try:
                for row in range(0, len(tensor.data), _TABLE_CHUNK_ROWS):
                    from_ggml(torch.from_numpy(tensor.data[row : row + _TABLE_CHUNK_ROWS].copy()), 4, minima=True)
            except ValueError:
                return False
        return True

    def read_plain(self, place: str, heads: int | None) -> Tensor:
        """Return a tensor as it is, or a table dequantised to float16. heads: see `_in_order`."""
        from gguf.quants import dequantize

        tensor = self.tensors[place]
        kind, shape = tensor.tensor_type.name, tensor.shape.tolist()[::-1]
        if kind in _PLAIN:
            flat = torch.from_numpy(tensor.data.copy()).view(torch.uint8).flatten()
            return _in_order(flat.view(_PLAIN[kind]).view(shape), heads)
        table = torch.empty(shape, dtype=torch.float16)
        for row in range(0, shape[0], _TABLE_CHUNK_ROWS):
            values = dequantize(tensor.data[row : row + _TABLE_CHUNK_ROWS], tensor.tensor_type)
            table[row : row + _TABLE_CHUNK_ROWS] = torch.from_numpy(values)
        if not table.isfinite().all():
            raise CheckpointError(f"{self.path}: tensor {place!r} holds values that float16 does not")
        return table

    def permuted_heads(self, model: PreTrainedModel, place: str) -> int | None:
        """Return the heads of a tensor whose rows llama.cpp has in another order, None for the others."""
        if self.architecture != "llama" or (".attn_q." not in place and ".attn_k." not in place):
            return None
        config = model.config
        return int(config.num_attention_heads if ".attn_q." in place else config.num_key_value_heads)


def gguf_path(path: Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only one in a directory without config.json.

    Raises InputError if there are several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"{path}: {len(files)} GGUF files in it; name one, {files[0]} say")
    return files[0] if files else None


def _in_order(tensor: Tensor, heads: int | None) -> Tensor:
    """Return rows as transformers has them; llama.cpp has the two halves of each of `heads` interleaved."""
    if heads is None:
        return tensor
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()
