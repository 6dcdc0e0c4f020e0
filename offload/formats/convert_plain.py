"""A model nobody quantized, re-laid as a checkpoint of this toolkit: the same bytes, a decoder layer a shard.

So it is read and streamed as any other: a layer is one range of one file, past the page cache, with checksums.
"""

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from offload.checkpoint import CONFIG_NAME, INDEX_NAME, PLAIN, Checkpoint, Recipe, describe_difference, is_ours
from offload.checkpoint_writer import open_writer
from offload.command import Progress, say
from offload.errors import CheckpointError
from offload.files import read_json
from offload.skeleton import build_skeleton, decoder_layers, outer_names, read_config
from offload.source import files_around
from offload.source_weights import SourceWeights
from offload.version import VERSION

_NAMED = 3


def is_plain(directory: Path) -> bool:
    """Whether a directory looks like a model of transformers whose weights nobody quantized, in safetensors."""
    config = directory / CONFIG_NAME
    if is_ours(directory) or not config.is_file() or "quantization_config" in read_json(config):
        return False
    return (directory / INDEX_NAME).is_file() or (directory / "model.safetensors").is_file()


@torch.inference_mode()
def convert_plain(directory: Path, identity: str, output: Path, overwrite: bool = False) -> Checkpoint:
    """Write a plain model as a checkpoint; an interrupted run is resumed. A piece of a tensor is in memory at a time.

    identity: what changes with the files of the model. Raises CheckpointError if its tensors are not those of the
    model, InputError if the model is of an unknown kind.
    """
    config = read_config(directory)
    model = build_skeleton(config, getattr(config, "dtype", None) or torch.bfloat16)
    source = SourceWeights.open(directory).placed(model)
    _check_names(directory, model, source)
    prefix, layers = decoder_layers(model)
    names = list(source.locations)
    first, last = outer_names(model, prefix, [name for name in names if not name.startswith(f"{prefix}.")])
    modules = [f"{prefix}.{index}" for index in range(len(layers))]
    inner = [(module, [name for name in names if name.startswith(f"{module}.")]) for module in modules]
    shards = [("", first), *inner, ("", last)]
    with open_writer(output, _recipe(directory, identity), len(shards), overwrite) as writer:
        progress = Progress("re-laying, shard", len(shards))
        for index, (module, of_shard) in enumerate(shards):
            if writer.done(index) is None:
                writer.write_shard(index, module, {name: source.stored_tensor(name) for name in of_shard}, {})
            progress.advance()
        card = (
            f"# {directory.resolve().name}, re-laid\n\nThe same weights, a decoder layer a file; nothing was rounded.\n"
        )
        writer.finish(read_json(directory / CONFIG_NAME), files_around(directory) | {"README.md": card.encode()})
    return Checkpoint.open(output)


def _check_names(directory: Path, model: PreTrainedModel, source: SourceWeights) -> None:
    """Raise CheckpointError unless the tensors are those of the model; say what is left out beside them."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    expected = set(model.state_dict()) - tied
    if expected - set(source.locations):
        difference = describe_difference(set(source.locations) & expected, expected, "by the configuration")
        hint = f"; {len(source.unplaced)} others have no place in the model" if source.unplaced else ""
        raise CheckpointError(f"{directory}: {difference}{hint}")
    if source.unplaced:
        more = ", ..." if len(source.unplaced) > _NAMED else ""
        named = f"{', '.join(source.unplaced[:_NAMED])}{more}"
        say(f"{directory}: {len(source.unplaced)} tensors have no place in the model and are left out ({named})")


def _recipe(directory: Path, identity: str) -> Recipe:
    return Recipe(
        method=PLAIN,
        bits=8,
        group_size=None,
        symmetric=True,
        ignore=(),
        source=str(directory.resolve()),
        source_xxh3=identity,
        seed=0,
        versions={"toolkit": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    )
