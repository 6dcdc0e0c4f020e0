"""A linear layer whose weight is packed, and lies wherever the executor has put it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.cpu_matmul import compiled_library, dequant_matmul_cpu, untiled_level
from kernels.matmul import Mode, dequant_matmul
from kernels.packed import PackedWeight, dequantize
from offload.joint import Gather


@dataclass(frozen=True, slots=True)
class _Product:
    """What one sequence wants: x [K] times a weight, and the bias, into out [N]."""

    x: Tensor
    weight: PackedWeight
    bias: Tensor | None
    out: Tensor


class JointProduct:
    """A `Joint`: the product of one weight, in the host's memory, with one token of each of some sequences."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.gather: Gather | None = None

    def compute(self, jobs: Sequence[_Product]) -> None:
        """Multiply. Each gets the bits of a product of its own, which is never tiled."""
        rows, first = torch.stack([job.x for job in jobs]), jobs[0]
        products = dequant_matmul_cpu(rows, first.weight, first.bias, "fast", untiled_level())
        for job, product in zip(jobs, products, strict=True):
            job.out.copy_(product)

    def product(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, mode: Mode) -> Tensor:
        """Return what `dequant_matmul` returns; a single token's product is made with those of others."""
        alone = x.numel() != weight.in_features or mode != "fast" or x.is_cuda or compiled_library() is None
        if alone or self.gather is None:
            return dequant_matmul(x, weight, bias, mode)
        out = x.new_empty(*x.shape[:-1], weight.out_features)
        self.gather(self, _Product(x.flatten(), weight, bias, out.view(-1)))
        return out


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` was. `packed` is attached while the layer's weights are in memory, None otherwise.

    bias: float [out_features] or None. bits: of a weight. mode: see `dequant_matmul`. input_order: int32 [in_features]
    where column j of the weight is for input input_order[j], None where the columns are in order. joint: makes the
    products of several sequences, where that is asked for.
    """

    input_order: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, bits: int, mode: Mode
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.mode = in_features, out_features, bits, mode
        self.packed: PackedWeight | None = None
        self.joint: JointProduct | None = None
        self.dtype = dtype
        empty = torch.empty(out_features, dtype=dtype, device="meta")
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None
        self.register_buffer("input_order", None)

    def reorder_inputs(self) -> None:
        """Have a place for an order of the inputs, which is attached with the weight."""
        self.input_order = torch.empty(self.in_features, dtype=torch.int32, device="meta")

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized anew: for models that look at a linear's weight besides calling it. [N, K]."""
        if self.packed is None:
            raise AttributeError("the weights of this layer are not in memory")
        weight = dequantize(self.packed, self.dtype)
        return weight if self.input_order is None else torch.empty_like(weight).index_copy_(1, self.input_order, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, in x's dtype."""
        if self.packed is None:
            raise RuntimeError("the weights of this layer are not in memory: call the decoder layer it belongs to")
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        if self.joint is not None:
            return self.joint.product(x, self.packed, self.bias, self.mode)
        return dequant_matmul(x, self.packed, self.bias, self.mode)

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, mode={self.mode}"
