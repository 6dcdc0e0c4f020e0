"""The grid: scales to the bit and codes to the nearest level, against float64 numpy that shares no code with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from kernels.packed import BITS, dequantize, unpack
from quant.groupwise import Grid, Parameters, codes, fake_quantize, minmax, pack_weight, range_parameters, values

Doubles = NDArray[np.float64]
GROUPS = [32, 64, 128, None]
DTYPES = [torch.bfloat16, torch.float16]


def doubles(tensor: Tensor) -> Doubles:
    return tensor.double().numpy()


def stored_scale(scale: Doubles, dtype: torch.dtype) -> Doubles:
    """Round to the file's dtype, to nearest even, and keep the result at or above the smallest normal."""
    single = scale.astype(np.float32)
    if dtype == torch.float16:
        return np.maximum(single.astype(np.float16).astype(np.float64), float(np.finfo(np.float16).tiny))
    bits = single.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.maximum(bits.astype(np.uint32).view(np.float32).astype(np.float64), float(np.finfo(np.float32).tiny))


def reference_scale(weight: Doubles, grid: Grid) -> Doubles:
    """Return the round-to-nearest scale [N, C] of a weight [N, C, G]."""
    low, high = weight.min(-1).clip(max=0), weight.max(-1).clip(min=0)
    if grid.symmetric:
        return stored_scale(np.maximum(-low, high) / {4: 7.5, 8: 127.5}[grid.bits], grid.scale_dtype)
    width = (high - low).astype(np.float32).astype(np.float64)
    return stored_scale(width / {4: 15, 8: 255}[grid.bits], grid.scale_dtype)


def grouped(weight: Tensor, grid: Grid) -> Doubles:
    size = grid.group_size or weight.shape[1]
    return doubles(weight).reshape(len(weight), -1, size)


def distance_to_nearest_level(weight: Doubles, scale: Doubles, zero: Doubles, bits: int) -> Doubles:
    """Return, for every weight [N, C, G], the distance to the nearest of its group's levels, all of them tried."""
    levels = (np.arange(2**bits) - zero[..., None]) * scale[..., None]
    return np.abs(weight[..., None] - levels[:, :, None, :]).min(-1)


