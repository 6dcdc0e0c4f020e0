"""The walk over a model's decoder layers, one in memory at a time.

Each layer is read from the source, quantized by the method, written, and then run *as quantized* to make the inputs of
the next, so that later layers see the errors of earlier ones. A layer that an interrupted run has written is read back
and run in the same way, which is why a resumed checkpoint equals an uninterrupted one byte for byte.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.packed import PackedWeight
from offload.checkpoint import read_header
from offload.checkpoint_writer import CheckpointWriter
from offload.command import Progress, say
from offload.memory import trim_memory
from offload.skeleton import assign, decoder_layers, outer_names
from offload.source_weights import Location, SourceWeights
from quant.cost import Cost, Shape, Windows
from quant.groupwise import Grid, Parameters, minmax, pack_weight, round_to_nearest_, unpack_into
from quant.hidden_states import HiddenStates
from quant.layer import LayerInputs, linears, unreached
from quant.walk_inputs import HELD_OUT_SHARE, WalkInputs, first_inputs


class Method(Protocol):
    """What the walk asks of a method: a layer in, the parameters of its linears out.

    needs_original: it also wants the inputs that the unquantized model would give the layer. pass_dtype: in which the
    linears multiply when layers are run.
    """

    name: str
    needs_inputs: bool
    needs_original: bool
    pass_dtype: torch.dtype

    def settings_json(self) -> dict[str, Any]:
        """Return the method's own settings, as plain JSON values, for the recipe."""

    def cost(self, shapes: list[Shape], grid: Grid, windows: Windows | None) -> Cost:
        """Return what a layer whose linears have these shapes will take."""

    def quantize_layer(
        self, layer: nn.Module, inputs: Any, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Choose parameters on their grids for linears of `layer`, by name; also returns what to report.

        May rescale `layer` in place. Linears that share an input share their grid.
        """


@dataclass(frozen=True, slots=True)
class Walk:
    """A model to be quantized: its skeleton on the meta device, its weights on disk, and where the result goes.

    grids: of the linears to be quantized, by full name; others are left as they are. spill_to: a directory for hidden
    states that memory has no room for. statistics_to: the same for what the method knows of them.
    """

    model: PreTrainedModel
    source: SourceWeights
    writer: CheckpointWriter
    method: Method
    grids: Mapping[str, Grid]
    head_dim: int
    spill_to: Path | None = None
    statistics_to: Path | None = None

    def run(self, windows: Tensor | None) -> None:
        """Write every shard that is not there yet. windows: int64 [S, T] for methods that need inputs."""
        prefix, layers = decoder_layers(self.model)
        outer = [name for name in self.source.locations if not name.startswith(f"{prefix}.")]
        first, last = outer_names(self.model, prefix, outer)
        if self.writer.done(0) is None:
            self._write(0, "", {name: self.source.read(name) for name in first}, {})
        done = [self.writer.done(index + 1) is not None for index in range(len(layers))]
        if any(done):
            say(f"resuming: {sum(done)} of {len(layers)} layers are done and verified")
        inputs = None
        if self.method.needs_inputs and windows is not None and not all(done):
            inputs = first_inputs(self.model, self.source, windows, self.spill_to, self.method.pass_dtype)
        progress = Progress("layer", len(layers))
        for index in range(len(layers)):
            if done[index] and all(done):
                break
            layer, name = layers[index], f"{prefix}.{index}"
            keeps_original = inputs is not None and self.method.needs_original
            dtypes = load_layer(layer, name, self.source) if keeps_original or not done[index] else {}
            original_STD = None
            if inputs is not None and keeps_original:
                original_STD = inputs.original_outputs(layer)
                inputs = inputs.towards(original_STD)
            note, held_out_STD = self._layer(index, name, layer, inputs, None if done[index] else dtypes)
            if inputs is not None and index + 1 < len(layers):
                inputs = inputs.following(layer, index + 1, original_STD, held_out_STD)
            release(layers[index])
            trim_memory()  # what layers leave between the blocks of others grew by 10 MiB a layer
            progress.advance(note)
        if self.writer.done(len(layers) + 1) is None:
            self._write(len(layers) + 1, "", {name: self.source.read(name) for name in last}, {})

    def _write(self, index: int, module: str, tensors: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Write a shard, its tensors under the names that the source has them under."""
        stored = {self.source.stored(name): tensor for name, tensor in tensors.items()}
        self.writer.write_shard(index, module, stored, report)

    def _layer(
        self,
        index: int,
        name: str,
        layer: nn.Module,
        inputs: WalkInputs | None,
        dtypes: dict[str, torch.dtype] | None,
    ) -> tuple[str, HiddenStates | None]:
        """Leave `layer` in memory as quantized, and on disk; return a note for the progress line.

        Beside it what `layer` makes of the held-out samples, where that is known. dtypes: of the source whose weights
        are loaded, None for a layer that is done.
        """
        if dtypes is None:
            if inputs is not None:
                record = self.writer.done(index + 1)
                assert record is not None, "the record was there when the walk began"
                path = self.writer.directory / record["file"]
                restore(layer, name, path, self._grids(layer, name), self.source.stored)
            return "already done", None
        packed, report, held_out_STD = self._quantize(layer, name, inputs, dtypes)
        state, quantized = layer.state_dict(), {f"{key}.weight" for key in packed}
        tensors = {f"{name}.{key}": t.to(dtypes[key]) for key, t in state.items() if key not in quantized}
        for key, weight in packed.items():
            tensors |= {f"{name}.{key}.{part}": t for part, t in stored_tensors(weight).items()}
        self._write(index + 1, name, tensors, report)
        note = f"error {report['error']:.4f} (rtn {report['rtn_error']:.4f})" if "error" in report else ""
        return note, held_out_STD

    def _grids(self, layer: nn.Module, name: str) -> dict[str, Grid]:
        """Return the grids of the linears of layer `name` that are to be quantized, by their name within it."""
        return {key: self.grids[f"{name}.{key}"] for key in linears(layer) if f"{name}.{key}" in self.grids}

    def _quantize(
        self, layer: nn.Module, name: str, inputs: WalkInputs | None, dtypes: dict[str, torch.dtype]
    ) -> tuple[dict[str, PackedWeight], dict[str, Any], HiddenStates | None]:
        """Quantize, measure on held-out samples against round-to-nearest, and fall back to that where it is better.

        Returns what the layer makes of these samples, too, if there was room for it: the reference's, if not kept.
        """
        grids = self._grids(layer, name)
        if inputs is None:
            found, report = self.method.quantize_layer(layer, None, grids, self.head_dim)
            return pack_layer(layer, found, grids, dtypes), report, None
        fit, held_out = inputs.at_layer.split_held_out(HELD_OUT_SHARE)
        reference = held_out.original().run(layer) if held_out.target_STD is None else held_out.target_STD
        for key, grid in grids.items():
            round_to_nearest_(layer.get_parameter(f"{key}.weight").data, grid)
        rtn_error = relative_error(held_out, layer, reference)
        load_layer(layer, name, self.source)
        blind = unreached(layer, fit, grids)
        seen = {key: grid for key, grid in grids.items() if key not in blind}
        known_to = replace(fit, statistics_to=self.statistics_to)
        found, chosen = self.method.quantize_layer(layer, known_to, seen, self.head_dim)
        found |= {key: minmax(layer.get_parameter(f"{key}.weight").data, grids[key]) for key in blind}
        packed = pack_layer(layer, found, grids, dtypes)
        room = held_out.target_STD is None
        error = relative_error(held_out, layer, reference, overwrite=room)
        report = {"error": error, "rtn_error": rtn_error, "fallback": False, "chosen": chosen}
        if blind:
            say(
                f"{name}: no calibration token reaches {len(blind)} of {len(grids)} linears ({blind[0]}, ...): "
                "these are rounded to nearest; more calibration text may reach them"
            )
            report["unreached"] = blind
        if not error <= rtn_error:
            say(
                f"{name}: {self.method.name} error {error:.4f}, "
                f"round-to-nearest {rtn_error:.4f}: falling back to the latter"
            )
            load_layer(layer, name, self.source)
            nearest = {key: minmax(layer.get_parameter(f"{key}.weight").data, grid) for key, grid in grids.items()}
            packed = pack_layer(layer, nearest, grids, dtypes)
            report |= {"error": rtn_error, "fallback": True, "chosen": {}}
            room = False
        return packed, report, reference if room else None


def pack_layer(
    layer: nn.Module, found: dict[str, Parameters], grids: Mapping[str, Grid], dtypes: dict[str, torch.dtype]
) -> dict[str, PackedWeight]:
    """Pack linears of `layer` and leave in it what the file says: these dequantized, the rest in `dtypes`' values."""
    packed = {}
    for key, parameters in found.items():
        weight = layer.get_parameter(f"{key}.weight").data
        packed[key] = pack_weight(weight, parameters, grids[key])
        unpack_into(weight, packed[key])
    quantized = {f"{key}.weight" for key in found}
    for key, tensor in layer.state_dict().items():
        if key not in quantized and tensor.is_floating_point():
            assign(layer, key, tensor.to(dtypes[key]).float())
    return packed


def relative_error(inputs: LayerInputs, layer: nn.Module, reference: HiddenStates, overwrite: bool = False) -> float:
    """Return |layer(x) - reference|^2 / |reference - x0|^2: the error, in units of what the layer adds to its input.

    x0: the unquantized model's input where that is kept, else x. overwrite: whether to leave layer(x) in the place of
    the reference, a tensor then.
    """
    error = added = 0.0
    batches = reference.split(inputs.batch_samples), inputs.original().hidden_STD.split(inputs.batch_samples)
    for output, expected, before in zip(inputs.outputs(layer), *batches, strict=True):
        error += float((output - expected).square().sum())
        added += float((expected - before).square().sum())
        if overwrite:
            expected.copy_(output)  # a view of the reference
    return error / added


def stored_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return a packed weight under compressed-tensors' names and shapes."""
    shape = torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64)
    tensors = {"weight_packed": weight.codes.view(torch.int32), "weight_scale": weight.scale, "weight_shape": shape}
    return tensors if weight.zero is None else tensors | {"weight_zero_point": weight.zero}


