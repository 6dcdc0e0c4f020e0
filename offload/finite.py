"""Stops a text where the model's logits are no numbers, and says which layer began it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.errors import InputError
from offload.gpu.device import Device

_LOOKED_AT_TOKENS = 512


class FiniteLogits:
    """A logits processor of one text that changes nothing; raises InputError where the largest logit is no number.

    layers: the decoder layers of `model`, by name. Where logits went wrong, the last tokens take one more pass to see
    whose output is the first that is not finite. device: that computes the logits, None for the host. What it found is
    brought to the host beside the token, and looked at by `check`, which comes with the next token at the latest: the
    device is not waited for once more.
    """

    def __init__(self, model: PreTrainedModel, layers: dict[str, nn.Module], device: Device | None = None) -> None:
        self._model, self._layers, self._device = model, layers, device
        self._found: tuple[Tensor, Callable[[], bool]] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores`, float [B, vocabulary]; `input_ids`, int64 [B, T], are all tokens so far."""
        self.check()
        finite = torch.isfinite(scores.max())  # a NaN is larger than everything
        if self._device is None:
            self._found = input_ids, partial(bool, finite)
            self.check()
        else:
            self._found = input_ids, self._device.read_later(finite)
        return scores

    def check(self) -> None:
        """Raise InputError if the last logits were NaN or infinite. Waits for nothing once their token was read."""
        found, self._found = self._found, None
        if found is None or found[1]():
            return
        input_ids = found[0]
        raise InputError(
            f"after {input_ids.shape[1]} tokens the model's logits are NaN or infinite; {self._origin(input_ids)}; "
            "--exact computes with wider numbers; if it does not help, quantize the model again"
        )

    def _origin(self, input_ids: Tensor) -> str:
        found: list[str] = []
        with _watched(self._layers, found):
            self._model(input_ids[:, -_LOOKED_AT_TOKENS:], use_cache=False, logits_to_keep=1)
        return f"{found[0]} is the first layer whose output is" if found else "the output of no layer is"


class CheckedStreamer:
    """Hands tokens on to another streamer, but none whose logits were NaN or infinite."""

    def __init__(self, streamer: Any, finite: FiniteLogits) -> None:
        self._streamer, self._finite = streamer, finite

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token after the other. Raises InputError."""
        self._finite.check()
        self._streamer.put(value)

    def end(self) -> None:
        """Tell the other streamer."""
        self._streamer.end()


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
