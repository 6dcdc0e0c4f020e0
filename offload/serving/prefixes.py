"""Keys and values of the beginnings of prompts, kept so that a prompt that begins alike is not computed from scratch.

Kept and reused are whole passes of a prompt, never parts of one: what is left of a prompt is then cut into the passes
that it would have been cut into anyway, and every bit of the answer is what it would have been.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kernels.kv_block import BLOCK_TOKENS
from offload.kv.cache import Int8Layer
from offload.session import PREFILL_CHUNK_TOKENS

_Pass = tuple[Any, ...]  # of each layer: keys and values [1, K, N, D] of the model's dtype, or a list of int8 blocks


class Prefixes:
    """Holds `tokens` tokens of prompts at most, those that were used last; of a prompt the beginning goes last.

    pass_tokens: of a whole pass, a multiple of the tokens of an int8 block. For one thread at a time.
    """

    def __init__(self, tokens: int, pass_tokens: int = PREFILL_CHUNK_TOKENS) -> None:
        assert pass_tokens % BLOCK_TOKENS == 0, "a pass fills whole blocks"
        self._most, self._pass_tokens = tokens // pass_tokens, pass_tokens
        self._passes: OrderedDict[tuple[int, ...], _Pass] = OrderedDict()  # by all tokens up to the end of the pass

    @staticmethod
    def useful_tokens(tokens: int, context_tokens: int, pass_tokens: int = PREFILL_CHUNK_TOKENS) -> int:
        """Return how many of `tokens` tokens can be found again, prompts and answers having `context_tokens` together.

        That is whole passes, and nothing where no prompt goes on behind the first one: memory for them would lie idle.
        """
        return tokens // pass_tokens * pass_tokens if context_tokens >= pass_tokens + 2 else 0

    @staticmethod
    def fit(cache: Cache | None) -> bool:
        """Whether a cache can begin with what another one held: all of its layers keep their whole past."""
        return cache is not None and all(type(layer) in (DynamicLayer, Int8Layer) for layer in cache.layers)

    @property
    def tokens(self) -> int:
        """How many are held."""
        return len(self._passes) * self._pass_tokens

    def take(self, prompt: Sequence[int], cache: Cache) -> int:
        """Let an empty cache begin with the longest beginning of `prompt` that is held; return its tokens.

        The last token of a prompt is always left to compute: the first of the answer comes from it.
        """
        found = []
        for key in self._keys(prompt[:-1]):
            if key not in self._passes:
                break
            found.append(key)
        passes = [self._passes[key] for key in found]
        for layer, parts in zip(cache.layers, zip(*passes, strict=True), strict=True) if passes else ():
            if isinstance(layer, Int8Layer):
                device = parts[-1][0][0].memory.device
                layer.begin_with([block.copy(device) for blocks, _ in parts for block in blocks], parts[0][1])
            else:
                layer.update(*(_joined(tensors) for tensors in zip(*parts, strict=True)))
        self._use(found)
        return len(found) * self._pass_tokens

    def keep(self, prompt: Sequence[int], cache: Cache) -> None:
        """Copy from a cache what it holds of the whole passes of `prompt`, and forget what was not used for longest."""
        keys = self._keys(prompt)[: self._most]
        new = [key for key in keys if key not in self._passes]
        self._use([key for key in keys if key in self._passes])
        while len(self._passes) + len(new) > self._most:  # before anything is copied: the room is what was planned
            self._passes.popitem(last=False)
        for key in new:
            self._passes[key] = self._copied(cache, len(key) // self._pass_tokens - 1)
        self._use(keys)

    def _keys(self, prompt: Sequence[int]) -> list[tuple[int, ...]]:
        ends = range(self._pass_tokens, len(prompt) + 1, self._pass_tokens)
        return [tuple(prompt[:end]) for end in ends]

    def _copied(self, cache: Cache, index: int) -> _Pass:
        start, end = index * self._pass_tokens, (index + 1) * self._pass_tokens
        copied: list[Any] = []
        for layer in cache.layers:
            if isinstance(layer, Int8Layer):
                copied.append((layer.copied_blocks(start // BLOCK_TOKENS, end // BLOCK_TOKENS), layer.dtype))
            else:
                copied.append((layer.keys[:, :, start:end].clone(), layer.values[:, :, start:end].clone()))
        return tuple(copied)

    def _use(self, keys: Sequence[tuple[int, ...]]) -> None:
        for key in reversed(keys):  # the end first: no pass is to stay without those before it
            self._passes.move_to_end(key)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return passes in one, where the last was kept: layers may have left a GPU meanwhile."""
    return torch.cat([tensor.to(tensors[-1].device) for tensor in tensors], dim=2)
