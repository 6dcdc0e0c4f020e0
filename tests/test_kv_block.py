"""The block of 8-bit keys and values: codes against float64, bytes independent of how a context is cut, its size."""

import pytest
import torch
from torch import Tensor

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
from kernels.reference import attention_reference

SHAPES = [BlockShape(1, 1, 8, 8), BlockShape(2, 3, 24, 40), BlockShape(1, 8, 128, 128)]


def empty_blocks(shape: BlockShape, tokens: int) -> KVBlocks:
    """Blocks for so many tokens, filled with the bytes of NaN scales."""
    count = -(-tokens // BLOCK_TOKENS)
    return KVBlocks(shape, (KVBlock(shape, torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8)) for _ in range(count)))


def random_tokens(shape: BlockShape, tokens: int) -> tuple[Tensor, Tensor]:
    key = torch.randn(shape.batch, shape.key_heads, tokens, shape.key_dim)
    value = torch.randn(shape.batch, shape.key_heads, tokens, shape.value_dim)
    return key, value


def context_of(shape: BlockShape, tokens: int, offset: Tensor | None = None) -> tuple[KVContext, Tensor, Tensor]:
    key, value = random_tokens(shape, tokens)
    if offset is not None:
        key += offset[:, None]
    blocks = empty_blocks(shape, tokens)
    write_tokens(blocks, 0, key, value, offset)
    return KVContext(blocks, tokens, offset), key, value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_every_element_is_within_half_a_step(shape: BlockShape, tokens: int) -> None:
    context, key, value = context_of(shape, tokens)
    for found, true in zip(dequantize_blocks(context), (key, value), strict=True):
        step = true.double().abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)
        assert ((found.double() - true.double()).abs() <= step / 2).all()


def test_an_offset_is_taken_off_and_put_back() -> None:
    shape = SHAPES[1]
    offset = 100 * torch.randn(shape.key_heads, shape.key_dim)
    context, key, _ = context_of(shape, 130, offset)
    plain = empty_blocks(shape, 130)
    write_tokens(plain, 0, key, key.new_zeros(*key.shape[:3], shape.value_dim))
    error = (dequantize_blocks(context)[0] - key).abs().max()
    assert error < 0.03
    assert (dequantize_blocks(KVContext(plain, 130))[0] - key).abs().max() > 10 * error


def test_the_bytes_do_not_depend_on_how_the_context_was_cut() -> None:
    shape, tokens = SHAPES[1], 150
    key, value = random_tokens(shape, tokens)
    whole, pieces = empty_blocks(shape, tokens), empty_blocks(shape, tokens)
    write_tokens(whole, 0, key, value)
    for start, stop in ((0, 1), (1, 63), (63, 64), (64, 149), (149, 150)):
        write_tokens(pieces, start, key[:, :, start:stop], value[:, :, start:stop])
    assert all(torch.equal(a.memory, b.memory) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize(("bad", "finite"), [(torch.nan, False), (torch.inf, False), (0.0, True), (1e-38, True)])
def test_what_is_no_number_stays_none_and_zeros_stay_zero(bad: float, finite: bool) -> None:
    x = torch.zeros(1, 1, 2, 8)
    x[0, 0, 1, 3] = bad
    codes, scale = quantize_tokens(x)
    dequantized = codes.float() * scale[..., None].float()
    assert (dequantized[0, 0, 0] == 0).all()
    assert bool(dequantized[0, 0, 1].isfinite().all()) is finite


@pytest.mark.parametrize("dim", [64, 128])
def test_a_full_block_takes_at_most_53_hundredths_of_bfloat16(dim: int) -> None:
    shape = BlockShape(1, 8, dim, dim)
    assert shape.nbytes / (2 * 2 * dim * shape.key_heads * BLOCK_TOKENS) <= 0.53


@pytest.mark.parametrize("group", [1, 3])
def test_the_reference_is_torchs_attention_and_does_not_see_the_offset(group: int) -> None:
    shape, tokens, queries = BlockShape(2, 2, 24, 16), 100, 3
    offset = torch.randn(shape.key_heads, shape.key_dim)
    context, _, _ = context_of(shape, tokens, offset)
    query = torch.randn(shape.batch, group * shape.key_heads, queries, shape.key_dim)
    found = attention_reference(query, context, 0.2)
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in dequantize_blocks(context))
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), keys, values, mask, scale=0.2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    without = attention_reference(query, KVContext(context.blocks, tokens), 0.2)
    torch.testing.assert_close(found, without, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BlockShape(1, 0, 8, 8), "expected at least 1 of each"),
        (lambda: KVBlock(SHAPES[0], torch.zeros(8, dtype=torch.uint8)), "memory: expected contiguous uint8"),
        (lambda: KVContext(empty_blocks(SHAPES[0], 64), 65), "65 tokens in 1 blocks of 64"),
        (lambda: KVBlocks(SHAPES[0], empty_blocks(SHAPES[1], 1)), "a block of BlockShape.* among those of"),
        (lambda: KVContext(empty_blocks(SHAPES[0], 1), 1, torch.zeros(8)), r"key_offset: expected float32 \(1, 8\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()  # type: ignore[operator]


def test_addresses_on_a_device_are_copied_once_for_the_places_that_blocks_are_in() -> None:
    def block() -> KVBlock:
        return KVBlock(SHAPES[0], torch.empty(SHAPES[0].nbytes, dtype=torch.uint8))

    blocks = KVBlocks(SHAPES[0], [block() for _ in range(3)])
    there = torch.device("cpu")
    held = blocks.device_addresses(there)
    assert held.tolist() == list(blocks.addresses)
    blocks.truncate(3)  # a token was taken back, no block
    assert blocks.device_addresses(there) is held
    blocks.truncate(2)
    assert blocks.device_addresses(there).tolist() == list(blocks.addresses)
    elsewhere = blocks.device_addresses(torch.device("meta"))
    assert elsewhere.device.type == "meta"
    first, other = blocks[0], block()
    tables = []
    for lent in (first, other, first, other):
        blocks.place(0, lent)
        tables.append(blocks.device_addresses(there, 0, 1))
        assert tables[-1].tolist() == [lent.memory.data_ptr()]
    assert tables[0] is tables[2]
    assert tables[1] is tables[3]
    assert blocks.device_addresses(there, 1).tolist() == list(blocks.addresses)[1:]
