"""Re-laid weights of other tools hold their codes, zero points and scales, one by one, at odd shapes too."""

import pytest
import torch

from kernels.packed import dequantize, unpack
from kernels.repack import from_awq, from_gptq
from tests.packers import random_grid, to_awq, to_gptq

SHAPES = [(8, 64, 32), (24, 128, 128), (40, 192, 64), (1032, 256, 32)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
def test_awq(rows: int, inputs: int, group_size: int, symmetric: bool) -> None:
    grid = random_grid(rows, inputs, group_size, symmetric)
    weight = from_awq(**to_awq(grid), symmetric=symmetric)
    codes, zero = unpack(weight)
    assert weight.symmetric == symmetric
    assert torch.equal(codes.long(), grid.codes)
    assert torch.equal(zero.long(), grid.zero)
    assert torch.equal(weight.scale, grid.scale)


@pytest.mark.parametrize("first_version", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
def test_gptq(
    rows: int, inputs: int, group_size: int, symmetric: bool, act_order: bool, bits: int, first_version: bool
) -> None:
    grid = random_grid(rows, inputs, group_size, symmetric, act_order, bits)
    tensors = to_gptq(grid, first_version)
    weight, order = from_gptq(**tensors, bits=bits, first_version=first_version, symmetric=symmetric)
    grouped = inputs > group_size and act_order
    assert (order is not None) == grouped
    restored = dequantize(weight, torch.float64)
    if order is not None:
        assert torch.equal(order.sort().values, torch.arange(inputs))
        restored = torch.empty_like(restored).index_copy_(1, order, restored)
    assert torch.equal(restored.float(), grid.weight().float())


def test_what_does_not_fit_is_refused() -> None:
    grid = random_grid(16, 64, 32, symmetric=False)
    awq, gptq = to_awq(grid), to_gptq(grid, first_version=False)
    with pytest.raises(ValueError, match="zero points other than 8 in a weight that is said to be symmetric"):
        from_awq(**awq, symmetric=True)
    with pytest.raises(ValueError, match=r"scales \[2, 15\] and qzeros \[2, 2\] do not fit 16 rows of 64 inputs"):
        from_awq(**(awq | {"scales": awq["scales"][:, 1:]}), symmetric=False)
    uneven = gptq | {"g_idx": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(ValueError, match="g_idx: expected 64 inputs in 2 groups of one size"):
        from_gptq(**uneven, bits=4, first_version=False, symmetric=False)
