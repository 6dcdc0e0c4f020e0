"""The fused decode step: a decoder layer of the Llama family as one call of the compiled kernels.

Where a layer has the parts of a Llama layer, and a proof on its own weights shows that one call computes what its
modules compute, a single token goes through that call, with those of other sequences that have come to the same layer;
everything else, prompts, batches, masks, other caches, goes through transformers' modules as before. Layers alike in
class, shapes and settings are proved once, on the first one.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kernels.attention import attention
from kernels.cpu_matmul import compiled_library
from kernels.decoder import CompiledLayer, DecoderLayer, Projection, Token, dense_token, int8_token
from kernels.matmul import Mode
from offload.cache import CACHE_NAME, Int8Layer
from offload.joint import Gather, do
from offload.linear import PackedLinear

_log = logging.getLogger(__name__)

_ROOM_TOKENS = 256
_PROOF_TOKENS = 7
_ROUNDING = 1e-5
_HIDDEN_BNH = 3  # rank of hidden states [batch, tokens, hidden]


@dataclass(frozen=True, slots=True)
class _Step:
    """What one sequence wants of a layer, whose weights lie where `compiled` says."""

    compiled: CompiledLayer
    token: Token
    mode: Mode


class FusedLayer:
    """Stands in for the `forward` of one decoder layer, a `Joint`. enabled: whether one token takes the fused call."""

    def __init__(self, layer: Any, enabled: bool = True) -> None:
        self.layer, self.modules_forward, self.enabled = layer, layer.forward, enabled
        self.order: int = layer.self_attn.layer_idx
        self.gather: Gather | None = None
        self._output: PackedLinear = layer.self_attn.o_proj
        self._compiled: dict[int, CompiledLayer] = {}  # by the weight that is attached, which tells the slot
        layer.forward = self._forward

    def compute(self, jobs: Sequence[_Step]) -> None:
        """Take the tokens of some sequences through the layer. Their weights are in one place: nobody moved them."""
        jobs[0].compiled.step([job.token for job in jobs], jobs[0].mode)

    def step(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DynamicLayer | Int8Layer) -> Tensor:
        """Return the output [1, 1, hidden] for one token, appending to the cache."""
        compiled = self._compiled.get(id(self._output.packed))
        if compiled is None:
            compiled = self._compiled[id(self._output.packed)] = CompiledLayer(decoder_layer(self.layer))
        inputs, mode = (hidden.flatten(), cos.flatten(), sin.flatten()), self._output.mode
        if isinstance(cache, Int8Layer):
            cache.make_room(1)
            token = int8_token(*inputs, cache.blocks, cache.tokens, cache.key_offset)
            if (parts := cache.parts()) is None:
                do(self, _Step(compiled, token, mode))
                cache.count(1)
            else:
                queries = compiled.append_int8(token, mode)
                cache.count(1)
                compiled.finish(token, attention(queries, cache.context, 1.0, parts=parts), mode)
        else:
            keys, values, tokens = _with_room(cache)
            token = dense_token(*inputs, keys, values, tokens)
            do(self, _Step(compiled, token, mode))
            cache.keys, cache.values = keys[None, :, : tokens + 1], values[None, :, : tokens + 1]
        return token.out.view(1, 1, -1)

    def _forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        cache = self._cache(hidden_states, options) if self.enabled and not arguments else None
        if cache is None:
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


def _with_room(cache: DynamicLayer) -> tuple[Tensor, Tensor, int]:
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


def decoder_layer(layer: Any) -> DecoderLayer:
    """Describe a layer whose weights are attached. Raises AttributeError or ValueError if it is of another kind."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
    head_dim = attention.head_dim
    output, down = _projection(attention.o_proj), _projection(mlp.down_proj)
    heads = output.weight.in_features // head_dim
    parts = [_projection(getattr(attention, name)) for name in qkv]
    rows = sum(part.weight.out_features for part in parts)
    norm = layer.input_layernorm
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return DecoderLayer(
        qkv=tuple(parts),
        output=output,
        gate_up=tuple(_projection(getattr(mlp, name)) for name in gate_up),
        down=down,
        input_norm=norm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
        heads=heads,
        key_heads=(rows // head_dim - heads) // 2,
        head_dim=head_dim,
        norm_epsilon=norm.variance_epsilon,
        scaling=attention.scaling,
    )


def _projection(linear: Any) -> Projection:
    if not isinstance(linear, PackedLinear) or linear.packed is None or linear.input_order is not None:
        raise ValueError("not a packed linear with its weight in memory, its inputs in order")
    return Projection(linear.packed, linear.bias)


def fuse(
    model: PreTrainedModel, layers: Mapping[int, nn.Module], in_memory: Callable[[int], AbstractContextManager[None]]
) -> int:
    """Let single tokens take the fused call in every layer where it is proved; returns how many those are.

    layers: by their index, those that the host computes. in_memory(i): a context in which the weights of layer i are
    attached. A layer of another family is left as it is; if one that looks like the family fails the proof, that is
    logged.
    """
    if compiled_library() is None:
        return 0
    proved: dict[str, bool] = {}
    for index, layer in layers.items():
        kind = _kind(layer)
        if kind not in proved:
            with in_memory(index):
                proved[kind] = _is_proved(model, layer)
        if proved[kind]:
            FusedLayer(layer)
    return sum(proved[_kind(layer)] for layer in layers.values())


def unfuse(layers: Iterable[nn.Module]) -> None:
    """Let every layer compute with its modules alone again."""
    for stand_in in fused_layers(layers):
        stand_in.layer.forward = stand_in.modules_forward


def fused_layers(layers: Iterable[nn.Module]) -> list[FusedLayer]:
    """Return what stands in for those of some layers that are fused."""
    found = (getattr(layer.forward, "__self__", None) for layer in layers)
    return [stand_in for stand_in in found if isinstance(stand_in, FusedLayer)]


def _kind(layer: nn.Module) -> str:
    """Return everything but the weights that decides what a layer computes: its modules and their plain settings."""
    settings = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
    ]
    return f"{type(layer).__qualname__} {layer} {settings}"


def _is_proved(model: Any, layer: Any) -> bool:
    """Whether the fused call is at most twice as far from the modules in float32 as they are in their own dtype."""
    try:
        described, rotary = decoder_layer(layer), model.get_decoder().rotary_emb
    except (AttributeError, ValueError):
        return False
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, described.hidden, generator=noise).to(model.dtype)
    past = torch.randn(2, 1, described.key_heads, _PROOF_TOKENS, described.head_dim, generator=noise).to(model.dtype)
    angles: tuple[Tensor, Tensor] = rotary(hidden, position_ids=torch.tensor([[_PROOF_TOKENS]]))
    fused = FusedLayer(layer, enabled=False)
    try:
        modules = _run(fused, hidden, angles, past)
        with _exact(layer):
            truth = _run(fused, hidden.float(), (angles[0].float(), angles[1].float()), past.float())
        fused.enabled = True
        found = _run(fused, hidden, angles, past)
    finally:
        layer.forward = fused.modules_forward
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


def _run(fused: FusedLayer, hidden: Tensor, angles: tuple[Tensor, Tensor], past: Tensor) -> tuple[Tensor, ...]:
    """Return what one token adds to the hidden states, and its key and value, in float32."""
    cache, index = DynamicCache(), fused.layer.self_attn.layer_idx
    cache.update(past[0], past[1], index)
    out = fused.layer.forward(
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
