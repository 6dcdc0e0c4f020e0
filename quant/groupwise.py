"""Rounding to a grid: scales and zero points of groups, and codes, as pure functions of a float weight.

Axes: N outputs, K inputs, C = K / G groups of G inputs in a row. Everything is float32 until it is packed; scales are
rounded to the dtype of the file before codes are chosen, so what is searched is what is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packed import (
    BITS,
    PackedWeight,
    check_group_size,
    code_max,
    codes_per_word,
    dequantize,
    pack,
    symmetric_zero,
)

_CHUNK_WEIGHTS = 1 << 24
_CHUNK_MULTIPLE = 64
"""Whole words of zero points, which are packed down the rows."""


def chunk_rows(width: int) -> int:
    """Return how many rows of `width` columns are worked on at a time: fixed, so that memory decides no bit."""
    return max(_CHUNK_MULTIPLE, _CHUNK_WEIGHTS // width // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE)


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Yield the rows of a weight [N, K] that are worked on at a time, one part after the other."""
    step = chunk_rows(width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, slots=True)
class Grid:
    """The representable weights: codes of 4 or 8 bits under one scale (and zero point, when asymmetric) a group.

    group_size: G in elements, None for the whole row. scale_dtype: bfloat16 or float16, as stored.
    Raises ValueError for other bits.
    """

    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype = torch.bfloat16
    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: expected 4 or 8")

    @property
    def code_max(self) -> int:
        """The largest code: 15 or 255."""
        return code_max(self.bits)

    @property
    def symmetric_zero(self) -> int:
        """The zero point of symmetric weights: 8 or 128."""
        return symmetric_zero(self.bits)

    def group(self, in_features: int) -> int:
        """Return G for a weight of K = `in_features`. Raises ValueError if K cannot be cut so."""
        size = in_features if self.group_size is None else self.group_size
        check_group_size(in_features, size, self.bits)
        return size

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of codes, scales and zero points of a weight [N, K] in the file."""
        groups, per_word = in_features // self.group(in_features), codes_per_word(self.bits)
        zero_bytes = 0 if self.symmetric else 4 * -(-out_features // per_word) * groups
        return 4 * out_features * in_features // per_word + 2 * out_features * groups + zero_bytes


@dataclass(frozen=True, slots=True)
class Parameters:
    """Scale and zero point of every group, float32 [N, C]; the scale holds values of the file's dtype exactly."""

    scale: Tensor
    zero: Tensor


def range_parameters(low: Tensor, high: Tensor, grid: Grid) -> Parameters:
    """Return the parameters whose grid spans [low, high]; both float32 [N, C], low <= 0 <= high.

    Symmetric: s = max(|low|, |high|) / 7.5 (127.5 for 8 bits), so that codes -8..7 are all used (compressed-tensors'
    convention); with the ends swapped and negated, s is negative.
    Asymmetric: s = (high - low) / 15 (255), z = round(-low / s).
    """
    if grid.symmetric:
        sign = torch.where(high < low, -1.0, 1.0)
        scale = sign * round_scale(torch.maximum(-low * sign, high * sign) / (grid.code_max / 2), grid.scale_dtype)
        return Parameters(scale, torch.full_like(scale, grid.symmetric_zero))
    scale = round_scale((high - low) / grid.code_max, grid.scale_dtype)
    return Parameters(scale, (-low / scale).round().clamp(0, grid.code_max))


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`'s values, away from zero: a group of zeros gets the smallest normal scale, not 0."""
    return scale.to(dtype).float().clamp(min=torch.finfo(dtype).tiny)


def minmax(weight: Tensor, grid: Grid) -> Parameters:
    """Return the round-to-nearest parameters of a float32 weight [N, K]: the whole range of every group."""
    grouped = weight.unflatten(1, (-1, grid.group(weight.shape[1])))
    return range_parameters(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), grid)


def kept_range(weight: Tensor, parameters: Parameters, grid: Grid) -> float:
    """Return how much of the whole range of a weight's groups the chosen ranges keep, on average: 1 if all of it."""
    return round(float((parameters.scale.abs() / minmax(weight, grid).scale).mean()), 4)


def codes(weight: Tensor, parameters: Parameters, grid: Grid) -> Tensor:
    """Return the nearest codes, float32 integers in 0..2^B - 1, of a weight [N, K]."""
    grouped = weight.unflatten(1, (parameters.scale.shape[1], -1))
    rounded: Tensor = grouped / parameters.scale[..., None] + parameters.zero[..., None]
    return rounded.round_().clamp_(0, grid.code_max).flatten(1)


def values(code: Tensor, parameters: Parameters) -> Tensor:
    """Return (q - z) * s, float32 [N, K], for codes [N, K]."""
    grouped = code.unflatten(1, (parameters.scale.shape[1], -1))
    represented: Tensor = (grouped - parameters.zero[..., None]) * parameters.scale[..., None]
    return represented.flatten(1)


def fake_quantize(weight: Tensor, parameters: Parameters, grid: Grid) -> Tensor:
    """Return the representable weight nearest to `weight`, float32 [N, K]."""
    return values(codes(weight, parameters, grid), parameters)


def round_to_nearest_(weight: Tensor, grid: Grid) -> None:
    """Overwrite a float32 weight [N, K] with the nearest values of its whole ranges, some rows at a time."""
    for rows in row_chunks(*weight.shape):
        weight[rows] = fake_quantize(weight[rows], minmax(weight[rows], grid), grid)


def pack_weight(weight: Tensor, parameters: Parameters, grid: Grid) -> PackedWeight:
    """Round a float32 weight [N, K] to the grid and pack it, some rows at a time."""
    size, bits = grid.group(weight.shape[1]), grid.bits
    scale = parameters.scale.to(grid.scale_dtype)
    zero = None if grid.symmetric else parameters.zero.to(torch.uint8)
    parts = []
    for rows in row_chunks(*weight.shape):
        code = codes(weight[rows], Parameters(parameters.scale[rows], parameters.zero[rows]), grid).to(torch.uint8)
        parts.append(pack(code, scale[rows], None if zero is None else zero[rows], size, bits))
    if len(parts) == 1:
        return parts[0]
    packed_zero = None if zero is None else torch.cat([part.zero for part in parts if part.zero is not None])
    return PackedWeight(torch.cat([part.codes for part in parts]), scale, packed_zero, size, bits)


def unpack_into(weight: Tensor, packed: PackedWeight) -> None:
    """Write what a packed weight stands for into a float32 [N, K], some rows at a time."""
    per_word = codes_per_word(packed.bits)
    for rows in row_chunks(*weight.shape):
        words = slice(rows.start // per_word, -(-rows.stop // per_word))
        zero = None if packed.zero is None else packed.zero[words]
        weight[rows] = dequantize(
            PackedWeight(packed.codes[rows], packed.scale[rows], zero, packed.group_size, packed.bits)
        )
