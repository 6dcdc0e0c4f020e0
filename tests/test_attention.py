"""Attention over 8-bit keys and values: each instruction set against the naive float32, at odd shapes; NaN around."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.attention import append_tokens, attention
from kernels.cpu_attention import PIECE_TOKENS, CompiledAttention, append_tokens_cpu
from kernels.cpu_matmul import LEVELS, compiled_library, cpu_level
from kernels.kv_block import (
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    MOST_FUSED_QUERIES,
    BlockShape,
    KVBlock,
    KVBlocks,
    KVContext,
    write_tokens,
)
from kernels.reference import attention_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPILED = pytest.mark.skipif(compiled_library() is None, reason="no compiled kernels")
LEVEL_NUMBERS = [pytest.param(n, id=name) for n, name in enumerate(LEVELS) if n <= cpu_level()]


TWO_HEADS = BlockShape(1, 2, 64, 64)


@dataclass(frozen=True)
class Case:
    """A context and its queries."""

    shape: BlockShape = TWO_HEADS
    group: int = 2
    queries: int = 1
    tokens: int = 100
    dtype: torch.dtype = FP32


CASES = [
    Case(),
    Case(tokens=1),
    Case(tokens=PIECE_TOKENS, group=1),
    Case(tokens=PIECE_TOKENS + 1, group=3),
    Case(BlockShape(1, 8, 128, 128), group=4, tokens=700, dtype=BF16),
    Case(BlockShape(2, 3, 80, 40), group=5, tokens=333, queries=3),
    Case(BlockShape(3, 1, 20, 200), group=1, tokens=17, queries=16, dtype=FP16),
    Case(BlockShape(1, 1, 576, 512), group=2, tokens=70),
]


def empty_blocks(shape: BlockShape, tokens: int) -> KVBlocks:
    """Blocks for so many tokens, filled with the bytes of NaN scales."""
    count = -(-tokens // BLOCK_TOKENS)
    return KVBlocks(shape, (KVBlock(shape, torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8)) for _ in range(count)))


def random_context(case: Case, offset: Tensor | None = None) -> KVContext:
    shape = case.shape
    key = 2 * torch.randn(shape.batch, shape.key_heads, case.tokens, shape.key_dim) / shape.key_dim**0.25
    value = torch.randn(shape.batch, shape.key_heads, case.tokens, shape.value_dim)
    blocks = empty_blocks(shape, case.tokens)
    write_tokens(blocks, 0, key if offset is None else key + offset[:, None], value, offset)
    return KVContext(blocks, case.tokens, offset)


def random_query(case: Case) -> Tensor:
    shape = case.shape
    query = torch.randn(shape.batch, case.queries, case.group * shape.key_heads, shape.key_dim, dtype=case.dtype)
    return (2 * query / shape.key_dim**0.25).transpose(1, 2)


def random_mask(case: Case) -> Tensor:
    """Of left padding and of one token that nobody sees: [batch, 1, queries, tokens]; each query sees itself."""
    own = torch.arange(case.tokens - case.queries, case.tokens)[:, None]
    padding = torch.arange(case.shape.batch)[:, None, None, None] * 3
    tokens = torch.arange(case.tokens)
    seen = (tokens >= padding) & (tokens != 1) & (tokens <= own)
    return seen | (tokens == own)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """The rounding of the output's dtype, and of queries to 15 bits.

    An element of a query is off by up to 1 / 32512 of the largest; with the keys of these cases, some 7 long, that
    moves a score by 2.5e-4 in the root mean square. Levels share these queries: see `test_instruction_sets_agree`.
    """
    step = torch.finfo(found.dtype).eps if found.dtype != FP32 else 0.0
    assert found.isfinite().all()
    error = (found.float() - expected).abs().max() / expected.abs().max()
    assert error <= step + 2e-4, float(error)


@COMPILED
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("level", LEVEL_NUMBERS)
def test_compiled_attention_is_the_naive_one(case: Case, level: int) -> None:
    context, query = random_context(case), random_query(case)
    for mask in (None, random_mask(case)):
        attending = CompiledAttention(query, context, 1.0, mask, level)
        attending.attend(0, case.tokens)
        assert_near(attending.result(), attention_reference(query, context, 1.0, mask))


@COMPILED
@pytest.mark.parametrize("level", LEVEL_NUMBERS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_compiled_appending_writes_the_bytes_of_the_reference(level: int, dtype: torch.dtype) -> None:
    shape, tokens = BlockShape(2, 3, 24, 40), 150
    key = (3 * torch.randn(2, tokens, 3, 24)).to(dtype).transpose(1, 2)
    value = torch.randn(2, 3, tokens, 40, dtype=dtype)
    key[0, 0, 5], value[1, 2, 7] = 0, 0
    key[1, 1, 9, 3], value[0, 0, 11, 2], value[0, 0, 12] = torch.inf, torch.nan, 1e-7
    for offset in (None, torch.randn(3, 24)):
        expected, found = empty_blocks(shape, tokens), empty_blocks(shape, tokens)
        write_tokens(expected, 0, key, value, offset)
        for start, stop in ((0, 1), (1, 65), (65, 150)):
            append_tokens_cpu(found, start, key[:, :, start:stop], value[:, :, start:stop], offset, level)
        for a, b in zip(expected, found, strict=True):
            finite = a.key_scale.isfinite(), a.value_scale.isfinite()
            assert torch.equal(finite[0], b.key_scale.isfinite())
            assert torch.equal(finite[1], b.value_scale.isfinite())
            assert torch.equal(a.key_scale[finite[0]], b.key_scale[finite[0]])
            assert torch.equal(a.key_codes[finite[0]], b.key_codes[finite[0]])
            assert torch.equal(a.value_codes[finite[1]], b.value_codes[finite[1]])
            assert torch.equal(a.value_scale[finite[1]], b.value_scale[finite[1]])


@COMPILED
def test_instruction_sets_agree() -> None:
    """To float32 sums; VNNI has weights of 16 bits, off by 2**-17 of the largest; over 500 tokens 6e-5."""
    case = Case(BlockShape(1, 2, 100, 72), tokens=500)
    context, query = random_context(case), random_query(case)
    found = []
    for level in range(min(2, cpu_level()) + 1):
        attending = CompiledAttention(query, context, 1.0, None, level)
        attending.attend(0, case.tokens)
        found.append(attending.result())
    for other, most in zip(found[1:], (1e-6, 1e-4), strict=False):
        assert (other - found[0]).abs().max() <= most * found[0].abs().max()


@pytest.mark.parametrize("queries", [1, 5, MOST_FUSED_QUERIES + 1, 300])
def test_parts_of_the_context_give_the_bits_of_the_whole(queries: int) -> None:
    case = Case(BlockShape(1, 2, 32, 48), tokens=2 * CHUNK_TOKENS + 77, queries=queries)
    context, query = random_context(case), random_query(case)
    whole = attention(query, context, 1.0)
    parts = [(0, CHUNK_TOKENS), (CHUNK_TOKENS, 2 * CHUNK_TOKENS), (2 * CHUNK_TOKENS, case.tokens)]
    assert torch.equal(attention(query, context, 1.0, parts=parts), whole)
    assert_near(whole, attention_reference(query, context, 1.0))


@COMPILED
def test_a_query_does_not_see_who_else_asks_nor_how_many_threads_answer() -> None:
    case = Case(BlockShape(2, 2, 64, 64), tokens=600, queries=7, dtype=BF16)
    context, query = random_context(case), random_query(case)
    together = attention(query, context, 1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(attention(query, context, 1.0), together)
    finally:
        torch.set_num_threads(threads)
    for n in range(case.queries):
        tokens = case.tokens - case.queries + n + 1
        alone = attention(query[:, :, n : n + 1], KVContext(context.blocks, tokens), 1.0)
        assert torch.equal(alone[:, :, 0], together[:, :, n])


@pytest.mark.parametrize("queries", [3, 40])
def test_masks_hide_tokens_even_of_nan_and_who_sees_nothing_gets_zeros(queries: int) -> None:
    case = Case(BlockShape(2, 2, 32, 32), tokens=90, queries=queries)
    context, query, mask = random_context(case), random_query(case), random_mask(case)
    expected = attention(query, context, 1.0, mask)
    assert_near(expected, attention_reference(query, context, 1.0, mask))
    mask[1, :, 1] = False
    blind = attention(query, context, 1.0, mask)
    assert (blind[1, :, 1] == 0).all()
    assert torch.equal(blind[0], expected[0])
    if queries <= MOST_FUSED_QUERIES and compiled_library() is not None:
        context.blocks[0].value_scale[:, :, 1] = torch.nan
        context.blocks[0].key_scale[:, :, 1] = torch.nan
        assert torch.equal(attention(query, context, 1.0, mask), blind)


def test_a_chunk_that_a_query_does_not_see_counts_nothing() -> None:
    case = Case(BlockShape(1, 2, 32, 32), tokens=CHUNK_TOKENS + 100, queries=MOST_FUSED_QUERIES + 4)
    context, query, mask = random_context(case), random_query(case), random_mask(case)
    mask[..., 3, : case.tokens - case.queries + 3] = False  # itself alone
    mask[..., 4, CHUNK_TOKENS:] = False
    assert_near(attention(query, context, 1.0, mask), attention_reference(query, context, 1.0, mask))


@COMPILED
def test_a_token_that_is_no_number_is_seen() -> None:
    case = Case()
    context, query = random_context(case), random_query(case)
    context.blocks[0].value_scale[0, 0, 3] = torch.nan
    assert attention(query, context, 1.0)[:, : case.group].isnan().all()
    assert attention(query, context, 1.0)[:, case.group :].isfinite().all()
    context.blocks[0].key_scale[0, 1, 3] = torch.nan
    assert attention(query, context, 1.0).isnan().all()


def test_heads_that_cannot_share_are_refused_and_appending_takes_any_strides() -> None:
    case = Case(group=1)
    context = random_context(case)
    with pytest.raises(ValueError, match="3 heads cannot share 2 key heads evenly"):
        attention(torch.randn(1, 3, 1, 64), context, 1.0)
    key, value = torch.randn(1, 2, 64, 5).transpose(2, 3), torch.randn(1, 2, 5, 64)
    found, expected = empty_blocks(case.shape, 5), empty_blocks(case.shape, 5)
    append_tokens(found, 0, key, value)
    write_tokens(expected, 0, key, value)
    assert torch.equal(found[0].memory, expected[0].memory)
