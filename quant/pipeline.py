"""From a command line to a checkpoint: the flags every method shares, the plan checked before any work, the walk.

What can be wrong is found before the first layer: what `quant/plan.py` refuses, weights that are not finite, text that
is too short, a directory that is not ours, a disk that is too small.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from offload.checkpoint import CONFIG_NAME, RUN_NAME, SENSITIVITY_NAME, Checkpoint, Recipe
from offload.checkpoint_writer import open_writer
from offload.command import format_bytes, format_seconds, parse_bytes, run, say
from offload.errors import InputError, ResourceError, UsageError
from offload.files import read_json
from offload.memory import give_memory_back_at_once, peak_memory_bytes, trim_memory
from offload.skeleton import decoder_layers
from offload.source import files_around
from offload.text import load_text, load_tokenizer, sample_windows, tokenize
from offload.version import VERSION
from quant.cost import Windows
from quant.flags import method_parser, with_changes
from quant.kv import calibrate as calibrate_cache
from quant.model_card import model_card
from quant.pass_dtype import AUTO, PASS_DTYPES, settled
from quant.plan import Plan, average_bits, make_plan, with_grids
from quant.plan_words import describe
from quant.preflight import Footprint, footprint
from quant.running import smallest_memory
from quant.sensitivity import widen
from quant.walk import Method, Walk

_KV_WINDOWS = 16

_TEXT_BYTES = 64 << 20
"""A tokenizer and the text, where they are not loaded yet: 50 MiB for the embedded ones."""


def run_method(name: str, make: Callable[[Any], Method], argv: list[str] | None, tiers: Mapping[str, Any]) -> int:
    """Run `python -m quant.<name>`, its method made of a tier's settings, the first's by default."""

    def command(arguments: list[str]) -> None:
        default = next(iter(tiers))
        parser = method_parser(name, make(tiers[default]).needs_inputs)
        parser.set_defaults(tier=default, set=[], pass_dtype=None)
        if len(tiers) > 1:
            parser.add_argument("--tier", choices=list(tiers), default=default, help="how much work to spend")
        if tiers[default] is not None:
            parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="change a setting; repeatable")
        if hasattr(tiers[default], "pass_dtype"):
            choices = [AUTO, *PASS_DTYPES]
            parser.add_argument("--pass-dtype", choices=choices, help="what linears multiply in; default: the tier's")
        options = parser.parse_args(arguments)
        settings = with_changes(tiers[options.tier], options.set)
        if options.pass_dtype is not None:
            settings = replace(settings, pass_dtype=options.pass_dtype)
        quantize(name, lambda output: make(settled(settings, output, options)), options)

    return run(command, argv)


@torch.no_grad()
def quantize(kind: str, make: Callable[[Path], Method], options: argparse.Namespace) -> None:
    """Plan, calibrate, write and report. Raises ToolkitError for whatever the user can mend.

    kind: the method's name. make: makes it, knowing the directory that will be written.
    """
    started = time.monotonic()
    budget_bytes = None if options.cpu_memory is None else parse_bytes(options.cpu_memory, "--cpu-memory")
    if budget_bytes is not None:
        give_memory_back_at_once()
    trim_memory()
    plan = make_plan(options)
    name = f"{plan.name}-{kind}-int{plan.grid.bits}-g{plan.grid.group_size or 'row'}"
    name += "" if options.target_bits is None else f"-{options.target_bits:g}bits"
    output: Path = options.output or Path("checkpoints") / name
    method = make(output)
    amount = Windows(options.num_samples, options.seq_len) if method.needs_inputs else None
    widens = options.target_bits is not None and amount is not None
    cached = None if options.kv is None else Windows(min(_KV_WINDOWS, options.num_samples), options.seq_len)
    if options.plan:
        needed = footprint(plan, method, amount, widens, cached)
        needed = replace(needed, runtime_bytes=needed.runtime_bytes + (_TEXT_BYTES if amount else 0))
        print(describe(plan, method, output, amount, needed.within(budget_bytes)))
        return
    windows, calibration = _calibration(method, options, plan)
    files: dict[str, bytes] = {}
    runtime_bytes = None
    if windows is not None and widens:
        needed = footprint(plan, method, amount, widens, cached).within(budget_bytes)
        runtime_bytes = needed.runtime_bytes
        plan.source.fingerprint()  # refuses weights that are not finite before anything is made of them
        spill_to = _existing(output) if needed.statistics_spilled else None
        grids, measured = widen(plan.model, plan.source, plan.grids, windows, options.target_bits, spill_to)
        plan, files = with_grids(plan, grids), {SENSITIVITY_NAME: _json([asdict(each) for each in measured])}
    needed = footprint(plan, method, amount, cached=cached)
    if runtime_bytes is not None:  # what the allocator kept of the measuring is of the reserve
        needed = replace(needed, runtime_bytes=runtime_bytes)
    needed = needed.within(budget_bytes)
    _check_output(output, plan, needed)
    say(describe(plan, method, output, amount, needed))
    recipe = _recipe(plan, method, options, calibration)
    _, layers = decoder_layers(plan.model)
    with open_writer(output, recipe, len(layers) + 2, options.overwrite) as writer:
        if writer.complete:
            say(f"{output}: already complete")
        else:
            spill_to = output if needed.spilled else None
            statistics_to = output if needed.statistics_spilled else None
            left = sum(writer.done(index + 1) is None for index in range(len(layers)))
            places = spill_to, statistics_to
            Walk(plan.model, plan.source, writer, method, plan.grids, plan.head_dim, *places).run(windows)
            sizes = plan.source.nbytes, plan.expected_bytes, smallest_memory(plan)
            card = model_card(plan.name, output.name, recipe, *sizes)
            files |= {**files_around(plan.directory), "README.md": card}
            writer.finish(
                read_json(plan.directory / CONFIG_NAME),
                files | {RUN_NAME: _json(_taken(plan, started) | {"layers": left})},
            )
    if options.kv is not None:
        assert windows is not None, "the flag is for methods that calibrate"
        _calibrate_kv(output, windows[:_KV_WINDOWS], calibration, options)
    _report(Checkpoint.open(output), plan, started, options.json)


def _recipe(plan: Plan, method: Method, options: argparse.Namespace, calibration: Mapping[str, Any]) -> Recipe:
    """Return what decides the result. Reads the whole source, and refuses weights that are not finite."""
    return Recipe(
        method=method.name,
        bits=plan.grid.bits,
        group_size=plan.grid.group_size,
        symmetric=plan.grid.symmetric,
        ignore=_as_known_outside(plan, plan.skipped),
        source=options.model,
        source_xxh3=plan.source.fingerprint(),
        seed=options.seed,
        settings=method.settings_json(),
        versions={"toolkit": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
        wide=_as_known_outside(plan, [name for name, grid in plan.grids.items() if grid.bits > plan.grid.bits]),
        **calibration,
    )


def _calibrate_kv(output: Path, windows: Tensor, calibration: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Calibrate the cache of what was written, on the first of the windows that its weights were calibrated on."""
    text = {"text": calibration["calibration_name"], "text_sha256": calibration["calibration_sha256"]}
    amount = {"num_samples": len(windows), "seq_len": options.seq_len, "seed": options.seed}
    calibrate_cache(output, windows, text | amount, options.cpu_memory)


