"""The packed weight of 4 or 8 bits: the one file that knows the bits.

A linear layer's weight W [N, K] (N outputs, K inputs) is stored as codes q of B bits, in 0..2^B - 1, with one scale
and, when asymmetric, one zero point for every G consecutive inputs of a row:

    W[n, k] = (q[n, k] - z[n, k // G]) * s[n, k // G]        AWQ, arXiv:2306.00978, section 2; z = 2^(B-1) if symmetric

Layout, byte for byte that of compressed-tensors' `pack-quantized`, so that a tensor of a checkpoint is viewed, never
repacked:

    codes  uint8 [N, K*B/8]     of 4 bits, byte j of a row: k = 2j in the low nibble, k = 2j+1 in the high one; of 8
                                bits, a byte each (the file's int32 [N, K*B/32], little-endian, seen as bytes)
    scale  bf16 or fp16 [N, K/G]
    zero   int32 [ceil(N*B/32), K/G] or None    packed down the rows, P = 32/B in a word: row n is n % P of word n // P
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
"""Group sizes that every kernel supports, beside K itself (one group a row)."""

BITS = (4, 8)
"""Widths of a code."""


def code_max(bits: int) -> int:
    """Return the largest code."""
    return (1 << bits) - 1


def symmetric_zero(bits: int) -> int:
    """Return the zero point of a weight that stores none."""
    return 1 << (bits - 1)


def codes_per_word(bits: int) -> int:
    """Return the codes, or zero points, in one int32 of the file."""
    return 32 // bits


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] as it lies in the file; the tensors are views, on any device.

    codes: uint8 [N, K*B/8], contiguous. scale: bfloat16 or float16 [N, K/G], contiguous. zero: int32
    [ceil(N*B/32), K/G], contiguous, or None when symmetric. group_size: G in elements, 32, 64, 128 or K. bits: B.
    as_mapped: whether a GPU rounds the products as those with a weight in host memory, wherever this one lies.
    Raises ValueError if the tensors do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    bits: int = 4
    as_mapped: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: expected 4 or 8")
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or not self.codes.is_contiguous():
            raise ValueError(f"codes: expected contiguous uint8 [N, K*{self.bits}/8], found {_describe(self.codes)}")
        check_group_size(self.in_features, self.group_size, self.bits)
        groups = self.in_features // self.group_size
        if self.scale.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"scale: expected bfloat16 or float16, found {self.scale.dtype}")
        if self.scale.shape != (self.out_features, groups) or not self.scale.is_contiguous():
            expected = [self.out_features, groups]
            raise ValueError(f"scale: expected contiguous {expected}, found {_describe(self.scale)}")
        if self.zero is not None:
            expected = [-(-self.out_features // codes_per_word(self.bits)), groups]
            if self.zero.dtype != torch.int32 or list(self.zero.shape) != expected or not self.zero.is_contiguous():
                raise ValueError(f"zero: expected contiguous int32 {expected}, found {_describe(self.zero)}")

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1] * 8 // self.bits

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the codes."""
        return self.zero is None

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads: codes, scales and zero points."""
        zero_bytes = 0 if self.zero is None else self.zero.nbytes
        return self.codes.nbytes + self.scale.nbytes + zero_bytes


def check_group_size(in_features: int, group_size: int, bits: int) -> None:
    """Raise ValueError unless K = `in_features` can be cut into groups of `group_size` that the kernels support."""
    if in_features % codes_per_word(bits):
        raise ValueError(f"K={in_features} is not a multiple of {codes_per_word(bits)}, the codes in one int32")
    if group_size < 1 or group_size not in (*GROUP_SIZES, in_features):
        raise ValueError(f"group_size={group_size}: expected 32, 64, 128 or the whole row, K={in_features}")
    if in_features % group_size:
        raise ValueError(f"K={in_features} is not a multiple of group_size={group_size}")


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int = 4) -> PackedWeight:
    """Pack integer codes.

    codes: any integer dtype [N, K], values 0..2^B - 1. scale: bfloat16 or float16 [N, K/G]. zero: integers [N, K/G] of
    the same range, or None for symmetric. Raises ValueError on a value out of range or shapes that do not fit.
    """
    _check_range("codes", codes, bits)
    check_group_size(codes.shape[1], group_size, bits)
    per_byte = 8 // bits
    packed = torch.zeros(codes.shape[0], codes.shape[1] // per_byte, dtype=torch.uint8, device=codes.device)
    for i in range(per_byte):
        packed |= codes[:, i::per_byte].to(torch.uint8) << bits * i
    expected = [codes.shape[0], codes.shape[1] // group_size]
    if zero is not None and list(zero.shape) != expected:
        raise ValueError(f"zero: expected {expected}, found {_describe(zero)}")
    packed_zero = None if zero is None else pack_zero(zero, bits)
    return PackedWeight(packed, scale.contiguous(), packed_zero, group_size, bits)


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [N, K] and zero points uint8 [N, K/G] (2^(B-1) throughout when symmetric)."""
    bits, mask = weight.bits, code_max(weight.bits)
    codes = torch.stack([weight.codes >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(1)
    if weight.zero is None:
        return codes, torch.full(weight.scale.shape, symmetric_zero(bits), dtype=torch.uint8, device=codes.device)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    zero = (weight.zero[:, None, :] >> shifts[None, :, None]) & mask
    return codes, zero.flatten(0, 1)[: weight.out_features].to(torch.uint8)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W [N, K] = (q - z) * s, computed in float32 and cast to `dtype`."""
    codes, zero = unpack(weight)
    grouped = codes.view(weight.out_features, -1, weight.group_size).float()
    values = (grouped - zero.float()[..., None]) * weight.scale.float()[..., None]
    return values.view(weight.out_features, weight.in_features).to(dtype)


def pack_zero(zero: Tensor, bits: int) -> Tensor:
    """Pack zero points, integers [N, K/G], down the rows into int32 [ceil(N*B/32), K/G]; missing rows are 0.

    Raises ValueError on a value out of range.
    """
    _check_range("zero", zero, bits)
    (rows, groups), per_word = zero.shape, codes_per_word(bits)
    words = -(-rows // per_word)
    padded = torch.zeros(words * per_word, groups, dtype=torch.int64, device=zero.device)
    padded[:rows] = zero.to(torch.int64)
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=zero.device)
    unsigned = (padded.view(words, per_word, groups) << shifts[None, :, None]).sum(dim=1)
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32)


def _check_range(name: str, values: Tensor, bits: int) -> None:
    if values.dim() != 2 or values.is_floating_point():
        raise ValueError(f"{name}: expected integers of rank 2, found {_describe(values)}")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) > code_max(bits)):
        found = f"{int(values.min())}..{int(values.max())}"
        raise ValueError(f"{name}: expected values 0..{code_max(bits)}, found {found}")


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else " not contiguous"
    return f"{tensor.dtype} {list(tensor.shape)}{layout}"
