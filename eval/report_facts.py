"""What the files of a checkpoint say of it, and the figures that one would ask for first."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.ppl import Perplexity
from offload.checkpoint import RUN_NAME, SENSITIVITY_NAME, Checkpoint
from offload.command import format_bytes, format_seconds
from offload.errors import InputError
from offload.files import read_json

_PACKED = ".weight_packed"
_PARTS = {"weight_packed": "codes", "weight_scale": "scales", "weight_zero_point": "zero points"}


@dataclass(frozen=True, slots=True)
class Linear:
    """A quantized linear. layer: the decoder layer's name; name: its own within that; bits: of a code."""

    layer: str
    name: str
    bits: int
    weights: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Checkpoint and original under one protocol. rise: of the mean nll, in nats, with its standard error."""

    original: Perplexity
    checkpoint: Perplexity
    rise: float
    rise_stderr: float


@dataclass(frozen=True, slots=True)
class Report:
    """All there is to say of a checkpoint.

    recipe: as in the manifest. sizes: bytes by what they hold. bits_per_weight: of quantized weights, scales and zero
    points counted. layers: by name, as the manifest records them: errors relative to what the layer adds, what was
    chosen. sensitivity: what `--target-bits` measured, empty without. run: what making it took, empty if not recorded.
    """

    name: str
    recipe: dict[str, Any]
    sizes: dict[str, int]
    bits_per_weight: float
    linears: tuple[Linear, ...]
    layers: dict[str, Any]
    sensitivity: tuple[dict[str, Any], ...]
    run: dict[str, Any]
    accuracy: Accuracy | None = None


def describe(checkpoint: Checkpoint, accuracy: Accuracy | None = None) -> Report:
    """Gather what the files of a checkpoint say. Raises InputError for a record that is none."""
    sizes = dict.fromkeys(("codes", "scales", "zero points", "other weights of the layers", "outside the layers"), 0)
    linears = []
    for blob in checkpoint.blobs:
        rest = "other weights of the layers" if blob.module else "outside the layers"
        for name, spec in blob.tensors.items():
            sizes[_PARTS.get(name.rpartition(".")[2], rest)] += spec.nbytes
            if name.endswith(_PACKED):
                stem = name.removesuffix(_PACKED)
                bits = checkpoint.recipe.bits_of(stem)
                linears.append(Linear(*cut_name(stem), bits, 8 * spec.nbytes // bits))
    quantized_bytes = sum(sizes[part] for part in _PARTS.values())
    return Report(
        name=checkpoint.directory.resolve().name,
        recipe=checkpoint.recipe.to_json(),
        sizes=sizes,
        bits_per_weight=8 * quantized_bytes / sum(linear.weights for linear in linears),
        linears=tuple(linears),
        layers=checkpoint.layer_errors,
        sensitivity=_sensitivity(checkpoint.directory / SENSITIVITY_NAME),
        run=_recorded_run(checkpoint.directory / RUN_NAME),
        accuracy=accuracy,
    )


def cut_name(linear: str) -> tuple[str, str]:
    """Cut a linear's full name behind its decoder layer's, which ends in the first number."""
    parts = linear.split(".")
    end = next((index for index, part in enumerate(parts, start=1) if part.isdigit()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])


def _recorded_run(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = read_json(path)
    expected = {"source_bytes", "seconds", "cpu_seconds", "peak_memory_bytes", "layers"}
    if set(found) != expected or not all(isinstance(value, int | float) for value in found.values()):
        raise InputError(f"{path}: expected the numbers {', '.join(sorted(expected))}; remove it to do without")
    return found


def _sensitivity(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.exists():
        return ()
    try:
        found = json.loads(path.read_text())
        return tuple({key: each[key] for key in ("linears", "error", "extra_bytes")} for each in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a record of sensitivities ({error}); remove it to do without") from None


def summary(report: Report) -> list[tuple[str, str, str]]:
    """Return title, value and note of each figure that one would ask for first."""
    recipe, total_bytes = report.recipe, sum(report.sizes.values())
    group = "whole rows" if recipe["group_size"] is None else f"groups of {recipe['group_size']}"
    kind = "symmetric" if recipe["symmetric"] else "asymmetric"
    wide = sum(linear.bits > recipe["bits"] for linear in report.linears)
    mixed = f", {wide} of {len(report.linears)} linears in 8 bits" if wide else ""
    found = [
        ("method", recipe["method"].upper(), f"{recipe['bits']} bits, {kind}, {group}"),
        ("bits", f"{report.bits_per_weight:.3f} a weight", f"scales and zero points counted{mixed}"),
    ]
    ran = report.run
    before = f"of {format_bytes(ran['source_bytes'])}, {ran['source_bytes'] / total_bytes:.1f}x" if ran else ""
    found.append(("size", format_bytes(total_bytes), before))
    errors = [layer for layer in report.layers.values() if "error" in layer]
    if errors:
        share = sum(layer["error"] for layer in errors) / sum(layer["rtn_error"] for layer in errors)
        fallen = sum(layer["fallback"] for layer in errors)
        found.append(("layer error", f"{share:.1%} of nearest", f"on held-out windows; {fallen} layers fell back"))
    if report.accuracy is not None:
        after, before_nll = report.accuracy.checkpoint, report.accuracy.original
        protocol = f"{after.text}, {after.windows} windows of {after.window}"
        found += [
            ("nll rise", f"{report.accuracy.rise:.4f} ± {report.accuracy.rise_stderr:.4f}", protocol),
            ("perplexity", f"{after.perplexity:.3f}", f"the original {before_nll.perplexity:.3f}"),
            ("KL", f"{after.kl:.4f} nats", "of the original's predictions to these, a token"),
            ("top-1", f"{after.top1:.1%}", "of the tokens with the original's likeliest"),
        ]
    if ran:
        layers = f"{ran['layers']} of {len({linear.layer for linear in report.linears})} layers"
        found += [
            ("time", format_seconds(ran["seconds"]), f"{format_seconds(ran['cpu_seconds'])} of processors; {layers}"),
            ("peak memory", format_bytes(ran["peak_memory_bytes"]), "the whole process"),
        ]
    return found