def check_against_reference(weight: Tensor, grid: Grid) -> Parameters:
    parameters = minmax(weight, grid)
    exact, scale, zero = grouped(weight, grid), doubles(parameters.scale), doubles(parameters.zero)
    slack = 1e-5 * (2**grid.bits - 1) / 15  # of a code as float32 computes it, in proportion to its size
    assert np.array_equal(scale, reference_scale(exact, grid))
    if grid.symmetric:
        assert (zero == {4: 8, 8: 128}[grid.bits]).all()
    else:
        wanted = -exact.min(-1).clip(max=0) / scale
        assert (np.abs(zero - wanted.clip(0, 2**grid.bits - 1)) <= 0.5 + slack).all()
        assert (zero == zero.round()).all()
    found = fake_quantize(weight, parameters, grid)
    distance = np.abs(grouped(found, grid) - exact)
    nearest = distance_to_nearest_level(exact, scale, zero, grid.bits)
    assert (distance <= nearest + slack * np.abs(scale)[..., None]).all()
    code = codes(weight, parameters, grid)
    assert code.dtype == torch.float32
    assert set(code.unique().tolist()) <= set(range(2**grid.bits))
    assert torch.equal(values(code, parameters), found)
    return parameters


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_scales_and_codes_equal_the_reference(
    group_size: int | None, dtype: torch.dtype, symmetric: bool, bits: int
) -> None:
    weight = torch.randn(9, 256) * torch.logspace(-3, 2, 9)[:, None] + torch.linspace(-1, 1, 9)[:, None]
    parameters = check_against_reference(weight, Grid(group_size, symmetric, dtype, bits))
    assert parameters.scale.shape == (9, 256 // (group_size or 256))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_one_sided_groups_keep_zero_representable(symmetric: bool, bits: int) -> None:
    weight = torch.cat((torch.rand(4, 64) + 3, -torch.rand(4, 64) - 3))
    grid = Grid(32, symmetric, bits=bits)
    parameters = check_against_reference(weight, grid)
    if not symmetric:
        assert (parameters.zero[:4] == 0).all()
        assert (parameters.zero[4:] == grid.code_max).all()
    assert torch.equal(fake_quantize(torch.zeros(8, 64), parameters, grid), torch.zeros(8, 64))


def special_weights() -> dict[str, Tensor]:
    outlier = torch.randn(3, 64)
    outlier[1, 5] = 1e4
    zeros = torch.randn(3, 64)
    zeros[:, :32] = 0
    return {
        "constant": torch.tensor([2.5, -2.5, 1e-3])[:, None].expand(3, 64).clone(),
        "zeros": zeros,
        "outlier": outlier,
        "denormal": torch.full((3, 64), 1e-40) * torch.linspace(-1, 1, 64),
        "smallest": torch.full((3, 64), 1e-45),
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(special_weights()))
@pytest.mark.parametrize("bits", BITS)
def test_special_weights_have_finite_scales(kind: str, dtype: torch.dtype, symmetric: bool, bits: int) -> None:
    weight, grid = special_weights()[kind], Grid(32, symmetric, dtype, bits)
    parameters = check_against_reference(weight, grid)
    assert (parameters.scale >= torch.finfo(dtype).tiny).all()
    assert torch.isfinite(parameters.scale).all()
    packed = pack_weight(weight, parameters, grid)
    assert torch.isfinite(packed.scale).all()
    assert torch.isfinite(dequantize(packed)).all()
    if kind == "zeros":
        assert torch.equal(dequantize(packed)[:, :32], torch.zeros(3, 32))
    if kind == "constant" and not symmetric:
        # 1e-3 in 8 bits wants a scale below the smallest normal of fp16
        smallest_scale = torch.finfo(dtype).tiny if bits == 8 else 0
        torch.testing.assert_close(dequantize(packed), weight, rtol=2**-8, atol=smallest_scale / 2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@given(
    weight=arrays(
        np.float32,
        (2, 32),
        elements=st.floats(-65504, 65504, width=32) | st.sampled_from([0.0, 1e-45, -1e-38, 6e-8, 1.0, -1.0, 7.5]),
    )
)
@settings(deadline=None, database=None, derandomize=True, max_examples=60)
def test_any_weight_goes_to_its_nearest_level(symmetric: bool, bits: int, weight: NDArray[np.float32]) -> None:
    check_against_reference(torch.from_numpy(weight), Grid(32, symmetric, bits=bits))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_on_the_grid_stays_where_it_is(dtype: torch.dtype, symmetric: bool, bits: int) -> None:
    weight, grid = torch.randn(7, 128) * torch.logspace(-4, 3, 7)[:, None], Grid(64, symmetric, dtype, bits)
    parameters = minmax(weight, grid)
    once = fake_quantize(weight, parameters, grid)
    assert not torch.equal(once, weight)
    assert torch.equal(fake_quantize(once, parameters, grid), once)
    assert torch.equal(codes(once, parameters, grid), codes(weight, parameters, grid))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_the_packed_weight_is_the_fake_quantized_one(
    group_size: int | None, dtype: torch.dtype, symmetric: bool, bits: int
) -> None:
    weight, grid = torch.randn(13, 256), Grid(group_size, symmetric, dtype, bits)
    parameters = minmax(weight, grid)
    packed = pack_weight(weight, parameters, grid)
    assert torch.equal(dequantize(packed), fake_quantize(weight, parameters, grid))
    assert packed.bits == bits
    assert packed.scale.dtype == dtype
    assert packed.group_size == (group_size or 256)
    assert packed.symmetric == symmetric
    stored_codes, stored_zero = unpack(packed)
    assert torch.equal(stored_codes.float(), codes(weight, parameters, grid))
    assert torch.equal(stored_zero.float(), parameters.zero)


def test_swapped_ends_make_a_negative_scale_that_survives_packing() -> None:
    """A negative scale puts the extra code of a symmetric grid on the positive side."""
    weight, grid = torch.randn(4, 32), Grid(32, True)
    weight.clamp_(-2.9, 2.9)[:, 0] = 3
    low, high = 0.9 * weight.amin(-1, keepdim=True), 0.9 * weight.amax(-1, keepdim=True)
    straight, swapped = range_parameters(low, high, grid), range_parameters(-low, -high, grid)
    assert torch.equal(swapped.scale, -straight.scale)
    found = fake_quantize(weight, swapped, grid)
    exact = grouped(weight, grid)
    nearest = distance_to_nearest_level(exact, doubles(swapped.scale), doubles(swapped.zero), 4)
    assert np.allclose(np.abs(grouped(found, grid) - exact), nearest, rtol=0, atol=1e-6)
    assert (found[:, 0] > fake_quantize(weight, straight, grid)[:, 0]).all()
    assert torch.equal(dequantize(pack_weight(weight, swapped, grid)), found)


def test_a_narrower_range_saturates() -> None:
    weight, grid = torch.linspace(-4, 4, 32)[None], Grid(32, False)
    parameters = range_parameters(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), grid)
    code = codes(weight, parameters, grid)
    assert (code[weight < -1.2] == 0).all()
    assert (code[weight > 2.2] == 15).all()
    assert parameters.scale.item() == pytest.approx(0.2, rel=2**-8)
    assert parameters.zero.item() == 5


@pytest.mark.parametrize(
    ("group_size", "width", "message"),
    [
        (64, 96, "K=96 is not a multiple of group_size=64"),
        (48, 96, "group_size=48: expected 32, 64, 128 or the whole row, K=96"),
        (None, 100, "K=100 is not a multiple of 8, the codes in one int32"),
    ],
)
def test_widths_that_cannot_be_cut_are_refused(group_size: int | None, width: int, message: str) -> None:
    grid = Grid(group_size, True)
    with pytest.raises(ValueError, match=message):
        grid.group(width)
    with pytest.raises(ValueError, match=message):
        minmax(torch.randn(2, width), grid)
