"""Keys and values in 8 bits: the one file that knows how a block of them lies in memory.

A key or value x of one token and one head, D elements, is stored as signed codes with one scale (per token and head),
keys less an offset per channel that is the same for all tokens, zero unless calibrated:

    k[t, d] = key_scale[t] * key_codes[t, d] + key_offset[d]          v[t, d] = value_scale[t] * value_codes[t, d]

Scales are rounded to bfloat16 before the codes are computed, so every code is within half a step; codes are symmetric,
-127..127. The offset drops out of attention: q . key_offset is one number for all tokens, which softmax does not see
(arXiv:2411.10958, section 3.1). It matters to who wants the keys themselves.

Tokens fill blocks of `BLOCK_TOKENS` in order; a token is quantised once, when it is written, from itself alone, so the
bytes do not depend on how a context was cut into passes. A block is one piece of memory of one size:

    key_codes    int8 [batch, key_heads, BLOCK_TOKENS, key_dim]
    value_codes  int8 [batch, key_heads, BLOCK_TOKENS, value_dim]
    key_scale    bfloat16 [batch, key_heads, BLOCK_TOKENS]
    value_scale  bfloat16 [batch, key_heads, BLOCK_TOKENS]

Axes in names: B batch, H query heads, K key heads, N new tokens or queries, T tokens of the context, D elements.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

MOST_FUSED_QUERIES = 16
"""New tokens of a sequence that read the codes directly; more of them are faster over keys dequantised once for all."""

CHUNK_TOKENS = 1024
"""Tokens that are dequantised together: fixed, so that sums do not depend on how much of a context is in memory."""

BLOCK_TOKENS = 64
"""Tokens of a block: enough for one read or copy to be long, few enough that a half-empty last one costs little."""

_CODE_MAX = 127
_MOST_TABLES = 4096
_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What every block of one layer holds for each of its BLOCK_TOKENS tokens. Raises ValueError below 1."""

    batch: int
    key_heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        if min(self.batch, self.key_heads, self.key_dim, self.value_dim) < 1:
            raise ValueError(f"{self}: expected at least 1 of each")

    @property
    def rows(self) -> int:
        """Keys, or values, in a block: one for each sequence, head and token."""
        return self.batch * self.key_heads * BLOCK_TOKENS

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.rows * (self.key_dim + self.value_dim + 2 * _SCALE_BYTES)


@dataclass(frozen=True, slots=True)
class KVBlock:
    """One block: memory, uint8 [shape.nbytes], contiguous, on any device. Raises ValueError if it is anything else."""

    shape: BlockShape
    memory: Tensor

    def __post_init__(self) -> None:
        found = (self.memory.dtype, tuple(self.memory.shape), self.memory.is_contiguous())
        if found != (torch.uint8, (self.shape.nbytes,), True):
            raise ValueError(f"memory: expected contiguous uint8 [{self.shape.nbytes}], found {found}")

    def copy(self, device: torch.device | None = None) -> "KVBlock":
        """Return a block of the same bytes in memory of its own, on a device, None for the same one."""
        return KVBlock(self.shape, self.memory.to(device or self.memory.device, copy=True))

    @property
    def key_codes(self) -> Tensor:
        """int8 [batch, key_heads, BLOCK_TOKENS, key_dim], a view."""
        return self._view(0, self.shape.key_dim, torch.int8)

    @property
    def value_codes(self) -> Tensor:
        """int8 [batch, key_heads, BLOCK_TOKENS, value_dim], a view."""
        return self._view(self.shape.rows * self.shape.key_dim, self.shape.value_dim, torch.int8)

    @property
    def key_scale(self) -> Tensor:
        """bfloat16 [batch, key_heads, BLOCK_TOKENS], a view."""
        return self._view(self.shape.nbytes - 2 * _SCALE_BYTES * self.shape.rows, 1, torch.bfloat16)[..., 0]

    @property
    def value_scale(self) -> Tensor:
        """bfloat16 [batch, key_heads, BLOCK_TOKENS], a view."""
        return self._view(self.shape.nbytes - _SCALE_BYTES * self.shape.rows, 1, torch.bfloat16)[..., 0]

    def _view(self, start: int, width: int, dtype: torch.dtype) -> Tensor:
        shape = self.shape
        part = self.memory[start : start + shape.rows * width * dtype.itemsize].view(dtype)
        return part.view(shape.batch, shape.key_heads, BLOCK_TOKENS, width)


class KVBlocks:
    """Blocks of one shape in a row, and where each begins, as kernels want to know it.

    addresses: one a block, as signed 64-bit integers. Raises ValueError for a block of another shape.
    """

    def __init__(self, shape: BlockShape, blocks: Iterable[KVBlock] = ()) -> None:
        self.shape = shape
        self.addresses = array("q")
        self._blocks: list[KVBlock | None] = []
        for block in blocks:
            self.append(block)

    def append(self, block: KVBlock) -> None:
        """Put a block behind the others."""
        if block.shape != self.shape:
            raise ValueError(f"a block of {block.shape} among those of {self.shape}")
        self._blocks.append(block)
        self.addresses.append(block.memory.data_ptr())

    def place(self, index: int, block: KVBlock | None) -> None:
        """Say where a block lies now; None: not in memory, so that nobody may ask for it."""
        self._blocks[index] = block
        self.addresses[index] = 0 if block is None else block.memory.data_ptr()

    def truncate(self, count: int) -> None:
        """Keep the first `count` blocks."""
        if count < len(self):
            del self._blocks[count:]
            del self.addresses[count:]

    def device_addresses(self, device: torch.device, first: int = 0, last: int | None = None) -> Tensor:
        """Return the addresses of the blocks first..last, int64, on a device that reads them.

        They are copied there when they are asked for first, a copy that the host waits for: memory that is used again
        and again, as slots are, has them there already.
        """
        return integers_on(device, self.addresses[first:last].tobytes())

    def __reduce__(self) -> tuple[type["KVBlocks"], tuple[BlockShape, tuple[KVBlock, ...]]]:
        """Let a copy have addresses of its own blocks. Every block has to be in memory."""
        return KVBlocks, (self.shape, tuple(self))

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[KVBlock]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> KVBlock:
        block = self._blocks[index]
        assert block is not None, f"block {index} is not in memory"
        return block


