"""What a model takes, in bytes, before any of it is loaded: counted from its configuration and its files."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from transformers import PretrainedConfig

from kernels.kv_block import BLOCK_TOKENS, BlockShape
from kernels.triton_tuning import GpuKind
from offload.checkpoint import Checkpoint, LayerBlob
from offload.kv.shelf import shelved_bytes
from offload.layer_view import copied_bytes
from offload.memory import own_memory_bytes, reread_libraries, trim_memory, whole_pages
from offload.planning.device_needs import DeviceScratch, SplitNeeds, device_scratch, is_given_up, split_needs
from offload.planning.step_needs import step_shape, with_steps
from offload.planning.wishes import KVFormat
from offload.units import Units

CODE_BYTES = 180 << 20
"""The most that is counted for pages of libraries; what is counted beside a GPU, where none were measured, and for
sequences that share passes, whose threads hold more than is counted for them: 729 MiB of 700 were seen."""

_LEAST_CODE_BYTES, _CODE_GROWTH = 56 << 20, 2
_COARSE_BYTES = 64 << 20

_RESERVE_BYTES = 8 << 20
"""The allocator's own waste, and the streamer."""


@dataclass(frozen=True, slots=True)
class ExpertNeeds:
    """Experts that can be fetched when they are routed to.

    expert: the largest. counts: of experts, an entry a decoder layer. around: the layers without them. per_token: of
    the experts of a layer, those that a token is sent to.
    """

    expert_bytes: int
    counts: tuple[int, ...]
    around_bytes: tuple[int, ...]
    per_token: int

    def touched(self, tokens: int) -> tuple[int, ...]:
        """Return how many experts of each layer so many tokens are sent to, at most."""
        return tuple(min(count, tokens * self.per_token) for count in self.counts)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model takes beside its decoder layers, in bytes, and what each layer takes.

    runtime: Python, torch and transformers, their code included. fixed: embeddings, norms and head. cache: keys and
    values at the asked context, of them what is at hand; shelf: for layers that a GPU computes, what is beside it in
    host memory. activations: the largest pass. layers: one entry a decoder layer, in order.
    device_runtime: what a GPU's memory holds before any tensor; device: what is taken there beside weights. embedding:
    what of the fixed bytes is a table that can stay on disk. head_blocks: what of them is the head, in blocks that can
    be streamed; none if it cannot. experts: what of the layers are experts, None if they have none. split: the layers
    in parts, None if no part is smaller than a layer. standing_in_parts: of activations, what sequences that share a
    pass hold more of where they stand between parts of a layer.
    """

    runtime_bytes: int
    fixed_bytes: int
    cache_bytes: int
    activation_bytes: int
    layers_bytes: tuple[int, ...]
    device_runtime_bytes: int = 0
    embedding_bytes: int = 0
    head_blocks_bytes: tuple[int, ...] = ()
    experts: ExpertNeeds | None = None
    shelf_bytes: int = 0
    device: DeviceScratch = field(default_factory=DeviceScratch)
    split: SplitNeeds | None = None
    standing_in_parts_bytes: int = 0

    def without_embedding(self) -> "Needs":
        """Return what is needed when the embeddings are left on disk."""
        return replace(self, fixed_bytes=self.fixed_bytes - self.embedding_bytes, embedding_bytes=0)

    def without_head(self) -> "Needs":
        """Return what is needed beside the blocks of the head, whose pages together take more than it does whole."""
        return replace(self, fixed_bytes=max(0, self.fixed_bytes - sum(self.head_blocks_bytes)))

    def without_experts(self, layers: Collection[int]) -> "Needs":
        """Return what is needed beside the experts of some layers."""
        if self.experts is None or not layers:
            return self
        around = enumerate(zip(self.layers_bytes, self.experts.around_bytes, strict=True))
        return replace(self, layers_bytes=tuple(less if at in layers else whole for at, (whole, less) in around))

    def unsplit(self) -> "Needs":
        """Return the same of layers that are not to be had in parts: nobody asked for a GPU that is too small."""
        return replace(self, split=None)

    @property
    def around_bytes(self) -> int:
        """Everything that is not a decoder layer, without a GPU."""
        return self.runtime_bytes + self.fixed_bytes + self.cache_bytes + self.activation_bytes + _RESERVE_BYTES

    @property
    def working_bytes(self) -> int:
        """Activations, and what allocators waste."""
        return self.activation_bytes + _RESERVE_BYTES


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Keys and values of which only `budget_bytes` are at hand. layers: that share them; block: of one sequence."""

    budget_bytes: int
    layers: int
    block: BlockShape

    @classmethod
    def of(cls, config: PretrainedConfig, budget_bytes: int) -> "CacheShape":
        """Return that of a model."""
        return cls(budget_bytes, *_blocks(config, 1))

    def away_bytes(self, context_tokens: int, batch_size: int) -> int:
        """Return what every token brings back, with so many before it. Raises ResourceError for too small a budget."""
        block = replace(self.block, batch=batch_size)
        return shelved_bytes(self.budget_bytes, self.layers, block, context_tokens)[1]


