"""Write a checkpoint in the layout of another tool, code by code. `python -m quant.export --format gptq --output DIR`

AWQ's "gemm" and GPTQ (version 1 where there are no zero points, else 2, which stores them without loss) take the codes,
zero points and scales as they are, GGUF the codes and scales; what a layout cannot hold is refused by name.
compressed-tensors is the layout of every checkpoint already: DIR itself opens in transformers. `--kv-export` copies it
with scales of keys and values beside the weights, for runtimes that then round their own caches.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from offload.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    RUN_NAME,
    SENSITIVITY_NAME,
    Checkpoint,
    LayerBlob,
)
from offload.checkpoint_writer import write_safetensors
from offload.command import Parser, Progress, format_bytes, run, say
from offload.durable_file import write_durably
from offload.errors import InputError, ResourceError, UsageError
from offload.files import read_json
from offload.formats.convert import opened
from offload.layer_view import ORDER, PACKED, SCALE, SHAPE, ZERO
from offload.memory import FileReader
from offload.source import DEFAULT_OUTPUT, check_made, files_around
from quant.export_card import export_card
from quant.layouts import CACHES, FORMATS, Layout, Strategy, cache_layout, layout_of
from quant.shards import packed_linears, read_shard

_EXTRA_NAME = "kv_scales.safetensors"
_GPTQ_CONFIG_NAME = "quantize_config.json"  # where its older readers look


@torch.inference_mode()
def export(checkpoint: Checkpoint, layout: Layout, output: Path) -> None:
    """Write a checkpoint in a layout; the directory appears under its name complete. A layer is in memory at a time.

    Raises InputError if a weight does not fit the layout, UsageError if there is something at `output`, ResourceError
    if it cannot be written.
    """
    if output.exists():
        raise UsageError(f"--output {output}: exists; name another directory, or remove it")
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(checkpoint, layout, temporary)
        os.rename(temporary, output)
    except OSError as error:
        raise ResourceError(f"--output {output}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(checkpoint: Checkpoint, layout: Layout, directory: Path) -> None:
    reader = FileReader()
    weight_map = dict.fromkeys(layout.extra, _EXTRA_NAME)
    total_bytes = sum(tensor.nbytes for tensor in layout.extra.values())
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
    if layout.extra:
        write_safetensors(directory / _EXTRA_NAME, layout.extra)
    config = read_json(checkpoint.directory / CONFIG_NAME) | {"quantization_config": layout.config}
    write_durably(directory / CONFIG_NAME, _json(config))
    if layout.name == "gptq":
        write_durably(directory / _GPTQ_CONFIG_NAME, _json(layout.config))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_durably(directory / INDEX_NAME, _json(index))
    ours = {MANIFEST_NAME, RUN_NAME, SENSITIVITY_NAME, _GPTQ_CONFIG_NAME}
    for file, content in files_around(checkpoint.directory).items():
        if file not in ours:
            write_durably(directory / file, content)
    write_durably(directory / "README.md", export_card(checkpoint, layout))


def _relaid(checkpoint: Checkpoint, blob: LayerBlob, layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a shard's tensors with those of packed linears in the layout. Raises InputError naming a linear."""
    if layout.repack is None:
        return tensors
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


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    strategy = _strategy(options)
    check_made(options.model)
    checkpoint = Checkpoint.open(opened(options.model))
    what = options.kv_export or options.format
    if what == "gguf":
        from quant.export_gguf import export_gguf

        export_gguf(checkpoint, options.output)
        nbytes, opens = options.output.stat().st_size, "llama.cpp"
    else:
        layout = cache_layout(what, strategy, checkpoint) if options.kv_export else layout_of(what, checkpoint)
        export(checkpoint, layout, options.output)
        nbytes, opens = sum(path.stat().st_size for path in options.output.iterdir()), layout.opens
    if options.json:
        print(json.dumps({"model": str(options.model), "format": what, "bytes": nbytes}))
    else:
        say(f"{options.output}: {format_bytes(nbytes)}, for {opens}")
    if options.kv_export:
        say(f"what each runtime does with the scales: {options.output / 'README.md'}")


def _strategy(options: argparse.Namespace) -> Strategy:
    """Return how many scales a layer gets. Raises UsageError where the flag does not go with the others."""
    asked: Strategy | None = options.kv_strategy
    if asked is not None and options.kv_export != "ct-int8":
        raise UsageError(
            f"--kv-strategy {asked}: goes with --kv-export ct-int8; vllm-fp8 has one scale a layer, the formats none"
        )
    return asked or "tensor"


def _parser() -> argparse.ArgumentParser:
    parser = Parser("quant.export", "Write a checkpoint in the layout of another tool; nothing is rounded.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    into = parser.add_mutually_exclusive_group(required=True)
    into.add_argument(
        "-f", "--format", choices=[*FORMATS, "gguf"], help="compressed-tensors is what a checkpoint is already"
    )
    into.add_argument(
        "--kv-export",
        choices=list(CACHES),
        help="copy it with calibrated scales of keys and values, on which other runtimes round their caches",
    )
    add("--kv-strategy", choices=get_args(Strategy), help="of ct-int8: a scale for a layer, or for each head")
    add("-o", "--output", type=Path, required=True, help="directory to write, of gguf the file")
    add("--json", action="store_true", help="print one JSON object about the result on stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
