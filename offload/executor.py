"""A checkpoint as a real transformers model that runs inside a memory budget.

The skeleton is transformers' own; its linears are replaced, its decoder layers hooked (`offload.streaming`). Nothing
else of the model is touched, so `generate()`, beams, streamers and assisted decoding work on it as on any other.
"""

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from kernels.matmul import Mode
from offload.checkpoint import Checkpoint
from offload.errors import ResourceError, UsageError
from offload.files import reading
from offload.formats.convert import opened
from offload.gpu.device import Device, find_device
from offload.gpu.recovery import recover
from offload.kv.cache import CACHE_NAME, KVCache, use_int8_attention
from offload.kv.calibration import read_kv
from offload.kv.shelved_layer import shelved_cache
from offload.kv.store import FileStore, HostStore
from offload.memory import give_memory_back_at_once, trim_memory
from offload.model_tensors import check_tensors, replace_linears
from offload.names import checkpoint_in_model
from offload.planning.choice import plan
from offload.planning.needs import CODE_BYTES, Needs, count_needs, settle_libraries
from offload.planning.placement import Placement
from offload.planning.predict import Costs
from offload.planning.wishes import Wishes, WishWords, flag
from offload.skeleton import build_skeleton, read_config
from offload.streaming import Executor
from offload.units import Units

_log = logging.getLogger(__name__)

_KEPT = 2
"""Times the activations that the C library was seen to keep of what was freed, at most: a budget needs room for it, or
all has to be given back at once, at the price of a fifth of a prompt's time (3B, prompts of 600 tokens)."""


def load(
    directory: Path | str,
    *,
    context_tokens: int = 2048,
    batch_size: int = 1,
    parallel: int = 1,
    kept_tokens: int = 0,
    prefill_chunk_tokens: int = 512,
    dtype: torch.dtype | None = None,
    mode: Mode = "fast",
    costs: Costs | None = None,
    poison: bool = False,
    **words: Unpack[WishWords],
) -> PreTrainedModel:
    """Return the checkpoint in `directory` as a model that keeps the process within the budget `cpu_memory`.

    Another tool's checkpoint is re-laid first, see `offload.formats.convert`.

    context_tokens: keys and values to leave room for, of each of batch_size sequences; parallel, kept_tokens: of so
    many batches that share passes, and of so many tokens more, see `count_needs`. dtype: of activations and of
    what is not quantized; None for the source's. mode: see `dequant_matmul`. costs: to plan by; None plans by sizes
    alone. poison: fill freed slots with NaN, for tests. words: where layers are to live, and how keys and values are
    kept, see WishWords; `generate()` keeps them so, and `new_cache` makes a cache for other uses.
    Raises CheckpointError if a file is not what it should be, ResourceError if a budget is too small or there is no GPU
    that was asked for, UsageError for wishes that contradict each other.
    """
    wishes = Wishes.of(words)
    device = wished_device(wishes)
    trim_memory()
    checkpoint = Checkpoint.open(opened(Path(directory), plain=True))
    config = read_config(checkpoint.directory)
    model = build_skeleton(config, dtype or getattr(config, "dtype", None) or torch.bfloat16)
    checkpoint = checkpoint_in_model(checkpoint, model)
    names = replace_linears(model, checkpoint, mode)
    check_tensors(model, checkpoint, names)
    units = Units.of(model, checkpoint)
    layers = [blob.module for blob in checkpoint.blobs if blob.module]
    wishes = wishes.on([name for name, _ in model.named_modules()], layers)
    code_bytes = settle_libraries()
    needs = count_needs(
        config,
        checkpoint,
        units,
        model.dtype,
        context_tokens=context_tokens,
        batch_size=batch_size,
        chunk_tokens=prefill_chunk_tokens,
        device_runtime_bytes=0 if device is None else device.used_bytes,
        gpu=None if device is None else device.gpu,
        kv=wishes.kv,
        kv_bytes=wishes.kv_bytes,
        parallel=parallel,
        kept_tokens=kept_tokens,
        code_bytes=code_bytes if device is None and parallel == 1 else CODE_BYTES,
    )
    placement: Placement | None = None
    if device is not None:
        placement = _planned_on(device, needs, wishes, costs)
        wishes = wishes.within(device.total_bytes) if placement is not None else wishes
    if placement is None:
        device, placement = None, plan(replace(needs, device_runtime_bytes=0, shelf_bytes=0), wishes, costs)
    if (
        placement.budget_bytes is not None
        and placement.budget_bytes - placement.expected_bytes < _KEPT * needs.activation_bytes
    ):
        give_memory_back_at_once()
    executor = Executor(model, checkpoint, units, placement, poison=poison, device=device)
    try:
        executor.attach()
        _finish(model, executor, wishes, costs)
    except torch.OutOfMemoryError as error:
        executor.close()
        raise ResourceError(
            "the GPU ran out of memory while layers were brought there; give a smaller --gpu-memory"
        ) from error
    except BaseException:  # its thread and its files would stay
        executor.close()
        raise
    return model


