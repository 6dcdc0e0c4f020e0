"""Write a checkpoint in the layout of another tool, code by code. `python -m quant.export --format gptq --output DIR`

AWQ's "gemm" and GPTQ (version 1 where there are no zero points, else 2, which stores them without loss) take the codes,
zero points and scales as they are, GGUF the codes and scales; what a layout cannot hold is refused by name.
compressed-tensors is the layout of every checkpoint already: DIR itself opens in transformers.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.packed import PackedWeight
from kernels.repack import to_awq, to_gptq
from offload.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, LayerBlob, Recipe
from offload.checkpoint_writer import write_safetensors
from offload.command import Parser, Progress, format_bytes, run, say
from offload.convert import opened
from offload.durable_file import write_durably
from offload.errors import InputError, ResourceError, UsageError
from offload.files import read_json
from offload.layer_view import ORDER, PACKED, SCALE, SHAPE, ZERO
from offload.memory import FileReader
from offload.source import DEFAULT_OUTPUT, check_made, files_around
from quant.shards import packed_linears, read_shard


@dataclass(frozen=True, slots=True)
class Layout:
    """How another tool stores a weight, what its configuration says, and who opens it."""

    repack: Callable[[PackedWeight], dict[str, Tensor]]
    config: dict[str, Any]
    opens: str


def layout_of(name: str, recipe: Recipe) -> Layout:
    """Return the layout of a format for a checkpoint. Raises InputError if it cannot hold one of this recipe."""
    if recipe.wide:
        raise InputError(f"--format {name}: weights of two widths, 4 bits and 8, are more than it can say")
    if recipe.settings.get("reordered"):
        raise InputError(f"--format {name}: inputs in an order of their own; export the checkpoint it was made from")
    group_size = recipe.group_size or -1
    if name == "awq":
        if recipe.bits != 4:
            raise InputError(f"--format awq: weights of {recipe.bits} bits; it holds 4, --format gptq holds these")
        config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
        kept = [module for module in recipe.ignore]
        return Layout(to_awq, config | {"modules_to_not_convert": kept}, "gptqmodel (for transformers), vLLM, SGLang")
    first_version = recipe.symmetric
    config = {
        "quant_method": "gptq",
        "bits": recipe.bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": recipe.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if first_version else "gptq_v2",
        "pack_dtype": "int32",
    }
    opens = "gptqmodel (for transformers)" + (", vLLM, SGLang" if recipe.symmetric else "; vLLM takes no zero points")
    return Layout(lambda weight: to_gptq(weight, first_version), config, opens)


FORMATS: Mapping[str, str] = {"awq": "AutoAWQ's gemm", "gptq": "GPTQ, version 1 or 2"}
"""What is a directory; `gguf` is a file (`quant.export_gguf`)."""


@torch.inference_mode()
def export(checkpoint: Checkpoint, name: str, output: Path) -> Layout:
    """Write a checkpoint in a format; the directory appears under its name complete. A layer is in memory at a time.

    Raises InputError if a weight does not fit the format, UsageError if there is something at `output`, ResourceError
    if it cannot be written.
    """
    layout = layout_of(name, checkpoint.recipe)
    if output.exists():
        raise UsageError(f"--output {output}: exists; name another directory, or remove it")
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(checkpoint, layout, name, temporary)
        os.rename(temporary, output)
    except OSError as error:
        raise ResourceError(f"--output {output}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return layout


def _write(checkpoint: Checkpoint, layout: Layout, name: str, directory: Path) -> None:
    reader = FileReader()
    weight_map: dict[str, str] = {}
    total_bytes = 0
    progress = Progress("exporting, shard", len(checkpoint.blobs))
    try:
        for blob in checkpoint.blobs:
            tensors = _relaid(checkpoint, blob, layout, read_shard(reader, blob))
            write_safetensors(directory / blob.path.name, tensors)
            weight_map |= dict.fromkeys(tensors, blob.path.name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
            progress.advance()
    finally:
        reader.close()
    config = read_json(checkpoint.directory / CONFIG_NAME) | {"quantization_config": layout.config}
    write_durably(directory / CONFIG_NAME, _json(config))
    if name == "gptq":  # its older readers look here
        write_durably(directory / "quantize_config.json", _json(layout.config))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_durably(directory / INDEX_NAME, _json(index))
    ours = {"manifest.json", "quantize_config.json", "run.json", "sensitivity.json"}
    for file, content in files_around(checkpoint.directory).items():
        if file not in ours:
            write_durably(directory / file, content)
    write_durably(directory / "README.md", _card(checkpoint, layout, name))


def _relaid(checkpoint: Checkpoint, blob: LayerBlob, layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a shard's tensors with those of packed linears in the layout. Raises InputError naming a linear."""
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith((PACKED, SCALE, ZERO, SHAPE, ORDER))}
    for module, weight in packed_linears(checkpoint, tensors):
        try:
            relaid = layout.repack(weight)
        except ValueError as error:
            raise InputError(
                f"{module}: {error}; the compressed-tensors layout, {checkpoint.directory} as it is, holds it"
            ) from None
        out |= {f"{module}.{part}": tensor for part, tensor in relaid.items()}
    return out


def _card(checkpoint: Checkpoint, layout: Layout, name: str) -> bytes:
    recipe = checkpoint.recipe
    group = "one group a row" if recipe.group_size is None else f"groups of {recipe.group_size}"
    kind = "symmetric" if recipe.symmetric else "with zero points"
    return f"""# {checkpoint.directory.name}, for {FORMATS[name]}

{recipe.bits} bits in {group}, {kind}, made by {recipe.method}: the codes, zero points and scales of the original
checkpoint, re-laid; nothing was rounded.

Made for {layout.opens}. Tried: gptqmodel 7.7 through transformers 5.23 on a CPU, which gives the logits that this
toolkit does. Not tried: vLLM and SGLang. Runtimes that force float16 round norms and embeddings in bfloat16.
""".encode()


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    check_made(options.model)
    checkpoint = Checkpoint.open(opened(options.model))
    if options.format == "gguf":
        from quant.export_gguf import export_gguf

        export_gguf(checkpoint, options.output)
        nbytes, opens = options.output.stat().st_size, "llama.cpp"
    else:
        opens = export(checkpoint, options.format, options.output).opens
        nbytes = sum(path.stat().st_size for path in options.output.iterdir())
    if options.json:
        print(json.dumps({"model": str(options.model), "format": options.format, "bytes": nbytes}))
    else:
        say(f"{options.output}: {format_bytes(nbytes)}, for {opens}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("quant.export", "Write a checkpoint in the layout of another tool; nothing is rounded.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    add(
        "-f",
        "--format",
        choices=[*FORMATS, "gguf"],
        required=True,
        help="compressed-tensors is what a checkpoint is already",
    )
    add("-o", "--output", type=Path, required=True, help="directory to write, of gguf the file")
    add("--json", action="store_true", help="print one JSON object about the result on stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
