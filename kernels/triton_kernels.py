"""The Triton kernels of the int4 product: what a program computes. How they are launched: kernels/triton_matmul.py.

Every packed byte is loaded once; its two nibbles meet the even and the odd activations in two dots, so nothing is
interleaved. A nibble is not converted to a float, which would take most instructions of the loop, but put into the
mantissa of 1024 (128 in bfloat16), and a subtraction takes that out again, exactly. The scale of a group multiplies the
group's partial sum in float32, less what the sum of its activations times its zero point comes to.

Letters: M activations, N outputs, K inputs, C groups in a row, S splits or steps of K.
"""

import triton
import triton.language as tl

# Four bytes in $4; halves of the low nibbles in $0 and $1, of the high ones in $2 and $3, each less 8.
_FP16_LESS_8 = tl.constexpr("""{
.reg .b32 a, b, sixteenth, offset;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
mov.b32 sixteenth, 0x2c002c00;
mov.b32 offset, 0xd480d480;
lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, b, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $2, a, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 $3, b, 0x00f000f0, 0x64006400, 0xea;
mov.b32 a, 0x64086408;
sub.f16x2 $0, $0, a;
sub.f16x2 $1, $1, a;
fma.rn.f16x2 $2, $2, sixteenth, offset;
fma.rn.f16x2 $3, $3, sixteenth, offset;
}""")
_BF16_LESS_8 = tl.constexpr("""{
.reg .b32 a, b, c, d, one, offset;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.u32 c, a, 4;
shr.u32 d, b, 4;
mov.b32 one, 0x3f803f80;
mov.b32 offset, 0xc308c308;
lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, c, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, d, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, offset;
fma.rn.bf16x2 $1, $1, one, offset;
fma.rn.bf16x2 $2, $2, one, offset;
fma.rn.bf16x2 $3, $3, one, offset;
}""")


@triton.jit
def _less_8(pairs, dtype: tl.constexpr, PTX: tl.constexpr):
    """Return the even and the odd codes of packed bytes, each less 8, in dtype."""
    if PTX and dtype == tl.float16:
        even, odd = tl.inline_asm_elementwise(
            _FP16_LESS_8, "=&r,=&r,=&r,=&r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif PTX and dtype == tl.bfloat16:
        even, odd = tl.inline_asm_elementwise(
            _BF16_LESS_8, "=&r,=&r,=&r,=&r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        even = ((pairs & 15).to(tl.int32) - 8).to(dtype)
        odd = ((pairs >> 4).to(tl.int32) - 8).to(dtype)
    return even, odd


@triton.jit
def _zero_less_8(words, n):
    """Return the zero points of rows n less 8, float32, out of the words of eight rows that `words` points to."""
    return (((tl.load(words) >> ((n % 8) * 4).to(tl.int32)) & 15) - 8).to(tl.float32)


@triton.jit
def matmul_kernel(
    x_MK,
    x_sum_MS,
    codes_NK,
    scale_NC,
    zero_NC,
    bias_N,
    out_SMN,
    M,
    N,
    K,
    row_bytes,
    C,
    steps_per_split,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile of one split of x @ W.T, STEP codes of a row at a time. GROUP 0: one group a row.

    The codes of a step are of one group, whose scale multiplies their sum; with SCALE_WEIGHTS they may be of several.
    """
    split = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows past the end read the last one, which keeps masks out of the loop, and are not stored
    from_m, from_n = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    byte, code = tl.arange(0, STEP // 2), tl.arange(0, STEP)
    codes_rows = codes_NK + from_n[:, None] * row_bytes + byte[None, :]
    x_rows = x_MK + from_m[:, None] * K + code[None, :]
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, STEP))
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        if WHOLE_STEPS:
            pairs = tl.load(codes_rows + step * (STEP // 2))
            x = tl.load(x_rows + step * STEP)
        else:
            pairs = tl.load(
                codes_rows + step * (STEP // 2), mask=(step * (STEP // 2) + byte < row_bytes)[None, :], other=0
            )
            x = tl.load(x_rows + step * STEP, mask=(step * STEP + code < K)[None, :], other=0.0)
        even_codes, odd_codes = _less_8(pairs, x_MK.dtype.element_ty, PTX)
        even, odd = tl.split(tl.reshape(x, (BLOCK_M, STEP // 2, 2)))
        if SCALE_WEIGHTS:
            group = (0 * byte if GROUP == 0 else tl.minimum((step * STEP + 2 * byte) // GROUP, C - 1))[None, :]
            scale = tl.load(scale_NC + from_n[:, None] * C + group).to(tl.float32)
            offset = tl.zeros((BLOCK_N, 1), dtype=tl.float32)
            if HAS_ZERO:
                offset = _zero_less_8(zero_NC + (from_n // 8)[:, None] * C + group, from_n[:, None])
            even_codes = ((even_codes.to(tl.float32) - offset) * scale).to(x_MK.dtype.element_ty)
            odd_codes = ((odd_codes.to(tl.float32) - offset) * scale).to(x_MK.dtype.element_ty)
            total = tl.dot(even, tl.trans(even_codes), acc=total, input_precision="ieee")
            total = tl.dot(odd, tl.trans(odd_codes), acc=total, input_precision="ieee")
        else:
            group = 0 if GROUP == 0 else step * STEP // GROUP
            scale = tl.load(scale_NC + from_n * C + group).to(tl.float32)
            partial = tl.dot(even, tl.trans(even_codes), input_precision="ieee")
            partial = tl.dot(odd, tl.trans(odd_codes), acc=partial, input_precision="ieee")
            if HAS_ZERO:
                offset = _zero_less_8(zero_NC + (from_n // 8) * C + group, from_n)
                partial -= tl.load(x_sum_MS + from_m * tl.cdiv(K, STEP) + step)[:, None] * offset[None, :]
            total += partial * scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias_N + from_n).to(tl.float32)[None, :]
    tl.store(
        out_SMN + split.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :],
        total.to(out_SMN.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


@triton.jit
def reduce_kernel(
    partial_SMN, bias_N, out_MN, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Add the splits in order, then the bias."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_SMN + split * size + index, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_N + index % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_MN + index, total.to(out_MN.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    codes_NK, scale_NC, zero_NC, out_NK, N, K, C, GROUP: tl.constexpr, STEP: tl.constexpr, HAS_ZERO: tl.constexpr
):
    """STEP values of one row of the weight, in out's dtype."""
    n = tl.program_id(0)
    j = tl.program_id(1) * (STEP // 2) + tl.arange(0, STEP // 2)
    inside = j < K // 2
    pairs = tl.load(codes_NK + n.to(tl.int64) * (K // 2) + j, mask=inside, other=0)
    group = tl.zeros_like(j) if GROUP == 0 else 2 * j // GROUP
    scale = tl.load(scale_NC + n * C + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.full((STEP // 2,), 8, dtype=tl.int32)
    if HAS_ZERO:
        zero = (tl.load(zero_NC + (n // 8) * C + group, mask=inside, other=0) >> ((n % 8) * 4)) & 15
    even = (((pairs & 15).to(tl.int32) - zero) * scale).to(out_NK.dtype.element_ty)
    odd = (((pairs >> 4).to(tl.int32) - zero) * scale).to(out_NK.dtype.element_ty)
    values = tl.interleave(even, odd)
    k = tl.program_id(1) * STEP + tl.arange(0, STEP)
    tl.store(out_NK + n.to(tl.int64) * K + k, values, mask=k < K)