def _finish(model: PreTrainedModel, executor: Executor, wishes: Wishes, costs: Costs | None) -> None:
    """Let the model's own methods know of its device, its cache and its maker's defaults."""
    checkpoint = executor.checkpoint
    model._streaming = executor
    model.get_output_embeddings().register_forward_pre_hook(_canonical_strides)
    if executor.device_side is not None:
        recover(model, executor, wishes, costs)
    key_offsets = {index: layer.key_offset for index, layer in read_kv(checkpoint).items()} if wishes.kv else {}
    for index, how in enumerate(executor.placement.hows):  # where a captured step finds them for every cache
        if how != "host" and key_offsets.get(index) is not None:
            key_offsets[index] = key_offsets[index].to(executor.device)
    if wishes.kv == "int8" and not use_int8_attention(model, key_offsets):
        _log.warning("%s: its attention takes no int8 keys; they are widened at every step", type(model).__name__)
    executor.kv, executor.kv_bytes = wishes.kv, wishes.kv_bytes
    if wishes.kv is not None:
        _generate_with_new_cache(model)
    model.hf_device_map = executor.device_map
    defaults = checkpoint.directory / "generation_config.json"
    if defaults.exists():
        with reading(defaults):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)


def wished_device(wishes: Wishes) -> Device | None:
    """Return the GPU if a wish needs one or lets it be used. Raises ResourceError if one is needed and none is here."""
    if wishes.gpu_word is None and not wishes.anywhere:
        return None
    device = find_device()
    if wishes.gpu_word is not None:
        word, _, value = wishes.gpu_word.partition(" ")
        asked = f"{flag(word)}{value and f' {value}'}"
        if device is None:
            raise ResourceError(f"{asked}: no CUDA device here; leave it out")
    return device


def _planned_on(device: Device, needs: Needs, wishes: Wishes, costs: Costs | None) -> Placement | None:
    """Return a placement on the GPU, None if it has no room and nobody asked for it. Raises ResourceError."""
    asked = needs if wishes.gpu_word is not None else needs.unsplit()
    try:
        return replace(plan(asked, wishes.within(device.total_bytes), costs), needs=needs)
    except ResourceError as error:
        if wishes.gpu_word is not None:
            raise
        _log.warning("the GPU is left out, everything is computed on the host: %s", error)
        return None


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
    if CACHE_NAME not in taken or not model._supports_default_dynamic_cache():
        return None
    executor = executor_of(model)
    if executor.kv is None:
        return DynamicCache(config=model.config)
    if executor.kv_bytes is None:
        return KVCache.of(model)
    side = executor.device_side
    if side is None:
        return shelved_cache(model, FileStore(executor.kv_queue), executor.kv_bytes, poison=executor.poison)
    on_host = [at for at, how in enumerate(executor.placement.hows) if how == "host"]
    store = HostStore(side.device, side.cache_copies, side.cache_copies_back)
    return shelved_cache(model, store, executor.kv_bytes, on_host, executor.poison)


def _generate_with_new_cache(model: PreTrainedModel) -> None:
    """Let the model's own `generate()` begin with what `new_cache` makes, unless it is told of another cache."""
    prepare = model._prepare_cache_for_generation

    def prepared(generation_config: GenerationConfig, model_kwargs: dict[str, Any], *more: Any, **options: Any) -> Any:
        told = model_kwargs.get(CACHE_NAME) is not None or generation_config.cache_implementation is not None
        if not told and generation_config.use_cache is not False and (cache := new_cache(model)) is not None:
            model_kwargs[CACHE_NAME] = cache
        return prepare(generation_config, model_kwargs, *more, **options)

    model._prepare_cache_for_generation = prepared


def executor_of(model: PreTrainedModel) -> "Executor":
    """Return the executor behind a model that `load` made: its placement, its counters, its end."""
    executor = getattr(model, "_streaming", None)
    if not isinstance(executor, Executor):
        raise UsageError("this model was not loaded by offload.executor.load")
    return executor
