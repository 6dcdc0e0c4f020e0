"""The packed weight bit for bit: what goes in comes out, the bytes are compressed-tensors' own, misfits are refused."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.packed import BITS, PackedWeight, check_group_size, dequantize, pack, unpack
from kernels.reference import dequant_matmul_reference

SHAPES = [(16, 96, 32), (5, 192, 64), (33, 384, 128), (7, 200, 200), (1, 8, 8), (12, 64, 64)]
# multiples of four alone are for 8 bits
SHAPES_AND_BITS = [*((*shape, bits) for shape in SHAPES for bits in BITS), (7, 332, 332, 8), (1, 4, 4, 8)]


def parts(
    N: int, K: int, group_size: int, asymmetric: bool, scale_dtype: torch.dtype = torch.bfloat16, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes, scales and, if asymmetric, zero points."""
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
    scale = torch.rand(N, K // group_size).add(0.01).to(scale_dtype)
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8) if asymmetric else None
    return codes, scale, zero


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("N", "K", "group_size", "bits"), SHAPES_AND_BITS)
def test_what_is_packed_comes_out(
    N: int, K: int, group_size: int, bits: int, asymmetric: bool, scale_dtype: torch.dtype
) -> None:
    codes, scale, zero = parts(N, K, group_size, asymmetric, scale_dtype, bits)
    weight = pack(codes, scale, zero, group_size, bits)
    assert (weight.out_features, weight.in_features, weight.symmetric) == (N, K, not asymmetric)
    zero_bytes = 4 * -(-N * bits // 32) * K // group_size if asymmetric else 0
    assert weight.nbytes == N * K * bits // 8 + 2 * scale.numel() + zero_bytes

    found_codes, found_zero = unpack(weight)
    expected_zero = torch.full(scale.shape, {4: 8, 8: 128}[bits], dtype=torch.uint8) if zero is None else zero
    assert found_codes.dtype == found_zero.dtype == torch.uint8
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_zero, expected_zero)

    wide = [values.double().repeat_interleave(group_size, dim=1) for values in (expected_zero, scale)]
    expected = (codes.double() - wide[0]) * wide[1]
    assert torch.equal(dequantize(weight).double(), expected)  # a 9-bit integer times 11 bits fits float32
    assert torch.equal(dequantize(weight, torch.bfloat16), expected.float().bfloat16())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_unpacking_undoes_packing_at_any_shape(data: st.DataObject) -> None:
    N = data.draw(st.integers(1, 40), "N")
    size = data.draw(st.sampled_from([32, 64, 128, 0]), "group size, 0 for the row")
    bits = data.draw(st.sampled_from(BITS), "bits")
    words = data.draw(st.integers(1, 40), "words")
    K = data.draw(st.integers(1, 4), "groups") * size if size else 32 // bits * words
    dtypes = [torch.uint8, torch.int32, torch.int64] + ([torch.int8] if bits == 4 else [])
    dtype = data.draw(st.sampled_from(dtypes), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    codes, scale, zero = parts(N, K, size or K, data.draw(st.booleans(), "asymmetric"), bits=bits)
    weight = pack(codes.to(dtype), scale, None if zero is None else zero.to(dtype), size or K, bits)
    found_codes, found_zero = unpack(weight)
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_zero, torch.full_like(found_zero, 1 << (bits - 1)) if zero is None else zero)
    again = pack(found_codes, weight.scale, None if zero is None else found_zero, size or K, bits)
    assert torch.equal(again.codes, weight.codes)
    assert (again.zero is None and weight.zero is None) or torch.equal(again.zero, weight.zero)


@pytest.mark.parametrize("bits", BITS)
@given(word=st.integers(0, 2**32 - 1))
def test_a_word_holds_its_codes_from_its_low_end_up(bits: int, word: int) -> None:
    count = 32 // bits
    codes = torch.tensor([[word >> bits * i & ((1 << bits) - 1) for i in range(count)]])
    row = pack(codes, torch.ones(1, 1, dtype=torch.float16), None, count, bits)
    assert bytes(row.codes[0].tolist()) == word.to_bytes(4, "little")
    blank, scale = torch.zeros(count, 32, dtype=torch.int32), torch.ones(count, 1, dtype=torch.float16)
    column = pack(blank, scale, codes.T, 32, bits)
    assert column.zero is not None
    assert column.zero.item() == word - (word >> 31 << 32)


