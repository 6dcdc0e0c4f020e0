"""Models of random weights and a given shape, written layer by layer: speed asks for bytes, not for sense.

The same shape is written as a checkpoint of this toolkit (int4 layers, an 8-bit head), as a GGUF file by llama.cpp's
own recipe for Q4_0 (a 6-bit head), and as a bfloat16 model of transformers. Weights are small enough for activations to
stay finite.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.packed import check_group_size
from offload.checkpoint import INDEX_NAME, MANIFEST_NAME, Recipe
from offload.checkpoint_writer import open_writer
from offload.command import Progress

GROUP_SIZE = 64
_CODE_DEVIATION = {4: 4.6, 8: 73.9}
_Q4_0_BYTES, _Q6_K_BYTES = 18, 210  # of a block of 32 weights, and of one of 256
_Q4_0_WEIGHTS, _Q6_K_WEIGHTS = 32, 256


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama. tied: whether the head is the table of embeddings, in the GGUF file."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the linears of a layer, by their names in transformers."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "eos_token_id": None,
            "bos_token_id": None,
        }


MODELS = Path("checkpoints") / "random"
"""Where models of random weights are kept, unless a flag says otherwise."""

SHAPES = {
    "tiny": ModelShape(4, 256, 768, 4, 2, 64, 1024, tied=True),
    "thin": ModelShape(28, 128, 256, 2, 1, 64, 1024, tied=True),
    "1b": ModelShape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "3b": ModelShape(28, 3072, 8192, 24, 8, 128, 128256, tied=True),
    "8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, tied=False),
}
"""Those of Llama 3.1 and 3.2, one for tests, and the layers of 3b with hardly any weights: a token is Python's time."""


