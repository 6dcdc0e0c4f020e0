"""One token through one layer in one call, against an independent float64 layer; NaN lies behind the cache's end."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.cpu_matmul import LEVELS, compiled_library, cpu_level
from kernels.decoder import CompiledLayer, DecoderLayer, Projection, Token, dense_token, int8_token
from kernels.kv_block import (
    BLOCK_TOKENS,
    BlockShape,
    KVBlock,
    KVBlocks,
    KVContext,
    dequantize_blocks,
    quantize_tokens,
    write_tokens,
)
from kernels.matmul import Mode
from kernels.packed import dequantize, pack

pytestmark = pytest.mark.skipif(compiled_library() is None, reason="no compiled kernels")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LEVEL_NUMBERS = [pytest.param(n, id=name) for n, name in enumerate(LEVELS) if n <= cpu_level()]


@dataclass(frozen=True)
class Case:
    """A layer's sizes and kind."""

    hidden: int = 64
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 32
    mlp: int = 160
    group_size: int = 32
    bits: tuple[int, ...] = (4, 4, 4, 4, 4, 4, 4)  # of q, k, v, output, gate, up, down
    joined: bool = False
    symmetric: bool = True
    bias: bool = False
    head_norms: bool = False
    rotary: int = 32
    tokens: int = 5
    dtype: torch.dtype = BF16


CASES = [
    Case(),
    Case(tokens=0),
    Case(tokens=255),
    Case(tokens=256, heads=3, key_heads=1),
    Case(tokens=700, heads=6, key_heads=3, head_dim=16, rotary=16),
    Case(hidden=96, head_dim=80, rotary=32, mlp=96, symmetric=False),
    Case(bias=True, head_norms=True, symmetric=False),
    Case(joined=True, group_size=64, mlp=192),
    Case(bits=(4, 8, 4, 8, 8, 4, 8)),
    Case(bits=(8,) * 7, symmetric=False, dtype=FP16),
    Case(dtype=FP32, head_norms=True, tokens=40),
    Case(dtype=FP16, tokens=33, bias=True),
    Case(hidden=192, heads=9, key_heads=3, head_dim=64, rotary=64, mlp=544),
]


