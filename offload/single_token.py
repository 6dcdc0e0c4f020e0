"""A decoder layer that takes one token of one sequence in a way of its own, and leaves the rest to its modules.

Prompts, batches, masks, other caches go through transformers' modules as before.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from offload.kv.cache import CACHE_NAME, Int8Layer

_ROOM_TOKENS = 256
_HIDDEN_BNH = 3  # rank of hidden states [batch, tokens, hidden]


class SingleToken(ABC):
    """Stands in for the `forward` of one decoder layer. enabled: whether one token takes the layer's own way."""

    def __init__(self, layer: Any, enabled: bool = True) -> None:
        self.layer, self.modules_forward, self.enabled = layer, layer.forward, enabled
        self.order: int = layer.self_attn.layer_idx
        layer.forward = self._forward

    @abstractmethod
    def step(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DynamicLayer | Int8Layer) -> Tensor:
        """Return the output [1, 1, hidden] for one token, appending to the cache."""

    def takes(self, cache: DynamicLayer | Int8Layer) -> bool:
        """Whether a token with such a past can go this way."""
        return True

    def _forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        cache = self._cache(hidden_states, options) if self.enabled and not arguments else None
        if cache is None or not self.takes(cache):
            return self.modules_forward(hidden_states, *arguments, **options)
        cos, sin = options["position_embeddings"]
        return self.step(hidden_states, cos, sin, cache)

    def _cache(self, hidden: Tensor, options: dict[str, Any]) -> DynamicLayer | Int8Layer | None:
        """Return the layer's cache if this call is one token of one sequence behind others, else None."""
        if hidden.dim() != _HIDDEN_BNH or hidden.shape[:2] != (1, 1) or options.get("attention_mask") is not None:
            return None
        if options.get("output_attentions") or torch.compiler.is_compiling():
            return None
        angles = options.get("position_embeddings")
        layers = getattr(options.get(CACHE_NAME), "layers", ())
        if angles is None or angles[0].dtype != hidden.dtype or self.order >= len(layers):
            return None
        cache: DynamicLayer | Int8Layer = layers[self.order]
        if isinstance(cache, Int8Layer):
            return cache if cache.batch_size == 1 and cache.dtype == hidden.dtype else None
        if type(cache) is not DynamicLayer or not cache.is_initialized:
            return None
        return cache if cache.keys.shape[:1] == (1,) and cache.keys.dtype == hidden.dtype else None


def stand_ins(layers: Iterable[nn.Module]) -> list[SingleToken]:
    """Return what stands in for those of some layers that have a way of their own."""
    found = (getattr(layer.forward, "__self__", None) for layer in layers)
    return [stand_in for stand_in in found if isinstance(stand_in, SingleToken)]


def with_room(cache: DynamicLayer) -> tuple[Tensor, Tensor, int]:
    """Return the buffers of keys and of values [heads, capacity, head_dim] behind a cache, and the tokens in them.

    Whatever else has a hand in the cache puts other tensors in; then, or when they are full, new buffers are filled.
    """
    tokens = cache.keys.shape[2]
    buffers: tuple[Tensor, Tensor] | None = getattr(cache, "_buffers", None)
    if buffers is not None and tokens < buffers[0].shape[1]:
        pairs = zip(buffers, (cache.keys[0], cache.values[0]), strict=True)
        if all(b.data_ptr() == x.data_ptr() and b.stride() == x.stride() for b, x in pairs):
            return *buffers, tokens
    grown = []
    for held in (cache.keys[0], cache.values[0]):
        buffer = held.new_empty(held.shape[0], tokens + _ROOM_TOKENS, held.shape[2])
        buffer[:, :tokens] = held
        grown.append(buffer)
    cache._buffers = (grown[0], grown[1])
    return grown[0], grown[1], tokens


def hold(cache: DynamicLayer, keys: Tensor, values: Tensor, tokens: int) -> None:
    """Let a cache hold the first `tokens` tokens of its buffers [heads, capacity, head_dim]."""
    cache.keys, cache.values = keys[None, :, :tokens], values[None, :, :tokens]
