"""A linear layer whose weight is packed, and lies wherever the executor has put it."""

import torch
from torch import Tensor, nn

from kernels.matmul import Mode, dequant_matmul
from kernels.packed import PackedWeight, dequantize


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` was. `packed` is attached while the layer's weights are in memory, None otherwise.

    bias: float [out_features] or None. bits: of a weight. mode: see `dequant_matmul`. input_order: int32 [in_features]
    where column j of the weight is for input input_order[j], None where the columns are in order.
    """

    input_order: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, bits: int, mode: Mode
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.mode = in_features, out_features, bits, mode
        self.packed: PackedWeight | None = None
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
        return dequant_matmul(x, self.packed, self.bias, self.mode)

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, mode={self.mode}"
