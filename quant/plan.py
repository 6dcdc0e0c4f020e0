"""What a quantization run will do, decided from configuration and headers alone, before anything is read or written.

What can be wrong is found here: shapes that no group size cuts, linears that cannot be quantized, tensors that have no
place in the model.
"""

import argparse
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from kernels.packed import GROUP_SIZES
from offload.checkpoint import is_checkpoint
from offload.command import format_bytes, say
from offload.errors import InputError, UsageError
from offload.skeleton import build_skeleton, decoder_layers, read_config
from offload.source import model_name, resolve_model
from offload.source_weights import SourceWeights
from quant.groupwise import Grid
from quant.layer import linears


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, known before it does anything.

    grids: of the linears that are quantized, by full name; skipped: those that are not. grid: where nothing asks for
    another. others: weights of the layers that belong to no linear, in words.
    heads, eager: of attention, and whether it holds the scores of all pairs of tokens. layers_bytes: size of every
    decoder layer in the checkpoint, expected_bytes: of all of it.
    """

    name: str
    directory: Path
    model: PreTrainedModel
    source: SourceWeights
    grids: dict[str, Grid]
    skipped: tuple[str, ...]
    others: tuple[str, ...]
    grid: Grid
    head_dim: int
    hidden_size: int
    vocabulary: int
    context_tokens: int | None
    heads: int
    eager: bool
    experts_per_token: int
    layers_bytes: tuple[int, ...]
    expected_bytes: int


def make_plan(options: argparse.Namespace) -> Plan:
    """Read configuration and headers only, and decide what will be quantized. Raises InputError or UsageError."""
    directory = resolve_model(options.model)
    if is_checkpoint(directory):
        raise InputError(f"{directory}: already quantized; name the model it was made from")
    config = read_config(directory)
    model = build_skeleton(config, torch.float32)
    source = SourceWeights.open(directory).placed(model)
    _check_names(directory, model, source)
    prefix, layers = decoder_layers(model)
    inside = {f"{prefix}.{i}.{key}": linear for i, layer in enumerate(layers) for key, linear in linears(layer).items()}
    outside = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and key not in inside]
    if not inside:
        raise InputError(f"{directory}: {type(model).__name__} has no plain nn.Linear in its layers to quantize")
    skipped = sorted({key for glob in options.skip for key in _matching(glob, list(inside))})
    quantized = {key: linear for key, linear in inside.items() if key not in skipped}
    if not quantized:
        raise UsageError("--skip leaves nothing to quantize")
    group_size = _choose_group_size(options, quantized)
    dtypes = {source.locations[f"{key}.weight"].spec.dtype for key in quantized}
    scale_dtype = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
    grid = Grid(group_size, options.symmetric, scale_dtype, options.bits)
    text_config = config.get_text_config(decoder=True)
    context = getattr(text_config, "max_position_embeddings", None)
    heads = getattr(text_config, "num_attention_heads", None) or 1  # a recurrent model has none
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    grids = dict.fromkeys(quantized, grid)
    plan = Plan(
        name=model_name(options.model),
        directory=directory,
        model=model,
        source=source,
        grids=grids,
        skipped=tuple(outside + skipped),
        others=_others(source, prefix, set(inside)),
        grid=grid,
        head_dim=head_dim,
        hidden_size=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        context_tokens=context if context and context > 0 else None,
        heads=heads,
        eager=config._attn_implementation == "eager",
        experts_per_token=getattr(text_config, "num_experts_per_tok", None) or 1 << 30,
        layers_bytes=(),
        expected_bytes=0,
    )
    return with_grids(plan, grids)


def _choose_group_size(options: argparse.Namespace, quantized: dict[str, nn.Linear]) -> int | None:
    """Return G, None for whole rows. Raises UsageError listing what fits if what was asked does not."""
    asked, bits = options.group_size, options.bits
    fitting = [str(size) for size in GROUP_SIZES if not _unfit(quantized, size, bits)]
    if not _unfit(quantized, None, bits):
        fitting.append("row")
    if asked is None and len(fitting) > 1:
        asked = fitting[-2]
        if asked != str(GROUP_SIZES[-1]):
            name, width = _unfit(quantized, GROUP_SIZES[-1], bits)[0]
            say(f"group size {asked}: the largest that fits, as {name} has {width} inputs")
    size = None if asked == "row" else int(asked or GROUP_SIZES[-1])
    unfit = _unfit(quantized, size, bits)
    if unfit:
        some = ", ".join(f"{name} with {width} inputs" for name, width in unfit[:3])
        fits = f"--group-size {' or '.join(fitting)} fits" if fitting else "no group size fits"
        raise UsageError(
            f"--group-size {size or 'row'}: does not divide {len(unfit)} linears ({some}, ...); {fits}, or use --skip"
        )
    return size


def _unfit(quantized: dict[str, nn.Linear], group_size: int | None, bits: int) -> list[tuple[str, int]]:
    grid, unfit = Grid(group_size, symmetric=True, bits=bits), []
    for name, linear in quantized.items():
        try:
            grid.group(linear.in_features)
        except ValueError:
            unfit.append((name, linear.in_features))
    return unfit


def _check_names(directory: Path, model: PreTrainedModel, source: SourceWeights) -> None:
    """Demand a tensor of the right shape for every parameter, tied ones excepted, and no tensor without a place."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    buffers = dict(model.named_buffers())
    ignored = [r"\.inv_freq$", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    unknown = sorted(
        name for name in source.unplaced if name not in buffers and not any(re.search(p, name) for p in ignored)
    )
    if unknown:
        raise InputError(
            f"{directory}: {len(unknown)} tensors have no place in {type(model).__name__} ({', '.join(unknown[:3])}); "
            "its weights are stored in a form this version does not convert"
        )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        location = source.locations.get(name)
        if location is None and name not in tied:
            raise InputError(
                f"{directory}: tensor {name!r} is missing; the download is incomplete or of another version"
            )
        if location is not None and location.spec.shape != tuple(parameter.shape):
            expected, found = list(parameter.shape), list(location.spec.shape)
            raise InputError(f"{location.path}: tensor {name!r} is {found}, the configuration asks for {expected}")


def _matching(glob: str, names: list[str]) -> list[str]:
    matching = fnmatch.filter(names, glob)
    if not matching:
        raise UsageError(f"--skip {glob!r}: matches none of {len(names)} linears, such as {names[0]!r}")
    return matching


def with_grids(plan: Plan, grids: dict[str, Grid]) -> Plan:
    """Return the plan with other grids, and the sizes that follow from them."""
    prefix, layers = decoder_layers(plan.model)
    growth = {}
    for name, grid in grids.items():
        shape_bytes, packed_bytes = 16, grid.stored_bytes(*plan.model.get_parameter(f"{name}.weight").shape)
        growth[name] = packed_bytes + shape_bytes - plan.source.locations[f"{name}.weight"].spec.nbytes
    sizes = tuple(_stored_bytes(plan.source, growth, f"{prefix}.{index}.") for index in range(len(layers)))
    expected_bytes = _stored_bytes(plan.source, growth, "")
    return replace(plan, grids=grids, layers_bytes=sizes, expected_bytes=expected_bytes)


def average_bits(model: nn.Module, grids: Mapping[str, Grid]) -> float:
    """Return the bits of a quantized weight in the file, scales and zero points counted."""
    weights = {name: model.get_parameter(f"{name}.weight") for name in grids}
    stored_bytes = sum(grids[name].stored_bytes(*weight.shape) for name, weight in weights.items())
    return 8 * stored_bytes / sum(weight.numel() for weight in weights.values())


def around_bytes(plan: Plan, as_floats: bool) -> int:
    """Return the bytes of what lies outside the layers, as it is written; in float32, if more, what feeds them."""
    prefix, _ = decoder_layers(plan.model)
    outer = {name: place.spec for name, place in plan.source.locations.items() if not name.startswith(f"{prefix}.")}
    written = sum(spec.nbytes for spec in outer.values())
    if not as_floats:
        return written
    parent = prefix.rpartition(".")[0]
    fed = [spec for name, spec in outer.items() if name.startswith(f"{parent}.")]
    return max(written, sum(4 * spec.nbytes // spec.dtype.itemsize for spec in fed))


def _stored_bytes(source: SourceWeights, growth: dict[str, int], prefix: str) -> int:
    """Return the bytes in the checkpoint of everything whose name begins with `prefix`."""
    before = sum(place.spec.nbytes for name, place in source.locations.items() if name.startswith(prefix))
    return before + sum(more for name, more in growth.items() if name.startswith(prefix))


def _others(source: SourceWeights, prefix: str, linears_inside: set[str]) -> tuple[str, ...]:
    """Describe the matrices of the layers that are no linears' weights: routers, experts that stayed fused."""
    found: dict[str, list[int]] = {}
    for name, place in source.locations.items():
        if not name.startswith(f"{prefix}.") or name.rpartition(".")[0] in linears_inside or len(place.spec.shape) < 2:
            continue
        _, _, within = name.removeprefix(f"{prefix}.").partition(".")
        found.setdefault(within, []).append(place.spec.nbytes)
    return tuple(f"{name} of {len(sizes)} layers, {format_bytes(sum(sizes))}" for name, sizes in sorted(found.items()))
