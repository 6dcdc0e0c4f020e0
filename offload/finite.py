"""Stops a text where the model's logits are no numbers, and says which layer began it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.errors import InputError

_LOOKED_AT_TOKENS = 512


class FiniteLogits:
    """A logits processor that changes nothing, and raises InputError where the largest logit is NaN or infinite.

    layers: the decoder layers of `model`, by name. Where logits went wrong, the last tokens take one more pass to see
    whose output is the first that is not finite.
    """

    def __init__(self, model: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
        self._model, self._layers = model, layers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores`, float [B, vocabulary]; `input_ids`, int64 [B, T], are all tokens so far."""
        if torch.isfinite(scores.max()):  # a NaN is larger than everything
            return scores
        raise InputError(
            f"after {input_ids.shape[1]} tokens the model's logits are NaN or infinite; {self._origin(input_ids)}; "
            "--exact computes with wider numbers; if it does not help, quantize the model again"
        )

    def _origin(self, input_ids: Tensor) -> str:
        found: list[str] = []
        with _watched(self._layers, found):
            self._model(input_ids[:, -_LOOKED_AT_TOKENS:], use_cache=False, logits_to_keep=1)
        return f"{found[0]} is the first layer whose output is" if found else "the output of no layer is"


@contextmanager
def _watched(layers: dict[str, nn.Module], found: list[str]) -> Iterator[None]:
    """Append the name of every layer whose output, or a part of it, is not finite, as they run."""

    def look(name: str, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if not torch.isfinite(hidden).all():
            found.append(name)

    handles = [
        layer.register_forward_hook(lambda module, arguments, output, name=name: look(name, output))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
