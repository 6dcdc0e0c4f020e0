"""The fixed memory of a decode step on the GPU: everything that changes from token to token lies in it.

A room is one for all layers of a shape, and holds nothing between the output of one and the load of the next.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.decoder import DecoderLayer
from kernels.kv_block import BLOCK_TOKENS
from kernels.packed import GROUP_SIZES
from kernels.triton_tuning import SPLIT_TOKENS, GpuKind, WeightShape, product_bytes, split_tokens

_ALIGNMENT_BYTES = 128
_DENSE_TABLE = 3


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the memory and the launches of a step depend on, but for where its weights lie.

    weights: those of a layer, in the order of its fields. rotary: the first elements of a head that are rotated. dtype:
    that of activations and of a dense past. int8: whether the past is kept in 8 bits. most_tokens: a power of two, up
    to which, the new one included, the step is good. It fixes where attention is split: over 8 bits as
    `TritonAttention` splits, bit for bit, if it is the smallest such power that is not below the tokens.
    Raises ValueError if they are out of range.
    """

    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    rotary: int
    mlp: int
    weights: tuple[WeightShape, ...]
    dtype: torch.dtype
    int8: bool
    most_tokens: int
    gpu: GpuKind

    def __post_init__(self) -> None:
        if self.rotary % 2 or not 0 <= self.rotary <= self.head_dim:
            raise ValueError(f"rotary={self.rotary}: expected an even number up to head_dim={self.head_dim}")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={self.dtype}: expected float32, bfloat16 or float16")
        if self.most_tokens < SPLIT_TOKENS or self.most_tokens & (self.most_tokens - 1):
            raise ValueError(f"most_tokens={self.most_tokens}: expected a power of two, at least {SPLIT_TOKENS}")

    @classmethod
    def of(
        cls,
        layer: DecoderLayer,
        rotary: int,
        dtype: torch.dtype,
        int8: bool,
        most_tokens: int,
        gpu: GpuKind | None = None,
    ) -> "StepShape":
        """Return that of a layer, whose tensors may be anywhere. gpu: None for the current one, or the interpreter."""
        projections = (*layer.qkv, layer.output, *layer.gate_up, layer.down)
        return cls(
            hidden=layer.hidden,
            heads=layer.heads,
            key_heads=layer.key_heads,
            head_dim=layer.head_dim,
            rotary=rotary,
            mlp=layer.down.weight.in_features,
            weights=tuple(WeightShape.of(projection.weight) for projection in projections),
            dtype=dtype,
            int8=int8,
            most_tokens=most_tokens,
            gpu=gpu or GpuKind.of(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        )

    @property
    def split_tokens(self) -> int:
        """Tokens of the past that a program of attention takes."""
        return split_tokens(self.most_tokens)

    @property
    def splits(self) -> int:
        """Programs of attention for a key head; those behind the tokens find nothing."""
        return -(-self.most_tokens // self.split_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that a `StepRoom` takes, sums of split products included."""
        return sum(_aligned(elements * dtype.itemsize) for elements, dtype in self.parts().values())

    def entries(self, tokens: int) -> int:
        """Return how many integers the table of a past has that so many tokens fill, the new one included."""
        return -(-tokens // BLOCK_TOKENS) if self.int8 else _DENSE_TABLE

    def parts(self) -> dict[str, tuple[int, torch.dtype]]:
        """Return what a room holds, in order: elements and dtype by name."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        found = self.heads * self.splits if self.splits > 1 else 0
        widest = max(weight.in_features for weight in self.weights)
        return {
            "tokens": (1, torch.int32),
            "table": (self.entries(self.most_tokens), torch.int64),
            "hidden": (self.hidden, self.dtype),
            "cos": (self.rotary, self.dtype),
            "sin": (self.rotary, self.dtype),
            "normed": (self.hidden, self.dtype),
            "qkv": (queries + 2 * keys, self.dtype),
            "queries": (queries, self.dtype),
            "parts": (found * self.head_dim, torch.float32),
            "logsums": (self.heads * self.splits, torch.float32),
            "mixed": (queries, self.dtype),
            "product": (self.hidden, self.dtype),
            "residual": (self.hidden, self.dtype),
            "gate_up": (2 * self.mlp, self.dtype),
            "gated": (self.mlp, self.dtype),
            "sums": (-(-widest // min(GROUP_SIZES)), torch.float32),
            "splits": (product_bytes(self.weights, 1, self.dtype.itemsize, self.gpu) // 4, torch.float32),
            "out": (self.hidden, self.dtype),
        }


class StepRoom:
    """The fixed memory that the layers of a shape share: a token's operands, all between them and the output.

    memory: uint8, contiguous, at least `shape.nbytes`, beginning at a multiple of 16 bytes, on the device; whatever is
    in it. Raises ValueError if it is anything else.
    """

    def __init__(self, shape: StepShape, memory: Tensor) -> None:
        found = (memory.dtype, memory.dim(), memory.is_contiguous(), memory.numel() >= shape.nbytes)
        if found != (torch.uint8, 1, True, True) or memory.data_ptr() % 16:
            raise ValueError(
                f"memory: expected contiguous uint8 of {shape.nbytes} at a multiple of 16 bytes, "
                f"found {memory.dtype} {list(memory.shape)}"
            )
        self.shape, self.device = shape, memory.device
        self._parts: dict[str, Tensor] = {}
        start = 0
        for name, (elements, dtype) in shape.parts().items():
            nbytes = elements * dtype.itemsize
            self._parts[name] = memory[start : start + nbytes].view(dtype)
            start += _aligned(nbytes)

    def __getitem__(self, name: str) -> Tensor:
        """Return a part by its name in `StepShape.parts`."""
        return self._parts[name]

    @property
    def out(self) -> Tensor:
        """[hidden], in the activations' dtype: what the last step that ran gave."""
        return self._parts["out"]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