def _as_known_outside(plan: Plan, names: Sequence[str]) -> tuple[str, ...]:
    """Return modules under the model's names and, where those differ, the stored ones, which other readers may know."""
    stored = (plan.source.stored(f"{name}.weight").removesuffix(".weight") for name in names)
    return tuple(dict.fromkeys((*names, *stored)))


def _check_output(output: Path, plan: Plan, needed: Footprint) -> None:
    if output.resolve().is_relative_to(plan.directory.resolve()):
        raise UsageError(f"--output {output}: lies inside the model it is made from")
    free_bytes = shutil.disk_usage(_existing(output)).free
    written = sum(path.stat().st_size for path in output.glob("model-*.safetensors")) if output.is_dir() else 0
    missing_bytes = needed.disk_bytes - written
    if missing_bytes > free_bytes:
        raise ResourceError(
            f"--output {output}: {format_bytes(missing_bytes)} needed, {format_bytes(free_bytes)} free on that disk"
        )


def _existing(output: Path) -> Path:
    """Return the directory that a path leads through as far as it is there."""
    return next(path for path in (output, *output.absolute().parents) if path.exists())


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


def _taken(plan: Plan, started: float) -> dict[str, Any]:
    """Return what this process took until now, and the size of what it read."""
    return {
        "source_bytes": plan.source.nbytes,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _report(checkpoint: Checkpoint, plan: Plan, started: float, as_json: bool) -> None:
    reports = [report for report in checkpoint.layer_errors.values() if "error" in report]
    fallbacks = sum(report["fallback"] for report in reports)
    result = {
        "output": str(checkpoint.directory),
        "method": checkpoint.recipe.method,
        "bits": checkpoint.recipe.bits,
        "bits_per_weight": round(average_bits(plan.model, plan.grids), 4),
        "group_size": checkpoint.recipe.group_size,
        "symmetric": checkpoint.recipe.symmetric,
        "checkpoint_bytes": checkpoint.nbytes,
        "layers": len(checkpoint.blobs) - 2,
        "layers_fallen_back": fallbacks,
        "linears_without_tokens": sum(len(report.get("unreached", ())) for report in reports),
        "error": _mean([report["error"] for report in reports]),
        "rtn_error": _mean([report["rtn_error"] for report in reports]),
        **_taken(plan, started),
    }
    if as_json:
        print(json.dumps(result))
        return
    ratio = plan.source.nbytes / checkpoint.nbytes
    print(
        f"{checkpoint.directory}: {format_bytes(plan.source.nbytes)} -> {format_bytes(checkpoint.nbytes)} "
        f"({ratio:.1f}x) in {format_seconds(result['seconds'])}"
    )
    if reports:
        print(f"mean layer error on held-out windows {result['error']:.4f}, round-to-nearest {result['rtn_error']:.4f}")
    print(f"next: python -m eval.ppl --model {checkpoint.directory} --baseline")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