@pytest.mark.parametrize(("N", "K", "group_size", "bits"), SHAPES_AND_BITS)
def test_bytes_are_those_of_compressed_tensors(N: int, K: int, group_size: int, bits: int) -> None:
    codes, scale, zero = parts(N, K, group_size, asymmetric=True, bits=bits)
    assert zero is not None
    weight = pack(codes, scale, zero, group_size, bits)
    signed_codes, signed_zero = ((values.int() - (1 << (bits - 1))).to(torch.int8) for values in (codes, zero))
    assert torch.equal(weight.codes, pack_to_int32(signed_codes, bits).view(torch.uint8))
    assert torch.equal(unpack_from_int32(weight.codes.view(torch.int32), bits, signed_codes.shape), signed_codes)
    assert weight.zero is not None
    assert torch.equal(weight.zero, pack_to_int32(signed_zero, bits, packed_dim=0))
    if len(weight.zero) > 1:  # 0.20.0 cannot read a single row of words back: it views a transpose of stride > 1
        assert torch.equal(unpack_from_int32(weight.zero, bits, signed_zero.shape, packed_dim=0), signed_zero)


def test_strided_codes_scales_and_zeros_are_packed_all_the_same() -> None:
    codes, scale, zero = parts(16, 64, 32, asymmetric=True)
    assert zero is not None
    expected = pack(codes, scale, zero, 32)
    found = pack(*(values.T.contiguous().T for values in (codes, scale, zero)), 32)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)


def test_a_weight_views_its_tensors() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (8, 16), dtype=torch.int32)
    scale = torch.ones(8, 1, dtype=torch.bfloat16)
    weight = PackedWeight(words.view(torch.uint8), scale, None, 128)
    assert weight.codes.data_ptr() == words.data_ptr()
    before = dequantize(weight)
    words.zero_()
    scale.fill_(2)
    assert not torch.equal(dequantize(weight), before)
    assert torch.equal(dequantize(weight), torch.full((8, 128), -16.0))


