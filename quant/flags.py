"""The flags that every method shares, and its settings: a tier names a set of them, `--set NAME=VALUE` changes one."""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from kernels.packed import BITS
from offload.command import Parser
from offload.errors import UsageError

Settings = TypeVar("Settings")


def method_parser(name: str, needs_inputs: bool) -> argparse.ArgumentParser:
    """Return a parser of the flags of `python -m quant.<name>`; those about text only where the method needs inputs."""
    parser = Parser(f"quant.{name}", f"Quantize a causal language model with {name.upper()}, layer by layer.")
    add = parser.add_argument
    add("-m", "--model", help="directory or hub id; without it the embedded SmolLM2-135M-Instruct")
    add("-o", "--output", type=Path, help="directory to write; default checkpoints/NAME-METHOD-intBITS-gGROUP")
    add("--bits", type=int, default=4, choices=BITS, help="bits of a weight")
    add(
        "--group-size",
        choices=["32", "64", "128", "row"],
        help="inputs that share a scale; default: the largest that fits",
    )
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--symmetric", dest="symmetric", action="store_true", default=True, help="no zero points")
    symmetry.add_argument("--asymmetric", dest="symmetric", action="store_false", help="a zero point for every group")
    add("--skip", action="append", default=[], metavar="GLOB", help="linears to leave as they are, by name; repeatable")
    add("--seed", type=int, default=0, help="chooses the calibration windows")
    add("--overwrite", action="store_true", help="replace a checkpoint this toolkit wrote")
    add("--json", action="store_true", help="print one JSON object about the result on stdout")
    add("--cpu-memory", metavar="SIZE", help="budget for the whole process, such as 8GiB; default: no limit")
    add("--plan", action="store_true", help="say what would be done and what it takes, and stop; reads no weights")
    if needs_inputs:
        add("--calibration", metavar="FILE|DATASET", help="text; default: half of the topics of pydoc_data")
        add("--num-samples", type=_positive, default=64, help="windows of calibration text")
        add("--seq-len", type=_positive, default=512, help="tokens of a window")
        add(
            "--target-bits",
            type=float,
            metavar="BITS",
            help="8 bits where they pay most, up to BITS a weight, all counted",
        )
        add("--kv", choices=["int8"], help="calibrate the int8 cache of the result as well, as quant.kv does")
    parser.set_defaults(target_bits=None, kv=None)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not above zero")
    return value


def with_changes(settings: Settings, changes: Iterable[str]) -> Settings:
    """Return a frozen dataclass of settings with each NAME=VALUE of `changes` in it; NAME has dots where they nest.

    Raises UsageError for a name that is none of them, and for a value of another type.
    """
    for change in changes:
        name, _, text = change.partition("=")
        known = _flatten(settings)
        if name not in known:
            raise UsageError(
                f"--set {change!r}: expected NAME=VALUE with a NAME of {', '.join(known) or 'none at all'}"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        wanted = type(known[name])
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise UsageError(f"--set {change!r}: expected a value like {json.dumps(known[name])}")
        try:
            settings = _replaced(settings, name.split("."), wanted(value))
        except ValueError as error:
            raise UsageError(f"--set {change!r}: {error}") from None
    return settings


def _flatten(settings: Any) -> Mapping[str, Any]:
    """Return every setting by its name, nested ones behind a dot."""
    if not is_dataclass(settings):
        return {}
    flat: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        nested = {f"{field.name}.{key}": inner for key, inner in _flatten(value).items()}
        flat |= nested or {field.name: value}
    return flat


def _replaced(settings: Any, path: list[str], value: Any) -> Any:
    name, *inner = path
    return replace(settings, **{name: _replaced(getattr(settings, name), inner, value) if inner else value})
