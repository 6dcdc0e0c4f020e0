"""The Triton kernels of 8-bit keys and values: what a program computes. Launched by kernels/triton_attention.py.

A program takes some steps of the context for one key head of one sequence and the queries that share it. Queries are
rounded to 15 bits, as on the CPU, 128 * high + low: keys meet them as they are, in two products of integers, and no key
is ever converted. Values become halves, exactly; the weights that they meet are scaled by their tokens' scales, over
the largest of the step, so that halves hold them whatever the range of the model's dtype.

Where a block lies comes from a table of addresses; what is in it is in kernels/kv_block.py, as are the letters.
S splits of those that one launch takes.
"""

import triton
import triton.language as tl

_QUERY_MAX = tl.constexpr(127.0 * 128.0)
_CODE_MAX = tl.constexpr(127.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it loses its fraction, to the nearest even

# Four signed bytes in $2 as halves in $0 and $1: 1024 + (byte ^ 128) is 0x6400 | (byte ^ 128), and 1152 is 0x6480.
_HALVES = tl.constexpr("""{
.reg .b32 a, magic;
mov.b32 magic, 0x64646464;
xor.b32 a, $2, 0x80808080;
prmt.b32 $0, a, magic, 0x4140;
prmt.b32 $1, a, magic, 0x4342;
mov.b32 a, 0x64806480;
sub.f16x2 $0, $0, a;
sub.f16x2 $1, $1, a;
}""")


@triton.jit
def _halves(codes, PTX: tl.constexpr):
    """Return int8 codes as float16."""
    if PTX:
        values = tl.inline_asm_elementwise(_HALVES, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        values = codes.to(tl.float16)
    return values


@triton.jit
def _nearest(x):
    """Return x rounded to the nearest integer, halves to the even one; |x| below 2**22."""
    return (x + _ROUND) - _ROUND


@triton.jit
def part(address, start, kind: tl.constexpr):
    """Return a pointer to a part of what begins at an address; the part begins at a multiple of 16 bytes."""
    return tl.multiple_of((address + start).to(tl.pointer_type(kind)), 16)


@triton.jit(
    do_not_specialize=["batch", "N", "tokens", "first_split", "steps_per_split", "mask_stride_B", "mask_stride_N"]
)
def attention_kernel(
    query_BHND,
    addresses,
    mask_BNT,
    out_SBNHD,
    logsum_SBNH,
    query_stride_B,
    query_stride_H,
    query_stride_N,
    mask_stride_B,
    mask_stride_N,
    mask_stride_T,
    scaling_log2,
    batch,
    key_heads,
    N,
    tokens,
    first_split,
    steps_per_split,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PTX: tl.constexpr,
    TOKENS_IN_MEMORY: tl.constexpr,
):
    """BLOCK_M queries of one key head over one split: their mean value, and the logarithm of their sum to base 2.

    The table of addresses begins with the first block of the first split. With TOKENS_IN_MEMORY `tokens` points to the
    number of those before the one query, and splits behind it find 0, the logarithm of whose sum is minus infinity.
    """
    if TOKENS_IN_MEMORY:
        tokens = tl.load(tokens) + 1
    sequence, key_head = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < N * GROUP
    n, head = row // GROUP, key_head * GROUP + row % GROUP
    heads = key_heads * GROUP

    d_key, d_value = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    query = tl.load(
        query_BHND
        + sequence.to(tl.int64) * query_stride_B
        + (head * query_stride_H + n * query_stride_N)[:, None]
        + d_key[None, :],
        mask=inside[:, None] & (d_key < KEY_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    top = tl.max(tl.abs(query), axis=1)
    steps = tl.where(top > 0, _QUERY_MAX / tl.where(top > 0, top, 1.0), 0.0)
    number = _nearest(query * steps[:, None])
    high = _nearest(number * 0.0078125)
    low = (number - 128.0 * high).to(tl.int8)
    high = high.to(tl.int8)
    # a query that is no number has none in its scale: the maximum above passes over NaN
    query_scale = (top / _QUERY_MAX + tl.sum(query * 0.0, axis=1)) * scaling_log2

    largest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, VALUE_BLOCK), dtype=tl.float32)
    rows = batch * key_heads * BLOCK_TOKENS
    before = first_split * steps_per_split
    first = before + split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(tokens, STEP))
    for step in range(first, last):
        address = tl.load(addresses + (step - before) * STEP // BLOCK_TOKENS)
        own = tl.program_id(0) * BLOCK_TOKENS + step * STEP % BLOCK_TOKENS + tl.arange(0, STEP)
        token = step * STEP + tl.arange(0, STEP)
        held = token < tokens
        keys = part(address, 0, tl.int8) + own[:, None] * KEY_DIM + d_key[None, :]
        if KEY_DIM == KEY_BLOCK:  # noqa: SIM108 - of constants, which a conditional expression is not for Triton
            key = tl.load(keys)
        else:
            key = tl.load(keys, mask=(d_key < KEY_DIM)[None, :], other=0)
        scales = address + rows.to(tl.int64) * (KEY_DIM + VALUE_DIM)
        key_scale = tl.load(part(scales, 0, tl.bfloat16) + own, mask=held, other=0.0).to(tl.float32)
        score = tl.dot(high, tl.trans(key), out_dtype=tl.int32) * 128
        score = tl.dot(low, tl.trans(key), acc=score, out_dtype=tl.int32)
        if HAS_MASK:
            places = mask_BNT + sequence.to(tl.int64) * mask_stride_B + n[:, None].to(tl.int64) * mask_stride_N
            seen = inside[:, None] & held[None, :]
            seen = tl.load(places + token[None, :] * mask_stride_T, mask=seen, other=0) != 0
        else:
            seen = token[None, :] <= (tokens - N + n)[:, None]
        score = tl.where(seen, score.to(tl.float32) * query_scale[:, None] * key_scale[None, :], -float("inf"))
        new = tl.maximum(largest, tl.max(score, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)
        faded = tl.exp2(largest - base)
        weight = tl.exp2(score - base[:, None])
        total = total * faded + tl.sum(weight, axis=1)

        values = part(address, rows.to(tl.int64) * KEY_DIM, tl.int8) + own[:, None] * VALUE_DIM + d_value[None, :]
        if VALUE_DIM == VALUE_BLOCK:
            value = tl.load(values)
        else:
            value = tl.load(values, mask=(d_value < VALUE_DIM)[None, :], other=0)
        scale = tl.load(part(scales, rows * 2, tl.bfloat16) + own, mask=held, other=0.0).to(tl.float32)
        most = tl.max(scale)
        share = tl.where(scale == 0, 0.0, scale / most)
        weight = tl.where(seen, weight * share[None, :], 0.0).to(tl.float16)
        mean = mean * faded[:, None] + tl.dot(weight, _halves(value, PTX)) * most
        largest = new

    mean = tl.where(total == 0, 0.0, 1 / total)[:, None] * mean
    place = ((split * batch + sequence).to(tl.int64) * N + n) * heads + head
    tl.store(
        out_SBNHD + place[:, None] * VALUE_DIM + d_value[None, :],
        mean.to(out_SBNHD.dtype.element_ty),
        mask=inside[:, None] & (d_value < VALUE_DIM)[None, :],
    )
    tl.store(logsum_SBNH + place, largest + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["R", "splits"])
def merge_kernel(part_SRD, logsum_SR, out_RD, R, splits, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr):
    """One of R rows: the splits' means, weighed by their sums, added in order; the first logsum becomes that of all.

    `out_RD` may be the first split's means.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, VALUE_BLOCK)
    largest = -float("inf")
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(logsum_SR + split * R + row))
    base = tl.where(largest == -float("inf"), 0.0, largest)
    weights = 0.0
    total = tl.zeros((VALUE_BLOCK,), dtype=tl.float32)
    for split in range(splits):
        weight = tl.exp2(tl.load(logsum_SR + split * R + row) - base)
        part = tl.load(part_SRD + (split * R + row) * VALUE_DIM + d, mask=d < VALUE_DIM, other=0.0)
        weights += weight
        total += weight * part
    total = tl.where(weights == 0, 0.0, total / weights)
    tl.store(logsum_SR + row, base + tl.log2(weights))
    tl.store(out_RD + row * VALUE_DIM + d, total.to(out_RD.dtype.element_ty), mask=d < VALUE_DIM)


@triton.jit
def store_codes(x, address, codes_byte, scale_byte, row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write float32 x [BLOCK], of which DIM count, the others 0, as the codes and the scale of a row of a block."""
    exact = tl.div_rn(tl.max(tl.abs(x)), _CODE_MAX)
    # bfloat16, to the nearest even; NaN where an element is no number
    bits = exact.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    broken = tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1)) > 0
    bits = tl.where(broken, 0x7FC0, bits)
    scale = (bits << 16).to(tl.float32, bitcast=True)
    codes = _nearest(tl.div_rn(x, tl.where(scale > 0, scale, 1.0)))
    codes = tl.where(scale > 0, tl.minimum(tl.maximum(codes, -_CODE_MAX), _CODE_MAX), 0.0)
    d = tl.arange(0, BLOCK)
    tl.store(part(address, codes_byte, tl.int8) + row * DIM + d, codes.to(tl.int8), mask=d < DIM)
    tl.store(part(address, scale_byte, tl.int16) + row, bits.to(tl.int16))


@triton.jit(do_not_specialize=["start"])
def append_kernel(
    x_BKND,
    offset_KD,
    addresses,
    stride_B,
    stride_K,
    stride_N,
    key_heads,
    start,
    codes_byte,
    scale_byte,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """One token of one key head: its codes and its scale, which begin so many bytes into the block."""
    sequence, key_head = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads
    n = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < DIM
    place = x_BKND + sequence.to(tl.int64) * stride_B + key_head * stride_K + n.to(tl.int64) * stride_N
    x = tl.load(place + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        x -= tl.load(offset_KD + key_head * DIM + d, mask=inside, other=0.0)
    token = start + n
    address = tl.load(addresses + token // BLOCK_TOKENS)
    row = tl.program_id(0) * BLOCK_TOKENS + token % BLOCK_TOKENS
    store_codes(x, address, codes_byte, scale_byte, row, DIM, BLOCK)
