"""The walk over a model's decoder layers, one in memory at a time.

Each layer is read from the source, quantized by the method, written, and then run *as quantized* to make the inputs of
the next, so that later layers see the errors of earlier ones. A layer that an interrupted run has written is read back
and run in the same way, which is why a resumed checkpoint equals an uninterrupted one byte for byte.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.packed import PackedWeight, dequantize
from offload.checkpoint import read_header
from offload.checkpoint_writer import CheckpointWriter
from offload.command import Progress, say
from offload.skeleton import assign, decoder_layers
from quant.groupwise import Grid, Parameters, fake_quantize, minmax, pack_weight
from quant.layer import LayerInputs, linears
from quant.source_weights import Location, SourceWeights

_HELD_OUT_SHARE = 8


class Method(Protocol):
    """What the walk asks of a method: a layer in, the parameters of its linears out.

    needs_original: it also wants the inputs that the unquantized model would give the layer.
    """

    name: str
    needs_inputs: bool
    needs_original: bool

    def settings_json(self) -> dict[str, Any]:
        """Return the method's own settings, as plain JSON values, for the recipe."""

    def quantize_layer(
        self, layer: nn.Module, inputs: Any, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Choose parameters on their grids for linears of `layer`, by name; also returns what to report.

        May rescale `layer` in place. Linears that share an input share their grid.
        """


@dataclass(frozen=True, slots=True)
class Walk:
    """A model to be quantized: its skeleton on the meta device, its weights on disk, and where the result goes.

    grids: of the linears to be quantized, by full name; others are left as they are.
    """

    model: nn.Module
    source: SourceWeights
    writer: CheckpointWriter
    method: Method
    grids: Mapping[str, Grid]
    head_dim: int

    def run(self, windows: Tensor | None) -> None:
        """Write every shard that is not there yet. windows: int64 [S, T] for methods that need inputs."""
        prefix, layers = decoder_layers(self.model)
        outer = [name for name in self.source.locations if not name.startswith(f"{prefix}.")]
        last = [name for name in outer if self._comes_after(name, prefix)] or outer[-1:]  # no shard is empty
        first = [name for name in outer if name not in last]
        if self.writer.done(0) is None:
            self.writer.write_shard(0, "", {name: self.source.read(name) for name in first}, {})
        done = [self.writer.done(index + 1) is not None for index in range(len(layers))]
        if any(done):
            say(f"resuming: {sum(done)} of {len(layers)} layers are done and verified")
        inputs = None
        if self.method.needs_inputs and windows is not None and not all(done):
            inputs = first_inputs(self.model, self.source, windows)
        progress = Progress("layer", len(layers))
        for index in range(len(layers)):
            if done[index] and all(done):
                break
            layer, name = layers[index], f"{prefix}.{index}"
            keeps_original = inputs is not None and self.method.needs_original
            dtypes = load_layer(layer, name, self.source) if keeps_original or not done[index] else {}
            original_STD = inputs.at_layer.original().run(layer) if inputs is not None and keeps_original else None
            note = self._layer(index, name, layer, inputs, None if done[index] else dtypes)
            if inputs is not None and index + 1 < len(layers):
                inputs = inputs.following(layer, index + 1, original_STD)
            release(layers[index])
            progress.advance(note)
        if self.writer.done(len(layers) + 1) is None:
            self.writer.write_shard(len(layers) + 1, "", {name: self.source.read(name) for name in last}, {})

    def _comes_after(self, name: str, prefix: str) -> bool:
        """Whether an outer tensor is used after the layers: by the order in which the model registers its parts."""
        order = [key for key, _ in self.model.named_parameters(remove_duplicate=False)]
        final = max(i for i, key in enumerate(order) if key.startswith(f"{prefix}."))
        return name in order and order.index(name) > final

    def _layer(
        self,
        index: int,
        name: str,
        layer: nn.Module,
        inputs: "WalkInputs | None",
        dtypes: dict[str, torch.dtype] | None,
    ) -> str:
        """Leave `layer` in memory as quantized, and on disk; return a note for the progress line.

        dtypes: of the source whose weights are loaded, None for a layer that is done.
        """
        if dtypes is None:
            if inputs is not None:
                record = self.writer.done(index + 1)
                assert record is not None, "the record was there when the walk began"
                restore(layer, name, self.writer.directory / record["file"], self._grids(layer, name))
            return "already done"
        packed, report = self._quantize(layer, name, inputs, dtypes)
        tensors = {f"{name}.{key}": tensor.to(dtypes[key]) for key, tensor in layer.state_dict().items()}
        for key, weight in packed.items():
            del tensors[f"{name}.{key}.weight"]
            tensors |= {f"{name}.{key}.{part}": t for part, t in stored_tensors(weight).items()}
        self.writer.write_shard(index + 1, name, tensors, report)
        return f"error {report['error']:.4f} (rtn {report['rtn_error']:.4f})" if "error" in report else ""

    def _grids(self, layer: nn.Module, name: str) -> dict[str, Grid]:
        """Return the grids of the linears of layer `name` that are to be quantized, by their name within it."""
        return {key: self.grids[f"{name}.{key}"] for key in linears(layer) if f"{name}.{key}" in self.grids}

    def _quantize(
        self, layer: nn.Module, name: str, inputs: "WalkInputs | None", dtypes: dict[str, torch.dtype]
    ) -> tuple[dict[str, PackedWeight], dict[str, Any]]:
        """Quantize, measure on held-out samples against round-to-nearest, and fall back to that where it is better."""
        grids = self._grids(layer, name)
        if inputs is None:
            found, report = self.method.quantize_layer(layer, None, grids, self.head_dim)
            return pack_layer(layer, found, grids, dtypes), report
        fit, held_out = inputs.at_layer.split_held_out(_HELD_OUT_SHARE)
        before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        reference = held_out.original().run(layer)
        for key, grid in grids.items():
            weight = layer.get_parameter(f"{key}.weight")
            weight.data = fake_quantize(weight.data, minmax(weight.data, grid), grid)
        rtn_error = relative_error(held_out, layer, reference)
        for key, tensor in before.items():
            assign(layer, key, tensor.clone())
        found, chosen = self.method.quantize_layer(layer, fit, grids, self.head_dim)
        packed = pack_layer(layer, found, grids, dtypes)
        error = relative_error(held_out, layer, reference)
        report = {"error": error, "rtn_error": rtn_error, "fallback": False, "chosen": chosen}
        if not error <= rtn_error:
            say(
                f"{name}: {self.method.name} error {error:.4f}, "
                f"round-to-nearest {rtn_error:.4f}: falling back to the latter"
            )
            for key, tensor in before.items():
                assign(layer, key, tensor)
            nearest = {key: minmax(layer.get_parameter(f"{key}.weight").data, grid) for key, grid in grids.items()}
            packed = pack_layer(layer, nearest, grids, dtypes)
            report |= {"error": rtn_error, "fallback": True, "chosen": {}}
        return packed, report


def pack_layer(
    layer: nn.Module, found: dict[str, Parameters], grids: Mapping[str, Grid], dtypes: dict[str, torch.dtype]
) -> dict[str, PackedWeight]:
    """Pack linears of `layer` and leave in it what the file says: these dequantized, the rest in `dtypes`' values."""
    packed = {}
    for key, parameters in found.items():
        weight = layer.get_parameter(f"{key}.weight")
        packed[key] = pack_weight(weight.data, parameters, grids[key])
        weight.data = dequantize(packed[key])
    quantized = {f"{key}.weight" for key in found}
    for key, tensor in layer.state_dict().items():
        if key not in quantized and tensor.is_floating_point():
            assign(layer, key, tensor.to(dtypes[key]).float())
    return packed


@dataclass(frozen=True, slots=True)
class WalkInputs:
    """The inputs of the layer the walk stands at, and the arguments that each later layer will be called with."""

    at_layer: LayerInputs
    arguments_by_layer: tuple[dict[str, Any], ...]

    def following(self, layer: nn.Module, index: int, original_STD: Tensor | None) -> "WalkInputs":
        """Run `layer` and return the inputs of layer `index`, which comes after it, beside the unquantized model's."""
        inputs = LayerInputs(self.at_layer.run(layer), self.arguments_by_layer[index], original_STD=original_STD)
        return WalkInputs(inputs, self.arguments_by_layer)


def first_inputs(model: nn.Module, source: SourceWeights, windows: Tensor) -> WalkInputs:
    """Run everything before the decoder layers on windows [S, T] and return what the layers would be called with.

    The tensors needed for that, embeddings mostly, are read for this call and dropped again.
    """
    prefix, layers = decoder_layers(model)
    parent_name, _, list_name = prefix.rpartition(".")
    parent = model.get_submodule(parent_name)
    around = [key for key in state_names(parent) if not key.startswith(f"{list_name}.")]
    for key in around:
        tensor = source.read(f"{parent_name}.{key}")
        assign(parent, key, tensor.float() if tensor.is_floating_point() else tensor)
    recorders = [_Recorder(layer) for layer in layers]
    hidden = []
    parent._modules[list_name] = nn.ModuleList(recorders)
    try:
        for window_T in windows:
            parent(input_ids=window_T[None], use_cache=False)
            hidden.append(recorders[0].hidden_BTD)
    finally:
        parent._modules[list_name] = layers
    for key in around:
        assign(parent, key, torch.empty_like(parent.state_dict()[key], device="meta"))
    arguments = tuple(recorder.arguments for recorder in recorders)
    return WalkInputs(LayerInputs(torch.cat(hidden), arguments[0]), arguments)


class _Recorder(nn.Module):
    """Stands where a decoder layer was, passes hidden states on, and remembers how the layer would have been called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.hidden_BTD = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Answer for the layer where the model asks for an attribute of it, its kind of attention say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Record the call by the names of the layer's own signature."""
        bound = inspect.signature(type(self.layer).forward).bind(self.layer, *args, **kwargs)
        named = {key: value for key, value in bound.arguments.items() if key not in ("self", "kwargs")}
        named |= bound.arguments.get("kwargs", {})
        hidden_BTD: Tensor = named.pop("hidden_states")
        self.hidden_BTD, self.arguments = hidden_BTD, named
        return hidden_BTD


def relative_error(inputs: LayerInputs, layer: nn.Module, reference: Tensor) -> float:
    """Return |layer(x) - reference|^2 / |reference - x0|^2: the error, in units of what the layer adds to its input.

    x0: the unquantized model's input where that is kept, else x.
    """
    error = sum(
        float((output - expected).square().sum())
        for output, expected in zip(inputs.outputs(layer), reference.split(inputs.batch_samples), strict=True)
    )
    return error / float((reference - inputs.original().hidden_STD).square().sum())


def stored_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return a packed weight under compressed-tensors' names and shapes."""
    shape = torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64)
    tensors = {"weight_packed": weight.codes.view(torch.int32), "weight_scale": weight.scale, "weight_shape": shape}
    return tensors if weight.zero is None else tensors | {"weight_zero_point": weight.zero}


