"""The CPU product at every instruction set against float64, what a row may depend on, fallbacks, and the build."""

import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import kernels.cpu_build
from kernels import cpu_matmul
from kernels.cpu_build import BuildError, find_compiler, load_library
from kernels.cpu_matmul import LEVELS, cpu_backend, cpu_level, dequant_matmul_cpu, dequantize_cpu, read_seconds
from kernels.matmul import dequant_matmul
from kernels.packed import BITS, PackedWeight, dequantize, pack

# N odd and even, K with and without a step of 128 that is not full, the smallest K last
SHAPES = [(33, 96, 32), (45, 576, 64), (5, 384, 128), (131, 200, 200), (20, 1056, 32), (3, 8, 8)]
# multiples of four alone are for 8 bits
SHAPES_AND_BITS = [*((*shape, bits) for shape in SHAPES for bits in BITS), (7, 332, 332, 8), (2, 4, 4, 8)]


def random_weight(
    N: int,
    K: int,
    group_size: int,
    asymmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    bits: int = 4,
) -> PackedWeight:
    scale = torch.rand(N, K // group_size).add(0.1).to(scale_dtype)
    zero = torch.randint(0, 1 << bits, scale.shape) if asymmetric else None
    return pack(torch.randint(0, 1 << bits, (N, K)), scale, zero, group_size, bits)


def tiled(level: int, weight: PackedWeight) -> bool:
    """Whether a batch is multiplied in tiles of signed bytes, which asymmetric codes of 8 bits do not fit."""
    return LEVELS[level] == "amx" and (weight.bits == 4 or weight.symmetric)


def float64_product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the truth [..., N], and what an error is measured against: the sum of the magnitudes of its terms."""
    w = dequantize(weight).double()
    added = torch.zeros(len(w)) if bias is None else bias.double()
    return x.double() @ w.T + added, x.double().abs() @ w.abs().T + added.abs()


def assert_near(found: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Allow half a unit in the last place of found's dtype, and 2^-21 of the magnitude for sums in float32."""
    allowed = expected.abs() * torch.finfo(found.dtype).eps / 2 + magnitude * 2**-21
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= allowed).all()


