"""The GPU's attention over 8-bit keys and values, in Triton's interpreter; its machine code, compiled without a GPU.

Triton decides when it is imported whether it interprets, so the interpreter has a process of its own.
"""

from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_attention import BF16, CASES, FP16, FP32, Case, empty_blocks, random_context, random_mask, random_query
from torch import Tensor

from kernels.ahead_of_time import compile_one, configurations
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
from kernels.triton_attention import TritonAttention, append_tokens_triton
from kernels.triton_tuning import MOST_SPLITS, SPLIT_TOKENS, split_tokens

SPLIT_CASES = [
    Case(tokens=2 * SPLIT_TOKENS + 77, group=3),
    Case(tokens=300, queries=7),
    Case(tokens=64, queries=16),
    Case(tokens=90, queries=MOST_FUSED_QUERIES + 1, group=3),
    Case(BlockShape(2, 1, 32, 32), tokens=2 * CHUNK_TOKENS + 9, queries=MOST_FUSED_QUERIES + 9),
]
ODD = Case(BlockShape(2, 2, 64, 64), tokens=600, queries=7)


def poisoned(*arguments: Any, **options: Any) -> Tensor:
    return torch.full(*arguments[:1] if len(arguments) == 1 else (arguments,), float("nan"), **options)


def interpreted(query: Tensor, context: KVContext, mask: Tensor | None = None) -> Tensor:
    with patch("kernels.triton_attention.torch.empty", poisoned):
        attending = TritonAttention(query, context, 1.0, mask)
        attending.attend(0, context.tokens)
        return attending.result()


def interpreted_parts(queries: int) -> None:
    """Assert that a context of which two chunks are in memory at once, in turn, gives the bits of a whole one."""
    torch.manual_seed(0)
    case = Case(BlockShape(2, 1, 32, 32), tokens=3 * CHUNK_TOKENS + 77, queries=queries)
    context, query, mask = random_context(case), random_query(case), random_mask(case)
    whole = KVBlocks(case.shape, list(context.blocks))
    chunk_blocks = CHUNK_TOKENS // BLOCK_TOKENS
    slots = [[torch.empty_like(block.memory) for block in list(whole)[:chunk_blocks]] for _ in range(2)]
    for seen in (None, mask):
        expected = interpreted(query, context, seen)
        with patch("kernels.triton_attention.torch.empty", poisoned):
            attending = TritonAttention(query, KVContext(context.blocks, case.tokens), 1.0, seen)
            for index in range(len(whole)):
                context.blocks.place(index, None)
            for number, first in enumerate(range(0, case.tokens, CHUNK_TOKENS)):
                lent = range(number * chunk_blocks, min((number + 1) * chunk_blocks, len(whole)))
                for index, memory in zip(lent, slots[number % 2], strict=False):
                    context.blocks.place(index, KVBlock(case.shape, memory.copy_(whole[index].memory)))
                attending.attend(first, min(first + CHUNK_TOKENS, case.tokens))
                for index in lent:
                    context.blocks.place(index, None)
            assert torch.equal(attending.result(), expected)
        for index, block in enumerate(whole):
            context.blocks.place(index, block)


def interpreted_errors(case: Case) -> list[float]:
    """Return the largest error over the largest value, without and with a mask."""
    torch.manual_seed(0)
    context, query, found = random_context(case), random_query(case), []
    for mask in (None, random_mask(case)):
        expected = attention_reference(query, context, 1.0, mask)
        ours = interpreted(query, context, mask)
        assert ours.dtype == query.dtype
        found.append(float((ours.float() - expected).abs().max() / expected.abs().max()))
    return found


def interpreted_queries_alone() -> None:
    """Assert that a query gets the same bits whoever asks with it, where the context is split in the same places."""
    torch.manual_seed(0)
    context, query = random_context(ODD), random_query(ODD)
    together = interpreted(query, context)
    for n in range(ODD.queries):
        tokens = ODD.tokens - ODD.queries + n + 1
        alone = interpreted(query[:, :, n : n + 1], KVContext(context.blocks, tokens))
        assert torch.equal(alone[:, :, 0], together[:, :, n])


