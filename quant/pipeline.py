"""From a command line to a checkpoint: the flags every method shares, the plan checked before any work, the walk.

What can be wrong is found before the first layer: shapes that no group size cuts, linears that cannot be quantized,
weights that are not finite, text that is too short, a directory that is not ours, a disk that is too small.
"""

import argparse
import fnmatch
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import offload
from kernels.packed import GROUP_SIZES
from offload.checkpoint import CONFIG_NAME, Checkpoint, Recipe, is_checkpoint, read_json
from offload.checkpoint_writer import open_writer
from offload.command import format_bytes, format_seconds, run, say
from offload.errors import InputError, ResourceError, UsageError
from offload.memory import peak_memory_bytes
from offload.skeleton import build_skeleton, decoder_layers, read_config
from offload.source import model_name, resolve_model
from offload.text import load_text, load_tokenizer, sample_windows, tokenize
from quant.flags import method_parser, with_changes
from quant.groupwise import Grid
from quant.layer import linears
from quant.model_card import model_card
from quant.sensitivity import average_bits, widen
from quant.source_weights import SourceWeights
from quant.walk import Method, Walk

_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, known before it does anything.

    grids: of the linears that are quantized, by full name; skipped: those that are not. grid: where nothing asks for
    another. expected_bytes: size of the checkpoint.
    """

    name: str
    directory: Path
    model: nn.Module
    source: SourceWeights
    grids: dict[str, Grid]
    skipped: tuple[str, ...]
    grid: Grid
    head_dim: int
    hidden_size: int
    vocabulary: int
    context_tokens: int | None
    expected_bytes: int


def run_method(name: str, make: Callable[[Any], Method], argv: list[str] | None, tiers: Mapping[str, Any]) -> int:
    """Run `python -m quant.<name>`, its method made of a tier's settings, the first's by default."""

    def command(arguments: list[str]) -> None:
        default = next(iter(tiers))
        parser = method_parser(name, make(tiers[default]).needs_inputs)
        parser.set_defaults(tier=default, set=[])
        if len(tiers) > 1:
            parser.add_argument("--tier", choices=list(tiers), default=default, help="how much work to spend")
        if tiers[default] is not None:
            parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="change a setting; repeatable")
        options = parser.parse_args(arguments)
        quantize(make(with_changes(tiers[options.tier], options.set)), options)

    return run(command, argv)


@torch.no_grad()
def quantize(method: Method, options: argparse.Namespace) -> None:
    """Plan, calibrate, write and report. Raises ToolkitError for whatever the user can mend."""
    started = time.monotonic()
    plan = make_plan(options)
    name = f"{plan.name}-{method.name}-int{plan.grid.bits}-g{plan.grid.group_size or 'row'}"
    name += "" if options.target_bits is None else f"-{options.target_bits:g}bits"
    output: Path = options.output or Path("checkpoints") / name
    windows, calibration = _calibration(method, options, plan)
    if windows is not None and options.target_bits is not None:
        plan.source.fingerprint()  # refuses weights that are not finite before anything is made of them
        grids = widen(plan.model, plan.source, plan.grids, windows, options.target_bits)
        plan = replace(plan, grids=grids, expected_bytes=_expected_bytes(plan.source, plan.model, grids))
    _check_output(output, plan)
    _print_plan(plan, method, output, windows)
    recipe = Recipe(
        method=method.name,
        bits=plan.grid.bits,
        group_size=plan.grid.group_size,
        symmetric=plan.grid.symmetric,
        ignore=plan.skipped,
        source=options.model,
        source_xxh3=plan.source.fingerprint(),
        seed=options.seed,
        settings=method.settings_json(),
        versions={"toolkit": offload.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        wide=tuple(key for key, grid in plan.grids.items() if grid.bits > plan.grid.bits),
        **calibration,
    )
    _, layers = decoder_layers(plan.model)
    with open_writer(output, recipe, len(layers) + 2, options.overwrite) as writer:
        if writer.complete:
            say(f"{output}: already complete")
        else:
            Walk(plan.model, plan.source, writer, method, plan.grids, plan.head_dim).run(windows)
            card = model_card(plan.name, output.name, recipe, plan.source.nbytes, plan.expected_bytes)
            writer.finish(read_json(plan.directory / CONFIG_NAME), {**_other_files(plan.directory), "README.md": card})
    _report(Checkpoint.open(output), plan, time.monotonic() - started, options.json)


def make_plan(options: argparse.Namespace) -> Plan:
    """Read configuration and headers only, and decide what will be quantized. Raises InputError or UsageError."""
    directory = resolve_model(options.model)
    if is_checkpoint(directory):
        raise InputError(f"{directory}: already quantized; name the model it was made from")
    source = SourceWeights.open(directory)
    config = read_config(directory)
    model = build_skeleton(config, torch.float32)
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
    grids = dict.fromkeys(quantized, grid)
    text_config = config.get_text_config(decoder=True)
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return Plan(
        name=model_name(options.model),
        directory=directory,
        model=model,
        source=source,
        grids=grids,
        skipped=tuple(outside + skipped),
        grid=grid,
        head_dim=head_dim,
        hidden_size=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        context_tokens=getattr(text_config, "max_position_embeddings", None),
        expected_bytes=_expected_bytes(source, model, grids),
    )


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


def _check_names(directory: Path, model: nn.Module, source: SourceWeights) -> None:
    """Demand a tensor of the right shape for every parameter, tied ones excepted, and no tensor without a place."""
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    unknown = sorted(name for name in source.locations if name not in parameters and not name.endswith(".inv_freq"))
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


def _expected_bytes(source: SourceWeights, model: nn.Module, grids: Mapping[str, Grid]) -> int:
    total = source.nbytes
    for name, grid in grids.items():
        shape_bytes, stored_bytes = 16, grid.stored_bytes(*model.get_parameter(f"{name}.weight").shape)
        total += stored_bytes + shape_bytes - source.locations[f"{name}.weight"].spec.nbytes
    return total


def _check_output(output: Path, plan: Plan) -> None:
    if output.resolve().is_relative_to(plan.directory.resolve()):
        raise UsageError(f"--output {output}: lies inside the model it is made from")
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    written = sum(path.stat().st_size for path in output.glob("model-*.safetensors")) if output.is_dir() else 0
    if plan.expected_bytes - written > free_bytes:
        needed = format_bytes(plan.expected_bytes - written)
        raise ResourceError(f"--output {output}: {needed} needed, {format_bytes(free_bytes)} free on that disk")


def _calibration(method: Method, options: argparse.Namespace, plan: Plan) -> tuple[Tensor | None, dict[str, Any]]:
    """Return the windows [S, T] a method needs, and the recipe's fields about them."""
    if not method.needs_inputs:
        return None, {}
    if plan.context_tokens is not None and options.seq_len > plan.context_tokens:
        raise UsageError(f"--seq-len {options.seq_len}: {plan.name} reads at most {plan.context_tokens} tokens at once")
    text = load_text(options.calibration, "calibration")
    tokenizer = load_tokenizer(plan.directory)
    tokens = tokenize(text, tokenizer)
    vocabulary = plan.vocabulary
    if int(tokens.max()) >= vocabulary:
        raise InputError(
            f"{plan.directory}: the tokenizer knows {int(tokens.max())}, the model only {vocabulary} tokens"
        )
    windows = sample_windows(tokens, options.num_samples, options.seq_len, options.seed)
    fields = {"calibration_name": text.name, "calibration_sha256": text.sha256}
    return windows, {**fields, "num_samples": options.num_samples, "seq_len": options.seq_len}


