"""Tokens through one decoder layer of the Llama family, in one call of the compiled kernels.

Norm, attention and MLP of a layer are some twenty small operations, which cost more to start than to run. Here they
run on buffers that are kept, in float32 from the layer's input to its output; only keys and values are rounded, to the
dtype of their cache. Tokens of several sequences share the products with the weights: what a weight costs to be read
and taken apart is paid once, and each of them gets the bits that it would get alone.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.cpu_attention import context_struct
from kernels.cpu_matmul import compiled_library, cpu_level
from kernels.kv_block import KVBlocks
from kernels.matmul import Mode
from kernels.packed import PackedWeight

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class Projection:
    """A packed weight and its bias, [out_features] in any float dtype, or None."""

    weight: PackedWeight
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A layer: x + o(attention(qkv(norm(x)))), then y + down(silu(gate(norm(y))) * up(norm(y))).

    qkv: one projection or three, whose rows together are heads, key heads and value heads times head_dim. gate_up: one
    or two, gate first. Norms: [hidden]; those of queries and keys [head_dim] or None. Norms and biases are float32,
    bfloat16 or float16. head_dim is also the width of a value. scaling: of the scores, before the softmax. The tensors
    are on the CPU for a `CompiledLayer`; where a `DeviceStep` wants them, it says. Raises ValueError if the shapes do
    not fit each other.
    """

    qkv: tuple[Projection, ...]
    output: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    input_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    heads: int
    key_heads: int
    head_dim: int
    norm_epsilon: float
    scaling: float

    def __post_init__(self) -> None:
        hidden, mlp = self.hidden, self.down.weight.in_features
        if self.heads % self.key_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.key_heads} key heads evenly")
        for name, projections, inputs, outputs, most in (
            ("qkv", self.qkv, hidden, (self.heads + 2 * self.key_heads) * self.head_dim, 3),
            ("output", (self.output,), self.heads * self.head_dim, hidden, 1),
            ("gate_up", self.gate_up, hidden, 2 * mlp, 2),
            ("down", (self.down,), mlp, hidden, 1),
        ):
            weights = [projection.weight for projection in projections]
            rows = sum(weight.out_features for weight in weights)
            if not 1 <= len(weights) <= most or rows != outputs or any(w.in_features != inputs for w in weights):
                found = [[weight.out_features, weight.in_features] for weight in weights]
                raise ValueError(f"{name}: expected [{outputs}, {inputs}] in at most {most} weights, found {found}")
        for name, norm, size in (
            ("mlp_norm", self.mlp_norm, hidden),
            ("query_norm", self.query_norm, self.head_dim),
            ("key_norm", self.key_norm, self.head_dim),
        ):
            if norm is not None and norm.shape != (size,):
                raise ValueError(f"{name}: expected [{size}], found {list(norm.shape)}")

    @property
    def hidden(self) -> int:
        """The width of the residual stream."""
        return self.input_norm.shape[0]


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a sequence and what came before it, as the compiled step takes them. out: [hidden], written by it."""

    out: Tensor
    rotary: int
    struct: "_Token"
    held: tuple[Any, ...]  # whose memory the struct points to


def dense_token(hidden: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, tokens: int) -> Token:
    """Return a token whose past is kept as it was computed.

    hidden: [hidden]. cos, sin: [rotary], of hidden's dtype; the halves of the first `rotary` elements of a head are
    rotated against each other. keys, values: [key_heads, capacity, head_dim], contiguous, of which `tokens` are
    filled; the next is written in place.
    """
    dtype = _DTYPES[keys.dtype]
    past = (None, keys.data_ptr(), values.data_ptr(), keys.shape[1], tokens, dtype)
    return _token(hidden, cos, sin, past, (keys, values))


def int8_token(
    hidden: Tensor, cos: Tensor, sin: Tensor, blocks: KVBlocks, tokens: int, key_offset: Tensor | None = None
) -> Token:
    """Return a token whose past is kept in 8 bits, in blocks of one sequence which have room for one token more.

    hidden, cos, sin: see `dense_token`. blocks, tokens, key_offset: as of a `KVContext` before this token.
    """
    context = context_struct(blocks, tokens, key_offset)
    return _token(hidden, cos, sin, (ctypes.addressof(context),), (context, blocks, key_offset))


def _token(hidden: Tensor, cos: Tensor, sin: Tensor, past: tuple[Any, ...], held: tuple[Any, ...]) -> Token:
    out = torch.empty_like(hidden)
    struct = _Token(hidden.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *past)
    return Token(out, cos.shape[-1], struct, (hidden, cos, sin, *held))


class CompiledLayer:
    """A `DecoderLayer` as the compiled kernels take it; the memory of its tensors is read at every step, not now."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer = layer
        self._struct = _layer_struct(layer)
        self._address = ctypes.addressof(self._struct)

    def step(self, tokens: Sequence[Token], mode: Mode = "fast", level: int | None = None) -> None:
        """Write the layer's output for a token of each of some sequences, and their keys and values to their pasts.

        tokens: of one dtype. mode, level: see `dequant_matmul_cpu`.
        Attention of each is over its past and itself. What is written depends neither on the other tokens nor on the
        number of threads.
        """
        structs = (_Token * len(tokens))(*(token.struct for token in tokens))
        _library().int4_decode(*self._head(tokens[0], mode, level), structs, len(tokens))

    def append_int8(self, token: Token, mode: Mode = "fast", level: int | None = None) -> Tensor:
        """Do the first half of `step` for an `int8_token`: write its key and value, return its queries.

        They are float32 [1, heads, 1, head_dim] and scaled. What attention makes of them, over parts of the context as
        they come into memory, goes to `finish`: the output is that of `step` to the bit.
        """
        queries = torch.empty(1, self.layer.heads, 1, self.layer.head_dim)
        _library().int4_decode_append(*self._head(token, mode, level), token.struct, queries.data_ptr())
        return queries

    def finish(self, token: Token, mixed: Tensor, mode: Mode = "fast", level: int | None = None) -> None:
        """Do the second half: write the output of what attention found, float32 [1, heads, 1, head_dim]."""
        mixed = mixed.contiguous()
        _library().int4_decode_finish(*self._head(token, mode, level), token.struct, mixed.data_ptr())

    def _head(self, token: Token, mode: Mode, level: int | None) -> tuple[Any, ...]:
        """Return what every compiled function takes first."""
        level = cpu_level() if level is None else level
        self._struct.rotary = token.rotary
        return level, torch.get_num_threads(), mode == "exact", self._address, _DTYPES[token.out.dtype]