@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_is_the_product_in_float32(with_bias: bool) -> None:
    weight = pack(*parts(5, 192, 64, asymmetric=True), 64)
    x = torch.randn(2, 3, 192, dtype=torch.float16)
    bias = torch.randn(5, dtype=torch.bfloat16) if with_bias else None
    found = dequant_matmul_reference(x, weight, bias)
    expected = x.double() @ dequantize(weight).double().T + (0 if bias is None else bias.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("K", "group_size", "bits", "message"),
    [
        (100, 32, 4, "K=100 is not a multiple of 8, the codes in one int32"),
        (102, 102, 8, "K=102 is not a multiple of 4, the codes in one int32"),
        (100, 32, 8, "K=100 is not a multiple of group_size=32"),
        (0, 0, 4, "group_size=0: expected 32, 64, 128 or the whole row, K=0"),
        (192, 16, 4, "group_size=16: expected 32, 64, 128 or the whole row, K=192"),
        (192, 96, 4, "group_size=96: expected 32, 64, 128 or the whole row, K=192"),
        (192, 0, 8, "group_size=0: expected 32, 64, 128 or the whole row, K=192"),
        (192, 128, 8, "K=192 is not a multiple of group_size=128"),
        (32, 64, 4, "K=32 is not a multiple of group_size=64"),
    ],
)
def test_group_sizes_that_do_not_divide_the_row_are_refused(K: int, group_size: int, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_group_size(K, group_size, bits)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codes": torch.full((9, 64), 16)}, r"codes: expected values 0\.\.15, found 16\.\.16"),
        ({"codes": torch.arange(-1, 575).view(9, 64) % 17 - 1}, r"codes: expected values 0\.\.15, found -1\.\.15"),
        ({"bits": 8, "codes": torch.full((9, 64), 256)}, r"codes: expected values 0\.\.255, found 256\.\.256"),
        ({"bits": 8, "zero": torch.full((9, 2), 256)}, r"zero: expected values 0\.\.255, found 256\.\.256"),
        ({"bits": 8, "codes": torch.zeros(9, 62, dtype=torch.uint8)}, "K=62 is not a multiple of 4"),
        ({"codes": torch.zeros(9, 64)}, r"codes: expected integers of rank 2, found torch.float32 \[9, 64\]"),
        ({"codes": torch.zeros(576, dtype=torch.uint8)}, r"codes: expected integers of rank 2, found .*\[576\]"),
        ({"codes": torch.zeros(9, 60, dtype=torch.uint8)}, "K=60 is not a multiple of 8"),
        ({"group_size": 48}, "group_size=48: expected 32, 64, 128 or the whole row, K=64"),
        ({"scale": torch.ones(9, 2)}, "scale: expected bfloat16 or float16, found torch.float32"),
        ({"scale": torch.ones(9, 1).half()}, r"scale: expected contiguous \[9, 2\], found torch.float16 \[9, 1\]"),
        ({"scale": torch.ones(8, 2).half()}, r"scale: expected contiguous \[9, 2\], found torch.float16 \[8, 2\]"),
        ({"zero": torch.full((9, 2), 16)}, r"zero: expected values 0\.\.15, found 16\.\.16"),
        ({"zero": torch.full((9, 2), -1)}, r"zero: expected values 0\.\.15, found -1\.\.-1"),
        ({"zero": torch.full((9, 2), 8.0)}, r"zero: expected integers of rank 2, found torch.float32 \[9, 2\]"),
        ({"zero": torch.zeros(9, 1, dtype=torch.uint8)}, r"zero: expected .*\[9, 2\], found .*\[9, 1\]"),
        # as many words down the rows as 9 zero points take, and yet not 9
        ({"zero": torch.zeros(16, 2, dtype=torch.uint8)}, r"zero: expected .*\[9, 2\], found .*\[16, 2\]"),
        ({"zero": torch.zeros(10, 2, dtype=torch.uint8)}, r"zero: expected .*\[9, 2\], found .*\[10, 2\]"),
    ],
)
def test_parts_that_do_not_fit_are_not_packed(changed: dict[str, Any], message: str) -> None:
    codes, scale, zero = parts(9, 64, 32, asymmetric=True)
    fitting: dict[str, Any] = {"codes": codes, "scale": scale, "zero": zero, "group_size": 32}
    pack(**fitting)
    with pytest.raises(ValueError, match=f"^{message}"):
        pack(**fitting | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 3}, "bits=3: expected 4 or 8"),
        ({"bits": 8, "group_size": 16}, "group_size=16: expected 32, 64, 128 or the whole row, K=32"),
        ({"bits": 8, "group_size": 32}, r"scale: expected contiguous \[9, 1\], found torch.bfloat16 \[9, 2\]"),
        (
            {"bits": 8, "codes": torch.zeros(9, 64, dtype=torch.uint8)},
            r"zero: .* int32 \[3, 2\], found torch.int32 \[2, 2\]",
        ),
        ({"codes": torch.zeros(9, 32, dtype=torch.int8)}, r"codes: .*uint8 \[N, K\*4/8\], found torch.int8 \[9, 32\]"),
        ({"codes": torch.zeros(288, dtype=torch.uint8)}, r"codes: .*, found torch.uint8 \[288\]"),
        ({"codes": torch.zeros(32, 9, dtype=torch.uint8).T}, r"codes: .*\[9, 32\] not contiguous$"),
        ({"codes": torch.zeros(9, 34, dtype=torch.uint8)}, "K=68 is not a multiple of 8"),
        ({"codes": torch.zeros(9, 40, dtype=torch.uint8)}, "K=80 is not a multiple of group_size=32"),
        ({"group_size": 24}, "group_size=24: expected 32, 64, 128 or the whole row, K=64"),
        ({"group_size": 64}, r"scale: expected contiguous \[9, 1\], found torch.bfloat16 \[9, 2\]"),
        ({"scale": torch.ones(9, 2)}, "scale: expected bfloat16 or float16, found torch.float32"),
        ({"scale": torch.ones(2, 9).half().T}, r"scale: .*\[9, 2\], found torch.float16 \[9, 2\] not contiguous"),
        ({"scale": torch.ones(18).half()}, r"scale: .*\[9, 2\], found torch.float16 \[18\]"),
        ({"zero": torch.zeros(2, 2, dtype=torch.int64)}, r"zero: .* int32 \[2, 2\], found torch.int64 \[2, 2\]"),
        ({"zero": torch.zeros(9, 2, dtype=torch.int32)}, r"zero: .* int32 \[2, 2\], found torch.int32 \[9, 2\]"),
        ({"zero": torch.zeros(1, 2, dtype=torch.int32)}, r"zero: .* int32 \[2, 2\], found torch.int32 \[1, 2\]"),
        ({"zero": torch.zeros(2, 2, dtype=torch.int32).T}, r"zero: .* int32 \[2, 2\], .* not contiguous"),
    ],
)
def test_tensors_that_do_not_fit_are_no_weight(changed: dict[str, Any], message: str) -> None:
    weight = pack(*parts(9, 64, 32, asymmetric=True), 32)
    fitting = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "group_size": 32}
    PackedWeight(**fitting)
    with pytest.raises(ValueError, match=f"^{message}"):
        PackedWeight(**fitting | changed)
