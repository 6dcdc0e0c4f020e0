"""A GGUF file, re-laid as a checkpoint of this toolkit, a layer in memory at a time."""

from pathlib import Path

import torch
import transformers
import xxhash
from torch import Tensor, nn

from offload.checkpoint import WIDE_BITS, Checkpoint, Recipe
from offload.checkpoint_writer import open_writer
from offload.command import Progress
from offload.errors import InputError
from offload.formats.gguf_file import GgufFile
from offload.skeleton import build_skeleton, config_of, decoder_layers, outer_names
from offload.version import VERSION

_EDITION = 2
"""Of what is made of a file; copies of edition 1 cut the text of some tokenizers otherwise than the file says."""


@torch.inference_mode()
def convert_gguf(path: Path, output: Path, overwrite: bool = False) -> Checkpoint:
    """Write a GGUF file as a checkpoint; an interrupted run is resumed.

    Raises CheckpointError if it is damaged, InputError if it holds what cannot be kept exactly.
    """
    file = GgufFile.open(path)
    config = file.config()
    model = build_skeleton(config_of(config, path), torch.bfloat16)
    places = file.places(model)
    bits = file.packed_bits(model, places)
    if not bits:
        raise InputError(f"{path}: none of its linears is quantized as Q4_0 or Q8_0: there is nothing to re-lay")
    symmetric = file.symmetric(places, bits)
    prefix, layers = decoder_layers(model)
    first, last = outer_names(model, prefix, [name for name in places if not name.startswith(f"{prefix}.")])
    modules = [f"{prefix}.{index}" for index in range(len(layers))]
    inner = [(module, [name for name in places if name.startswith(f"{module}.")]) for module in modules]
    shards = [("", first), *inner, ("", last)]

    def read(name: str) -> dict[str, Tensor]:
        place, module = places[name], name.removesuffix(".weight")
        heads = file.permuted_heads(model, place)
        if name.endswith(".weight") and module in bits:
            return file.read_packed(module, place, bits[module], heads, symmetric)
        return {name: file.read_plain(place, heads)}

    around = file.tokenizer_files() | {"README.md": _card(path)}
    with open_writer(output, _recipe(path, model, bits, symmetric), len(shards), overwrite) as writer:
        progress = Progress("re-laying, shard", len(shards))
        for index, (module, names) in enumerate(shards):
            if writer.done(index) is None:
                tensors = {part: tensor for name in names for part, tensor in read(name).items()}
                writer.write_shard(index, module, tensors, {})
            progress.advance()
        writer.finish(config, around)
    return Checkpoint.open(output)


def gguf_identity(path: Path) -> str:
    """Return what changes with a file, its name, size and time, and with what is made of it."""
    state = path.stat()
    return xxhash.xxh3_64_hexdigest(f"{path.name} {state.st_size} {state.st_mtime_ns} {_EDITION}".encode())


def _recipe(path: Path, model: nn.Module, bits: dict[str, int], symmetric: bool) -> Recipe:
    narrow = min(bits.values())
    return Recipe(
        method="convert",
        bits=narrow,
        group_size=32,
        symmetric=symmetric,
        ignore=tuple(n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in bits),
        source=str(path.resolve()),
        source_xxh3=gguf_identity(path),
        seed=0,
        settings={"from": "gguf"},
        versions={"toolkit": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
        wide=tuple(name for name, wide in bits.items() if wide == WIDE_BITS) if narrow < WIDE_BITS else (),
    )


def _card(path: Path) -> bytes:
    return f"""# {path.stem}, re-laid

A GGUF file with the same codes and scales in the layout of this toolkit: no linear was rounded. Embeddings, and an
output head of a type that is neither Q4_0 nor Q8_0, were dequantised to float16.
""".encode()
