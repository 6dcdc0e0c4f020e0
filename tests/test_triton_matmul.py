"""The GPU product in Triton's interpreter and, where there is one, on a GPU; its machine code, compiled without one.

Triton decides when it is imported whether it interprets, so the interpreter has a process of its own.
"""

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import kernels.ahead_of_time
from kernels.ahead_of_time import Compiled, Configuration, compile_one, configurations, main
from kernels.matmul import dequant_matmul
from kernels.packed import BITS, PackedWeight, dequantize, pack
from kernels.triton_kernels import _BF16_LESS_8, _FP16_LESS_8, matmul_kernel
from kernels.triton_matmul import dequant_matmul_triton, fused, launch_sums, read_sums, workspace_elements
from kernels.triton_tuning import TUNINGS, GpuKind, Launch, Tuning, WeightShape, plan_launch, product_bytes

# a row of N=70 is two tiles; K with and without a last step that is not full; 1088 takes two blocks to dequantise
SHAPES = [(17, 160, 32), (33, 320, 64), (5, 384, 128), (70, 200, 200), (70, 8, 8), (9, 1088, 64)]
# multiples of four alone are for 8 bits
SHAPES_AND_BITS = [*((*shape, bits) for shape in SHAPES for bits in BITS), (7, 332, 332, 8)]


