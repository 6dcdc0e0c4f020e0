"""Packed weights of other tools and this one's, re-laid code by code: nothing is dequantised, nothing rounded.

    AWQ "gemm"   qweight int32 [K, N/8]: nibble i of word [k, c] is row n = 8c + (0 2 4 6 1 3 5 7)[i]; qzeros int32
                 [K/G, N/8] likewise; scales [K/G, N]                  (AutoAWQ, awq/modules/linear/gemm.py)
    GPTQ         qweight int32 [K*B/32, N]: code i of word [r, n] is input k = 32/B*r + i; qzeros int32 [K/G, N*B/32],
                 packed along N, less one in version 1; scales [K/G, N]; g_idx int32 [K], the group of each input
                                                                       (GPTQModel, nn_modules/qlinear/__init__.py)

Both mean W[n, k] = (q[n, k] - z[n, g]) * s[n, g] for g the group of k, as here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.cpu_repack import awq_codes_cpu
from kernels.packed import PackedWeight, codes_per_word, pack_zero, symmetric_zero, unpack

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LOW_NIBBLES = 0x0F0F0F0F
_MIDDLE_NIBBLES = 0x88888888 - (1 << 32)  # as int32


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Run torch's operations inside on this thread alone.

    Those on a MiB of scales or zero points take less time than it takes to wake torch's threads and wait for all of
    them: a hundred times less where other work has the processors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, symmetric: bool) -> PackedWeight:
    """Return a weight [N, K] of AWQ's "gemm" layout, 4 bits. Raises ValueError if the tensors do not fit each other.

    symmetric: store no zero points; raises ValueError if one is not the middle.
    """
    inputs, rows = qweight.shape[0], qweight.shape[1] * 8
    _groups(qzeros, scales, inputs, rows, rows // 8)
    if inputs % 2:
        raise ValueError(f"{inputs} inputs; expected an even number, two codes in a byte")
    codes = awq_codes_cpu(qweight)
    if codes is None:
        codes = awq_codes(qweight)
    if symmetric:
        _check_middle(qzeros, _MIDDLE_NIBBLES, 4)
    return _packed(codes, scales, None if symmetric else _awq_zero(qzeros), 4)


@on_one_thread()
def _awq_zero(qzeros: Tensor) -> Tensor:
    """Return zero points int32 [N/8, K/G] of AWQ's qzeros: the nibbles of a word in order, words down the rows."""
    ordered = torch.zeros_like(qzeros)
    for nibble, row in enumerate(_AWQ_ORDER):
        ordered |= (qzeros >> 4 * nibble & 15) << 4 * row
    return ordered.t().contiguous()


