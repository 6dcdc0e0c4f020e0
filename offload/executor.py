"""A checkpoint as a real transformers model that runs inside a memory budget.

The skeleton is transformers' own; its linears are replaced, its decoder layers wrapped: just before a layer runs its
weights are attached, views of the memory they were read into, and just after they are detached. Nothing else of the
model is touched, so `generate()`, beams, streamers and assisted decoding work on it as on any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from kernels.matmul import Mode
from kernels.packed import PackedWeight, codes_per_word
from offload.checkpoint import Checkpoint, LayerBlob, TensorSpec, describe_difference
from offload.errors import CheckpointError, UsageError
from offload.linear import PackedLinear
from offload.memory import Arena, FileReader, own_memory_bytes, trim_memory
from offload.names import checkpoint_in_model
from offload.placement import CODE_BYTES, Needs, Placement, activation_bytes, cache_bytes, layer_bytes, plan
from offload.skeleton import assign, build_skeleton, read_config
from offload.transfer import Slots, read_blob

_PACKED, _SCALE, _ZERO, _SHAPE = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's tensors as they lie in one arena, each with the place in the model it is for.

    packed: linears and their weights. others: tables of parameters or buffers, the key in each, the tensor, and the
    dtype it is wanted in.
    """

    packed: tuple[tuple[PackedLinear, PackedWeight], ...]
    others: tuple[tuple[dict[str, Any], str, Tensor, torch.dtype], ...]

    def attach(self) -> None:
        """Put every tensor in its place."""
        for linear, weight in self.packed:
            linear.packed = weight
        for table, key, tensor, dtype in self.others:
            table[key] = tensor if tensor.dtype == dtype else tensor.to(dtype)

    def detach(self) -> None:
        """Leave nothing behind that could be read after the arena has another layer in it."""
        for linear, _ in self.packed:
            linear.packed = None
        for table, key, tensor, dtype in self.others:
            table[key] = torch.empty(tensor.shape, dtype=dtype, device="meta")


@dataclass(frozen=True, slots=True)
class StreamingStats:
    """What has been read from disk since the model was loaded."""

    bytes_read: int
    layer_reads: int
    wait_seconds: float
    direct: bool


