"""Keys and values in 8 bits as a transformers cache: half of the bytes, quantised once, when they are written.

Layers that attend to their whole past hold int8 blocks (`kernels/kv_block.py`); sliding windows, states of linear
attention and the like stay transformers' own. `use_int8_attention` lets a model's attention read the blocks as they
are; of a model without it, layers hand out what they hold in the model's dtype, which is right, and slow.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from kernels.attention import append_tokens, attention
from kernels.kv_block import BLOCK_TOKENS, BlockShape, KVBlock, KVBlocks, KVContext, dequantize_blocks, select_sequences
from offload.errors import CheckpointError, UsageError

INT8_ATTENTION = "int8_kv"
"""What transformers knows the attention over int8 blocks by."""

CACHE_NAME = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
"""What models take and return their cache as; `past_key_values` before 5.24, which translates it with a warning."""

_KEEPING_NOTHING = getattr(cache_utils, "DummyLayer", ())
"""transformers' class of the layers of a cache that keep nothing; 5.17 has no such layers yet."""


def keeps_nothing(layer: Any) -> bool:
    """Return whether a layer of a transformers cache stands in for one without attention, or that shares another's."""
    return isinstance(layer, _KEEPING_NOTHING)


class Int8Layer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one decoder layer. key_offset: float32 [key_heads, key_dim] or None, see `KVContext`.

    direct: hand out no keys and values but stand-ins, which `int8_attention` reads the blocks behind. tokens: held.
    """

    is_croppable = True
    supports_early_init = False  # the shape of a block is known with the first key

    def __init__(self, key_offset: Tensor | None = None, direct: bool = False) -> None:
        super().__init__()
        self.tokens = 0
        self.key_offset, self._direct = key_offset, direct
        self._blocks: KVBlocks | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the shape of a block, dtype and device from the first keys and values, [B, K, N, D]."""
        batch, key_heads, _, key_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.key_offset is not None and self.key_offset.shape != (key_heads, key_dim):
            found, expected = list(self.key_offset.shape), [key_heads, key_dim]
            raise CheckpointError(f"offsets of keys {found}, expected {expected}; run `python -m quant.kv` again")
        if self.key_offset is not None:
            self.key_offset = self.key_offset.to(self.device)  # read with the checkpoint, on the host
        self._blocks = KVBlocks(BlockShape(batch, key_heads, key_dim, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add N tokens, [B, K, N, D]; return all there are, or stand-ins of that shape if `direct`."""
        if self._blocks is None:
            self.lazy_initialization(key_states, value_states)
        self.make_room(key_states.shape[2])
        append_tokens(self.blocks, self.tokens, key_states, value_states, self.key_offset)
        self.count(key_states.shape[2])
        context = self.context
        return self._stand_ins(context) if self._direct else dequantize_blocks(context, self.dtype)

    def _stand_ins(self, context: KVContext) -> tuple[Tensor, Tensor]:
        """Return tensors of the shape of all keys and values that hold one NaN each: no use of them goes unseen."""
        shape = context.shape
        key, value = (
            torch.full((1,), torch.nan, dtype=self.dtype, device=self.device).expand(
                shape.batch, shape.key_heads, context.tokens, dim
            )
            for dim in (shape.key_dim, shape.value_dim)
        )
        key.kv_context, key.kv_parts = context, self.parts  # type: ignore[attr-defined]
        return key, value

    def parts(self) -> Iterator[tuple[int, int]] | None:
        """Return ranges of the tokens then held, each in memory until the next is asked for; None: all are."""
        return None

    def make_room(self, tokens: int) -> None:
        """Let an initialised layer have blocks for so many tokens more."""
        shape = self.blocks.shape
        while len(self.blocks) * BLOCK_TOKENS < self.tokens + tokens:
            self.blocks.append(KVBlock(shape, torch.empty(shape.nbytes, dtype=torch.uint8, device=self.device)))

    def copied_blocks(self, start: int, end: int) -> list[KVBlock]:
        """Return copies of the blocks [start, end)."""
        return [self.blocks[index].copy() for index in range(start, end)]

    def begin_with(self, blocks: Sequence[KVBlock], dtype: torch.dtype, tokens: int | None = None) -> None:
        """Let an empty layer begin with these blocks, which are its own then.

        dtype: of the keys and values that they were made of. tokens: in them, None if all are full.
        """
        assert self._blocks is None, "only an empty layer begins"
        shape, self.dtype, self.device = blocks[0].shape, dtype, blocks[0].memory.device
        if self.key_offset is not None:
            self.key_offset = self.key_offset.to(self.device)
        self._blocks = KVBlocks(shape, blocks)
        self.tokens = len(blocks) * BLOCK_TOKENS if tokens is None else tokens
        self.is_initialized = True

    def move(self, device: torch.device) -> None:
        """Bring every block to a device."""
        if self._blocks is not None and device != self.device:
            shape = self._blocks.shape
            blocks = [KVBlock(shape, block.memory.to(device)) for block in self._blocks]
            self._blocks, self.device = KVBlocks(shape, blocks), device
            self.key_offset = None if self.key_offset is None else self.key_offset.to(device)

    def count(self, tokens: int) -> None:
        """Count so many tokens more, whose keys and values were written behind the others."""
        self.tokens += tokens

    @property
    def blocks(self) -> KVBlocks:
        """The blocks; the last may be partly filled."""
        assert self._blocks is not None, "no key was ever written"
        return self._blocks

    @property
    def context(self) -> KVContext:
        """All tokens held, at least one."""
        return KVContext(self.blocks, self.tokens, self.key_offset)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return 0 if self._blocks is None else len(self._blocks) * self._blocks.shape.nbytes

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first key."""
        return -1 if self._blocks is None else self._blocks.shape.batch

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        return self.tokens

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no limit. The name of `get_max_length` in older versions of transformers."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the tokens that a mask covers, and where they begin."""
        return self.tokens + int(query_length), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. Raises ValueError if it is positive, or they are not held."""
        if not -self.tokens <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}): expected the negative number of tokens to forget, of {self.tokens}"
            )
        self.tokens += tokens_to_remove
        if self._blocks is not None:
            self._blocks.truncate(-(-self.tokens // BLOCK_TOKENS))

    def reset(self) -> None:
        """Forget everything."""
        self.tokens, self._blocks, self.is_initialized = 0, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence beam_idx[i] held."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence `repeats` times, side by side."""
        if self._blocks is not None:
            self.batch_select_indices(torch.arange(self._blocks.shape.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, int64 or a mask [B]."""
        if self._blocks is None:
            return
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        blocks = [select_sequences(block, chosen.to(block.memory.device)) for block in self._blocks]
        shape = self._blocks.shape
        self._blocks = KVBlocks(BlockShape(len(chosen), shape.key_heads, shape.key_dim, shape.value_dim), blocks)

    def offload(self) -> None:
        """Do nothing: where blocks lie is not transformers' to decide."""

    def prefetch(self) -> None:
        """Do nothing, see `offload`."""


class KVCache(DynamicCache):  # type: ignore[misc]
    """A cache for `generate()` and `forward()` of a model of this configuration.

    key_offsets: by the index of a layer, float32 [key_heads, key_dim]; see `python -m quant.kv`. Raises CheckpointError
    with the first keys if an offset is of another shape.
    """

    def __init__(self, config: PretrainedConfig, key_offsets: Mapping[int, Tensor] | None = None) -> None:
        super().__init__(config=config)
        direct = config.get_text_config(decoder=True)._attn_implementation == INT8_ATTENTION
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = Int8Layer((key_offsets or {}).get(index), direct)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "KVCache":
        """Return an empty cache with the offsets that `use_int8_attention` was given for a model."""
        return cls(model.config, getattr(model, "_key_offsets", None))

    @property
    def nbytes(self) -> int:
        """Bytes of all int8 blocks."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, Int8Layer))


def use_int8_attention(model: PreTrainedModel, key_offsets: Mapping[int, Tensor] | None = None) -> bool:
    """Let a model's attention read int8 blocks directly, where it is transformers' attention through torch.

    Returns False, and leaves it as it is, where it is not: caps on the scores, or an attention of its own. key_offsets:
    remembered for `KVCache.of`.
    """
    model._key_offsets = key_offsets
    text = model.config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if text._attn_implementation == "sdpa" and not capped:
        model.set_attn_implementation(INT8_ATTENTION)
    return bool(text._attn_implementation == INT8_ATTENTION)


def int8_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Do what transformers' "sdpa" does: return [B, N, H, D] over the blocks that `key` stands in for, or over tensors.

    Raises UsageError if the stand-ins were changed on their way, or scores are to be changed in a way not known here.
    """
    context: KVContext | None = getattr(key, "kv_context", None)
    if context is None:
        if key.numel() > 1 and key.untyped_storage().nbytes() == key.itemsize:
            raise UsageError(f"{type(module).__name__} changes keys after they are cached: int8 keys cannot be used")
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    for word in ("softcap", "s_aux", "position_bias"):
        if options.get(word) is not None:
            raise UsageError(f"{type(module).__name__}: int8 attention knows no {word}")
    mask = None if attention_mask is None else _seen(attention_mask)[..., : context.tokens]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = attention(query, context, scale, mask, key.kv_parts())  # type: ignore[attr-defined]
    return out.transpose(1, 2).contiguous(), None


def _seen(mask: Tensor) -> Tensor:
    """Return a mask as bool, True where a query may look. Raises UsageError if it adds anything else to the scores."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise UsageError("int8 attention takes masks, not biases of the scores")
    return seen


AttentionInterface.register(INT8_ATTENTION, int8_attention)
AttentionMaskInterface.register(INT8_ATTENTION, sdpa_mask)
