"""The Triton kernels of the product: what a program computes. How they are launched: kernels/triton_matmul.py.

Every packed byte is loaded once; its two nibbles meet the even and the odd activations in two dots, so nothing is
interleaved. A nibble is not converted to a float, which would take most instructions of the loop, but put into the
mantissa of 1024 (128 in bfloat16), and a subtraction takes that out again, exactly. A code of 8 bits has a byte of its
own, and the activations as they lie. The scale of a group multiplies the group's partial sum in float32, less what the
sum of its activations times its zero point comes to.

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
def _less_128(codes, dtype: tl.constexpr):
    """Return codes of 8 bits, each less 128, in dtype, which holds them exactly."""
    return (codes.to(tl.int32) - 128).to(dtype)


@triton.jit
def _zero(words, n, BITS: tl.constexpr):
    """Return the zero points of rows n, int32, out of the words that they are in."""
    return (words >> ((n % (32 // BITS)) * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _scaled(codes, offset, scale):
    """Return (codes - offset) * scale, in the codes' dtype."""
    return ((codes.to(tl.float32) - offset) * scale).to(codes.dtype)


@triton.jit
def _add_product(total, x, packed, offset, scale, BITS: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, PTX: tl.constexpr):
    """Return total + x @ codes.T for the activations and packed codes of a step, the codes less the middle of theirs.

    With SCALE_WEIGHTS they are scaled before that; else offset and scale are not used.
    """
    if BITS == 4:
        even_codes, odd_codes = _less_8(packed, x.dtype, PTX)
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        if SCALE_WEIGHTS:
            even_codes, odd_codes = _scaled(even_codes, offset, scale), _scaled(odd_codes, offset, scale)
        total = tl.dot(even, tl.trans(even_codes), acc=total, input_precision="ieee")
        total = tl.dot(odd, tl.trans(odd_codes), acc=total, input_precision="ieee")
    else:
        codes = _less_128(packed, x.dtype)
        if SCALE_WEIGHTS:
            codes = _scaled(codes, offset, scale)
        total = tl.dot(x, tl.trans(codes), acc=total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["M", "C", "steps_per_split"])
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
    BITS: tl.constexpr,
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
    step_bytes: tl.constexpr = STEP * BITS // 8
    middle: tl.constexpr = 1 << (BITS - 1)
    byte, code = tl.arange(0, step_bytes), tl.arange(0, STEP)
    codes_rows = codes_NK + from_n[:, None] * row_bytes + byte[None, :]
    x_rows = x_MK + from_m[:, None] * K + code[None, :]
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, STEP))
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        if WHOLE_STEPS:
            packed = tl.load(codes_rows + step * step_bytes)
            x = tl.load(x_rows + step * STEP)
        else:
            packed = tl.load(
                codes_rows + step * step_bytes, mask=(step * step_bytes + byte < row_bytes)[None, :], other=0
            )
            x = tl.load(x_rows + step * STEP, mask=(step * STEP + code < K)[None, :], other=0.0)
        if SCALE_WEIGHTS:
            group = (0 * byte if GROUP == 0 else tl.minimum((step * STEP + 8 // BITS * byte) // GROUP, C - 1))[None, :]
            scale = tl.load(scale_NC + from_n[:, None] * C + group).to(tl.float32)
            offset = tl.zeros((BLOCK_N, 1), dtype=tl.float32)
            if HAS_ZERO:
                words = tl.load(zero_NC + (from_n // (32 // BITS))[:, None] * C + group)
                offset = (_zero(words, from_n[:, None], BITS) - middle).to(tl.float32)
            total = _add_product(total, x, packed, offset, scale, BITS, True, PTX)
        else:
            group = 0 if GROUP == 0 else step * STEP // GROUP
            scale = tl.load(scale_NC + from_n * C + group).to(tl.float32)
            partial = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            partial = _add_product(partial, x, packed, 0, 1, BITS, False, PTX)
            if HAS_ZERO:
                words = tl.load(zero_NC + (from_n // (32 // BITS)) * C + group)
                offset = (_zero(words, from_n, BITS) - middle).to(tl.float32)
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
def sums_kernel(x_MK, sum_MS, K, STEP: tl.constexpr, STEPS: tl.constexpr):
    """The float32 sums of STEPS steps of one row of x: what their zero points are multiplied by."""
    step = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    k = step[:, None] * STEP + tl.arange(0, STEP)[None, :]
    x = tl.load(x_MK + tl.program_id(1).to(tl.int64) * K + k, mask=k < K, other=0.0)
    steps = tl.cdiv(K, STEP)
    place = sum_MS + tl.program_id(1).to(tl.int64) * steps + step
    tl.store(place, tl.sum(x.to(tl.float32), axis=1), mask=step < steps)


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
    codes_NK,
    scale_NC,
    zero_NC,
    out_NK,
    N,
    K,
    C,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """STEP values of one row of the weight, in out's dtype."""
    n = tl.program_id(0)
    step_bytes: tl.constexpr = STEP * BITS // 8
    row_bytes = K // (8 // BITS)
    j = tl.program_id(1) * step_bytes + tl.arange(0, step_bytes)
    inside = j < row_bytes
    packed = tl.load(codes_NK + n.to(tl.int64) * row_bytes + j, mask=inside, other=0)
    group = tl.zeros_like(j) if GROUP == 0 else 8 // BITS * j // GROUP
    scale = tl.load(scale_NC + n * C + group, mask=inside, other=0.0).to(tl.float32)
    zero = tl.full((step_bytes,), 1 << (BITS - 1), dtype=tl.int32)
    if HAS_ZERO:
        zero = _zero(tl.load(zero_NC + (n // (32 // BITS)) * C + group, mask=inside, other=0), n, BITS)
    if BITS == 4:
        even = (((packed & 15).to(tl.int32) - zero) * scale).to(out_NK.dtype.element_ty)
        odd = (((packed >> 4).to(tl.int32) - zero) * scale).to(out_NK.dtype.element_ty)
        values = tl.interleave(even, odd)
    else:
        values = ((packed.to(tl.int32) - zero) * scale).to(out_NK.dtype.element_ty)
    k = tl.program_id(1) * STEP + tl.arange(0, STEP)
    tl.store(out_NK + n.to(tl.int64) * K + k, values, mask=k < K)


@triton.jit(do_not_specialize=["size", "steps"])
def read_kernel(words, sums_P, size, steps, BLOCK: tl.constexpr):
    """The sum of every P-th block of int32 words, of P programs: a read, and as little else as keeps it one."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in range(steps):
        index = (step * tl.num_programs(0) + program) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(words + index, mask=index < size, other=0)
    tl.store(sums_P + program, tl.sum(total))