def _print_plan(plan: Plan, method: Method, output: Path, windows: Tensor | None) -> None:
    _, layers = decoder_layers(plan.model)
    grid = plan.grid
    kind = f"int{grid.bits} {'symmetric' if grid.symmetric else 'asymmetric'}"
    size = "whole rows" if grid.group_size is None else f"groups of {grid.group_size}"
    wide = sum(each.bits > grid.bits for each in plan.grids.values())
    loads = "transformers, vLLM"
    if not grid.symmetric:  # transformers 5.23 dequantizes every linear by the first group's bits
        loads = "vLLM" if wide else "vLLM; transformers with dequantize=True"
    say(f"model    {plan.name}, {type(plan.model).__name__}, {len(layers)} layers, {format_bytes(plan.source.nbytes)}")
    say(f"method   {method.name}, {kind}, {size}; {len(plan.grids)} linears, left alone: {len(plan.skipped)}")
    if wide:
        say(f"widths   {wide} linears in 8 bits; {average_bits(plan.model, plan.grids):.3f} bits a weight, all counted")
    if windows is not None:
        hidden_bytes = windows.numel() * plan.hidden_size * 4
        say(
            f"data     {len(windows)} windows of {windows.shape[1]} tokens; "
            f"their hidden states take {format_bytes(hidden_bytes)}"
        )
    say(f"output   {output}, about {format_bytes(plan.expected_bytes)}; loads here and in {loads}")


def _other_files(directory: Path) -> dict[str, bytes]:
    """Return tokenizer, chat template and settings, byte for byte."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.suffix in _COPIED_SUFFIXES
        and path.name != CONFIG_NAME
        and not path.name.endswith(".index.json")
    }


def _report(checkpoint: Checkpoint, plan: Plan, seconds: float, as_json: bool) -> None:
    reports = [report for report in checkpoint.layer_errors.values() if "error" in report]
    fallbacks = sum(report["fallback"] for report in reports)
    result = {
        "output": str(checkpoint.directory),
        "method": checkpoint.recipe.method,
        "bits": checkpoint.recipe.bits,
        "bits_per_weight": round(average_bits(plan.model, plan.grids), 4),
        "group_size": checkpoint.recipe.group_size,
        "symmetric": checkpoint.recipe.symmetric,
        "source_bytes": plan.source.nbytes,
        "checkpoint_bytes": checkpoint.nbytes,
        "layers": len(checkpoint.blobs) - 2,
        "layers_fallen_back": fallbacks,
        "error": _mean([report["error"] for report in reports]),
        "rtn_error": _mean([report["rtn_error"] for report in reports]),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if as_json:
        print(json.dumps(result))
        return
    ratio = plan.source.nbytes / checkpoint.nbytes
    print(
        f"{checkpoint.directory}: {format_bytes(plan.source.nbytes)} -> {format_bytes(checkpoint.nbytes)} "
        f"({ratio:.1f}x) in {format_seconds(seconds)}"
    )
    if reports:
        print(f"mean layer error on held-out windows {result['error']:.4f}, round-to-nearest {result['rtn_error']:.4f}")
    print(f"next: python -m eval.ppl --model {checkpoint.directory} --baseline")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