def int8_activations(x: Tensor, width: int) -> Tensor:
    """What fast mode makes of x [M, K]: every `width` of a row rounded to 127ths of their largest. Returns float64."""
    M, K = x.shape
    steps = torch.nn.functional.pad(x.float(), (0, -K % width)).view(M, -1, width)
    largest = steps.abs().amax(dim=-1, keepdim=True)
    # a number divided by a tensor is a reciprocal and a product in torch, which settles ties otherwise
    inverse = torch.tensor(127.0) / largest
    whole = torch.where(largest > 0, (steps * inverse).round(), 0)
    return (whole.double() * (largest / 127).double()).view(M, -1)[:, :K]


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest) -> int:
    """Every instruction set that this machine has."""
    if cpu_backend() == "torch":
        assert find_compiler() is None, "there is a compiler, and yet no compiled kernel"
        pytest.skip("no C++ compiler")
    if request.param > cpu_level():
        pytest.skip(f"the best that this machine has is {cpu_backend()}")
    found: int = request.param
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    """Give torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("N", "K", "group_size", "bits"), SHAPES_AND_BITS)
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_product_is_that_of_float64(
    level: int,
    mode: Literal["fast", "exact"],
    N: int,
    K: int,
    group_size: int,
    bits: int,
    asymmetric: bool,
    scale_dtype: torch.dtype,
) -> None:
    weight = random_weight(N, K, group_size, asymmetric, scale_dtype, bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(17, K).to(dtype)
        for bias in (None, torch.randn(N).to(dtype)):
            for M in (1, 3, 8, 17):
                width = 128 if tiled(level, weight) and M >= 6 else 32
                seen = int8_activations(x[:M], width) if mode == "fast" else x[:M]
                expected, magnitude = float64_product(seen, weight, bias)
                found = dequant_matmul_cpu(x[:M], weight, bias, mode, level)
                assert found.dtype == dtype
                assert_near(found, expected, magnitude)


@pytest.mark.parametrize("bits", BITS)
def test_fast_loses_less_than_a_hundredth(level: int, bits: int) -> None:
    weight = random_weight(131, 1024, 64, bits=bits)
    x = torch.randn(17, 1024)
    expected = x @ dequantize(weight).T
    error = dequant_matmul_cpu(x, weight, None, "fast", level) - expected
    assert 0 < error.norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("N", "K", "group_size"), [(131, 4096, 128), (131, 576, 64), (131, 96, 32), (131, 200, 200)])
def test_instruction_sets_agree(level: int, N: int, K: int, group_size: int, asymmetric: bool, bits: int) -> None:
    if level == 0:
        pytest.skip("the one that the others are compared with")
    weight, x = random_weight(N, K, group_size, asymmetric, bits=bits), torch.randn(5, K)
    magnitude = x.abs() @ dequantize(weight).abs().T
    for mode in ("fast", "exact"):
        difference = dequant_matmul_cpu(x, weight, None, mode, level) - dequant_matmul_cpu(x, weight, None, mode, 0)
        assert (difference.abs() <= magnitude * 2**-21).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("mode", "largest"), [("fast", 17), ("exact", 8)])
def test_a_row_depends_on_neither_the_batch_nor_the_threads(
    level: int, mode: Literal["fast", "exact"], largest: int, asymmetric: bool, bits: int, threads: None
) -> None:
    # enough rows that a single activation is shared out too
    weight, x = random_weight(2000, 576, 64, asymmetric, bits=bits), torch.randn(largest, 576)
    torch.set_num_threads(1)
    batched = dequant_matmul_cpu(x, weight, None, mode, level)
    alone = torch.cat([dequant_matmul_cpu(row[None], weight, None, mode, level) for row in x])
    if mode == "exact" or not tiled(level, weight):
        assert torch.equal(batched, alone)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for M in (1, 2, 5, 6, 7, 8, largest):
            expected = batched if M >= 6 else alone  # from 6 on AMX multiplies tiles
            for start in range(0, largest - M + 1, 3):
                found = dequant_matmul_cpu(x[start : start + M], weight, None, mode, level)
                assert torch.equal(found, expected[start : start + M])


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("M", [1, 5, 8, 17])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_in_its_row(level: int, mode: Literal["fast", "exact"], M: int, bits: int) -> None:
    weight, clean = random_weight(33, 576, 64, bits=bits), torch.randn(M, 576)
    expected = dequant_matmul_cpu(clean, weight, None, mode, level)
    for row in {0, M // 2, M - 1}:
        for value in (float("nan"), float("inf"), float("-inf")):
            for k in (0, 127, 575):
                x = clean.clone()
                x[row, k] = value
                found = dequant_matmul_cpu(x, weight, None, mode, level)
                # an infinity times a weight is one in float32; int8 has no infinity
                assert not found[row].isfinite().any()
                assert mode == "exact" or found[row].isnan().all()
                others = torch.arange(M) != row
                assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("bits", BITS)
def test_activations_of_any_size(level: int, bits: int) -> None:
    weight, bias = random_weight(33, 576, 64, bits=bits), torch.randn(33)
    tiny, huge = torch.randn(576) * 1e-39, torch.randn(576) * 1e34
    uneven = torch.cat((torch.randn(128), torch.randn(320) * 1e6, torch.randn(128)))
    x = torch.stack((torch.zeros(576), tiny, huge, uneven))
    found = dequant_matmul_cpu(x, weight, bias, "fast", level)
    assert torch.equal(found[0], bias)
    assert torch.equal(found[1], bias)
    assert_near(found[2:], *float64_product(int8_activations(x[2:], 32), weight, bias))


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_an_empty_batch(mode: Literal["fast", "exact"]) -> None:
    weight = random_weight(33, 576, 64)
    for shape in ((0, 576), (2, 0, 576)):
        found = dequant_matmul(torch.empty(shape, dtype=torch.float16), weight, torch.zeros(33), mode)
        assert found.shape == (*shape[:-1], 33)
        assert found.dtype == torch.float16


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_strided_activations_and_biases(mode: Literal["fast", "exact"]) -> None:
    weight = random_weight(33, 192, 64)
    columns = torch.randn(192, 2, 3).permute(1, 2, 0)
    bias = torch.randn(66)[::2]
    for x in (columns, torch.randn(6, 384)[::2, 1::2], torch.randn(192).expand(3, 192), torch.randn(192)):
        assert torch.equal(
            dequant_matmul(x, weight, bias, mode), dequant_matmul(x.contiguous(), weight, bias.contiguous(), mode)
        )
    found = dequant_matmul(columns, weight, bias, mode).view(6, 33)
    rows = columns.reshape(6, 192)
    assert_near(
        found,
        *float64_product(
            rows if mode == "exact" else int8_activations(rows, 128 if tiled(cpu_level(), weight) else 32), weight, bias
        ),
    )


def test_callers_on_several_threads_do_not_disturb_each_other(threads: None) -> None:
    torch.set_num_threads(3)
    weights = [random_weight(1200 + 100 * i, 576, (32, 64, 576)[i % 3]) for i in range(6)]
    inputs = [torch.randn(1 + 2 * i, 576) for i in range(6)]
    expected = [dequant_matmul_cpu(x, weight, None, "fast") for x, weight in zip(inputs, weights, strict=True)]
    start = threading.Barrier(6)

    def multiply(i: int) -> bool:
        torch.set_num_threads(3)
        start.wait()
        return all(torch.equal(dequant_matmul_cpu(inputs[i], weights[i], None, "fast"), expected[i]) for _ in range(30))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(multiply, range(6)))


def test_a_child_forked_amid_a_product_multiplies(threads: None) -> None:
    torch.set_num_threads(3)
    weight, x = random_weight(2000, 576, 64), torch.randn(3, 576)
    expected = dequant_matmul_cpu(x, weight, None, "fast")
    done = threading.Event()

    def multiply() -> bool:
        torch.set_num_threads(3)
        right = True
        while not done.is_set():
            right &= torch.equal(dequant_matmul_cpu(x, weight, None, "fast"), expected)
        return right

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(multiply) for _ in range(2)]
        try:
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(20)  # a child that hangs is killed, and its status is not 0
                    os._exit(0 if torch.equal(dequant_matmul_cpu(x, weight, None, "fast"), expected) else 1)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            done.set()
    assert all(future.result() for future in busy)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_dequantised_rows_are_those_of_packed_at_every_scale(
    level: int, asymmetric: bool, scale_dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = torch.arange(-(2**15), 2**15).to(torch.int16).view(scale_dtype).view(256, 256)
    zero = torch.randint(0, 1 << bits, scale.shape) if asymmetric else None
    weight = pack(torch.randint(0, 1 << bits, (256, 8192)), scale, zero, 32, bits)
    expected = dequantize(weight)
    monkeypatch.setattr(cpu_matmul, "cpu_level", lambda: level)
    for start, stop in ((0, 256), (3, 250), (255, 256), (7, 7)):
        found = dequantize_cpu(weight, start, stop)
        torch.testing.assert_close(found, expected[start:stop], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [128, 200])
def test_dequantised_rows_of_other_groups(
    level: int, group_size: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(11, 640 if group_size == 128 else 200, group_size, bits=bits)
    monkeypatch.setattr(cpu_matmul, "cpu_level", lambda: level)
    assert torch.equal(dequantize_cpu(weight, 2, 11), dequantize(weight)[2:])


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_without_a_library_torch_multiplies_what_it_can(
    group_size: int, dtype: torch.dtype, asymmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(128, 384, group_size, asymmetric)
    x, bias = torch.randn(2, 5, 384).to(dtype), torch.randn(128).to(dtype)
    w = dequantize(weight)
    expected = x.double() @ w.double().T + bias.double()
    plain = (x.bfloat16() @ w.bfloat16().T).to(dtype) + bias

    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("torch's own int4 operation takes this shape")

    monkeypatch.setattr(cpu_matmul, "compiled_library", lambda: None)
    monkeypatch.setattr(cpu_matmul, "dequantize", refuse)
    found = dequant_matmul_cpu(x, weight, bias, "fast")
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= 2 * (plain.double() - expected).norm()


@pytest.mark.parametrize(
    ("N", "K", "group_size", "scale_dtype", "bits", "mode"),
    [
        (33, 384, 128, torch.bfloat16, 4, "fast"),
        (64, 200, 200, torch.bfloat16, 4, "fast"),
        (64, 384, 64, torch.float16, 4, "fast"),
        (64, 384, 64, torch.bfloat16, 4, "exact"),
        (64, 384, 64, torch.bfloat16, 8, "fast"),
    ],
)
def test_without_a_library_the_rest_is_dequantised(
    N: int,
    K: int,
    group_size: int,
    scale_dtype: torch.dtype,
    bits: int,
    mode: Literal["fast", "exact"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(N, K, group_size, scale_dtype=scale_dtype, bits=bits)
    monkeypatch.setattr(cpu_matmul, "compiled_library", lambda: None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, bias = torch.randn(5, K).to(dtype), torch.randn(N).to(dtype)
        found = dequant_matmul_cpu(x, weight, bias, mode)
        assert found.dtype == dtype
        assert_near(found, *float64_product(x, weight, bias))
    assert dequant_matmul_cpu(torch.empty(0, K), weight, None, mode).shape == (0, N)
    assert torch.equal(dequantize_cpu(weight, 1, 4), dequantize(weight)[1:4])


def test_why_torch_multiplies_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    weight = random_weight(33, 96, 32)
    cpu_matmul.compiled_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="kernels.cpu_matmul"):
            for _ in range(2):
                dequant_matmul(torch.randn(1, 96), weight)
        assert cpu_backend() == "torch"
        with pytest.raises(RuntimeError, match="read bandwidth needs the compiled kernels"):
            read_seconds(torch.zeros(64, dtype=torch.uint8))
    finally:
        cpu_matmul.compiled_library.cache_clear()
    assert caplog.messages == [
        "int4 products run through torch, several times slower: no C++ compiler (c++, g++ or clang++) on the PATH"
    ]


def test_reading_takes_time(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "cpu_level", lambda: level)
    small, large = (torch.ones(size, dtype=torch.uint8) for size in (1 << 16, 1 << 26))
    assert 0 < min(read_seconds(small) for _ in range(5)) < min(read_seconds(large) for _ in range(5))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 128), None, "x has K=128, the weight has K=96"),
        (torch.zeros(2, 96, dtype=torch.float64), None, "x is torch.float64; expected float32, bfloat16 or float16"),
        (torch.zeros(2, 96, dtype=torch.int8), None, "x is torch.int8; expected float32, bfloat16 or float16"),
        (torch.zeros(2, 96, device="meta"), None, "x is on meta, the weight on cpu"),
        (torch.zeros(2, 96), torch.zeros(4), r"bias: expected \[5\] on cpu, found \[4\] on cpu"),
        (torch.zeros(2, 96), torch.zeros(5, 1), r"bias: expected \[5\] on cpu, found \[5, 1\] on cpu"),
        (torch.zeros(2, 96), torch.zeros(5, device="meta"), r"bias: expected \[5\] on cpu, found \[5\] on meta"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x: Tensor, bias: Tensor | None, message: str) -> None:
    weight = random_weight(5, 96, 32)
    with pytest.raises(ValueError, match=f"^{message}$"):
        dequant_matmul(x, weight, bias)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that libraries are built into, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "int4-offload" / "kernels"


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_built_once_even_by_two_at_a_time(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, built = kernels.cpu_build.build, []

    def counted(library: Path) -> None:
        built.append(library)
        build(library)

    monkeypatch.setattr(kernels.cpu_build, "build", counted)
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: load_library(), range(2)))
    libraries.append(load_library())
    assert len(built) == 1
    assert sorted(fresh_cache.iterdir()) == [fresh_cache / ".lock", built[0]]
    assert {library.int4_level() for library in libraries} <= set(range(len(LEVELS)))


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_a_changed_source_or_flag_is_another_library(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def stop(library: Path) -> None:
        asked.append(library.name)
        raise BuildError("far enough")

    def ask() -> None:
        with pytest.raises(BuildError, match="far enough"):
            load_library()

    monkeypatch.setattr(kernels.cpu_build, "build", stop)
    ask()
    sources = shutil.copytree(kernels.cpu_build._SOURCES, tmp_path / "sources")
    monkeypatch.setattr(kernels.cpu_build, "_SOURCES", sources)
    ask()
    assert asked[0] == asked[1]
    (sources / "rows.h").write_bytes((sources / "rows.h").read_bytes() + b"\n")
    ask()
    monkeypatch.setattr(kernels.cpu_build, "_FLAGS", ("-O2",))
    ask()
    assert len(set(asked)) == 3


def test_no_compiler_is_said(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler \(c\+\+, g\+\+ or clang\+\+\) on the PATH$"):
        load_library()
    assert not fresh_cache.exists()


@pytest.fixture
def broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only compiler on the PATH, which refuses everything in two lines."""
    path = tmp_path / "bin" / "c++"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\necho 'In file included' >&2\necho 'error: no such flag' >&2\nexit 1\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.delenv("CXX", raising=False)
    return path


def test_a_compiler_that_fails_is_named_with_its_last_words(fresh_cache: Path, broken_compiler: Path) -> None:
    with pytest.raises(
        BuildError, match=rf"^{re.escape(str(broken_compiler))} failed on .*\.cpp: error: no such flag$"
    ):
        load_library()
    assert [path.name for path in fresh_cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, broken_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"file/int4-offload/kernels: Not a directory$"):
        load_library()


def test_a_library_that_cannot_be_loaded_is_named(
    fresh_cache: Path, broken_compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cut_short(library: Path) -> None:
        library.write_bytes(b"\x7fELF")

    monkeypatch.setattr(kernels.cpu_build, "build", cut_short)
    with pytest.raises(BuildError, match=r"^cannot load .*int4-[0-9a-f]{16}\.so: .*; delete it"):
        load_library()
    assert cpu_matmul.compiled_library.__wrapped__() is None
    assert "cannot load" in caplog.text


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='exakt'; expected 'fast' or 'exact'"):
        dequant_matmul(torch.zeros(2, 96), random_weight(5, 96, 32), mode="exakt")  # type: ignore[arg-type]
