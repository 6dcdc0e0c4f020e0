"""A checkpoint as a real transformers model that runs inside a memory budget.

The skeleton is transformers' own; its linears are replaced, its decoder layers wrapped: just before a layer runs its
weights are attached, views of the memory they were read into, and just after they are detached. Nothing else of the
model is touched, so `generate()`, beams, streamers and assisted decoding work on it as on any other.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from kernels.matmul import Mode
from offload.cache import KVCache, use_int8_attention
from offload.checkpoint import Checkpoint, LayerBlob
from offload.checksums import verify
from offload.convert import opened
from offload.embedding import DiskEmbedding
from offload.errors import ResourceError, UsageError
from offload.expert_cache import ExpertCache
from offload.experts import Experts
from offload.fused import fuse
from offload.head import StreamedHead, verify_head
from offload.kv_calibration import read_kv
from offload.layer_view import PACKED, SHAPE, LayerView, layer_view
from offload.linear import PackedLinear
from offload.memory import Arena, FileReader, trim_memory
from offload.model_tensors import check_tensors, replace_linears
from offload.names import checkpoint_in_model
from offload.planning.choice import plan
from offload.planning.needs import count_needs
from offload.planning.placement import Placement
from offload.planning.predict import Costs
from offload.planning.wishes import KVFormat, Wishes, WishWords, flag
from offload.read_queue import ReadQueue, read_blob
from offload.shelved_layer import shelved_cache
from offload.skeleton import build_skeleton, read_config
from offload.transfer import Slots
from offload.units import Units, without

_log = logging.getLogger(__name__)


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
    context_tokens: int = 2048,
    batch_size: int = 1,
    prefill_chunk_tokens: int = 512,
    dtype: torch.dtype | None = None,
    mode: Mode = "fast",
    costs: Costs | None = None,
    poison: bool = False,
    **words: Unpack[WishWords],
) -> PreTrainedModel:
    """Return the checkpoint in `directory` as a model that keeps the process within the budget `cpu_memory`.

    Another tool's checkpoint is re-laid first, see `offload.convert`.

    context_tokens: keys and values to leave room for, of each of batch_size sequences. dtype: of activations and of
    what is not quantized; None for the source's. mode: see `dequant_matmul`. costs: to plan by; None plans by sizes
    alone. poison: fill freed slots with NaN, for tests. words: where layers are to live, and how keys and values are
    kept, see WishWords; `generate()` keeps them so, and `new_cache` makes a cache for other uses.
    Raises CheckpointError if a file is not what it should be, ResourceError if a budget is too small or a GPU is asked
    for, UsageError for wishes that contradict each other.
    """
    wishes = Wishes.of(words)
    refuse_device(wishes)
    checkpoint = Checkpoint.open(opened(Path(directory)))
    config = read_config(checkpoint.directory)
    model = build_skeleton(config, dtype or getattr(config, "dtype", None) or torch.bfloat16)
    checkpoint = checkpoint_in_model(checkpoint, model)
    key_offsets = {index: layer.key_offset for index, layer in read_kv(checkpoint).items()} if wishes.kv else {}
    names = replace_linears(model, checkpoint, mode)
    check_tensors(model, checkpoint, names)
    fixed = [blob for blob in checkpoint.blobs if not blob.module]
    units = Units.of(model, checkpoint)
    layers = [blob.module for blob in checkpoint.blobs if blob.module]
    wishes = wishes.on([name for name, _ in model.named_modules()], layers)
    trim_memory()
    needs = count_needs(
        config,
        checkpoint,
        units,
        model.dtype.itemsize,
        context_tokens=context_tokens,
        batch_size=batch_size,
        chunk_tokens=prefill_chunk_tokens,
        kv=wishes.kv,
        kv_bytes=wishes.kv_bytes,
    )
    executor = Executor(model, checkpoint, units, plan(needs, wishes, costs), poison)
    try:
        executor.attach_layers(poison)
        apart = executor.attach_apart()
        for blob in fixed:
            if (rest := without(blob, apart)) is not None:
                executor.keep(rest)
        model.tie_weights()
        fuse(model, executor.layers, executor.in_memory)
    except BaseException:  # its thread and its files would stay
        executor.close()
        raise
    model.get_output_embeddings().register_forward_pre_hook(_canonical_strides)
    if wishes.kv == "int8" and not use_int8_attention(model, key_offsets):
        _log.warning("%s: its attention takes no int8 keys; they are widened at every step", type(model).__name__)
    executor.kv, executor.kv_bytes = wishes.kv, wishes.kv_bytes
    model._streaming = executor
    if wishes.kv is not None:
        _generate_with_new_cache(model)
    model.hf_device_map = {"": "cpu"} | {
        blob.module: "disk" if tier == "disk" else "cpu"
        for blob, tier in zip(executor.blobs, executor.placement.tiers, strict=True)
    }
    if (checkpoint.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model


def refuse_device(wishes: Wishes) -> None:
    """Raise ResourceError if a wish needs a GPU: there is none here, or layers cannot be run on it yet."""
    if wishes.gpu_word is None:
        return
    word, _, value = wishes.gpu_word.partition(" ")
    why = "layers run in host memory and on disk only, for now" if torch.cuda.is_available() else "no CUDA device here"
    raise ResourceError(f"{flag(word)}{value and f' {value}'}: {why}; leave it out")


def _canonical_strides(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy the last position's hidden state out of its sequence before the head sees it.

    Sliced, it keeps the sequence's strides, and oneDNN then copies the whole head into another layout at every token
    (measured with torch 2.13: 83 ms and 54 MiB against 8 ms and none).
    """
    return (arguments[0].clone(memory_format=torch.contiguous_format), *arguments[1:])


