"""Checkpoints of other tools, and plain models, re-laid as ours: once, by layers, into a cache to see and to clear.

A directory or GGUF file that is named to a command is opened by `opened`: ours as it is, another tool's as its re-laid
copy, which is made the first time, and made anew when a file of the original has changed.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
import xxhash
from torch import Tensor, nn

from offload.ahead import ahead
from offload.checkpoint import CONFIG_NAME, MANIFEST_NAME, PLAIN, Checkpoint, Recipe
from offload.checkpoint_writer import open_writer
from offload.command import Progress, format_bytes, say
from offload.errors import CheckpointError, InputError
from offload.files import read_json
from offload.formats.convert_gguf import convert_gguf, gguf_identity
from offload.formats.convert_plain import convert_plain, is_plain
from offload.formats.foreign import Foreign, foreign_format
from offload.formats.gguf_file import gguf_path
from offload.layer_view import ORDER
from offload.skeleton import build_skeleton, decoder_layers, outer_names, read_config
from offload.source import cache_directory, files_around
from offload.source_weights import SourceWeights, StoredTensor
from offload.version import VERSION

_CACHE_SCALE = re.compile(r"\.[qkv]_(scale|zero_point)$")
"""Of what `kv_cache_scheme` has other runtimes round keys and values to."""


@dataclass(frozen=True, slots=True)
class Original:
    """A checkpoint or a plain model that is not laid out as ours.

    kind: "awq", "gptq", "compressed-tensors", "gguf" or "plain". identity: what changes with its files. write(output,
    overwrite): re-lay it there.
    """

    path: Path
    kind: str
    identity: str
    write: Callable[[Path, bool], Checkpoint]


def find_original(directory: Path, plain: bool) -> Original | None:
    """Return what is to be re-laid of a directory or GGUF file, None where nothing is.

    plain: also where nobody quantized. Raises InputError for a quantization that cannot be kept to.
    """
    if (file := gguf_path(directory)) is not None:
        return Original(file, "gguf", gguf_identity(file), partial(convert_gguf, file))
    if (found := foreign_format(directory)) is not None:
        write = partial(convert, directory, found)
        return Original(directory, found.kind, identity_of(directory), write)
    if plain and is_plain(directory):
        identity = identity_of(directory)
        return Original(directory, PLAIN, identity, partial(convert_plain, directory, identity))
    return None


def opened(directory: Path, plain: bool = False) -> Path:
    """Return the directory to read: itself, or the re-laid copy of another tool's checkpoint, made now if need be.

    plain: re-lay a model that nobody quantized as well. Raises InputError or CheckpointError for one that cannot be
    re-laid exactly.
    """
    found = find_original(directory, plain)
    if found is None:
        return directory
    copy = _copies() / f"{found.path.resolve().name}-{found.identity}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    with (copy.parent / f".{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that is at it is waited for
        if not (copy / MANIFEST_NAME).exists():
            kind = "a plain model" if found.kind == PLAIN else f"of {found.kind}"
            say(f"{directory}: {kind}, re-laid once into {copy}; `python -m quant.convert --clear` removes it")
            if found.kind == PLAIN:
                awq = f"python -m quant.awq --model {directory}"
                say(f"its weights stay what they are; `{awq}` makes a quarter of them")
            found.write(copy, False)
    return copy


def copies() -> list[tuple[Path, int]]:
    """Return the re-laid copies in the cache, with their bytes."""
    directories = sorted(path for path in _copies().glob("*") if path.is_dir())
    return [(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())) for path in directories]


def clear() -> int:
    """Remove all copies; return the bytes that they took."""
    total = sum(nbytes for _, nbytes in copies())
    shutil.rmtree(_copies(), ignore_errors=True)
    return total


@torch.inference_mode()
def convert(directory: Path, found: Foreign, output: Path, overwrite: bool = False) -> Checkpoint:
    """Write a foreign checkpoint as one of ours; an interrupted run is resumed.

    The linears of two layers are in memory, one made while the other is written, and of other tensors a piece.
    Raises CheckpointError if its tensors are not those of the model, InputError if the model is of an unknown kind.
    """
    config = read_config(directory)
    model = build_skeleton(config, getattr(config, "dtype", None) or torch.bfloat16)
    source = SourceWeights.open(directory)
    packed = found.packed_modules(source.locations)
    source = _without_empty_biases(directory, model, source, packed)
    source = _without_cache_scales(directory, source, found)
    _check_names(directory, model, source, packed, found)
    prefix, layers = decoder_layers(model)
    plain = [name for name in source.locations if name.rpartition(".")[0] not in packed]
    first, last = outer_names(model, prefix, [name for name in plain if not name.startswith(f"{prefix}.")])

    def within(names: Iterable[str], module: str) -> list[str]:
        return [name for name in names if name.startswith(f"{module}.")]

    modules = [f"{prefix}.{index}" for index in range(len(layers))]
    shards = [("", first, []), *((module, within(plain, module), within(packed, module)) for module in modules)]
    shards.append(("", last, [module for module in packed if not module.startswith(f"{prefix}.")]))
    reader = _Reader(source, found)
    recipe = _recipe(directory, found, model, packed, reader.reordered(packed))
    with open_writer(output, recipe, len(shards), overwrite) as writer:
        missing = [(index, shard) for index, shard in enumerate(shards) if writer.done(index) is None]
        progress = Progress("re-laying, shard", len(missing))
        made = ((index, module, reader.tensors(names, linears)) for index, (module, names, linears) in missing)
        for index, module, tensors in ahead(made):
            writer.write_shard(index, module, tensors, {})
            progress.advance()
        around = files_around(directory) | {"README.md": _card(directory, found, recipe)}
        writer.finish(read_json(directory / CONFIG_NAME), around)
    return Checkpoint.open(output)


class _Reader:
    """Finds the tensors of a shard, those of packed linears re-laid, the others where they lie."""

    def __init__(self, source: SourceWeights, found: Foreign) -> None:
        self._source, self._found = source, found

    def tensors(self, plain: Iterable[str], linears: Iterable[str]) -> dict[str, Tensor | StoredTensor]:
        """Return the tensors of some names, and of some linears."""
        found: dict[str, Tensor | StoredTensor] = {name: self._source.stored_tensor(name) for name in plain}
        for module in linears:
            names = {part: f"{module}.{part}" for part in self._found.parts}
            given = {part: self._source.read(name) for part, name in names.items() if name in self._source.locations}
            found |= self._found.repack(module, given)
            if f"{module}.bias" in self._source.locations:
                found[f"{module}.bias"] = self._source.stored_tensor(f"{module}.bias")
        return found

    def reordered(self, linears: Iterable[str]) -> bool:
        """Whether the inputs of any linear are in another order than the model has them."""
        names = [f"{module}.g_idx" for module in linears if f"{module}.g_idx" in self._source.locations]
        return any(bool((groups[1:] < groups[:-1]).any()) for groups in map(self._source.read, names))


def _recipe(directory: Path, found: Foreign, model: nn.Module, packed: list[str], reordered: bool) -> Recipe:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return Recipe(
        method="convert",
        bits=found.bits,
        group_size=found.group_size,
        symmetric=found.symmetric,
        ignore=tuple(name for name in linears if name not in packed),
        source=str(directory.resolve()),
        source_xxh3=identity_of(directory),
        seed=0,
        settings={"from": found.kind} | ({"reordered": True} if reordered else {}),
        versions={"toolkit": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    )


def _check_names(directory: Path, model: nn.Module, source: SourceWeights, packed: list[str], found: Foreign) -> None:
    """Raise CheckpointError unless every packed module is a linear, and the other tensors are the model's."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    strange = [module for module in packed if module not in linears]
    if not packed or strange:
        what = f"{strange[0]!r} is packed, but no linear" if strange else f"no tensor ends in {found.parts[0]!r}"
        raise CheckpointError(f"{directory}: {what} of {type(model).__name__}; not what its configuration says")
    parts = {f"{module}.{part}" for module in packed for part in found.parts}
    expected = {name for name in model.state_dict() if name.removesuffix(".weight") not in packed}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    names = set(source.locations) - parts
    missing, unexpected = sorted(expected - names - tied), sorted(names - expected)
    if missing or unexpected:
        what = f"tensor {missing[0]!r} is missing" if missing else f"tensor {unexpected[0]!r} is not one of the model"
        raise CheckpointError(f"{directory}: {what}; {len(missing)} missing, {len(unexpected)} unexpected")