def count_needs(
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    units: Units,
    dtype: torch.dtype,
    *,
    context_tokens: int,
    batch_size: int,
    chunk_tokens: int,
    device_runtime_bytes: int = 0,
    gpu: GpuKind | None = None,
    kv: KVFormat | None = None,
    kv_bytes: int | None = None,
    parallel: int = 1,
    kept_tokens: int = 0,
    code_bytes: int = CODE_BYTES,
) -> Needs:
    """Return the needs of a checkpoint in this process, as it is before loading.

    units: what of it can be had apart. dtype: of activations, keys and values, and of what is not quantized.
    chunk_tokens: tokens of each sequence in the largest pass. gpu: that may be used, None for no GPU. kv: how keys and
    values are kept, None for in dtype. kv_bytes: of them at hand, see `Wishes`. parallel: batches that share passes,
    see `offload.serving.rounds`, each with keys and values of its own; kept_tokens: those of so many tokens more.
    code_bytes: what libraries' pages will take, see `library_bytes`. Raises ResourceError if kv_bytes is too little.
    """
    at_hand, away = _cache_at_hand(config, context_tokens, dtype.itemsize, batch_size, kv, kv_bytes)
    of_others = (parallel - 1) * batch_size * cache_bytes(config, context_tokens, dtype.itemsize, kv)
    standing = Standing.of(config, context_tokens, min(context_tokens, chunk_tokens), dtype.itemsize)
    others = (parallel - 1) * batch_size
    around = [blob for blob in checkpoint.blobs if not blob.module]
    largest_pass = batch_size * activation_bytes(config, min(context_tokens, chunk_tokens))
    freed_bytes = min(largest_pass, CODE_BYTES - code_bytes)  # once more: what is freed is not always given back
    return Needs(
        runtime_bytes=own_memory_bytes() + code_bytes + freed_bytes,
        fixed_bytes=sum(_held_bytes(blob, dtype) for blob in around),
        cache_bytes=at_hand + of_others + cache_bytes(config, kept_tokens, dtype.itemsize, kv),
        activation_bytes=largest_pass + others * standing.whole_bytes,
        layers_bytes=layer_bytes(checkpoint),
        device_runtime_bytes=device_runtime_bytes,
        embedding_bytes=0 if units.embedding is None else _table_elements(*units.embedding) * dtype.itemsize,
        head_blocks_bytes=() if units.head is None else tuple(whole_pages(b.nbytes) for b in units.head.blocks()),
        experts=expert_needs(config, units),
        shelf_bytes=away,
        device=with_steps(
            device_scratch(checkpoint, dtype, gpu, batch_size * min(context_tokens, chunk_tokens), batch_size),
            None if batch_size > 1 else step_shape(config, checkpoint, dtype, context_tokens, gpu, kv),
        ),
        split=split_needs(units, dtype),
        standing_in_parts_bytes=others * standing.in_parts_bytes,
    )


def settle_libraries() -> int:
    """Give libraries' pages back once a model is built, and return what they will take when it runs, in bytes.

    `trim_memory` is to come before the building. Pieces that are large are counted as they are, and read anew in small
    ones: from the next command on less is counted.
    """
    mapped_bytes = trim_memory()
    if mapped_bytes > _COARSE_BYTES:
        _read_libraries_anew()
    return library_bytes(mapped_bytes)


@cache
def _read_libraries_anew() -> None:
    """Do it once in a process: what other processes hold in large pieces stays so."""
    reread_libraries()


def library_bytes(mapped_bytes: int) -> int:
    """Return what pages of libraries will take once a model runs, from what was mapped while it was built.

    mapped_bytes: of files, between one `trim_memory` and the next. The kernel maps a piece of a file around each page
    that is touched, of a size that is the installation's: 64 KiB, or all that one write brought into the page cache
    if the file system keeps that in one. A run maps 1.6 times what building a model does: 39 MiB after 24, and 141
    after 87 with libraries that were just written to XFS (torch 2.13, Linux 6.18).
    """
    return min(CODE_BYTES, max(_LEAST_CODE_BYTES, _CODE_GROWTH * mapped_bytes))


