"""Re-laid weights of other tools hold their codes, zero points and scales, one by one, at odd shapes too."""

import pytest
import torch

from kernels.cpu_repack import awq_codes_cpu
from kernels.packed import PackedWeight, dequantize, pack, unpack
from kernels.repack import awq_codes, from_awq, from_gptq
from kernels.repack import to_awq as to_awq_of
from kernels.repack import to_gptq as to_gptq_of
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


@pytest.mark.parametrize(("inputs", "words"), [(2, 1), (62, 15), (64, 16), (66, 17), (258, 50)])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_and_torch_relay_awq_alike(inputs: int, words: int, threads: int) -> None:
    qweight = torch.randint(-(2**31), 2**31 - 1, (inputs, words), dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = awq_codes_cpu(qweight)
        if found is None:
            pytest.skip("no compiled kernels")
        assert torch.equal(found, awq_codes(qweight))
        assert torch.equal(awq_codes_cpu(qweight.t().contiguous().t()), found)
    finally:
        torch.set_num_threads(before)


def test_small_tensors_are_turned_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda self: (seen.append(torch.get_num_threads()), contiguous(self))[1]
    )
    torch.set_num_threads(2)
    try:
        from_awq(**to_awq(random_grid(16, 64, 32, False)), symmetric=False)
        assert seen[-2:] == [1, 1]  # zero points and scales; what comes before is the codes
        with pytest.raises(ValueError, match="other than 8"):
            from_awq(**to_awq(random_grid(16, 64, 32, False)), symmetric=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
def test_ours_as_theirs(rows: int, inputs: int, group_size: int, symmetric: bool) -> None:
    for bits in (4, 8):
        grid = random_grid(rows, inputs, group_size, symmetric, bits=bits)
        weight = pack(grid.codes, grid.scale, None if symmetric else grid.zero, group_size, bits)
        kinds = {"awq": (to_awq_of(weight), to_awq(grid))} if bits == 4 else {}
        kinds |= {f"gptq v{2 - first}": (to_gptq_of(weight, first), to_gptq(grid, first)) for first in (True, False)}
        for kind, (found, expected) in kinds.items():
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), (kind, name)


def test_what_theirs_cannot_hold_is_refused() -> None:
    def weight(rows: int, scale: float, bits: int = 4) -> PackedWeight:
        scales = torch.full((rows, 2), scale, dtype=torch.bfloat16)
        return pack(torch.zeros(rows, 64, dtype=torch.uint8), scales, None, 32, bits)

    with pytest.raises(ValueError, match="12 rows of 4 bits; expected 4 bits and a multiple of 8"):
        to_awq_of(weight(12, 0.01))
    with pytest.raises(ValueError, match="16 rows of 8 bits; expected 4 bits and a multiple of 8"):
        to_awq_of(weight(16, 0.01, bits=8))
    with pytest.raises(ValueError, match="12 rows; expected a multiple of 8"):
        to_gptq_of(weight(12, 0.01), True)
    for scale in (1e-9, 1e6):
        with pytest.raises(ValueError, match="scales that float16 does not hold"):
            to_gptq_of(weight(16, scale), True)


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
