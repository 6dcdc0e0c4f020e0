"""Lets single tokens take a way of their own through layers of the Llama family, where it is proved.

Where a layer has the parts of a Llama layer, and a proof on its own weights shows that its own way computes what its
modules compute, a token takes it. Layers alike in class, shapes and settings are proved once, on the first one.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from offload.fused import decoder_layer
from offload.kv.cache import CACHE_NAME
from offload.linear import PackedLinear
from offload.single_token import SingleToken, stand_ins

_log = logging.getLogger(__name__)

_PROOF_TOKENS = 7
_ROUNDING = 1e-5


def fuse(
    model: PreTrainedModel,
    layers: Mapping[int, nn.Module],
    in_memory: Callable[[int], AbstractContextManager[None]],
    own_way: Callable[[Any], SingleToken],
    device: torch.device,
) -> int:
    """Let single tokens take their own way in every layer where it is proved; returns how many those are.

    layers: by their index, those that `device` computes. in_memory(i): a context in which the weights of layer i are
    attached. own_way: makes what stands in for a layer. A layer of another family is left as it is; if one that looks
    like the family fails the proof, that is logged.
    """
    proved: dict[str, bool] = {}
    for index, layer in layers.items():
        kind = _kind(layer)
        if kind not in proved:
            with in_memory(index):
                proved[kind] = _is_proved(model, layer, own_way, device)
        if proved[kind]:
            own_way(layer)
    return sum(proved[_kind(layer)] for layer in layers.values())


def unfuse(layers: Iterable[nn.Module]) -> None:
    """Let every layer compute with its modules alone again."""
    for stand_in in stand_ins(layers):
        stand_in.layer.forward = stand_in.modules_forward


def _kind(layer: nn.Module) -> str:
    """Return everything but the weights that decides what a layer computes: its modules and their plain settings."""
    settings = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
    ]
    return f"{type(layer).__qualname__} {layer} {settings}"


def _is_proved(model: Any, layer: Any, own_way: Callable[[Any], SingleToken], device: torch.device) -> bool:
    """Whether its own way is at most twice as far from the modules in float32 as they are in their own dtype."""
    try:
        described, rotary = decoder_layer(layer), model.get_decoder().rotary_emb
    except (AttributeError, ValueError):
        return False
    noise = torch.Generator().manual_seed(0)
    past_shape = (2, 1, described.key_heads, _PROOF_TOKENS, described.head_dim)
    hidden = torch.randn(1, 1, described.hidden, generator=noise).to(device, model.dtype)
    past = torch.randn(past_shape, generator=noise).to(device, model.dtype)
    angles: tuple[Tensor, Tensor] = rotary(hidden, position_ids=torch.tensor([[_PROOF_TOKENS]], device=device))
    stand_in = own_way(layer)
    stand_in.enabled = False
    try:
        modules = _run(stand_in, hidden, angles, past)
        with _exact(layer):
            truth = _run(stand_in, hidden.float(), (angles[0].float(), angles[1].float()), past.float())
        stand_in.enabled = True
        found = _run(stand_in, hidden, angles, past)
    finally:
        layer.forward = stand_in.modules_forward
    errors = [
        (float((f - t).norm()), 2 * float((m - t).norm()) + _ROUNDING * float(t.norm()))
        for f, m, t in zip(found, modules, truth, strict=True)
    ]
    proved = all(error <= allowed for error, allowed in errors)
    if not proved:
        told = ", ".join(f"{error:.3g} of {allowed:.3g} allowed" for error, allowed in errors)
        _log.warning(
            "%s: the fused decode step differs from the modules (output, key, value: %s); the modules are used",
            type(layer).__name__,
            told,
        )
    return proved


def _run(stand_in: SingleToken, hidden: Tensor, angles: tuple[Tensor, Tensor], past: Tensor) -> tuple[Tensor, ...]:
    """Return what one token adds to the hidden states, and its key and value, in float32."""
    cache, index = DynamicCache(), stand_in.layer.self_attn.layer_idx
    cache.update(past[0], past[1], index)
    out = stand_in.layer.forward(
        hidden, attention_mask=None, position_embeddings=angles, use_cache=True, **{CACHE_NAME: cache}
    )
    entry = cache.layers[index]
    return out.float() - hidden.float(), entry.keys[0, :, -1].float(), entry.values[0, :, -1].float()


@contextmanager
def _exact(layer: nn.Module) -> Iterator[None]:
    """Let the layer's linears keep activations in float32 for a while."""
    linears = [module for module in layer.modules() if isinstance(module, PackedLinear)]
    modes = [linear.mode for linear in linears]
    for linear in linears:
        linear.mode = "exact"
    try:
        yield
    finally:
        for linear, mode in zip(linears, modes, strict=True):
            linear.mode = mode