class _Weight(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("scale_is_bf16", ctypes.c_bool),
    ]


class _Vector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


class _Linear(ctypes.Structure):
    _fields_ = [("weight", _Weight), ("bias", _Vector)]


class _Layer(ctypes.Structure):
    """`DecoderLayer` of cpu/decoder.h, field by field."""

    _fields_ = [
        ("qkv", _Linear * 3),
        ("output", _Linear),
        ("gate_up", _Linear * 2),
        ("down", _Linear),
        ("input_norm", _Vector),
        ("mlp_norm", _Vector),
        ("query_norm", _Vector),
        ("key_norm", _Vector),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("rotary", ctypes.c_int64),
        ("norm_epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
    ]


class _Token(ctypes.Structure):
    """`Token` of cpu/decoder.cpp, field by field."""

    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = compiled_library()
    if library is None:
        raise RuntimeError("a decoder layer in one call needs the compiled kernels")
    for function, struct in ((library.int4_decoder_layer_bytes, _Layer), (library.int4_decoder_token_bytes, _Token)):
        function.restype = ctypes.c_int64
        found, expected = function(), ctypes.sizeof(struct)
        assert found == expected, f"{struct.__name__} takes {found} bytes in C++ and {expected} here"
    pointer, integer, tokens = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Token)
    head: list[Any] = [integer, integer, integer, pointer, integer, tokens]
    library.int4_decode.argtypes = [*head, ctypes.c_int64]
    library.int4_decode_append.argtypes = [*head, pointer]
    library.int4_decode_finish.argtypes = [*head, pointer]
    for function in (library.int4_decode, library.int4_decode_append, library.int4_decode_finish):
        function.restype = None
    return library


def _layer_struct(layer: DecoderLayer) -> _Layer:
    return _Layer(
        (_Linear * 3)(*map(_linear, layer.qkv)),
        _linear(layer.output),
        (_Linear * 2)(*map(_linear, layer.gate_up)),
        _linear(layer.down),
        _vector(layer.input_norm),
        _vector(layer.mlp_norm),
        _vector(layer.query_norm),
        _vector(layer.key_norm),
        layer.hidden,
        layer.heads,
        layer.key_heads,
        layer.head_dim,
        0,
        layer.norm_epsilon,
        layer.scaling,
    )


def _linear(projection: Projection) -> _Linear:
    weight = projection.weight
    return _Linear(
        _Weight(
            weight.codes.data_ptr(),
            weight.scale.data_ptr(),
            None if weight.zero is None else weight.zero.data_ptr(),
            weight.out_features,
            weight.in_features,
            weight.group_size,
            weight.bits,
            weight.scale.dtype == torch.bfloat16,
        ),
        _vector(projection.bias),
    )


def _vector(tensor: Tensor | None) -> _Vector:
    return _Vector(None, 0) if tensor is None else _Vector(tensor.data_ptr(), _DTYPES[tensor.dtype])
