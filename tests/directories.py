"""What a directory of a checkpoint holds, and one whose tensors are others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from offload.checkpoint import RUN_NAME
from offload.checkpoint_writer import write_safetensors


def contents(directory: Path) -> dict[str, bytes]:
    """Return all that two runs of one recipe have in common; a file of a run that was cut off would show."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != RUN_NAME)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def rewritten(checkpoint: Path, directory: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Return a copy of a checkpoint with the shard of layer 1 changed, and what the manifest says of it."""
    shutil.copytree(checkpoint, directory)
    shard = directory / "model-00003-of-00005.safetensors"
    tensors = load_file(shard)
    change(tensors)
    checksums = write_safetensors(shard, tensors)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"][2] |= {"xxh3": checksums, "size_bytes": shard.stat().st_size}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory
