"""What a pass costs: what the links of a machine explain, and what a rehearsal of the model has measured beside it."""

import hashlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from kernels.cpu_build import library_name
from kernels.kv_block import BLOCK_TOKENS
from offload.checkpoint import CONFIG_NAME, Checkpoint
from offload.files import reading
from offload.memory import whole_pages
from offload.names import checkpoint_in_model
from offload.planning.machine import Machine, cache_file, load_cache, save_json
from offload.planning.needs import CacheShape, ExpertNeeds, cache_bytes, expert_needs, layer_bytes
from offload.planning.predict import Costs
from offload.planning.wishes import Wishes
from offload.skeleton import build_skeleton, read_config
from offload.units import Units


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model counts for speed: bytes of each layer, its quantized weights, keys and values a token, head.

    head_blocks: of the head, if it can be streamed; experts: of the layers, if they have any. cache: keys and values
    of which only some are at hand, None where all are.
    """

    layers_bytes: tuple[int, ...]
    layers_weights: tuple[int, ...]
    cache_bytes_per_token: float
    head_bytes: int
    head_blocks_bytes: tuple[int, ...] = ()
    experts: ExpertNeeds | None = None
    cache: CacheShape | None = None

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, units: Units, config: PretrainedConfig, element_bytes: int, wishes: Wishes
    ) -> "Shape":
        """Read it off a checkpoint. element_bytes: of activations and of what is not quantized. wishes: of a cache."""
        text = config.get_text_config(decoder=True)
        blobs = [blob for blob in checkpoint.blobs if blob.module]
        blocks = () if units.head is None else tuple(whole_pages(block.nbytes) for block in units.head.blocks())
        weights = [
            sum(spec.nbytes for name, spec in blob.tensors.items() if name.endswith(".weight_packed")) for blob in blobs
        ]
        return cls(
            layers_bytes=layer_bytes(checkpoint),
            layers_weights=tuple(nbytes * 8 // checkpoint.recipe.bits for nbytes in weights),
            cache_bytes_per_token=cache_bytes(config, BLOCK_TOKENS, element_bytes, wishes.kv)
            / BLOCK_TOKENS
            / len(blobs),
            head_bytes=sum(blocks) or text.vocab_size * text.hidden_size * element_bytes,
            head_blocks_bytes=blocks,
            experts=expert_needs(config, units),
            cache=None if wishes.kv_bytes is None else CacheShape.of(config, wishes.kv_bytes),
        )

    def computed_bytes(self, tokens: int) -> tuple[int, ...]:
        """Return what of each layer is multiplied in a pass over so many tokens: not the experts of none of them."""
        if self.experts is None:
            return self.layers_bytes
        largest, parts = (
            self.experts.expert_bytes,
            zip(self.experts.around_bytes, self.experts.touched(tokens), strict=True),
        )
        return tuple(around + touched * largest for around, touched in parts)

    def weights_per_token(self) -> tuple[float, ...]:
        """Return the quantized weights of each layer that a token is multiplied by."""
        sizes = zip(self.layers_weights, self.computed_bytes(1), self.layers_bytes, strict=True)
        return tuple(weights * used / nbytes for weights, used, nbytes in sizes)


@dataclass(frozen=True, slots=True)
class Overheads:
    """What decoding one sequence takes beside what the links explain, in seconds, as rehearsed on this machine.

    layer: of every layer in memory; streamed: of every one out of the ring. outside: of a pass, between its layers.
    context: of every layer and token of context, all of it. prefill: of every layer and token of a prompt.
    reading_share: of the disk's rate that reads keep while the model runs. kept, streamed: layers in memory and on
    disk that this was learned from. joint: whether those compute for several sequences in one call.
    """

    layer_seconds: float = 0.0
    streamed_seconds: float = 0.0
    outside_seconds: float = 0.0
    context_seconds: float | None = None
    prefill_seconds: float = 0.0
    reading_share: float = 1.0
    kept: int = 0
    streamed: int = 0
    joint: bool = False

    @property
    def known(self) -> bool:
        """Whether a rehearsal has found them."""
        return self != Overheads()

    def over(self, earlier: "Overheads") -> "Overheads":
        """Return them with what an earlier rehearsal knows from more layers than this one."""
        found = replace(self, joint=self.joint or earlier.joint)
        if earlier.kept > found.kept:
            found = replace(found, layer_seconds=earlier.layer_seconds, kept=earlier.kept)
        if earlier.streamed > found.streamed:
            share, seconds = earlier.reading_share, earlier.streamed_seconds
            found = replace(found, streamed_seconds=seconds, reading_share=share, streamed=earlier.streamed)
        return found

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Overheads":
        """Rebuild from `to_json`. Raises ValueError if the keys are others or a value is no number."""
        if set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"expected the keys {[field.name for field in fields(cls)]}, found {sorted(values)}")
        if not all(value is None or isinstance(value, (int, float)) for value in values.values()):
            raise ValueError("expected numbers")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values."""
        return asdict(self)


def decode_costs(
    shape: Shape, machine: Machine, overheads: Overheads, context_tokens: int, batch_size: int = 1
) -> Costs:
    """Return the costs of decoding one token of each sequence with `context_tokens` tokens before it."""
    cached = batch_size * context_tokens
    around = overheads.layer_seconds + cached * _token_seconds(shape, machine, overheads)
    costs = _costs(shape, machine, overheads, batch_size, around)
    if shape.cache is not None:
        away = shape.cache.away_bytes(context_tokens, batch_size)
        disk = machine.disk_bytes_per_second * overheads.reading_share
        bus = away / machine.copy_bytes_per_second if machine.has_device else 0.0
        costs = replace(costs, cache_read_seconds=away / disk, cache_copy_seconds=bus)
    if not machine.has_device:
        return costs
    device_context = cached * shape.cache_bytes_per_token / machine.device_bytes_per_second
    return _with_device(costs, shape, machine, batch_size, device_context)


def round_costs(shape: Shape, machine: Machine, overheads: Overheads, context_tokens: int, parallel: int) -> Costs:
    """Return the costs of a round of `offload.serving`: a token of each of `parallel` sequences, as `decode_costs`.

    What is read, or crosses the bus, does so once for all. Layers on the host make one product for all where they are
    joint, a head that is packed does, of a byte a weight; everything else is done for one after the other.
    """
    alone = decode_costs(shape, machine, overheads, context_tokens)
    if parallel == 1:
        return alone

    def each(seconds: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(parallel * one for one in seconds)

    rate = machine.joint_operations_per_second or machine.kernel_operations_per_second
    around = parallel * (overheads.layer_seconds + context_tokens * _token_seconds(shape, machine, overheads))
    joint = _costs(shape, replace(machine, kernel_operations_per_second=rate), overheads, parallel, around)
    blocks = tuple(
        max(alone, 2 * nbytes * parallel / rate)
        for alone, nbytes in zip(alone.head_seconds, shape.head_blocks_bytes, strict=True)
    )
    head = sum(blocks) or parallel * shape.head_bytes / machine.read_bytes_per_second
    crossing = zip(alone.copy_seconds, alone.device_seconds, strict=True)
    return replace(
        joint,
        host_seconds=joint.host_seconds if overheads.joint else each(alone.host_seconds),
        outside_seconds=head + parallel * overheads.outside_seconds,
        streamed_seconds=parallel * alone.streamed_seconds,
        head_seconds=blocks,
        device_seconds=each(alone.device_seconds),
        mapped_seconds=tuple(copy + parallel * computing for copy, computing in crossing),
        copy_seconds=alone.copy_seconds,
        outside_device_seconds=parallel * alone.outside_device_seconds,
        cache_read_seconds=parallel * alone.cache_read_seconds,
        cache_copy_seconds=parallel * alone.cache_copy_seconds,
    )


def _token_seconds(shape: Shape, machine: Machine, overheads: Overheads) -> float:
    """Return what a token of context adds to a layer on the host."""
    if overheads.context_seconds is not None:
        return overheads.context_seconds
    return shape.cache_bytes_per_token / machine.read_bytes_per_second


def prefill_costs(shape: Shape, machine: Machine, overheads: Overheads, tokens: int) -> Costs:
    """Return the costs of a pass over `tokens` tokens of prompts, together."""
    costs = _costs(shape, machine, overheads, tokens, tokens * overheads.prefill_seconds)
    return _with_device(costs, shape, machine, tokens, 0.0) if machine.has_device else costs


def _costs(shape: Shape, machine: Machine, overheads: Overheads, tokens: int, around: float) -> Costs:
    experts = shape.experts

    def reading(sizes: tuple[int, ...]) -> tuple[float, ...]:
        rate = machine.disk_bytes_per_second * overheads.reading_share
        return tuple(machine.disk_seconds_per_read + nbytes / rate for nbytes in sizes)

    around_read: tuple[float, ...] = ()
    fetch: tuple[float, ...] = ()
    if experts is not None:
        (expert_seconds,) = reading((experts.expert_bytes,))
        around_read = reading(experts.around_bytes)
        fetch = tuple(touched * expert_seconds for touched in experts.touched(tokens))
    return Costs(
        host_seconds=tuple(
            around
            + max(nbytes / machine.kernel_bytes_per_second, 2 * weights * tokens / machine.kernel_operations_per_second)
            for nbytes, weights in zip(shape.computed_bytes(tokens), shape.weights_per_token(), strict=True)
        ),
        read_seconds=reading(shape.layers_bytes),
        outside_seconds=shape.head_bytes / machine.read_bytes_per_second + overheads.outside_seconds,
        streamed_seconds=max(0.0, overheads.streamed_seconds - overheads.layer_seconds),
        computing_beside=1.0 if overheads.known else 1 / (1 + machine.interference),
        head_seconds=tuple(nbytes / machine.read_bytes_per_second for nbytes in shape.head_blocks_bytes),
        head_read_seconds=reading(shape.head_blocks_bytes),
        around_read_seconds=around_read,
        fetch_seconds=fetch,
    )


def _with_device(costs: Costs, shape: Shape, machine: Machine, tokens: int, around: float) -> Costs:
    """Add what a GPU would take; its overheads are not known before a rehearsal on it."""

    def computing(bytes_per_second: float) -> tuple[float, ...]:
        operations_per_second = machine.device_operations_per_second or float("inf")
        return tuple(
            around + max(nbytes / bytes_per_second, 2 * weights * tokens / operations_per_second)
            for nbytes, weights in zip(shape.layers_bytes, shape.layers_weights, strict=True)
        )

    return replace(
        costs,
        device_seconds=computing(machine.device_bytes_per_second),
        mapped_seconds=computing(machine.mapped_bytes_per_second),
        copy_seconds=tuple(nbytes / machine.copy_bytes_per_second for nbytes in shape.layers_bytes),
        outside_device_seconds=shape.head_bytes / machine.device_bytes_per_second,
    )


def model_key(checkpoint: Checkpoint) -> str:
    """Return what the overheads of a checkpoint are kept under: its shape, and the kernels that run it."""
    path = checkpoint.directory / CONFIG_NAME
    with reading(path):
        config = path.read_bytes()
    return hashlib.sha256(config + library_name().encode()).hexdigest()[:16]


def recall_overheads(checkpoint: Checkpoint) -> Overheads:
    """Return what a rehearsal of the checkpoint on this machine has found, or overheads that are not known."""
    found = load_cache(cache_file(checkpoint.directory)).get("models", {}).get(model_key(checkpoint))
    try:
        return Overheads() if found is None else Overheads.from_json(found)
    except ValueError:  # written by another version
        return Overheads()


def remember_overheads(checkpoint: Checkpoint, overheads: Overheads) -> None:
    """Keep them beside the figures of this machine, which have been measured."""
    path = cache_file(checkpoint.directory)
    cache = load_cache(path)
    save_json(path, {**cache, "models": {**cache["models"], model_key(checkpoint): overheads.to_json()}})


def recall_costs(directory: Path, context_tokens: int, wishes: Wishes, parallel: int = 1) -> Costs | None:
    """Return the costs of decoding from a checkpoint if `offload.plan` has rehearsed it on this machine, else None.

    wishes: for keys and values. parallel: sequences that share every pass, see `round_costs`. Raises CheckpointError if
    there is no finished checkpoint.
    """
    checkpoint = Checkpoint.open(directory)
    overheads = recall_overheads(checkpoint)
    if not overheads.known:
        return None
    machine = Machine.from_json(load_cache(cache_file(checkpoint.directory))["machine"])
    config = read_config(checkpoint.directory)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    skeleton = build_skeleton(config, dtype)
    checkpoint = checkpoint_in_model(checkpoint, skeleton)
    shape = Shape.of(checkpoint, Units.of(skeleton, checkpoint), config, dtype.itemsize, wishes)
    return round_costs(shape, machine, overheads, context_tokens, parallel)