def random_weight(
    N: int, K: int, group_size: int, asymmetric: bool, scale_dtype: torch.dtype, bits: int = 4, device: str = "cpu"
) -> PackedWeight:
    scale = torch.rand(N, K // group_size, device=device).add(0.1).to(scale_dtype)
    zero = torch.randint(0, 1 << bits, scale.shape, device=device) if asymmetric else None
    return pack(torch.randint(0, 1 << bits, (N, K), device=device), scale, zero, group_size, bits)


def errors(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> tuple[float, float]:
    """Return how far from float64 our product and plain torch's at x's dtype are, memory being NaN to begin with."""
    w = dequantize(weight)
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    plain = x @ w.to(x.dtype).T + (0 if bias is None else bias.to(x.dtype))
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        found = empty(*arguments, **options)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    with patch.object(torch, "empty", poisoned):
        ours = dequant_matmul_triton(x, weight, bias)
    assert ours.dtype == x.dtype
    assert ours.shape == exact.shape
    return float((ours.double() - exact).norm()), float((plain.double() - exact).norm())


def interpreted_errors(
    N: int, K: int, group_size: int, bits: int, asymmetric: bool, dtype: torch.dtype, M: int
) -> list[tuple[float, float]]:
    """Return the errors on random operands: a scale in bf16 and no bias, a scale in fp16 and one."""
    torch.manual_seed(0)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    ways = ((torch.bfloat16, None), (torch.float16, bias))
    return [errors(x, random_weight(N, K, group_size, asymmetric, kind, bits), added) for kind, added in ways]


def interpreted_special_cases() -> None:
    """Assert what is not a matter of error."""
    torch.manual_seed(0)
    weight = random_weight(33, 192, 64, True, torch.bfloat16)
    x, bias = torch.randn(70, 192), torch.randn(33)
    for M in (17, 70):
        ours, plain = errors(x[:M].half(), weight, bias)
        assert ours <= 2 * plain, "a bias of another dtype"
        strided = dequant_matmul_triton(x[:M].T.contiguous().T, weight, bias)
        assert torch.equal(strided, dequant_matmul_triton(x[:M], weight, bias))
    assert dequant_matmul_triton(x[:0], weight, bias).shape == (0, 33)
    assert dequant_matmul_triton(x[:6].view(2, 3, 192), weight, bias).shape == (2, 3, 33)
    expected = dequant_matmul_triton(x[:17], weight, bias)
    x[5, 100] = float("nan")
    found = dequant_matmul_triton(x[:17], weight, bias)
    assert found[5].isnan().all()
    others = torch.arange(17) != 5
    assert torch.equal(found[others], expected[others])


def interpreted_launches() -> list[tuple[float, float]]:
    """Return the errors of every tile, that for weights in host memory too, on one to three splits of K."""
    torch.manual_seed(0)
    found = []
    for bits, (K, group_size) in product(BITS, ((576, 64), (200, 200), (512, 32))):
        weight, x, bias = (
            random_weight(70, K, group_size, True, torch.float16, bits),
            torch.randn(5, K).half(),
            torch.randn(70),
        )
        exact = x.double() @ dequantize(weight).double().T + bias.double()
        plain = x @ dequantize(weight).half().T + bias.half()
        for tile in (*TUNINGS[8].tiles, TUNINGS[8].mapped):
            steps = -(-K // tile.step(0 if group_size == K else group_size, bits))
            for splits in range(1, min(3, steps) + 1):
                ours = fused(x, weight, bias, None, Launch(tile, splits, -(-steps // splits)))
                found.append((float((ours.double() - exact).norm()), float((plain.double() - exact).norm())))
    return found


def interpreted_copies() -> None:
    """Assert that a copy of a weight that is read across the bus gives the bits that it gives there, in any company."""
    torch.manual_seed(0)
    weight, x = random_weight(70, 1024, 64, True, torch.bfloat16), torch.randn(16, 1024).half()
    copy = dataclasses.replace(weight, as_mapped=True)
    there = fused(x, weight, None, None, plan_launch(16, weight, TUNINGS[8], 4, mapped=True))
    assert not torch.equal(there, dequant_matmul_triton(x, weight)), "the same in either memory: nothing is shown"
    assert torch.equal(dequant_matmul_triton(x, copy), there)
    for row in range(16):
        assert torch.equal(dequant_matmul_triton(x[row : row + 1], copy), there[row : row + 1])
    assert workspace_elements(16, copy, torch.device("cpu")) != workspace_elements(16, weight, torch.device("cpu"))


def interpreted_workspace() -> None:
    """Assert that a workspace of the caller's is used, is large enough as announced, and must be."""
    torch.manual_seed(0)
    weight, x = random_weight(33, 1024, 64, True, torch.bfloat16), torch.randn(3, 1024)
    size = workspace_elements(3, weight, torch.device("cpu"))
    assert size > 3 * 33
    assert size % (3 * 33) == 0
    workspace = torch.full((size,), float("nan"))
    expected = dequant_matmul_triton(x, weight)
    assert torch.equal(dequant_matmul_triton(x, weight, workspace=workspace), expected)
    assert torch.isfinite(workspace).all()
    with pytest.raises(ValueError, match=f"workspace: expected float32 of {size} elements, found {size - 1}"):
        dequant_matmul_triton(x, weight, workspace=workspace[1:])
    assert workspace_elements(1000, weight, torch.device("cpu")) == 0
    elements = max(workspace_elements(rows, weight, torch.device("cpu")) for rows in range(1, 6))
    shape, gpu = WeightShape(33, 1024, 64, weight.bits), GpuKind(8, 4)
    assert product_bytes([shape], 5, 2, gpu) == product_bytes([weight], 5, 2, gpu) == 4 * elements
    assert product_bytes([shape, WeightShape(7, 64, 64, 4)], 1000, 200, gpu) == 33 * 1024 * 200  # dequantized


def interpreted_sums() -> None:
    """Assert that the sums of whole steps and of what remains are those of torch, and that nothing lies behind them."""
    torch.manual_seed(0)
    for M, K, step in ((3, 200, 64), (1, 1088, 32), (2, 128, 128)):
        x, steps = torch.randn(M, K).half(), -(-K // step)
        sums = torch.full((M * steps + 9,), float("nan"))
        launch_sums(x, step, sums)
        expected = torch.nn.functional.pad(x.double(), (0, steps * step - K)).view(M, steps, step).sum(-1)
        torch.testing.assert_close(sums[: M * steps].view(M, steps).double(), expected, rtol=1e-5, atol=1e-5)
        assert sums[M * steps :].isnan().all()
        with pytest.raises(ValueError, match=f"sums: expected float32 of {M * steps} elements, found {M * steps - 1}"):
            launch_sums(x, step, sums[10:])


def interpreted_reads() -> None:
    """Assert that every word of a buffer is read once, where the last block is and is not full."""
    torch.manual_seed(0)
    for words in (1, 1024, 200_001):
        buffer = torch.randint(-(1 << 31), 1 << 31, (words,)).to(torch.int32)
        sums = read_sums(buffer.view(torch.uint8), torch.device("cpu"))
        assert sums.sum().to(torch.int32) == buffer.sum().to(torch.int32)


@pytest.mark.parametrize("M", [1, 5, 17, 70])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("N", "K", "group_size", "bits"), SHAPES_AND_BITS)
def test_interpreted_product_errs_at_most_twice_as_much_as_torch(
    interpreter: ProcessPoolExecutor,
    N: int,
    K: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    asymmetric: bool,
    M: int,
) -> None:
    future = interpreter.submit(interpreted_errors, N, K, group_size, bits, asymmetric, dtype, M)
    for ours, plain in future.result(timeout=60):
        assert ours <= 2 * plain


def test_interpreted_special_cases(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_special_cases).result(timeout=60)


def test_interpreted_launches_err_at_most_twice_as_much_as_torch(interpreter: ProcessPoolExecutor) -> None:
    for ours, plain in interpreter.submit(interpreted_launches).result(timeout=120):
        assert ours <= 2 * plain


def test_interpreted_copies_of_weights_in_host_memory(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_copies).result(timeout=60)


def test_interpreted_workspace(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_workspace).result(timeout=60)


def test_interpreted_sums(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_sums).result(timeout=60)


def test_interpreted_reads(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_reads).result(timeout=60)


def test_the_batches_tested_reach_every_way() -> None:
    tuning = TUNINGS[8]
    assert 5 <= tuning.tiles[0].block_m < 17 <= tuning.tiles[1].block_m <= tuning.fused_batch < 70


@pytest.mark.parametrize("tuning", TUNINGS.values())
@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(4096, 4096, 128), (1024, 4096, 64), (28672, 8192, 32), (64, 256, 256)]
)
@pytest.mark.parametrize("M", [1, 16, 17, 64, 100])
@pytest.mark.parametrize("bits", BITS)
def test_splits_cover_k_and_fill_the_device(tuning: Tuning, N: int, K: int, group_size: int, M: int, bits: int) -> None:
    codes = torch.empty(N, K * bits // 8, dtype=torch.uint8, device="meta")
    scale = torch.empty(N, K // group_size, dtype=torch.bfloat16, device="meta")
    weight = PackedWeight(codes, scale, None, group_size, bits)
    launch = plan_launch(M, weight, tuning, processors=132, mapped=False)
    steps = -(-K // launch.tile.step(0 if group_size == K else group_size, bits))
    assert (launch.splits - 1) * launch.steps_per_split < steps <= launch.splits * launch.steps_per_split
    programs = -(-N // launch.tile.block_n) * -(-M // launch.tile.block_m) * launch.splits
    assert programs >= 132 or launch.steps_per_split <= 4 or launch.splits >= 11
    assert launch.tile.block_m >= M or launch.tile is tuning.tiles[-1]


def run_ptx(text: str, byte_quadruple: int) -> list[int]:
    """Run the instructions that our inline assembly has on a register of four bytes; return what is in $0 to $3."""
    registers: dict[str, int] = {"$4": byte_quadruple}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def halves(kind: torch.dtype, operand: str) -> Tensor:
        return torch.tensor([value(operand)], dtype=torch.int64).to(torch.uint32).view(kind)

    for line in text.strip("{} \n").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *operands = [part.strip() for part in rest.split(",")]
        kind = torch.float16 if operation.endswith(".f16x2") else torch.bfloat16
        if operation == "mov.b32":
            registers[target] = value(operands[0])
        elif operation == "shr.u32":
            registers[target] = value(operands[0]) >> value(operands[1])
        elif operation == "prmt.b32":
            pool = value(operands[0]).to_bytes(4, "little") + value(operands[1]).to_bytes(4, "little")
            chosen = [pool[value(operands[2]) >> 4 * i & 7] for i in range(4)]
            registers[target] = int.from_bytes(bytes(chosen), "little")
        elif operation == "lop3.b32":
            assert value(operands[3]) == 0xEA, "(a & b) | c"
            registers[target] = value(operands[0]) & value(operands[1]) | value(operands[2])
        else:
            a, b = halves(kind, operands[0]).double(), halves(kind, operands[1]).double()
            result = a - b if operation == "sub.f16x2" else a * b + halves(kind, operands[2]).double()
            assert operation in ("sub.f16x2", "fma.rn.f16x2", "fma.rn.bf16x2"), operation
            registers[target] = int(result.to(kind).view(torch.uint32))
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(("text", "kind"), [(_FP16_LESS_8, torch.float16), (_BF16_LESS_8, torch.bfloat16)])
def test_the_inline_assembly_is_exact_for_every_byte(text: Any, kind: torch.dtype) -> None:
    for byte in range(256):
        four = [byte, 255 - byte, byte ^ 0x5A, (byte * 7) % 256]
        left = run_ptx(text.value, int.from_bytes(bytes(four), "little"))
        found = torch.tensor(left, dtype=torch.int64).to(torch.uint32).view(kind).tolist()
        assert found == [(b & 15) - 8 for b in four] + [(b >> 4) - 8 for b in four]


@pytest.mark.gpu
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "K", "group_size", "bits"), [*SHAPES_AND_BITS, *((4096, 2048, 128, bits) for bits in BITS)]
)
def test_gpu_product_errs_at_most_twice_as_much_as_torch(
    N: int, K: int, group_size: int, bits: int, dtype: torch.dtype, asymmetric: bool
) -> None:
    weight = random_weight(N, K, group_size, asymmetric, dtype, bits, "cuda")
    for M in (1, 2, 5, 16, 17, 33, 64, 65, 70, 200):
        x, bias = torch.randn(M, K, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
        for added in (None, bias):
            ours, plain = errors(x, weight, added)
            assert ours <= 2 * plain
            assert torch.equal(dequant_matmul(x, weight, added), dequant_matmul_triton(x, weight, added))


@pytest.mark.gpu
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("N", "K", "group_size"), [(33, 320, 64), (70, 200, 200), (4096, 2048, 128)])
@pytest.mark.parametrize("bits", BITS)
def test_gpu_reads_a_weight_in_pinned_memory(N: int, K: int, group_size: int, asymmetric: bool, bits: int) -> None:
    there = random_weight(N, K, group_size, asymmetric, torch.bfloat16, bits)
    zero = None if there.zero is None else there.zero.pin_memory()
    weight = PackedWeight(there.codes.pin_memory(), there.scale.pin_memory(), zero, group_size, bits)
    w = dequantize(there)
    for M in (1, 16):
        x = torch.randn(M, K, device="cuda").bfloat16()
        exact, plain = x.cpu().double() @ w.double().T, x.cpu() @ w.bfloat16().T
        ours = dequant_matmul(x, weight).cpu()
        assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm()
        scale, zero = weight.scale.cuda(), None if weight.zero is None else weight.zero.cuda()
        copy = PackedWeight(weight.codes.cuda(), scale, zero, group_size, bits, as_mapped=True)
        assert torch.equal(dequant_matmul(x, copy).cpu(), ours)
    with pytest.raises(ValueError, match="17 activations, the weight in host memory: at most 16; copy it first"):
        dequant_matmul(torch.zeros(17, K, device="cuda").bfloat16(), weight)


@pytest.mark.gpu
def test_gpu_and_cpu_operands_do_not_mix() -> None:
    weight = random_weight(33, 192, 64, True, torch.bfloat16)
    with pytest.raises(ValueError, match="x is on cuda:0, the weight on cpu"):
        dequant_matmul(torch.zeros(1, 192, device="cuda:0"), weight)


@pytest.fixture
def by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Configuration]:
    """The configurations, and an empty cache, so that what is compiled is compiled now."""
    if type(matmul_kernel).__name__ == "InterpretedFunction":
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return {configuration.name: configuration for configuration in configurations(80)}


def test_configurations_are_every_tile_group_dtype_and_kind_of_zero(by_name: dict[str, Configuration]) -> None:
    tuning = TUNINGS[8]
    tiles = [("matmul", tile) for tile in tuning.tiles] + [("mapped", tuning.mapped)]
    names = ["dequantize", *(f"{kind} {tile.block_m}x{tile.block_n}x{tile.largest_step}" for kind, tile in tiles)]
    kinds = [
        f"attention of {rows} rows, {{}}, heads of {{}}, {seen}" for rows in (16, 64) for seen in ("causal", "masked")
    ]
    kinds += ["attention of 16 rows, {}, heads of {}, replayed", "merge, {}, heads of {}", "append, {}, heads of {}"]
    kinds += [f"{kernel}, {{}}, heads of {{}}" for kernel in ("dense attention", "place dense", "place in 8 bits")]
    attention = {kind.format(*of) for kind in kinds for of in product(("fp16", "bf16"), (64, 128))}
    vectors = [f"norm of {added}{hidden}" for hidden in (2048, 5120, 16384) for added in ("", "a sum of ")]
    plain = {
        f"{kernel}, {of}" for kernel in ("reduce", "sums", "load", "gate", "add", *vectors) for of in ("fp16", "bf16")
    }
    assert set(by_name) == {"read"} | plain | attention | {
        f"{kernel}, int{bits}, {dtype}, group {group}, {zero}"
        for kernel in names
        for dtype in ("fp16", "bf16")
        for bits, groups in ((4, ("row", 32, 64, 128)), (8, ("row", 128)))
        for group in groups
        for zero in ("zero", "symmetric")
    }


def test_a_fused_kernel_compiles_to_tensor_cores_and_spills_nothing(by_name: dict[str, Configuration]) -> None:
    compiled = compile_one(by_name["matmul 16x64x128, int4, fp16, group 64, zero"], 80)
    assert (compiled.name, compiled.capability) == ("matmul 16x64x128, int4, fp16, group 64, zero", 80)
    assert compiled.spilled_bytes == 0
    assert compiled.tensor_core_instructions > 0
    assert 0 < compiled.registers <= 255
    assert compiled.shared_bytes > 0
    assert compiled.loop_instructions is not None
    assert 2 < compiled.loop_instructions <= 4
    assert compiled.failures(fused=True, most_instructions=4.0) == []


def test_decoding_4_bits_has_a_limit_whatever_the_group(by_name: dict[str, Configuration]) -> None:
    """A step of a group of 32 is half as long as one of 64, and what each step costs weighs more."""
    limits = {
        (group, kind): by_name[f"matmul 16x64x128, int4, bf16, group {group}, {kind}"].most_instructions
        for group in ("row", 128, 64, 32)
        for kind in ("symmetric", "zero")
    }
    assert limits.pop((32, "symmetric")) == 4.3
    assert limits.pop((32, "zero")) == 5.6
    assert set(limits.values()) == {4.0}
    assert by_name["matmul 16x64x128, int8, bf16, group 128, zero"].most_instructions is None


def test_machine_code_that_would_run_badly_is_refused(by_name: dict[str, Configuration]) -> None:
    one_warp = dataclasses.replace(by_name["matmul 64x128x128, int4, fp16, group 128, zero"], num_warps=1)
    spilling = compile_one(one_warp, 80)
    assert spilling.failures(fused=True, most_instructions=None) == [f"{spilling.spilled_bytes} bytes spilled"]
    no_product = compile_one(by_name["dequantize, int4, fp16, group 64, zero"], 80)
    assert no_product.failures(fused=False, most_instructions=None) == []
    assert no_product.failures(fused=True, most_instructions=None) == ["no tensor-core instruction"]


@pytest.mark.parametrize(
    ("changed", "failures"),
    [
        ({}, []),
        ({"spilled_bytes": 8}, ["8 bytes spilled"]),
        ({"tensor_core_instructions": 0}, ["no tensor-core instruction"]),
        ({"shared_bytes": 101377}, ["101377 bytes of shared memory"]),
        ({"loop_instructions": 4.01}, ["4.01 instructions a weight"]),
        ({"spilled_bytes": 8, "shared_bytes": 1 << 20}, ["8 bytes spilled", "1048576 bytes of shared memory"]),
    ],
)
def test_gates_decide_what_the_command_returns(
    changed: dict[str, int],
    failures: list[str],
    by_name: dict[str, Configuration],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = by_name["matmul 16x64x128, int4, fp16, group 64, zero"]
    passing = Compiled(
        one.name, 80, 210, spilled_bytes=0, shared_bytes=99 << 10, tensor_core_instructions=8, loop_instructions=4.0
    )
    result = dataclasses.replace(passing, **changed)
    assert result.failures(fused=True, most_instructions=4.0) == failures

    monkeypatch.setattr(kernels.ahead_of_time, "configurations", lambda _: [one])
    monkeypatch.setattr(
        kernels.ahead_of_time, "compile_one", lambda _, capability: dataclasses.replace(result, capability=capability)
    )
    assert main() == (1 if failures else 0)
    printed = capsys.readouterr()
    rows = printed.out.splitlines()[2:]
    assert [int(row.split("|")[2]) for row in rows] == [80, 90, 100]
    assert all(row.endswith(f"| {'; '.join(failures) or 'ok'} |") for row in rows)
    assert printed.err == f"3 compiled, {3 if failures else 0} failed\n"