def interpreted_masks() -> None:
    """Assert that hidden tokens count nothing even where they are NaN, and that who sees nothing gets zeros."""
    torch.manual_seed(0)
    context, query, mask = random_context(ODD), random_query(ODD), random_mask(ODD)
    mask[1, :, 1] = False
    blind = interpreted(query, context, mask)
    assert (blind[1, :, 1] == 0).all()
    assert blind.isfinite().all()


def interpreted_appending(dtype: torch.dtype) -> None:
    """Assert the bytes of the reference, in one piece and in several, NaN and infinity in them."""
    torch.manual_seed(0)
    shape, tokens = BlockShape(2, 2, 24, 40), 70
    key = (3 * torch.randn(2, tokens, 2, 24)).to(dtype).transpose(1, 2)
    value = torch.randn(2, 2, tokens, 40, dtype=dtype)
    key[0, 0, 5], value[1, 1, 7] = 0, 0
    key[1, 1, 9, 3], value[0, 0, 11, 2] = torch.inf, torch.nan
    for offset in (None, torch.randn(2, 24)) if dtype == FP32 else (torch.randn(2, 24),):
        expected, found = empty_blocks(shape, tokens), empty_blocks(shape, tokens)
        write_tokens(expected, 0, key, value, offset)
        for start, stop in ((0, 1), (1, 65), (65, 70)):
            append_tokens_triton(found, start, key[:, :, start:stop], value[:, :, start:stop], offset)
        for a, b in zip(expected, found, strict=True):
            for codes, scale in (("key_codes", "key_scale"), ("value_codes", "value_scale")):
                finite = getattr(a, scale).isfinite()
                assert torch.equal(finite, getattr(b, scale).isfinite())
                assert torch.equal(getattr(a, scale)[finite], getattr(b, scale)[finite])
                assert torch.equal(getattr(a, codes)[finite], getattr(b, codes)[finite])


@pytest.mark.parametrize("case", [*CASES, *SPLIT_CASES], ids=str)
def test_interpreted_attention_is_the_naive_one(interpreter: ProcessPoolExecutor, case: Case) -> None:
    """But for the rounding of queries to 15 bits, see tests/test_attention.py, and of weights to float16."""
    step = torch.finfo(case.dtype).eps if case.dtype != FP32 else 0.0
    for error in interpreter.submit(interpreted_errors, case).result(timeout=120):
        assert error <= step + 1e-3


def test_interpreted_queries_do_not_see_who_else_asks(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_queries_alone).result(timeout=120)


@pytest.mark.parametrize("queries", [1, 3, MOST_FUSED_QUERIES + 4])
def test_interpreted_parts_of_a_context_give_the_bits_of_the_whole(
    interpreter: ProcessPoolExecutor, queries: int
) -> None:
    interpreter.submit(interpreted_parts, queries).result(timeout=120)


def test_interpreted_masks_hide_tokens(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_masks).result(timeout=120)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_interpreted_appending_writes_the_bytes_of_the_reference(
    interpreter: ProcessPoolExecutor, dtype: torch.dtype
) -> None:
    interpreter.submit(interpreted_appending, dtype).result(timeout=120)


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 16384, 16385, 1 << 20])
def test_splits_are_whole_steps_and_few(tokens: int) -> None:
    split = split_tokens(tokens)
    assert CHUNK_TOKENS % split == split % SPLIT_TOKENS == 0
    assert split == CHUNK_TOKENS or -(-tokens // split) <= MOST_SPLITS


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_attention_compiles_ahead_of_time_without_spilling(capability: int) -> None:
    named = (c for c in configurations(capability) if c.name == "attention of 16 rows, bf16, heads of 128, masked")
    compiled = compile_one(next(named), capability)
    assert compiled.failures(fused=True, most_instructions=None) == []
    assert compiled.tensor_core_instructions