def _held_bytes(blob: LayerBlob, dtype: torch.dtype) -> int:
    """Return what a shard around the layers takes once it is loaded."""
    return copied_bytes(blob, dtype) + (0 if is_given_up(blob, dtype) else blob.nbytes)


def expert_needs(config: PretrainedConfig, units: Units) -> ExpertNeeds | None:
    """Return what of a model's layers are experts, None if there are none that could be fetched."""
    experts = [blob.nbytes for layer in units.experts for blob in layer]
    if not experts:
        return None
    per_token = getattr(config.get_text_config(decoder=True), "num_experts_per_tok", None) or 1
    return ExpertNeeds(
        expert_bytes=whole_pages(max(experts)),
        counts=tuple(len(layer) for layer in units.experts),
        around_bytes=tuple(whole_pages(blob.nbytes) for blob in units.around),
        per_token=per_token,
    )


def _table_elements(blob: LayerBlob, name: str) -> int:
    return math.prod(blob.tensors[name].shape)


def _cache_at_hand(
    config: PretrainedConfig,
    context_tokens: int,
    element_bytes: int,
    batch_size: int,
    kv: KVFormat | None,
    kv_bytes: int | None,
) -> tuple[int, int]:
    """Return the bytes of keys and values of a batch that are at hand, and of those that are not."""
    whole = batch_size * cache_bytes(config, context_tokens, element_bytes, kv)
    if kv_bytes is None or not whole:
        return whole, 0
    layers, shape = _blocks(config, batch_size)
    shelved = layers * shape.nbytes * -(-context_tokens // BLOCK_TOKENS)
    at_hand, away = shelved_bytes(kv_bytes, layers, shape, context_tokens)
    return whole - shelved + at_hand, away


def _blocks(config: PretrainedConfig, batch_size: int) -> tuple[int, BlockShape]:
    """Return how many layers attend to their whole past, and the shape of their blocks."""
    text = config.get_text_config(decoder=True)
    kinds, query_heads = getattr(text, "layer_types", None) or (), text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    layers = kinds.count("full_attention") if kinds else text.num_hidden_layers
    return layers, BlockShape(batch_size, heads, head_dim, head_dim)


def cache_bytes(config: PretrainedConfig, context_tokens: int, element_bytes: int, kv: KVFormat | None = None) -> int:
    """Return the bytes of keys and values of `context_tokens` tokens, all layers, for one sequence.

    kv: of layers that attend to their whole past, in whole blocks; windows keep elements of `element_bytes`.
    """
    text = config.get_text_config(decoder=True)
    query_heads = getattr(text, "num_attention_heads", None)
    if not query_heads:  # a recurrent model keeps a state of fixed size
        return 0
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    layers, shape = _blocks(config, 1)
    whole, blocks = 0 if kv is None else layers, shape.nbytes * -(-context_tokens // BLOCK_TOKENS)
    plain = text.num_hidden_layers - whole
    return int(2 * plain * heads * head_dim * context_tokens * element_bytes) + whole * blocks


def activation_bytes(config: PretrainedConfig, chunk_tokens: int) -> int:
    """Return what a pass over `chunk_tokens` tokens holds at most: float32 MLP activations, residuals, and the logits.

    A gated MLP has four tensors of its width alive, attention three of the hidden size; one row of logits in float32
    and its copies for sampling.
    """
    text = config.get_text_config(decoder=True)
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int(4 * chunk_tokens * (4 * width + 4 * text.hidden_size) + 4 * 4 * text.vocab_size)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a sequence that shares passes holds while others compute. whole: before a layer; in_parts: amid one, more.

    Before a layer these are its input and the embeddings it came from, a mask, what positions are known by, and the
    logits of its last token with copies for sampling; amid a layer the input once more, normed, what attention gave,
    and half of a gated MLP.
    """

    whole_bytes: int
    in_parts_bytes: int

    @classmethod
    def of(cls, config: PretrainedConfig, context_tokens: int, chunk_tokens: int, element_bytes: int) -> "Standing":
        """Count it for a pass over `chunk_tokens` tokens of a context, each element of the model of so many bytes."""
        text = config.get_text_config(decoder=True)
        width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
        hidden, positions = chunk_tokens * text.hidden_size * element_bytes, 2 * chunk_tokens * head_dim * element_bytes
        logits, mask, tokens = 3 * 4 * text.vocab_size, chunk_tokens * context_tokens, 4 * 8 * context_tokens
        whole = 2 * hidden + logits + mask + positions + tokens
        return cls(whole, 2 * hidden + chunk_tokens * width * element_bytes)


def layer_bytes(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the payload of every decoder layer, rounded up to the pages it takes in memory."""
    return tuple(whole_pages(blob.nbytes) for blob in checkpoint.blobs if blob.module)