def new_cache(model: PreTrainedModel) -> Cache | None:
    """Return an empty cache for a model that `load` made, of the format it was asked for.

    None for a model that keeps its past in another way than transformers' caches.
    """
    taken = inspect.signature(model.forward).parameters
    if "past_key_values" not in taken or not model._supports_default_dynamic_cache():
        return None
    executor = executor_of(model)
    if executor.kv is None:
        return DynamicCache(config=model.config)
    return (
        KVCache.of(model) if executor.kv_bytes is None else shelved_cache(model, executor.kv_queue, executor.kv_bytes)
    )


def _generate_with_new_cache(model: PreTrainedModel) -> None:
    """Let the model's own `generate()` begin with what `new_cache` makes, unless it is told of another cache."""
    prepare = model._prepare_cache_for_generation

    def prepared(generation_config: GenerationConfig, model_kwargs: dict[str, Any], *more: Any, **options: Any) -> Any:
        told = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        if not told and generation_config.use_cache is not False and (cache := new_cache(model)) is not None:
            model_kwargs["past_key_values"] = cache
        return prepare(generation_config, model_kwargs, *more, **options)

    model._prepare_cache_for_generation = prepared


def executor_of(model: PreTrainedModel) -> "Executor":
    """Return the executor behind a model that `load` made: its placement, its counters, its end."""
    executor = getattr(model, "_streaming", None)
    if not isinstance(executor, Executor):
        raise UsageError("this model was not loaded by offload.executor.load")
    return executor


