"""Timing in turn, the results file, and `python -m eval.speed` on a small product."""

import csv
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from eval.results import append, command_line
from eval.speed import cpu as speed_cpu
from eval.speed.__main__ import main
from eval.speed.cpu import Contenders
from eval.speed.ggml import Ggml, GgmlWeight, find_directory, survived
from eval.speed.kernels import random_weight
from eval.speed.measurement import PEERS, Case, Measurement
from eval.speed.timing import Samples, copies_in, paired
from kernels.cpu_matmul import LEVELS, cpu_level
from kernels.packed import BITS, dequantize
from offload.errors import UsageError

SMALL = ["kernels", "--shapes", "64x256", "--batches", "1,17", "--rounds", "2", "--group-size", "64"]


@pytest.fixture
def without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is installed, and the copies are few."""
    monkeypatch.setattr(speed_cpu, "find_directory", lambda _: None)
    monkeypatch.setattr(speed_cpu, "_pool_bytes", lambda: 1 << 20)


def exactly_int8(m: int, k: int) -> Tensor:
    """Activations that rounding to int8 under a scale for 32 of them leaves alone."""
    x = torch.randint(-127, 128, (m, k)).float()
    x[:, ::32] = 127
    return x


def error(found: Tensor, x: Tensor, w: Tensor) -> float:
    """Return how far a product is from the one in float64, in its norm."""
    exact = x.double() @ w.double().T
    return float((found.double() - exact).norm() / exact.norm())


def test_contenders_run_in_turn_and_rotate_their_copies() -> None:
    calls: list[tuple[str, int]] = []

    def step(name: str, seconds: float) -> None:
        calls.append((name, len(calls)))
        time.sleep(seconds)

    seen: dict[str, list[int]] = {"slow": [], "fast": []}
    times = paired(
        {
            "slow": lambda i: (seen["slow"].append(i), step("slow", 0.004)),
            "fast": lambda i: (seen["fast"].append(i), step("fast", 0.001)),
        },
        rounds=4,
        sample_seconds=0.004,
    )
    assert 0.004 <= times["slow"].median < 0.04
    assert times["fast"].speedup_over(times["slow"]) > 1
    assert len(times["slow"].seconds) == len(times["fast"].seconds) == 4
    assert seen["fast"] == list(range(len(seen["fast"]))), "every call has the next index"
    after_warm_up = [name for name, _ in calls[4:]]
    order = [name for i, name in enumerate(after_warm_up) if i == 0 or after_warm_up[i - 1] != name]
    assert order == ["fast", "slow", "fast", "slow", "fast"], "forwards and backwards in turn"


def test_ratios_are_taken_round_by_round() -> None:
    ours, other = Samples((1.0, 4.0, 2.0)), Samples((2.0, 8.0, 10.0))
    assert ours.median == 2
    assert ours.speedup_over(other) == 2
    assert (ours.percentile(0.2), ours.percentile(0.8)) == (1.0, 4.0)


def test_a_row_says_bytes_operations_and_the_share_of_the_limit() -> None:
    case = Case(n=4096, k=4096, group_size=128, m=2)
    item = Measurement(case, "ours", Samples((1e-3,)), Samples((5e-4,)), {"torch fp32": Samples((3e-3,))})
    row = item.row()
    assert case.packed_bytes == 4096 * 2048 + 2 * 4096 * 32
    assert row["packed_gb_per_s"] == pytest.approx(8.65, abs=0.01)
    assert row["gop_per_s"] == pytest.approx(67.1, abs=0.1)
    assert (row["of_read"], row["x_torch_fp32"], row["x_gemlite"]) == (0.5, 3.0, "")
    assert (row["bits"], row["device"]) == (4, "cpu")
    assert Case(n=4096, k=4096, group_size=128, m=2, bits=8).packed_bytes == 4096 * 4096 + 2 * 4096 * 32


def test_copies_fill_the_pool() -> None:
    assert [copies_in(pool, 10) for pool in (0, 10, 11, 95)] == [1, 1, 2, 10]
    assert copies_in(1 << 40, 1) == 2000


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("without_ggml")
def test_every_contender_multiplies_by_the_same_weight(bits: int) -> None:
    weight = random_weight(64, 128, 128, bits)
    w, binds = dequantize(weight), Contenders(None)(weight)
    for_bits = "torch int4" if bits == 4 else "torch int8"
    assert list(binds) == [*LEVELS[1 : cpu_level() + 1], "torch fp32", "torch bf16", for_bits, "read"]
    for m in (1, 9):
        x = exactly_int8(m, 128)
        plain = error(x.bfloat16() @ w.bfloat16().T, x, w)
        for name in binds.keys() - {"read"}:
            step = binds[name](x)
            assert step is not None
            for i in (0, 1, 1000):
                found = step(i)
                assert isinstance(found, Tensor)
                assert error(found, x, w) <= 2 * plain, name


@pytest.mark.usefixtures("without_ggml")
def test_what_has_no_room_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = random_weight(64, 256, 64, 4)
    monkeypatch.setattr(speed_cpu, "_free_bytes", lambda: 4 * ((1 << 20) + 64 * 256 * 5))
    assert "torch bf16" not in Contenders(None)(weight)
    left_out = "torch bf16: left out at N 64, K 256, it may take 1.1 MiB of 4.3 MiB free\n"
    assert capsys.readouterr().err == left_out


@pytest.mark.parametrize("bits", BITS)
def test_ggml_multiplies_by_what_it_was_given(bits: int) -> None:
    directory = find_directory(None)
    if directory is None:
        pytest.skip("ggml's libraries are not installed")
    from gguf import GGMLQuantizationType, quants

    ggml, weight = Ggml(directory), random_weight(64, 256, 128, bits)
    kind = GGMLQuantizationType.Q4_0 if bits == 4 else GGMLQuantizationType.Q8_0
    for name, layout in ggml.layouts().items():
        in_layout = GgmlWeight(ggml, layout, weight, 100_000)
        if not in_layout.supported:
            continue
        w = torch.from_numpy(quants.dequantize(in_layout.quantized.numpy(), kind))
        assert error(dequantize(weight).T, torch.eye(256), w) < 0.05, "quantised anew, it moves a little"
        for m in (1, 2, 33):
            if min(m, 2) in survived(directory, name, bits):
                x = exactly_int8(m, 256)
                step = in_layout.product(x)
                for i in range(3):
                    found = step(i)
                    assert isinstance(found, Tensor)
                    assert error(found, x, w) <= 2 * error(x @ w.T, x, w), name


@pytest.mark.usefixtures("without_ggml")
def test_the_command_prints_a_table_records_rows_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, picture = tmp_path / "kernels.csv", tmp_path / "speed.png"
    flags = ["--record", "--results", str(results), "--picture", str(picture)]
    for _ in range(2):
        assert main([*SMALL, *flags]) == 0
    printed = capsys.readouterr()
    contenders = [*LEVELS[1 : cpu_level() + 1], "torch fp32", "torch bf16", "torch int4"]
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert [row["contender"] for row in rows] == 4 * contenders
    assert {row["m"] for row in rows} == {"1", "17"}
    assert {f"x_{name.replace(' ', '_')}" for name in PEERS} < rows[0].keys()
    assert all(float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) for row in rows)
    assert all((row["of_read"] != "") == (row["m"] == "1") for row in rows)
    assert rows[0]["command"].startswith("python -m eval.speed kernels --shapes 64x256")
    assert "of read  x torch fp32  x torch bf16  x torch int4" in printed.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("without_ggml")
def test_the_command_prints_json_with_another_process_busy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--bits", "8", "--json", "--busy", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["busy"], row["bits"], row["device"]) for row in rows} == {(1, 8, "cpu")}
    assert "torch int8" in {row["contender"] for row in rows}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--device", "cuda"]) == 2
    message = "error: --device cuda: torch finds no CUDA device; leave it out to measure the CPU\n"
    assert capsys.readouterr().err == message


def interpreted_contenders(bits: int) -> None:
    """Assert that what a GPU is given multiplies by the same weight, in a process where Triton interprets."""
    from eval.speed import cuda as speed_cuda

    torch.manual_seed(0)
    device, weight = torch.device("cpu"), random_weight(64, 256, 64, bits)
    w = dequantize(weight)
    with patch.multiple(speed_cuda, _POOL_BYTES=40_000, _free_bytes=lambda _: 1 << 30):
        binds = speed_cuda.Contenders(device)(weight)
    assert {"triton", "triton mapped", "read", "read mapped", "torch fp32", "torch bf16"} == set(binds)
    assert binds["triton mapped"](torch.zeros(17, 256)) is None, "that many are not read across the bus"
    x = torch.randn(3, 256)
    plain = error(x.bfloat16() @ w.bfloat16().T, x, w)
    for name in binds.keys() - {"read", "read mapped"}:
        step = binds[name](x)
        assert step is not None
        for i in range(3):
            found = step(i)
            assert isinstance(found, Tensor)
            assert error(found.float(), x, w) <= 2 * plain, name
    read = binds["read"](x)
    assert read is not None
    words = torch.cat((weight.codes.view(-1), weight.scale.view(-1).view(torch.uint8))).view(torch.int32)
    for i in range(3):
        sums = read(i)
        assert isinstance(sums, Tensor)
        assert int(sums.sum().to(torch.int32)) == int(words.sum().to(torch.int32))


def test_what_a_gpu_is_given_multiplies_by_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for bits in BITS:
            pool.submit(interpreted_contenders, bits).result(timeout=120)


@pytest.mark.gpu
def test_the_command_measures_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--shapes", "1024x4096", "--batches", "1,17", "--rounds", "2", "--device", "cuda", "--json"]
    assert main(["kernels", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    measured = {(row["contender"], row["m"]): row["of_read"] for row in rows}
    assert {("triton", 1), ("triton mapped", 1), ("triton", 17), ("torch bf16", 17), ("torch int4", 1)} <= set(measured)
    assert ("triton mapped", 17) not in measured
    assert all((of_read != "") == (m == 1) for (_, m), of_read in measured.items())
    assert {(row["device"], row["backend"]) for row in rows} == {("cuda", "triton")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "64by256"], "--shapes '64by256': expected llama-3-8b"),
        (["--batches", "1,0"], "--batches '1,0': expected numbers above zero"),
        (["--shapes", "64x200"], "--group-size 128: does not divide K=200"),
        (["--ggml", "nowhere"], "--ggml nowhere: no libggml.so there; name the directory of ggml's shared libraries"),
    ],
)
def test_flags_that_cannot_be_meant(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_results_file_gains_columns_at_its_end_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append(path, [{"a": 1, "b": "x, y"}])
    append(path, [{"b": 4, "c": 5, "a": 3}])
    append(path, [{"a": 6, "b": 7, "c": ""}])
    whole = 'a,b,c\n1,"x, y",\n3,4,5\n6,7,\n'
    assert path.read_text() == whole
    with pytest.raises(UsageError, match="has the columns a, b, c; move it away or name another file"):
        append(path, [{"a": 1, "c": 2}])
    assert path.read_text() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_recorded_command_names_no_place_of_the_machine() -> None:
    line = command_line("eval.speed", ["kernels", "--ggml", "/somewhere/lib", "--picture", "docs/a.png"])
    assert line == "python -m eval.speed kernels --ggml lib --picture docs/a.png"