def load(
    directory: Path | str,
    *,
    cpu_memory: int | None = None,
    context_tokens: int = 2048,
    prefill_chunk_tokens: int = 512,
    dtype: torch.dtype | None = None,
    mode: Mode = "fast",
    poison: bool = False,
) -> PreTrainedModel:
    """Return the checkpoint in `directory` as a model that keeps the process within `cpu_memory` bytes.

    cpu_memory: budget for the whole process, None for no limit. context_tokens: keys and values to leave room for.
    dtype: of activations and of what is not quantized; None for the source's. mode: see `dequant_matmul`.
    poison: fill freed slots with NaN, for tests.
    Raises CheckpointError if a file is not what it should be, ResourceError if the budget is too small.
    """
    checkpoint = Checkpoint.open(directory)
    config = read_config(checkpoint.directory)
    model = build_skeleton(config, dtype or getattr(config, "dtype", None) or torch.bfloat16)
    checkpoint = checkpoint_in_model(checkpoint, model)
    element = torch.empty(0, dtype=model.dtype)
    names = _replace_linears(model, checkpoint, mode)
    check_tensors(model, checkpoint, names)
    fixed = [blob for blob in checkpoint.blobs if not blob.module]
    widening = element.element_size() / 2
    trim_memory()
    needs = Needs(
        runtime_bytes=own_memory_bytes() + CODE_BYTES,
        fixed_bytes=int(sum(blob.nbytes for blob in fixed) * widening),
        cache_bytes=cache_bytes(config, context_tokens, element.element_size()),
        activation_bytes=activation_bytes(config, min(context_tokens, prefill_chunk_tokens)),
        layers_bytes=layer_bytes(checkpoint),
    )
    executor = Executor(model, checkpoint, plan(needs, cpu_memory), poison)
    for blob in fixed:
        executor.attach_fixed(blob)
    model.tie_weights()
    model.get_output_embeddings().register_forward_pre_hook(_canonical_strides)
    model._streaming = executor
    model.hf_device_map = {"": "cpu"} | {
        blob.module: "disk" if tier == "disk" else "cpu"
        for blob, tier in zip(executor.blobs, executor.placement.tiers, strict=True)
    }
    if (checkpoint.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model


def _canonical_strides(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy the last position's hidden state out of its sequence before the head sees it.

    Sliced, it keeps the sequence's strides, and oneDNN then copies the whole head into another layout at every token
    (measured with torch 2.13: 83 ms and 54 MiB against 8 ms and none).
    """
    return (arguments[0].clone(memory_format=torch.contiguous_format), *arguments[1:])


def executor_of(model: PreTrainedModel) -> "Executor":
    """Return the executor behind a model that `load` made: its placement, its counters, its end."""
    executor = getattr(model, "_streaming", None)
    if not isinstance(executor, Executor):
        raise UsageError("this model was not loaded by offload.executor.load")
    return executor


class Executor:
    """Owns the memory of a model's weights and moves them under its decoder layers."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, placement: Placement, poison: bool) -> None:
        self.model, self.checkpoint, self.placement = model, checkpoint, placement
        self.blobs = [blob for blob in checkpoint.blobs if blob.module]
        self.reader = FileReader()
        streamed = [blob for blob, tier in zip(self.blobs, placement.tiers, strict=True) if tier == "disk"]
        self.slots = Slots(streamed, placement.depth, self.reader, verify, poison) if streamed else None
        self._views: dict[tuple[int, int], LayerView] = {}
        for blob, tier in zip(self.blobs, placement.tiers, strict=True):
            layer = model.get_submodule(blob.module)
            if tier == "host":
                arena = Arena(blob.nbytes)
                read_blob(self.reader, blob, arena)
                verify(blob, arena)
                self._view(blob, arena).attach()
            else:
                position = streamed.index(blob)
                layer.register_forward_pre_hook(partial(self._before, position))
                layer.register_forward_hook(partial(self._after, position), always_call=True)
        self.streamed_blobs = streamed

    @property
    def stats(self) -> StreamingStats:
        """Counters since loading."""
        if self.slots is None:
            return StreamingStats(0, 0, 0.0, self.reader.direct)
        return StreamingStats(self.slots.bytes_read, self.slots.reads, self.slots.wait_seconds, self.reader.direct)

    def attach_fixed(self, blob: LayerBlob) -> None:
        """Read what lies outside the decoder layers, in the model's dtype, to stay."""
        arena = Arena(blob.nbytes)
        read_blob(self.reader, blob, arena)
        verify(blob, arena)
        for name, spec in blob.tensors.items():
            tensor = arena.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype)
            assign(self.model, name, tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor)

    def close(self) -> None:
        """Stop reading and close the files; the model cannot run afterwards."""
        if self.slots is not None:
            self.slots.close()
        self.reader.close()

    def _before(self, position: int, layer: nn.Module, arguments: Any) -> None:
        assert self.slots is not None, "only streamed layers have this hook"
        slot = self.slots.wait(position)
        if (position, slot) not in self._views:
            self._views[position, slot] = self._view(self.streamed_blobs[position], self.slots.arenas[slot])
        self._views[position, slot].attach()
        self._attached = self._views[position, slot]

    def _after(self, position: int, layer: nn.Module, arguments: Any, output: Any) -> None:
        assert self.slots is not None, "only streamed layers have this hook"
        self._attached.detach()
        self.slots.release(position)

    def _view(self, blob: LayerBlob, arena: Arena) -> LayerView:
        """Describe where a layer's tensors lie in `arena` and where in the model they belong."""
        layer, prefix = self.model.get_submodule(blob.module), f"{blob.module}."
        tensors = {
            name.removeprefix(prefix): arena.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype)
            for name, spec in blob.tensors.items()
        }
        packed: list[tuple[PackedLinear, PackedWeight]] = []
        others: list[tuple[dict[str, Any], str, Tensor, torch.dtype]] = []
        for name in [name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)]:
            codes = tensors.pop(name + _PACKED).view(torch.uint8)
            scale, zero = tensors.pop(name + _SCALE), tensors.pop(name + _ZERO, None)
            tensors.pop(name + _SHAPE)
            linear = layer.get_submodule(name)
            assert isinstance(linear, PackedLinear), f"{name} was not replaced"
            group_size = self.checkpoint.recipe.group_size or linear.in_features
            packed.append((linear, PackedWeight(codes, scale, zero, group_size, linear.bits)))
        for name, tensor in tensors.items():
            owner_name, _, key = name.rpartition(".")
            owner = layer.get_submodule(owner_name)
            dtype = self.model.dtype if tensor.is_floating_point() else tensor.dtype
            if key in owner._parameters:
                others.append((owner._parameters, key, nn.Parameter(tensor, requires_grad=False), dtype))
            else:
                others.append((owner._buffers, key, tensor, dtype))
        return LayerView(tuple(packed), tuple(others))


def _replace_linears(model: PreTrainedModel, checkpoint: Checkpoint, mode: Mode) -> list[str]:
    """Put a PackedLinear where the checkpoint holds a packed weight; return their names."""
    names = [name.removesuffix(_PACKED) for blob in checkpoint.blobs for name in blob.tensors if name.endswith(_PACKED)]
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if type(linear) is not nn.Linear:
            raise CheckpointError(
                f"{checkpoint.directory}: {name!r} is packed, but no linear layer of {type(model).__name__}"
            )
        bits, biased = checkpoint.recipe.bits_of(name), linear.bias is not None
        packed = PackedLinear(linear.in_features, linear.out_features, biased, model.dtype, bits, mode)
        model.set_submodule(name, packed)
    return names


def check_tensors(model: PreTrainedModel, checkpoint: Checkpoint, packed: Sequence[str]) -> None:
    """Demand exactly the tensors the model has, each of its shape and a fitting dtype. Raises CheckpointError."""
    expected = _expected_tensors(model, checkpoint, packed)
    found = {name: (blob, spec) for blob in checkpoint.blobs for name, spec in blob.tensors.items()}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if set(found) | tied != set(expected) | tied:
        difference = describe_difference(set(found) - tied, set(expected) - tied, "by the configuration")
        raise CheckpointError(f"{checkpoint.directory}: {difference}")
    for name, (blob, spec) in found.items():
        shape, dtypes = expected[name]
        if spec.shape != shape or spec.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise CheckpointError(
                f"{blob.path}: tensor {name!r} is {spec.dtype} {list(spec.shape)}, expected {wanted} {list(shape)}"
            )
        if blob.module and not name.startswith(f"{blob.module}."):
            raise CheckpointError(f"{blob.path}: tensor {name!r} is not of layer {blob.module!r}")


def _expected_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, packed: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    floats = (torch.bfloat16, torch.float16, torch.float32)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        name: (tuple(tensor.shape), floats if tensor.is_floating_point() else (tensor.dtype,))
        for name, tensor in model.state_dict().items()
    }
    for name in packed:
        linear = model.get_submodule(name)
        rows, inputs = int(linear.out_features), int(linear.in_features)
        groups, per_word = inputs // (checkpoint.recipe.group_size or inputs), codes_per_word(linear.bits)
        expected[name + _PACKED] = ((rows, inputs // per_word), (torch.int32,))
        expected[name + _SCALE] = ((rows, groups), (torch.bfloat16, torch.float16))
        expected[name + _SHAPE] = ((2,), (torch.int64,))
        if not checkpoint.recipe.symmetric:
            expected[name + _ZERO] = ((-(-rows // per_word), groups), (torch.int32,))
    return expected


def verify(blob: LayerBlob, arena: Arena) -> None:
    """Compare every tensor in an arena with the manifest, and demand finite scales. Raises CheckpointError."""
    for name, spec in blob.tensors.items():
        found = xxhash.xxh3_64_hexdigest(arena.view(spec.offset, spec.nbytes))
        if found != blob.checksums[name]:
            raise CheckpointError(
                f"{blob.path}: tensor {name!r} is damaged (checksum {found}, {blob.checksums[name]} in the manifest); "
                "copy or download the checkpoint again"
            )
        if name.endswith(_SCALE):
            _check_scale(blob, name, arena, spec)


def _check_scale(blob: LayerBlob, name: str, arena: Arena, spec: TensorSpec) -> None:
    scale = arena.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype)
    bad = int((~torch.isfinite(scale)).sum())
    if bad:
        raise CheckpointError(
            f"{blob.path}: tensor {name!r} holds {bad} NaN or infinite scales; quantize the model again"
        )
