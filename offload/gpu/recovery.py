"""Goes on where a GPU runs out of memory: the pass is undone, layers leave the GPU, and the same pass is run again.

It happens below `generate()`, which hears nothing of it: tokens, noise that was drawn for them, beams and streamers
stay what they are. Keys and values of the tokens before are kept, so nothing is computed twice but the pass itself.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offload.command import format_bytes
from offload.errors import ResourceError
from offload.kv.cache import Int8Layer, keeps_nothing
from offload.kv.shelved_layer import ShelvedLayer
from offload.lent_layers import move_inputs
from offload.planning.choice import plan_smaller
from offload.planning.placement import Placement
from offload.planning.predict import Costs
from offload.planning.wishes import Wishes
from offload.streaming import Executor

_log = logging.getLogger(__name__)


def recover(model: PreTrainedModel, executor: Executor, wishes: Wishes, costs: Costs | None) -> None:
    """Let the forward of a model on a device take its inputs there, and survive the end of the device's memory.

    Each pass that finds none is run again with a smaller share of the layers there. From then on it raises
    ResourceError where no smaller share does, or the pass cannot be undone.
    """
    recovery = Recovery(model, executor, wishes, costs)

    @functools.wraps(model.forward)  # whose parameters transformers reads
    def forward(*arguments: Any, **options: Any) -> Any:
        return recovery.run(arguments, options)

    model.forward = forward


class Recovery:
    """What stands in for a model's forward, see `recover`."""

    def __init__(self, model: PreTrainedModel, executor: Executor, wishes: Wishes, costs: Costs | None) -> None:
        self._model, self._executor, self._wishes, self._costs = model, executor, wishes, costs
        self._forward = model.forward
        self._rearranged = False

    def run(self, arguments: Any, options: Any) -> Any:
        """Return what the model's own forward returns."""
        cache = next((value for value in (*arguments, *options.values()) if isinstance(value, Cache)), None)
        undo = _undo_of(cache)
        while True:
            if not self._executor.arranged:  # an interrupt came while layers were moved
                self._between_passes(self._arrange_anew)
            if self._rearranged and cache is not None:
                self._follow(cache)
            before = self._executor.placement
            try:
                moved, named = move_inputs(self._executor.device, self._model, arguments, options)
                return self._forward(*moved, **named)
            except torch.OutOfMemoryError:
                pass  # what the pass left on the device is freed with the error
            if undo is None:
                raise ResourceError(
                    "the GPU ran out of memory, and the cache of this model cannot be put back to where the pass "
                    "began; give a smaller --gpu-memory"
                )
            undo()
            self._between_passes(functools.partial(self._make_room, before))

    def _between_passes(self, act: Callable[[], None]) -> None:
        """Change what passes use, when no other one is under way."""
        wait_for_others = self._executor.between_passes
        if wait_for_others is None:
            act()
        else:
            wait_for_others(act)

    def _make_room(self, before: Placement) -> None:
        """Have less on the GPU than where a pass ran out of memory; another pass may have seen to it since."""
        if self._executor.placement is not before:
            return
        self._shrink()
        after = self._executor.placement
        _log.warning(
            "the GPU ran out of memory while it computed: from now on %s of it is planned for instead of %s, with %d "
            "of %d layers computed there instead of %d; generation goes on with the tokens it has",
            format_bytes(after.device_bytes),
            format_bytes(before.device_bytes),
            _on_device(after.hows),
            len(after.hows),
            _on_device(before.hows),
        )

    def _arrange_anew(self) -> None:
        if self._executor.arranged:  # another pass came first
            return
        try:
            self._rearrange(self._executor.placement)
            return
        except torch.OutOfMemoryError:
            pass
        self._shrink()

    def _shrink(self) -> None:
        """Bring layers off the GPU until the others find room there."""
        while True:
            smaller = plan_smaller(self._executor.placement, self._wishes, self._costs)
            try:
                self._rearrange(smaller)
                return
            except torch.OutOfMemoryError:
                pass

    def _rearrange(self, placement: Placement) -> None:
        self._rearranged = True
        with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the mode of the caller
            self._executor.rearrange(placement)
        self._model.hf_device_map = self._executor.device_map

    def _follow(self, cache: Cache) -> None:
        """Bring keys and values to where the layers that use them are computed."""
        host, device = torch.device("cpu"), self._executor.device
        for at, how in zip(range(len(cache.layers)), self._executor.placement.hows, strict=False):
            if how == "host" and isinstance(cache.layers[at], ShelvedLayer):
                cache.layers[at] = cache.layers[at].on_host()
            move_layer(cache.layers[at], host if how == "host" else device)


def move_layer(layer: Any, device: torch.device) -> None:
    """Bring what one layer of a cache holds to a device; what holds nothing yet goes where its first keys are."""
    if isinstance(layer, Int8Layer):
        layer.move(device)
    elif isinstance(layer, DynamicLayer) and layer.is_initialized:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer, name, value.to(device))
        layer.device = device


def _undo_of(cache: Cache | None) -> Callable[[], None] | None:
    """Return what puts a cache back to how it is now, None if that cannot be had; it holds on to windows alone."""
    if cache is None:
        return lambda: None
    undos = [_undo_of_layer(layer) for layer in cache.layers]
    if None in undos:
        return None

    def undo() -> None:
        del cache.layers[len(undos) :]
        for undo_layer in undos:
            assert undo_layer is not None, "there is one for each"
            undo_layer()

    return undo


def _undo_of_layer(layer: Any) -> Callable[[], None] | None:
    if keeps_nothing(layer):
        return lambda: None
    if type(layer) is DynamicSlidingWindowLayer:  # never writes into a tensor that it has handed out, but drops tokens
        return functools.partial(_put_back, layer, dict(vars(layer)))
    if type(layer) in (DynamicLayer, Int8Layer, ShelvedLayer):
        return functools.partial(_cut, layer, int(layer.get_seq_length()))
    return None


def _put_back(layer: Any, state: dict[str, Any]) -> None:
    vars(layer).clear()
    vars(layer).update(state)


def _cut(layer: Any, tokens: int) -> None:
    """Leave the first tokens; an abandoned pass may have added a key without its value."""
    if not tokens and type(layer) is DynamicLayer:
        layer.keys, layer.values, layer.is_initialized = None, None, False  # 5.17's `reset` keeps them, zeroed
    elif not tokens:
        layer.reset()
    elif isinstance(layer, Int8Layer):
        layer.crop(tokens - layer.tokens)
    else:
        layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]


def _on_device(hows: tuple[str, ...]) -> int:
    return sum(how != "host" for how in hows)