def write_checkpoint(shape: ModelShape, directory: Path, *, wide_head: bool = True) -> None:
    """Write a checkpoint of this toolkit, unless it is there: int4 in groups of 64, symmetric, the head in 8 bits.

    wide_head: False to leave the head in bfloat16, as formats of one width want it.
    """
    if (directory / MANIFEST_NAME).exists():
        return
    recipe = Recipe(
        method="random", bits=4, group_size=GROUP_SIZE, symmetric=True, ignore=() if wide_head else ("lm_head",),
        source=None, source_xxh3="0" * 16, seed=0, wide=("lm_head",) if wide_head else (),
    )  # fmt: skip
    noise = torch.Generator().manual_seed(0)
    progress = Progress(f"writing {directory.name}", shape.layers)
    with open_writer(directory, recipe, shape.layers + 2, overwrite=False) as writer:
        embeddings = _normal(noise, (shape.vocabulary, shape.hidden))
        writer.write_shard(0, "", {"model.embed_tokens.weight": embeddings}, {})
        for index in range(shape.layers):
            module = f"model.layers.{index}"
            tensors = {f"{module}.{name}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16) for name in _NORMS}
            for name, (rows, inputs) in shape.linears.items():
                tensors |= _packed(noise, f"{module}.{name}", rows, inputs, 4)
            writer.write_shard(index + 1, module, tensors, {})
            progress.advance()
        if wide_head:
            head = _packed(noise, "lm_head", shape.vocabulary, shape.hidden, 8)
        else:
            head = {"lm_head.weight": _normal(noise, (shape.vocabulary, shape.hidden), shape.hidden**-0.5)}
        head["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        writer.write_shard(shape.layers + 1, "", head, {})
        writer.finish(shape.config(), {})


_NORMS = ("input_layernorm", "post_attention_layernorm")


def _packed(noise: torch.Generator, name: str, rows: int, inputs: int, bits: int) -> dict[str, Tensor]:
    check_group_size(inputs, GROUP_SIZE, bits)
    words = torch.randint(-(2**31), 2**31, (rows, inputs * bits // 32), dtype=torch.int32, generator=noise)
    scale = torch.rand(rows, inputs // GROUP_SIZE, generator=noise).add_(0.5).div_(_CODE_DEVIATION[bits] * inputs**0.5)
    return {
        f"{name}.weight_packed": words,
        f"{name}.weight_scale": scale.to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, inputs]),
    }


def _normal(noise: torch.Generator, size: tuple[int, ...], deviation: float = 1.0) -> Tensor:
    """Random numbers in bfloat16: a block of them over and over, as drawing them all takes longer than writing."""
    count, block = int(np.prod(size)), 1 << 20
    drawn = torch.randn(min(block, count), generator=noise).mul_(deviation).to(torch.bfloat16)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(size)


def write_bfloat16(shape: ModelShape, directory: Path) -> None:
    """Write a model for transformers, unless it is there, a shard a layer; the head is a table of its own.

    (accelerate 1.15 cannot offload tied weights to disk: it looks for the head in the index.)
    """
    if (directory / INDEX_NAME).exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    embeddings = {"model.embed_tokens.weight": _normal(noise, (shape.vocabulary, shape.hidden))}
    embeddings["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    embeddings["lm_head.weight"] = _normal(noise, (shape.vocabulary, shape.hidden), shape.hidden**-0.5)
    progress = Progress(f"writing {directory.name}", shape.layers)
    for index in range(-1, shape.layers):
        tensors, file = embeddings, f"model-{index + 2:05d}-of-{shape.layers + 1:05d}.safetensors"
        if index >= 0:
            module = f"model.layers.{index}"
            tensors = {f"{module}.{name}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16) for name in _NORMS}
            for name, size in shape.linears.items():
                tensors[f"{module}.{name}.weight"] = _normal(noise, size, size[1] ** -0.5)
            progress.advance()
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "config.json").write_text(json.dumps(shape.config()))
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_gguf(shape: ModelShape, path: Path) -> None:
    """Write a GGUF file, unless it is there, by llama.cpp's recipe for Q4_0: layers Q4_0, the head Q6_K."""
    from gguf import GGMLQuantizationType, GGUFWriter

    if path.exists():
        return
    unfinished = path.with_suffix(".unfinished")
    writer = GGUFWriter(unfinished, "llama")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    kinds = {"Q4_0": GGMLQuantizationType.Q4_0, "Q6_K": GGMLQuantizationType.Q6_K, "F32": GGMLQuantizationType.F32}
    for name, kind, rows, inputs in _gguf_tensors(shape):
        size = _gguf_size(kind, rows, inputs)
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        writer.add_tensor_info(name, size, dtype, int(np.prod(size)) * dtype.itemsize, kinds[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noise = np.random.default_rng(0)
    progress = Progress(f"writing {path.name}", shape.layers * 9 + 3 - shape.tied)
    for _, kind, rows, inputs in _gguf_tensors(shape):
        writer.write_tensor_data(_gguf_data(noise, kind, rows, inputs))
        progress.advance()
    writer.close()
    unfinished.rename(path)


def _gguf_tensors(shape: ModelShape) -> Iterator[tuple[str, str, int, int]]:
    """Yield name, kind, rows and inputs; a norm has one row."""
    yield "token_embd.weight", "Q6_K" if shape.tied else "Q4_0", shape.vocabulary, shape.hidden
    for index in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{index}.{name}.weight", "F32", 1, shape.hidden
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        for name, (rows, inputs) in zip(names, shape.linears.values(), strict=True):
            yield f"blk.{index}.{name}.weight", "Q4_0", rows, inputs
    yield "output_norm.weight", "F32", 1, shape.hidden
    if not shape.tied:
        yield "output.weight", "Q6_K", shape.vocabulary, shape.hidden


def _gguf_size(kind: str, rows: int, inputs: int) -> tuple[int, ...]:
    if kind == "F32":
        return (inputs,)
    block_bytes, block = (_Q4_0_BYTES, _Q4_0_WEIGHTS) if kind == "Q4_0" else (_Q6_K_BYTES, _Q6_K_WEIGHTS)
    return rows, inputs // block * block_bytes


def _gguf_data(noise: np.random.Generator, kind: str, rows: int, inputs: int) -> Any:
    """Random blocks whose scale, the first two bytes of Q4_0 and the last two of Q6_K, is small and finite."""
    size = _gguf_size(kind, rows, inputs)
    if kind == "F32":
        return np.ones(size, dtype=np.float32)
    data = noise.integers(0, 256, size, dtype=np.uint8)
    scale = np.float16(inputs**-0.5 / (_CODE_DEVIATION[4] if kind == "Q4_0" else 64 * 18)).view(np.uint16)
    low, high = (0, 1) if kind == "Q4_0" else (_Q6_K_BYTES - 2, _Q6_K_BYTES - 1)
    blocks = data.reshape(-1, _Q4_0_BYTES if kind == "Q4_0" else _Q6_K_BYTES)
    blocks[:, low], blocks[:, high] = int(scale) & 255, int(scale) >> 8
    return data