def _without_empty_biases(directory: Path, model: nn.Module, source: SourceWeights, packed: list[str]) -> SourceWeights:
    """Return the tensors less biases of zeros where the model has none, as older GPTQ tools write for every linear.

    Raises CheckpointError for one that holds anything else.
    """
    names = {f"{module}.bias" for module in packed} & source.locations.keys() - model.state_dict().keys()
    for name in sorted(names):
        if source.read(name).any():
            raise CheckpointError(
                f"{directory}: tensor {name!r} is not zero, and {type(model).__name__} has no such bias"
            )
    return replace(source, locations={name: at for name, at in source.locations.items() if name not in names})


def _without_cache_scales(directory: Path, source: SourceWeights, found: Foreign) -> SourceWeights:
    """Return the tensors less the scales of a cache that this toolkit does not have, which is said."""
    if found.cache is None:
        return source
    kept = {name: at for name, at in source.locations.items() if not _CACHE_SCALE.search(name)}
    say(
        f"{directory}: the scales of its {found.cache} cache are left out, the weights do not need them; "
        "`python -m quant.kv` calibrates the cache of this toolkit"
    )
    return replace(source, locations=kept)


def identity_of(directory: Path) -> str:
    """Return what changes with the files of a directory: their names, sizes, times, and the configuration."""
    digest = xxhash.xxh3_64((directory / CONFIG_NAME).read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns} ".encode())
    return digest.hexdigest()


def _copies() -> Path:
    return cache_directory() / "converted"


def _card(directory: Path, found: Foreign, recipe: Recipe) -> bytes:
    settings = json.dumps(recipe.settings)
    lines = [
        f"# {directory.resolve().name}, re-laid",
        f"A checkpoint of {found.kind} with the same codes, zero points and scales in the layout of this toolkit "
        f"({settings}); nothing was rounded.",
    ]
    if recipe.settings.get("reordered"):
        lines.append(f"Inputs are in an order of their own (`{ORDER.lstrip('.')}`), which only this toolkit reads.")
    return ("\n\n".join(lines) + "\n").encode()


def require_original(directory: Path) -> Original:
    """Return what is to be re-laid of a directory or file. Raises InputError if there is nothing."""
    found = find_original(directory, plain=True)
    if found is None and not directory.is_file() and not (directory / CONFIG_NAME).is_file():
        raise InputError(f"{directory}: no {CONFIG_NAME} in it; not a model directory")
    if found is None:
        raise InputError(f"{directory}: not a checkpoint of another tool: there is nothing to convert")
    return found


def describe_copies() -> list[str]:
    """Return a line for each copy in the cache."""
    return [f"{format_bytes(nbytes):>10}  {path}" for path, nbytes in copies()]