def restore(
    layer: nn.Module,
    name: str,
    path: Path,
    grids: Mapping[str, Grid],
    stored: Callable[[str], str] = lambda name: name,
) -> None:
    """Load a written shard into `layer`, dequantized to float32. stored: maps a tensor's name to that in the file."""
    offset, specs = read_header(path)
    shard = SourceWeights({key: Location(path, offset, spec) for key, spec in specs.items()})
    for key in state_names(layer):
        full = stored(f"{name}.{key}")
        if full in specs:
            tensor = shard.read(full)
            assign(layer, key, tensor.float() if tensor.is_floating_point() else tensor)
            continue
        stem, grid = full.removesuffix(".weight"), grids[key.removesuffix(".weight")]
        codes = shard.read(f"{stem}.weight_packed").view(torch.uint8)
        zero = None if grid.symmetric else shard.read(f"{stem}.weight_zero_point")
        shape = layer.get_parameter(key).shape
        packed = PackedWeight(codes, shard.read(f"{stem}.weight_scale"), zero, grid.group(shape[1]), grid.bits)
        weight = torch.empty(shape)
        unpack_into(weight, packed)
        assign(layer, key, weight)


def load_layer(layer: nn.Module, name: str, source: SourceWeights) -> dict[str, torch.dtype]:
    """Read the original weights into `layer`, as float32, and return the dtypes of the source."""
    release(layer)
    dtypes = {}
    for key in state_names(layer):
        tensor = source.read(f"{name}.{key}")
        assign(layer, key, tensor.float() if tensor.is_floating_point() else tensor)
        dtypes[key] = tensor.dtype
    return dtypes


def state_names(layer: nn.Module) -> list[str]:
    """Return the names of a layer's parameters and persistent buffers."""
    return list(layer.state_dict())


def release(layer: nn.Module) -> None:
    """Drop a layer's weights again."""
    for key, tensor in layer.state_dict().items():
        assign(layer, key, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
