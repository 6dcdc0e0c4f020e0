"""The packed int4 weight: the one file that knows the bits.

A linear layer's weight W [N, K] (N outputs, K inputs) is stored as codes q in 0..15, with one scale and, when
asymmetric, one zero point for every G consecutive inputs of a row:

    W[n, k] = (q[n, k] - z[n, k // G]) * s[n, k // G]        AWQ, arXiv:2306.00978, section 2; z = 8 when symmetric

Layout, byte for byte that of compressed-tensors' `pack-quantized`, so that a tensor of a checkpoint is viewed, never
repacked:

    codes  uint8 [N, K/2]       byte j of a row: k = 2j in the low nibble, k = 2j+1 in the high one
                                (the file's int32 [N, K/8], little-endian, seen as bytes)
    scale  bf16 or fp16 [N, K/G]
    zero   int32 [ceil(N/8), K/G] or None    packed down the rows: row n is nibble n % 8 of word n // 8
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
"""Group sizes that every kernel supports, beside K itself (one group a row)."""

CODE_MAX = 15
SYMMETRIC_ZERO = 8
_CODES_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """An int4 weight [N, K] as it lies in the file; the tensors are views, on any device.

    codes: uint8 [N, K/2], contiguous. scale: bfloat16 or float16 [N, K/G], contiguous. zero: int32 [ceil(N/8), K/G],
    contiguous, or None when symmetric. group_size: G in elements, 32, 64, 128 or K.
    Raises ValueError if the tensors do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits={self.bits}: only 4 is supported")
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or not self.codes.is_contiguous():
            raise ValueError(f"codes: expected contiguous uint8 [N, K/2], found {_describe(self.codes)}")
        check_group_size(self.in_features, self.group_size)
        groups = self.in_features // self.group_size
        if self.scale.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"scale: expected bfloat16 or float16, found {self.scale.dtype}")
        if self.scale.shape != (self.out_features, groups) or not self.scale.is_contiguous():
            expected = [self.out_features, groups]
            raise ValueError(f"scale: expected contiguous {expected}, found {_describe(self.scale)}")
        if self.zero is not None:
            expected = [-(-self.out_features // _CODES_PER_WORD), groups]
            if self.zero.dtype != torch.int32 or list(self.zero.shape) != expected or not self.zero.is_contiguous():
                raise ValueError(f"zero: expected contiguous int32 {expected}, found {_describe(self.zero)}")

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1] * 2

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 8."""
        return self.zero is None

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads: codes, scales and zero points."""
        zero_bytes = 0 if self.zero is None else self.zero.nbytes
        return self.codes.nbytes + self.scale.nbytes + zero_bytes


def check_group_size(in_features: int, group_size: int) -> None:
    """Raise ValueError unless K = `in_features` can be cut into groups of `group_size` that the kernels support."""
    if in_features % _CODES_PER_WORD:
        raise ValueError(f"K={in_features} is not a multiple of {_CODES_PER_WORD}, the codes in one int32")
    if group_size < 1 or group_size not in (*GROUP_SIZES, in_features):
        raise ValueError(f"group_size={group_size}: expected 32, 64, 128 or the whole row, K={in_features}")
    if in_features % group_size:
        raise ValueError(f"K={in_features} is not a multiple of group_size={group_size}")


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> PackedWeight:
    """Pack integer codes.

    codes: any integer dtype [N, K], values 0..15. scale: bfloat16 or float16 [N, K/G]. zero: integers [N, K/G], values
    0..15, or None for symmetric. Raises ValueError on a value out of range or shapes that do not fit.
    """
    _check_range("codes", codes)
    check_group_size(codes.shape[1], group_size)
    low, high = codes[:, 0::2].to(torch.uint8), codes[:, 1::2].to(torch.uint8)
    packed_zero = None if zero is None else _pack_zero(zero, codes.shape[0], codes.shape[1] // group_size)
    return PackedWeight((low | (high << 4)).contiguous(), scale.contiguous(), packed_zero, group_size)


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [N, K] and zero points uint8 [N, K/G] (8 throughout when symmetric)."""
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).flatten(1)
    if weight.zero is None:
        return codes, torch.full(weight.scale.shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=codes.device)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    nibbles = (weight.zero[:, None, :] >> shifts[None, :, None]) & 15
    return codes, nibbles.flatten(0, 1)[: weight.out_features].to(torch.uint8)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W [N, K] = (q - z) * s, computed in float32 and cast to `dtype`."""
    codes, zero = unpack(weight)
    grouped = codes.view(weight.out_features, -1, weight.group_size).float()
    values = (grouped - zero.float()[..., None]) * weight.scale.float()[..., None]
    return values.view(weight.out_features, weight.in_features).to(dtype)


def _pack_zero(zero: Tensor, rows: int, groups: int) -> Tensor:
    """Pack [N, K/G] zero points down the rows into int32 [ceil(N/8), K/G]; missing rows are 0."""
    _check_range("zero", zero)
    if zero.shape != (rows, groups):
        raise ValueError(f"zero: expected {[rows, groups]}, found {_describe(zero)}")
    words = -(-rows // _CODES_PER_WORD)
    padded = torch.zeros(words * _CODES_PER_WORD, groups, dtype=torch.int64, device=zero.device)
    padded[:rows] = zero.to(torch.int64)
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=zero.device)
    unsigned = (padded.view(words, _CODES_PER_WORD, groups) << shifts[None, :, None]).sum(dim=1)
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32)


def _check_range(name: str, values: Tensor) -> None:
    if values.dim() != 2 or values.is_floating_point():
        raise ValueError(f"{name}: expected integers of rank 2, found {_describe(values)}")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) > CODE_MAX):
        raise ValueError(f"{name}: expected values 0..{CODE_MAX}, found {int(values.min())}..{int(values.max())}")


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else " not contiguous"
    return f"{tensor.dtype} {list(tensor.shape)}{layout}"