def restore(layer: nn.Module, name: str, path: Any, grids: Mapping[str, Grid]) -> None:
    """Load a written shard into `layer`, dequantized to float32."""
    offset, specs = read_header(path)
    shard = SourceWeights({key: Location(path, offset, spec) for key, spec in specs.items()})
    for key in state_names(layer):
        full = f"{name}.{key}"
        if full in specs:
            tensor = shard.read(full)
            assign(layer, key, tensor.float() if tensor.is_floating_point() else tensor)
            continue
        stem, grid = full.removesuffix(".weight"), grids[key.removesuffix(".weight")]
        codes = shard.read(f"{stem}.weight_packed").view(torch.uint8)
        zero = None if grid.symmetric else shard.read(f"{stem}.weight_zero_point")
        size = grid.group(layer.get_parameter(key).shape[1])
        weight = PackedWeight(codes, shard.read(f"{stem}.weight_scale"), zero, size, grid.bits)
        assign(layer, key, dequantize(weight))


def load_layer(layer: nn.Module, name: str, source: SourceWeights) -> dict[str, torch.dtype]:
    """Read the original weights into `layer`, as float32, and return the dtypes of the source."""
    original = {key: source.read(f"{name}.{key}") for key in state_names(layer)}
    for key, tensor in original.items():
        assign(layer, key, tensor.float() if tensor.is_floating_point() else tensor)
    return {key: tensor.dtype for key, tensor in original.items()}


def state_names(layer: nn.Module) -> list[str]:
    """Return the names of a layer's parameters and persistent buffers."""
    return list(layer.state_dict())


def release(layer: nn.Module) -> None:
    """Drop a layer's weights again."""
    for key, tensor in layer.state_dict().items():
        assign(layer, key, torch.empty_like(tensor, device="meta"))
