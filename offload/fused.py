"""The fused decode step: a decoder layer of the Llama family as one call of the compiled kernels.

A single token goes through that call, with those of other sequences that have come to the same layer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from kernels.attention import attention
from kernels.decoder import CompiledLayer, DecoderLayer, Projection, Token, dense_token, int8_token
from kernels.matmul import Mode
from offload.joint import Gather, do
from offload.kv.cache import Int8Layer
from offload.linear import PackedLinear
from offload.single_token import SingleToken, hold, stand_ins, with_room


@dataclass(frozen=True, slots=True)
class _Step:
    """What one sequence wants of a layer, whose weights lie where `compiled` says."""

    compiled: CompiledLayer
    token: Token
    mode: Mode


class FusedLayer(SingleToken):
    """A layer whose single tokens take the fused call on the host, a `Joint`."""

    def __init__(self, layer: Any, enabled: bool = True) -> None:
        super().__init__(layer, enabled)
        self.gather: Gather | None = None
        self._output: PackedLinear = layer.self_attn.o_proj
        self._compiled: dict[int, CompiledLayer] = {}  # by the weight that is attached, which tells the slot

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
            keys, values, tokens = with_room(cache)
            token = dense_token(*inputs, keys, values, tokens)
            do(self, _Step(compiled, token, mode))
            hold(cache, keys, values, tokens + 1)
        return token.out.view(1, 1, -1)


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


def fused_layers(layers: Iterable[nn.Module]) -> list[FusedLayer]:
    """Return what stands in for those of some layers that take the fused call."""
    return [stand_in for stand_in in stand_ins(layers) if isinstance(stand_in, FusedLayer)]