class Executor:
    """Owns the memory of a model's weights and moves them under its decoder layers."""

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint, units: Units, placement: Placement, poison: bool
    ) -> None:
        self.model, self.checkpoint, self.units, self.placement = model, checkpoint, units, placement
        self.blobs = list(units.layers)
        self.reader = FileReader()
        head_blocks = units.head.blocks() if units.head and placement.head_tiers else ()
        passed = (*units.placed(placement.experts_apart), *head_blocks)
        tiers = zip(passed, placement.units_tiers, strict=True)
        self.streamed_blobs = [blob for blob, tier in tiers if tier == "disk"]
        self.expert_blobs = [blob for layer in placement.experts_apart for blob in units.experts[layer]]
        self.queue = ReadQueue(self.reader, verify) if self.streamed_blobs or self.expert_blobs else None
        self.slots: Slots | None = None
        if self.queue is not None and self.streamed_blobs:
            self.slots = Slots(self.streamed_blobs, placement.depth, self.queue, poison)
        self._views: dict[tuple[int, int], LayerView] = {}
        self._embedding: DiskEmbedding | None = None
        self.kv: KVFormat | None = None
        self.kv_bytes: int | None = None
        self._kv_queue: ReadQueue | None = None

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return [self.model.get_submodule(blob.module) for blob in self.blobs]

    @contextmanager
    def in_memory(self, index: int) -> Iterator[None]:
        """Have the weights of decoder layer `index` attached for a while."""
        modules = [blob.module for blob in self.streamed_blobs]
        if self.blobs[index].module not in modules:
            yield
            return
        position, layer = modules.index(self.blobs[index].module), self.layers[index]
        self._before(position, layer, ())
        try:
            yield
        finally:
            self._after(position, layer, (), None)

    @property
    def kv_queue(self) -> ReadQueue:
        """Reads keys and values back: the queue of the weights, where some are streamed."""
        if self._kv_queue is None:
            self._kv_queue = self.queue or ReadQueue(self.reader, verify)
        return self._kv_queue

    @property
    def stats(self) -> StreamingStats:
        """Counters since loading."""
        if self.queue is None:
            return StreamingStats(0, 0, 0.0, self.reader.direct)
        return StreamingStats(self.queue.bytes_read, self.queue.reads, self.queue.wait_seconds, self.reader.direct)

    @property
    def head_memory(self) -> Tensor:
        """The weight of the output embeddings as it lies in memory, or a block of it, uint8 [bytes]."""
        head = self.model.get_output_embeddings()
        if isinstance(head, StreamedHead):
            return head.memory
        weight = head.packed.codes if isinstance(head, PackedLinear) and head.packed else head.weight.detach()
        return weight.reshape(-1).view(torch.uint8)

    @property
    def bytes_per_token(self) -> int:
        """Weights that decoding one token reads, wherever they lie, the head with them."""
        head, experts = self.units.head, self.placement.needs.experts
        layers = sum(blob.nbytes for blob in (self.units.layers if experts is None else self.units.around))
        if experts is not None:
            layers += sum(experts.touched(1)) * experts.expert_bytes
        return layers + (self.head_memory if head is None else head.blob.tensors[head.module + PACKED]).nbytes

    def attach_layers(self, poison: bool) -> None:
        """Read the layers that stay in memory, and hook what is streamed. Raises CheckpointError."""
        if self.queue is not None and self.expert_blobs:
            self._fetch_experts(self.queue, poison)
        placed = self.units.placed(self.placement.experts_apart)
        for blob, tier in zip(placed, self.placement.tiers, strict=True):
            if tier == "host":
                self.keep(blob)
            else:
                layer, position = self.model.get_submodule(blob.module), self.streamed_blobs.index(blob)
                layer.register_forward_pre_hook(partial(self._before, position))
                layer.register_forward_hook(partial(self._after, position), always_call=True)

    def attach_apart(self) -> set[str]:
        """Leave embeddings in their shard and the head in blocks, as planned; return the tensors that are so apart."""
        apart: set[str] = set()
        if self.placement.embedding_on_disk and self.units.embedding is not None:
            blob, name = self.units.embedding
            self._embedding = DiskEmbedding(blob, name, self.model.dtype)
            self.model.set_submodule(name.removesuffix(".weight"), self._embedding)
            apart.add(name)
        if self.placement.head_tiers and self.units.head is not None:
            head = self.units.head
            verify_head(head, self.reader)
            linear = self.model.get_submodule(head.module)
            assert isinstance(linear, PackedLinear), "a head in blocks is packed"
            streamed = StreamedHead(linear, head, self.checkpoint.recipe.group_size)
            position = self.placement.tiers.count("disk")
            for index, tier in enumerate(self.placement.head_tiers):
                if tier == "disk" and self.slots is not None:
                    streamed.stream(index, self.slots, position)
                    position += 1
                else:
                    streamed.keep(index, self.reader)
            self.model.set_submodule(head.module, streamed)
            apart |= {*head.names, head.module + SHAPE}
        return apart

    def _fetch_experts(self, queue: ReadQueue, poison: bool) -> None:
        """Let the lists of experts that are apart ask for those they route to."""
        cache = ExpertCache(self.expert_blobs, self.placement.expert_slots, queue, self._view_of, poison)
        for first, blob in enumerate(self.expert_blobs):
            module, _, index = blob.module.rpartition(".")
            if index == "0":
                experts = self.model.get_submodule(module)
                assert isinstance(experts, Experts), "only these are apart"
                experts.lend = partial(cache.lend, first)

    def keep(self, blob: LayerBlob) -> None:
        """Read a shard or a part of one, to stay in memory. Raises CheckpointError."""
        arena = Arena(blob.nbytes)
        read_blob(self.reader, blob, arena)
        verify(blob, arena)
        self._view_of(blob, arena).attach()

    def close(self) -> None:
        """Stop reading and close the files; the model cannot run afterwards."""
        for queue in {self.queue, self._kv_queue}:
            if queue is not None:
                queue.close()
        self.reader.close()
        if self._embedding is not None:
            self._embedding.close()

    def _view_of(self, blob: LayerBlob, arena: Arena) -> LayerView:
        return layer_view(self.model, blob, arena, self.checkpoint.recipe.group_size)

    def _before(self, position: int, layer: nn.Module, arguments: Any) -> None:
        assert self.slots is not None, "only streamed layers have this hook"
        slot = self.slots.wait(position)
        if (position, slot) not in self._views:
            self._views[position, slot] = self._view_of(self.streamed_blobs[position], self.slots.arenas[slot])
        self._views[position, slot].attach()
        self._attached = self._views[position, slot]

    def _after(self, position: int, layer: nn.Module, arguments: Any, output: Any) -> None:
        assert self.slots is not None, "only streamed layers have this hook"
        self._attached.detach()
        self.slots.release(position)