@dataclass(frozen=True, slots=True)
class KVContext:
    """The first `tokens` tokens in a row of blocks of one shape: what a query attends to.

    key_offset: float32 [key_heads, key_dim], or None for zero. Raises ValueError if the parts do not fit each other.
    """

    blocks: KVBlocks
    tokens: int
    key_offset: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.tokens <= len(self.blocks) * BLOCK_TOKENS:
            raise ValueError(f"{self.tokens} tokens in {len(self.blocks)} blocks of {BLOCK_TOKENS}")
        offset, expected = self.key_offset, (self.shape.key_heads, self.shape.key_dim)
        if offset is not None and (offset.dtype != torch.float32 or offset.shape != expected):
            raise ValueError(f"key_offset: expected float32 {expected}, found {offset.dtype} {tuple(offset.shape)}")

    @property
    def shape(self) -> BlockShape:
        """That of every block."""
        return self.blocks.shape


@lru_cache(maxsize=_MOST_TABLES)
def integers_on(device: torch.device, integers: bytes) -> Tensor:
    """Return signed 64-bit integers on a device, which the host waits for when they are asked for first."""
    return torch.frombuffer(bytearray(integers), dtype=torch.int64).to(device)


def quantize_tokens(x_BKND: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8 [B, K, N, D] and scales bfloat16 [B, K, N], one a token and head.

    x_BKND: any float dtype; keys less their offset. The scale of a row with NaN or infinity is NaN.
    """
    x = x_BKND.float()
    top = x.abs().amax(dim=-1)
    scale = torch.where(top.isfinite(), top / _CODE_MAX, torch.nan).to(torch.bfloat16)
    step = scale.float()[..., None]
    codes = torch.where(step > 0, x / step, 0.0).round().clamp(-_CODE_MAX, _CODE_MAX)
    return codes.to(torch.int8), scale


def write_tokens(
    blocks: KVBlocks, start: int, key_BKND: Tensor, value_BKND: Tensor, key_offset: Tensor | None = None
) -> None:
    """Quantise new tokens into the blocks, in place, as tokens start..start + N of the context.

    key_BKND, value_BKND: any float dtype, on the blocks' device. key_offset: as in `KVContext`.
    """
    key = key_BKND.float() if key_offset is None else key_BKND.float() - key_offset[:, None]
    parts = (*quantize_tokens(key), *quantize_tokens(value_BKND))
    stop = start + key.shape[2]
    for index in range(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)):
        first, last = max(start, index * BLOCK_TOKENS), min(stop, (index + 1) * BLOCK_TOKENS)
        block = blocks[index]
        places = (block.key_codes, block.key_scale, block.value_codes, block.value_scale)
        inside = slice(first - index * BLOCK_TOKENS, last - index * BLOCK_TOKENS)
        for place, part in zip(places, parts, strict=True):
            place[:, :, inside] = part[:, :, first - start : last - start]


def dequantize_blocks(
    context: KVContext, dtype: torch.dtype = torch.float32, first: int = 0, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return keys [B, K, T, key_dim] and values [B, K, T, value_dim] of a context, computed in float32.

    first, last: only those tokens; `first` is a multiple of BLOCK_TOKENS.
    """
    shape, stop = context.shape, context.tokens if last is None else last
    tokens, device = stop - first, context.blocks[first // BLOCK_TOKENS].memory.device
    keys = torch.empty(shape.batch, shape.key_heads, tokens, shape.key_dim, dtype=dtype, device=device)
    values = torch.empty(shape.batch, shape.key_heads, tokens, shape.value_dim, dtype=dtype, device=device)
    for start in range(0, tokens, BLOCK_TOKENS):
        block, held = context.blocks[(first + start) // BLOCK_TOKENS], min(BLOCK_TOKENS, tokens - start)
        key = block.key_codes[:, :, :held].float() * block.key_scale[:, :, :held, None].float()
        keys[:, :, start : start + held] = key if context.key_offset is None else key + context.key_offset[:, None]
        value = block.value_codes[:, :, :held].float() * block.value_scale[:, :, :held, None].float()
        values[:, :, start : start + held] = value
    return keys, values


def select_sequences(block: KVBlock, indices: Tensor) -> KVBlock:
    """Return a new block of the sequences `indices`, int64 [batch of the new one], as beams and batches ask for."""
    shape = replace(block.shape, batch=len(indices))
    chosen = KVBlock(shape, torch.empty(shape.nbytes, dtype=torch.uint8, device=block.memory.device))
    for part in ("key_codes", "value_codes", "key_scale", "value_scale"):
        torch.index_select(getattr(block, part), 0, indices, out=getattr(chosen, part))
    return chosen