def awq_codes(qweight: Tensor) -> Tensor:
    """Return codes uint8 [N, K/2] of AWQ's qweight int32 [K, N/8], K even, through torch."""
    inputs, words = qweight.shape
    first, second = qweight.view(inputs // 2, 2, words).unbind(1)  # of two inputs, which share a byte here
    low = first & _LOW_NIBBLES | (second & _LOW_NIBBLES) << 4
    high = first >> 4 & _LOW_NIBBLES | second & ~_LOW_NIBBLES
    codes = torch.empty(words, 8, inputs // 2, dtype=torch.uint8)
    for part, places in ((low, _AWQ_ORDER[0::2]), (high, _AWQ_ORDER[1::2])):
        turned = part.view(torch.uint8).t().contiguous().view(words, 4, inputs // 2)
        for byte, place in enumerate(places):
            codes[:, place] = turned[:, byte]
    return codes.view(words * 8, inputs // 2)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    *,
    bits: int,
    first_version: bool,
    symmetric: bool,
) -> tuple[PackedWeight, Tensor | None]:
    """Return a weight [N, K] of GPTQ's layout, and the order of its inputs: column j holds input order[j], int64 [K].

    The order is None where inputs of a group lie side by side already. first_version: zero points are stored less one.
    symmetric: as in `from_awq`. Raises ValueError if the tensors do not fit each other.
    """
    per_word, mask = codes_per_word(bits), (1 << bits) - 1
    inputs, rows = qweight.shape[0] * per_word, qweight.shape[1]
    groups = _groups(qzeros, scales, inputs, rows, -(-rows // per_word))
    codes = qweight.t().contiguous().view(torch.uint8)  # codes of a word in our order already
    words = qzeros.t().contiguous()
    zero = torch.stack([words >> bits * place & mask for place in range(per_word)], dim=1).flatten(0, 1)[:rows]
    if first_version:
        zero = zero + 1 & mask
    order = None if g_idx is None else _order(g_idx, inputs, groups)
    if order is not None:
        codes = _reordered(codes, order, bits)
    if symmetric:
        _check_middle(zero, symmetric_zero(bits), bits)
    return _packed(codes, scales, None if symmetric else pack_zero(zero, bits), bits), order


def _reordered(codes: Tensor, order: Tensor, bits: int) -> Tensor:
    """Return codes uint8 [N, K*B/8] with column j from column order[j]."""
    if bits == 8:
        return codes[:, order]
    single = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, order]
    return single[:, 0::2] | single[:, 1::2] << 4


def to_awq(weight: PackedWeight) -> dict[str, Tensor]:
    """Return qweight, qzeros and scales, float16, of AWQ's "gemm" layout.

    Raises ValueError unless it is of 4 bits and whole words of rows, and float16 holds its scales.
    """
    rows, inputs = weight.out_features, weight.in_features
    if weight.bits != 4 or rows % 8:
        raise ValueError(f"{rows} rows of {weight.bits} bits; expected 4 bits and a multiple of 8")
    codes, zero = unpack(weight)
    words = []
    for values in (codes, zero):
        lanes = values.view(rows // 8, 8, -1)[:, _AWQ_ORDER].to(torch.int32)
        words.append(_joined(lanes, 4).t().contiguous())
    return {"qweight": words[0].view(inputs, rows // 8), "qzeros": words[1], "scales": _turned_half(weight.scale)}


def to_gptq(weight: PackedWeight, first_version: bool) -> dict[str, Tensor]:
    """Return qweight, qzeros, scales, float16, and g_idx of GPTQ's layout; first_version: see `from_gptq`.

    Raises ValueError unless its rows fill whole words, and float16 holds its scales.
    """
    per_word, rows = codes_per_word(weight.bits), weight.out_features
    if rows % per_word:
        raise ValueError(f"{rows} rows; expected a multiple of {per_word}")
    _, zero = unpack(weight)
    stored = zero.to(torch.int32) - int(first_version) & (1 << weight.bits) - 1
    lanes = stored.view(rows // per_word, per_word, -1)
    return {
        "qweight": weight.codes.view(torch.int32).t().contiguous(),
        "qzeros": _joined(lanes, weight.bits).t().contiguous(),
        "scales": _turned_half(weight.scale),
        "g_idx": torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size,
    }


def _joined(lanes: Tensor, bits: int) -> Tensor:
    """Return int32 [words, n] of lanes int32 [words, 32 / bits, n], the first in the lowest bits."""
    words = torch.zeros_like(lanes[:, 0])
    for place in range(lanes.shape[1]):
        words |= lanes[:, place] << bits * place
    return words


def _half(scale: Tensor) -> Tensor:
    """Return scales as float16. Raises ValueError if that rounds one."""
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise ValueError("scales that float16 does not hold")
    return half


def _turned_half(scale: Tensor) -> Tensor:
    """Return scales [N, K/G] as float16 [K/G, N]. Raises ValueError if that rounds one."""
    return _half(scale).t().contiguous()


def _groups(qzeros: Tensor, scales: Tensor, inputs: int, rows: int, zero_words: int) -> int:
    groups = scales.shape[0] if scales.dim() == 2 else 0
    if scales.shape != (groups, rows) or qzeros.shape != (groups, zero_words) or groups == 0 or inputs % groups:
        raise ValueError(
            f"scales {list(scales.shape)} and qzeros {list(qzeros.shape)} do not fit {rows} rows of {inputs} inputs"
        )
    return groups


def _order(g_idx: Tensor, inputs: int, groups: int) -> Tensor | None:
    """Return the inputs group by group, None if that is their own order."""
    counts = torch.bincount(g_idx.long().clamp(0, groups), minlength=groups)
    if g_idx.shape != (inputs,) or not torch.equal(counts, torch.full((groups,), inputs // groups)):
        raise ValueError(f"g_idx: expected {inputs} inputs in {groups} groups of one size")
    order = torch.argsort(g_idx, stable=True)
    return None if torch.equal(order, torch.arange(inputs)) else order


@on_one_thread()
def _check_middle(zero: Tensor, middle: int, bits: int) -> None:
    """Raise ValueError unless zero points, one or more in an element, are all the middle of the codes."""
    if not (zero == middle).all():
        raise ValueError(f"zero points other than {symmetric_zero(bits)} in a weight that is said to be symmetric")


@on_one_thread()
def _packed(codes: Tensor, scales: Tensor, zero: Tensor | None, bits: int) -> PackedWeight:
    group_size = codes.shape[1] * 8 // bits // scales.shape[0]
    return PackedWeight(codes, scales.t().contiguous(), zero, group_size, bits)


def from_ggml(blocks: Tensor, bits: int, minima: bool = False) -> PackedWeight:
    """Return a weight [N, K] in groups of 32 of GGUF's Q4_0 (4 bits), Q8_0 (8) or Q4_1 (4 and `minima`).

    blocks: uint8 [N, K/32 * (2 + 2 * minima + 4 * bits)]; a block is a float16 scale, which may be negative, of Q4_1 a
    float16 minimum, and 32 codes: of 4 bits byte j holding places j and j + 16, less 8 without a minimum; of 8 bits
    signed, in order (ggml-common.h, block_q4_0, block_q4_1 and block_q8_0). A minimum becomes a zero point.
    Raises ValueError if rows are not whole blocks, or a minimum is not what `to_ggml` makes of a zero point.
    """
    head_bytes = 2 + 2 * minima
    block_bytes = head_bytes + 4 * bits
    if blocks.shape[1] % block_bytes:
        raise ValueError(f"rows of {blocks.shape[1]} bytes; expected a multiple of {block_bytes}")
    apart = blocks.view(len(blocks), -1, block_bytes)
    heads = apart[..., :head_bytes].contiguous().view(torch.float16)
    scale, codes = heads[..., 0].contiguous(), apart[..., head_bytes:]
    if bits == 4:
        single = torch.cat((codes & 15, codes >> 4), dim=-1)
        codes = single[..., 0::2] | single[..., 1::2] << 4
    else:
        codes = codes ^ symmetric_zero(bits)
    zero = pack_zero(_zero_of(scale, heads[..., 1]), bits) if minima else None
    return PackedWeight(codes.flatten(1).contiguous(), scale, zero, 32, bits)


def to_ggml(weight: PackedWeight) -> Tensor:
    """Return a weight as rows of GGUF's blocks, uint8: the inverse of `from_ggml`, with minima for zero points.

    A larger group's scale is repeated in each of its blocks. Codes and scales are unchanged; a minimum, -z * s, is
    rounded to float16, by less than 2^-7 of a step. Raises ValueError if float16 does not hold a scale or minimum, rows
    are not whole blocks, or 8 bits have zero points.
    """
    rows, inputs, bits = weight.out_features, weight.in_features, weight.bits
    if inputs % 32:
        raise ValueError(f"rows of {inputs} inputs; expected a multiple of 32")
    if bits == 8 and not weight.symmetric:
        raise ValueError("8 bits with zero points, where Q8_0 has none")
    codes, zero = unpack(weight)
    scale = _half(weight.scale)
    heads = [scale]
    if not weight.symmetric:
        heads.append(_minimum(scale, zero))
        if not heads[1].isfinite().all():
            raise ValueError("zero points times scales that float16 does not hold")
    single = codes.view(rows, -1, 32)
    body = single[..., :16] | single[..., 16:] << 4 if bits == 4 else single ^ symmetric_zero(bits)
    repeated = torch.stack(heads, dim=-1).repeat_interleave(weight.group_size // 32, dim=1)
    return torch.cat((repeated.view(torch.uint8), body), dim=-1).flatten(1)


def _minimum(scale: Tensor, zero: Tensor) -> Tensor:
    return -(scale.float() * zero.float()).half()


def _zero_of(scale: Tensor, minimum: Tensor) -> Tensor:
    """Return the zero points, uint8, of Q4_1's minima. Raises ValueError unless each gives its minimum again."""
    steps = torch.where(scale == 0, 0, -minimum.float() / scale.float()).round()
    if not ((steps >= 0) & (steps <= 15)).all() or not torch.equal(_minimum(scale, steps), minimum):
        raise ValueError("minima that are no whole number of steps")
    return steps.to(torch.uint8)
