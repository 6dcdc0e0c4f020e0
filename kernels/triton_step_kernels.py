"""The Triton kernels of a decode step beside its products: what a program computes. Launched by kernels/triton_step.py.

They round where transformers' modules do: a norm and a rotation are computed in float32, but each of their products is
of the activations' dtype. D elements of a vector, H heads, K key heads, S splits of the past.
"""

import triton
import triton.language as tl

from kernels.triton_attention_kernels import part, store_codes


@triton.jit
def _copy(source, target, index, size):
    tl.store(target + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit(do_not_specialize=["tokens", "entries"], do_not_specialize_on_alignment=["hidden_D", "cos", "sin", "past"])
def load_kernel(
    hidden_D,
    cos,
    sin,
    past,
    tokens,
    hidden_in_room_D,
    cos_in_room,
    sin_in_room,
    table,
    tokens_in_room,
    hidden,
    rotary,
    entries,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of everything that a step is given, into the room; `tokens` comes with the launch."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _copy(hidden_D, hidden_in_room_D, index, hidden)
    _copy(cos, cos_in_room, index, rotary)
    _copy(sin, sin_in_room, index, rotary)
    _copy(past, table, index, entries)
    if tl.program_id(0) == 0:
        tl.store(tokens_in_room, tokens)


@triton.jit
def _normed(x, share, norm_D, d, inside, kind: tl.constexpr):
    """Return x * share, rounded to `kind`, times a norm's weights, rounded too; float32."""
    weight = tl.load(norm_D + d, mask=inside, other=0.0).to(tl.float32)
    return ((x * share).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)


@triton.jit
def norm_kernel(
    x_D, added_D, norm_D, sum_D, out_D, epsilon, D: tl.constexpr, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr
):
    """The norm of x, or of x + added, which is then written to `sum`, by the root of the mean square."""
    d = tl.arange(0, BLOCK)
    inside = d < D
    kind: tl.constexpr = out_D.dtype.element_ty
    x = tl.load(x_D + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        rounded = (x + tl.load(added_D + d, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(sum_D + d, rounded, mask=inside)
        x = rounded.to(tl.float32)
    share = tl.rsqrt(tl.sum(x * x) / D + epsilon)
    tl.store(out_D + d, _normed(x, share, norm_D, d, inside, kind).to(kind), mask=inside)


@triton.jit
def add_kernel(x_D, y_D, out_D, size, BLOCK: tl.constexpr):
    """BLOCK elements of x + y."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_D + index, mask=index < size, other=0.0).to(tl.float32)
    y = tl.load(y_D + index, mask=index < size, other=0.0).to(tl.float32)
    tl.store(out_D + index, (x + y).to(out_D.dtype.element_ty), mask=index < size)


@triton.jit
def gate_kernel(gate_up_D, out_D, size, BLOCK: tl.constexpr):
    """BLOCK elements of silu(gate) * up, of which `size` elements of each lie one behind the other."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kind: tl.constexpr = out_D.dtype.element_ty
    gate = tl.load(gate_up_D + index, mask=index < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up_D + size + index, mask=index < size, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out_D + index, (opened * up).to(kind), mask=index < size)


@triton.jit
def _rotated(
    x_D,
    norm_D,
    cos,
    sin,
    epsilon,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Return a head [BLOCK], its norm taken if it has one, its first ROTARY elements rotated, the halves paired."""
    kind: tl.constexpr = x_D.dtype.element_ty
    half: tl.constexpr = ROTARY // 2
    d = tl.arange(0, BLOCK)
    inside, turned = d < DIM, d < ROTARY
    partner = tl.where(d < half, d + half, d - half)
    x = tl.load(x_D + d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_D + partner, mask=turned, other=0.0).to(tl.float32)
    if HAS_NORM:
        share = tl.rsqrt(tl.sum(x * x) / DIM + epsilon)
        x = _normed(x, share, norm_D, d, inside, kind)
        other = _normed(other, share, norm_D, partner, turned, kind)
    other = tl.where(d < half, -other, other)
    straight = x * tl.load(cos + d, mask=turned, other=0.0).to(tl.float32)
    crossed = other * tl.load(sin + d, mask=turned, other=0.0).to(tl.float32)
    return tl.where(turned, straight.to(kind).to(tl.float32) + crossed.to(kind).to(tl.float32), x).to(kind)


@triton.jit
def place_kernel(
    qkv_HD,
    query_norm_D,
    key_norm_D,
    cos,
    sin,
    offset_KD,
    table,
    tokens_in_room,
    query_HD,
    epsilon,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_QUERY_NORM: tl.constexpr,
    HAS_KEY_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    INT8: tl.constexpr,
):
    """One head of the new token: a query to `query`, a key or a value behind the past, as codes or as it is."""
    head = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < DIM
    kind: tl.constexpr = qkv_HD.dtype.element_ty
    if head < HEADS:
        query = _rotated(qkv_HD + head * DIM, query_norm_D, cos, sin, epsilon, DIM, ROTARY, BLOCK, HAS_QUERY_NORM)
        tl.store(query_HD + head * DIM + d, query, mask=inside)
    else:
        of_values, key_head = (head - HEADS) // KEY_HEADS, (head - HEADS) % KEY_HEADS
        x = tl.load(qkv_HD + head * DIM + d, mask=inside, other=0.0)
        if of_values == 0:
            x = _rotated(qkv_HD + head * DIM, key_norm_D, cos, sin, epsilon, DIM, ROTARY, BLOCK, HAS_KEY_NORM)
        token = tl.load(tokens_in_room)
        if INT8:
            rows: tl.constexpr = KEY_HEADS * BLOCK_TOKENS
            x = x.to(tl.float32)
            if HAS_OFFSET:  # noqa: SIM102 - this is known when it is compiled, what follows is not
                if of_values == 0:
                    x -= tl.load(offset_KD + key_head * DIM + d, mask=inside, other=0.0)
            address = tl.load(table + token // BLOCK_TOKENS)
            row = key_head * BLOCK_TOKENS + token % BLOCK_TOKENS
            scales_byte = 2 * rows * DIM + of_values * 2 * rows
            store_codes(x, address, of_values * rows * DIM, scales_byte, row, DIM, BLOCK)
        else:
            capacity = tl.load(table + 2)
            past = part(tl.load(table + of_values), 0, kind)
            tl.store(past + (key_head * capacity + token) * DIM + d, x, mask=inside)


@triton.jit(do_not_specialize=["steps_per_split"])
def dense_attention_kernel(
    query_HD,
    table,
    tokens_in_room,
    out_SHD,
    logsum_SH,
    scaling_log2,
    steps_per_split,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """BLOCK_M of the queries that share a key head over one split: their mean value, and the logarithm of their sum.

    That is to base 2. A split behind the tokens finds 0, and minus infinity.
    """
    key_head, split = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < GROUP
    head = key_head * GROUP + row
    d = tl.arange(0, BLOCK)
    kind: tl.constexpr = query_HD.dtype.element_ty
    query = tl.load(query_HD + head[:, None] * DIM + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
    tokens = tl.load(tokens_in_room) + 1
    before = key_head * tl.load(table + 2)
    keys, values = part(tl.load(table), 0, kind), part(tl.load(table + 1), 0, kind)

    largest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(tokens, STEP))
    for step in range(first, last):
        token = step * STEP + tl.arange(0, STEP)
        held = token < tokens
        place = (before + token)[:, None] * DIM + d[None, :]
        there = held[:, None] & (d < DIM)[None, :]
        key = tl.load(keys + place, mask=there, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling_log2
        score = tl.where(held[None, :], score, -float("inf"))
        new = tl.maximum(largest, tl.max(score, axis=1))
        faded, weight = tl.exp2(largest - new), tl.exp2(score - new[:, None])
        total = total * faded + tl.sum(weight, axis=1)
        value = tl.load(values + place, mask=there, other=0.0)
        mean = mean * faded[:, None] + tl.dot(weight.to(kind), value, input_precision="ieee")
        largest = new

    mean = tl.where(total == 0, 0.0, 1 / total)[:, None] * mean
    row_of_all = split * tl.num_programs(0) * GROUP + head
    tl.store(
        out_SHD + row_of_all[:, None] * DIM + d[None, :],
        mean.to(out_SHD.dtype.element_ty),
        mask=inside[:, None] & (d < DIM)[None, :],
    )
    tl.store(logsum_SH + row_of_all, largest + tl.log2(total), mask=inside)