def random_layer(case: Case) -> DecoderLayer:
    def projection(index: int, rows: int, inputs: int) -> Projection:
        bits = case.bits[index]
        group_size = inputs if inputs % case.group_size else case.group_size
        codes = torch.randint(0, 1 << bits, (rows, inputs))
        zero = None if case.symmetric else torch.randint(0, 1 << bits, (rows, inputs // group_size))
        scale = (torch.rand(rows, inputs // group_size) + 0.5) / (1 << bits) / inputs**0.5
        bias = torch.randn(rows).to(case.dtype) if case.bias else None
        return Projection(pack(codes, scale.to(BF16), zero, group_size, bits), bias)

    hidden, queries, keys = case.hidden, case.heads * case.head_dim, case.key_heads * case.head_dim
    if case.joined:
        qkv: tuple[Projection, ...] = (projection(0, queries + 2 * keys, hidden),)
        gate_up: tuple[Projection, ...] = (projection(4, 2 * case.mlp, hidden),)
    else:
        qkv = tuple(projection(i, rows, hidden) for i, rows in enumerate((queries, keys, keys)))
        gate_up = (projection(4, case.mlp, hidden), projection(5, case.mlp, hidden))
    norms = [torch.rand(size).add(0.5).to(case.dtype) for size in (hidden, hidden, case.head_dim, case.head_dim)]
    return DecoderLayer(
        qkv=qkv,
        output=projection(3, hidden, queries),
        gate_up=gate_up,
        down=projection(6, hidden, case.mlp),
        input_norm=norms[0],
        mlp_norm=norms[1],
        query_norm=norms[2] if case.head_norms else None,
        key_norm=norms[3] if case.head_norms else None,
        heads=case.heads,
        key_heads=case.key_heads,
        head_dim=case.head_dim,
        norm_epsilon=1e-5,
        scaling=case.head_dim**-0.5,
    )


@dataclass(frozen=True)
class Inputs:
    """What one step is given; keys and values [key_heads, capacity, head_dim], NaN behind the tokens."""

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor

    def fresh(self) -> "Inputs":
        return replace(self, keys=self.keys.clone(), values=self.values.clone())

    def token(self, tokens: int) -> Token:
        return dense_token(self.hidden, self.cos, self.sin, self.keys, self.values, tokens)


def random_inputs(case: Case) -> Inputs:
    past = torch.full((2, case.key_heads, case.tokens + 3, case.head_dim), torch.nan)
    past[:, :, : case.tokens] = torch.randn(2, case.key_heads, case.tokens, case.head_dim)
    angles = torch.rand(case.rotary // 2).repeat(2) * 6
    keys, values = past.to(case.dtype)
    return Inputs(
        torch.randn(case.hidden).to(case.dtype), angles.cos().to(case.dtype), angles.sin().to(case.dtype), keys, values
    )


def step(layer: DecoderLayer, token: Token, mode: Mode = "fast", level: int | None = None) -> Tensor:
    CompiledLayer(layer).step([token], mode, level)
    return token.out


def naive_step(
    layer: DecoderLayer,
    inputs: Inputs,
    tokens: int,
    dtype: torch.dtype,
    cached: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer by its definition, in `dtype`: output, keys and values [key_heads, tokens + 1, head_dim].

    cached: what a cache makes of new keys, or values; None: rounds them to its dtype.
    """

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + layer.norm_epsilon).sqrt() * weight.to(dtype)

    def times(x: Tensor, *projections: Projection) -> Tensor:
        outputs = [dequantize(p.weight).to(dtype) @ x for p in projections]
        return torch.cat(
            [y if p.bias is None else y + p.bias.to(dtype) for y, p in zip(outputs, projections, strict=True)]
        )

    def rotated(x: Tensor) -> Tensor:
        turned, rest = x[..., : inputs.cos.numel()], x[..., inputs.cos.numel() :]
        a, b = turned.chunk(2, dim=-1)
        cos, sin = inputs.cos.to(dtype), inputs.sin.to(dtype)
        return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, rest), -1)

    x = inputs.hidden.to(dtype)
    sizes = [n * layer.head_dim for n in (layer.heads, layer.key_heads, layer.key_heads)]
    q, k, v = (part.view(-1, layer.head_dim) for part in times(norm(x, layer.input_norm), *layer.qkv).split(sizes))
    q, k = (y if w is None else norm(y, w) for y, w in ((q, layer.query_norm), (k, layer.key_norm)))
    keep = cached or (lambda new: new.to(inputs.keys.dtype))
    rounded = [keep(new).to(dtype)[:, None] for new in (rotated(k), v)]
    keys = torch.cat((inputs.keys[:, :tokens].to(dtype), rounded[0]), 1)
    values = torch.cat((inputs.values[:, :tokens].to(dtype), rounded[1]), 1)
    shared = layer.heads // layer.key_heads
    scores = torch.einsum("hd,htd->ht", rotated(q), keys.repeat_interleave(shared, 0)) * layer.scaling
    mixed = torch.einsum("ht,htd->hd", scores.softmax(-1), values.repeat_interleave(shared, 0)).flatten()
    x = x + times(mixed, layer.output)
    gate, up = times(norm(x, layer.mlp_norm), *layer.gate_up).chunk(2)
    return x + times(torch.nn.functional.silu(gate) * up, layer.down), keys, values


@pytest.mark.parametrize("level", LEVEL_NUMBERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_step_equals_the_float64_layer(case: Case, level: int) -> None:
    layer, inputs = random_layer(case), random_inputs(case)
    truth, keys, values = naive_step(layer, inputs, case.tokens, torch.float64)
    given = inputs.fresh()
    out = step(layer, given.token(case.tokens), "exact", level)
    single, *single_cache = naive_step(layer, inputs, case.tokens, FP32)
    allowed = 2 * (single.to(case.dtype).double() - truth).abs().max() + 1e-6 * truth.abs().max()
    assert (out.double() - truth).abs().max() <= allowed
    for found, before, expected, in_single in zip(
        (given.keys, given.values), (inputs.keys, inputs.values), (keys, values), single_cache, strict=True
    ):
        assert torch.equal(found[:, : case.tokens], before[:, : case.tokens])
        new = expected[:, case.tokens]
        error = 2 * (in_single[:, case.tokens] - new).abs().max() + torch.finfo(case.dtype).eps * new.abs().max()
        assert (found[:, case.tokens].double() - new).abs().max() <= error
        assert found[:, case.tokens + 1 :].isnan().all()


@pytest.mark.parametrize("level", LEVEL_NUMBERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_step_over_8_bit_blocks_equals_the_float64_layer(case: Case, level: int) -> None:
    layer, inputs = random_layer(case), random_inputs(case)
    tokens, shape = case.tokens, BlockShape(1, case.key_heads, case.head_dim, case.head_dim)
    offset = torch.randn(case.key_heads, case.head_dim)
    count = tokens // BLOCK_TOKENS + 1
    memory = [torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8) for _ in range(count)]
    blocks = KVBlocks(shape, (KVBlock(shape, one) for one in memory))
    if tokens:
        write_tokens(blocks, 0, inputs.keys[None, :, :tokens], inputs.values[None, :, :tokens], offset)
        keys, values = dequantize_blocks(KVContext(blocks, tokens, offset))
        inputs = replace(inputs, keys=keys[0], values=values[0])

    def truth(dtype: torch.dtype) -> Tensor:
        offsets = iter((offset, torch.zeros(()), offset, torch.zeros(())))

        def cached(new: Tensor) -> Tensor:
            less = next(offsets)
            codes, scale = quantize_tokens((new - less)[None, :, None])
            return (codes.float() * scale.float()[..., None])[0, :, 0] + less

        return naive_step(layer, inputs, tokens, dtype, cached)[0]

    expected = truth(torch.float64)
    out = step(layer, int8_token(inputs.hidden, inputs.cos, inputs.sin, blocks, tokens, offset), "exact", level)
    allowed = 2 * (truth(FP32).to(case.dtype).double() - expected).abs().max() + 2e-4 * expected.abs().max()
    assert (out.double() - expected).abs().max() <= allowed
    written, _ = dequantize_blocks(KVContext(blocks, tokens + 1, offset))
    assert written.isfinite().all()


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_halves_of_a_step_give_the_bits_of_the_whole(case: Case, mode: Mode) -> None:
    """Between them another step runs in the same thread, and the context is attended to in two parts."""
    layer, inputs = random_layer(case), random_inputs(case)
    tokens, shape = case.tokens, BlockShape(1, case.key_heads, case.head_dim, case.head_dim)
    offset, compiled = torch.randn(case.key_heads, case.head_dim), CompiledLayer(layer)

    def filled() -> KVBlocks:
        memory = [torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8) for _ in range(tokens // BLOCK_TOKENS + 1)]
        blocks = KVBlocks(shape, (KVBlock(shape, one) for one in memory))
        write_tokens(blocks, 0, inputs.keys[None, :, :tokens], inputs.values[None, :, :tokens], offset)
        return blocks

    whole, halves = filled(), filled()
    expected, found, other = (
        int8_token(hidden, inputs.cos, inputs.sin, blocks, tokens, offset)
        for hidden, blocks in ((inputs.hidden, whole), (inputs.hidden, halves), (-inputs.hidden, whole))
    )
    queries = compiled.append_int8(found, mode)
    compiled.step([expected], mode)
    for one, another in zip(whole, halves, strict=True):
        assert torch.equal(one.memory, another.memory)
    compiled.step([other], mode)
    parts = [(0, 256), (256, tokens + 1)] if tokens >= 256 else [(0, tokens + 1)]
    mixed = attention(queries, KVContext(halves, tokens + 1, offset), 1.0, parts=parts)
    compiled.finish(found, mixed, mode)
    assert torch.equal(found.out, expected.out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_level_gives_the_fast_step_of_the_portable_one(case: Case) -> None:
    layer, inputs = random_layer(case), random_inputs(case)
    outs = []
    for level in range(cpu_level() + 1):
        given = inputs.fresh()
        angles = given.cos.float(), given.sin.float()
        outs.append(
            step(
                layer,
                dense_token(given.hidden.float(), *angles, given.keys, given.values, case.tokens),
                level=level,
            )
        )
    truth, *_ = naive_step(layer, inputs, case.tokens, torch.float64)
    added = (truth - inputs.hidden.double()).norm()
    for out in outs:
        assert (out.double() - truth).norm() <= 0.03 * added  # activations in int8
        assert (out - outs[0]).norm() <= 0.01 * added  # a code more or less where the levels round differently


def test_threads_change_no_bit() -> None:
    case = Case(hidden=256, heads=8, key_heads=4, head_dim=64, rotary=64, mlp=1024, tokens=600)
    layer, inputs, threads = random_layer(case), random_inputs(case), torch.get_num_threads()
    outs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(step(layer, inputs.fresh().token(case.tokens)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_nan_is_not_lost() -> None:
    case = Case()
    layer, inputs = random_layer(case), random_inputs(case)
    inputs.keys[1, 2, 3] = torch.nan
    assert step(layer, inputs.token(case.tokens)).isnan().all()


@pytest.mark.parametrize("level", LEVEL_NUMBERS)
@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sequences_together_get_the_bits_of_each_alone(case: Case, mode: Mode, level: int) -> None:
    """Seven, with pasts of several lengths, plain and in 8 bits; more than a tile takes, and not a multiple of it."""
    layer, dim = random_layer(case), case.head_dim
    shape, offset = BlockShape(1, case.key_heads, dim, dim), torch.randn(case.key_heads, dim)
    lengths = [case.tokens, 0, 1, 63, 64, 300, 17]
    given = [random_inputs(replace(case, tokens=tokens)) for tokens in lengths]

    def tokens_and_pasts() -> tuple[list[Token], list[Tensor]]:
        tokens, pasts = [], []
        for index, (inputs, length) in enumerate(zip(given, lengths, strict=True)):
            fresh = inputs.fresh()
            if index % 2 == 0:
                tokens.append(fresh.token(length))
                pasts += [fresh.keys, fresh.values]
                continue
            count = length // BLOCK_TOKENS + 1
            memory = [torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8) for _ in range(count)]
            blocks = KVBlocks(shape, (KVBlock(shape, one) for one in memory))
            if length:
                write_tokens(blocks, 0, fresh.keys[None, :, :length], fresh.values[None, :, :length], offset)
            tokens.append(int8_token(fresh.hidden, fresh.cos, fresh.sin, blocks, length, offset))
            pasts += memory
        return tokens, pasts

    (apart, pasts_apart), (together, pasts_together) = tokens_and_pasts(), tokens_and_pasts()
    for token in apart:
        step(layer, token, mode, level)
    CompiledLayer(layer).step(together, mode, level)
    for one, other in zip(apart, together, strict=True):
        assert one.out.isfinite().all()
        assert torch.equal(one.out, other.out)
    for past, other_past in zip(pasts_apart, pasts_together, strict=True):
        assert torch.equal(past.view(torch.uint8), other_past.view(torch.uint8))


def test_shapes_that_do_not_fit_are_refused() -> None:
    layer = random_layer(Case())
    with pytest.raises(ValueError, match="4 heads cannot share 3 key heads"):
        replace(layer, key_heads=3)
    with pytest.raises(ValueError, match=r"qkv: expected \[256, 64\] in at most 3 weights, found \[\[128, 64\]"):
        replace(layer, qkv=layer.qkv[:2])
    with pytest.raises(ValueError, match=r"down: expected \[64, 160\] in at most 1 weights, found \[\[32, 160\]\]"):
        replace(layer, down=replace(layer.down, weight=random_layer(Case(hidden=32)).down.weight))
    with pytest.raises(ValueError, match=r"key_norm: expected \[32\], found \[64\]"):
        replace(layer, key_norm=layer.input_norm)
