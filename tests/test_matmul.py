"""The product as an operator of torch: what it says of itself, and torch.compile passing through it."""

import pytest
import torch
from torch import nn

from kernels.matmul import Mode, dequant_matmul
from kernels.packed import BITS, PackedWeight, pack
from offload.linear import PackedLinear


def random_weight(asymmetric: bool, bits: int) -> PackedWeight:
    zero = torch.randint(0, 1 << bits, (33, 3)) if asymmetric else None
    return pack(torch.randint(0, 1 << bits, (33, 192)), torch.rand(33, 3).add(0.1).bfloat16(), zero, 64, bits)


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_the_operator_keeps_its_word(mode: Mode, asymmetric: bool, dtype: torch.dtype, bits: int) -> None:
    weight, x, bias = random_weight(asymmetric, bits), torch.randn(2, 5, 192).to(dtype), torch.randn(33)
    operands = (x, weight.codes, weight.scale, weight.zero, bias, 64, bits, mode, True)
    torch.library.opcheck(torch.ops.int4_offload.dequant_matmul.default, operands)
    found = torch.ops.int4_offload.dequant_matmul(*operands)
    assert torch.equal(found, dequant_matmul(x, weight, bias, mode))


def test_the_operator_tells_copies_of_weights_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, told = random_weight(True, 4), []

    def product(x: torch.Tensor, weight: PackedWeight, *_: object) -> torch.Tensor:
        told.append(weight.as_mapped)
        return x.new_zeros(2, 33)

    monkeypatch.setattr("kernels.matmul._product", product)
    operands = (torch.randn(2, 192), weight.codes, weight.scale, weight.zero, None, 64, 4, "fast")
    torch.ops.int4_offload.dequant_matmul(*operands)
    torch.ops.int4_offload.dequant_matmul(*operands, True)
    assert told == [False, True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bits", BITS)
def test_torch_compile_passes_through_without_a_break(bits: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PackedLinear(192, 33, False, torch.float32, bits, "fast")
            self.linear.packed = random_weight(True, bits)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.sin()).relu() + 1

    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for tokens in (1, 7):
        x = torch.randn(tokens, 192)
        with torch.no_grad():
            assert torch.equal(compiled(x), block(x))
