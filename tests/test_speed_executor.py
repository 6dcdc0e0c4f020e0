"""Engines take turns in processes of their own; one that fails is left out, and said; random models are real files."""

import argparse
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaModel

from eval.speed import executor as speed_executor
from eval.speed.__main__ import main
from eval.speed.contender import ENGINES, Engine
from eval.speed.control_group import memory_limit
from eval.speed.executor import EngineError, Turns, _row, measure
from eval.speed.native_time import TimedLibrary, timed_kernels
from eval.speed.random_model import SHAPES, write_bfloat16, write_checkpoint, write_gguf
from eval.speed.timing import Samples
from kernels.matmul import dequant_matmul
from kernels.packed import PackedWeight
from offload.errors import UsageError
from offload.executor import load

TINY = SHAPES["tiny"]


def options(models: Path, **changes: Any) -> argparse.Namespace:
    given = {"shapes": "tiny", "budgets": "none", "engines": "ours", "tokens": 3, "prompt_tokens": 8, "rounds": 2}
    return argparse.Namespace(**(given | {"models": models} | changes))


def test_a_row_for_every_shape_budget_and_engine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = measure(options(tmp_path, budgets="none,700MiB"))
    free, limited = report.rows()
    for row in (free, limited):
        assert (row["shape"], row["engine"], row["decode_x_ours"], row["prompt_x_ours"]) == ("tiny", "ours", 1.0, 1.0)
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["p50_ms"], rel=0.01)
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["disk_bytes_per_token"] == 0
        assert 0 < row["of_read"] < 1
        assert 0 < row["python_share"] < 1
        assert row["of_disk"] == ""
    linears = sum(rows * inputs for rows, inputs in TINY.linears.values())
    packed = TINY.layers * (linears * 17 // 32 + 7 * 16 + 2 * 2 * TINY.hidden)  # with shapes and two norms
    assert free["bytes_per_token"] == packed + TINY.vocabulary * TINY.hidden
    assert limited["peak_bytes"] <= 700 << 20
    table = report.table().splitlines()
    assert len(table) == 3
    assert "700.0 MiB ours" in table[2]
    with pytest.raises(UsageError, match=r"--picture .*picture\.png: only the kernels are drawn"):
        report.draw(tmp_path / "picture.png")


def test_what_is_streamed_is_held_against_the_disk_of_the_same_round(tmp_path: Path) -> None:
    facts = {"bytes_per_token": 80_000_000, "disk_bytes_per_token": 50_000_000}
    turns = {"ours": Turns(decode=[0.1, 0.2, 0.1], disk=[1e-9, 2e-9, 1e-9], facts=facts)}
    row = _row("tiny", "ours", 700 << 20, turns, Samples((1e-10,) * 3), options(tmp_path))
    assert (row["of_disk"], row["of_read"], row["disk_gb_per_s"], row["read_gb_per_s"]) == (0.5, "", 1.0, 10.0)


def test_an_engine_that_fails_is_left_out_and_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = measure(options(tmp_path, budgets="200MiB"))
    assert report.rows() == []
    assert "ours: ResourceError: --cpu-memory 200.0 MiB: too small for this model" in capfd.readouterr().err


def test_an_engine_that_dies_says_how() -> None:
    command = [sys.executable, "-c", "import os; input(); os._exit(9)"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with pytest.raises(EngineError, match="ended with status 9 at 'load'"):
        speed_executor._ask(process, "load")
    speed_executor._end(process)


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed_executor, "_PACKAGES", {"ours": "offload", "llama.cpp": "no_such_package"})
    assert speed_executor._installed(["ours", "llama.cpp"]) == ["ours"]
    assert "left out, as not installed: llama.cpp" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--shapes", "2b"], "--shapes '2b': expected one of tiny, thin, 1b, 3b, 8b, 70b"),
        (["--engines", "vllm"], "--engines 'vllm': expected some of ours, llama.cpp, accelerate"),
        (["--budgets", "much"], "--budgets 'much': expected a size"),
    ],
)
def test_flags_that_cannot_be_meant(flags: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["executor", *flags]) == 2
    assert told in capfd.readouterr().err


def test_a_limited_process_is_in_its_group() -> None:
    with memory_limit(64 << 20, "test") as enter:
        if enter is None:
            pytest.skip("no control group can be made here")
        with subprocess.Popen(
            [sys.executable, "-c", "input(); bytearray(200 << 20)"], stdin=subprocess.PIPE
        ) as process:
            enter(process.pid)
            process.communicate(b"\n")
        assert process.returncode == -9
    assert not list(Path("/sys/fs/cgroup").glob(f"**/int4-offload-{os.getpid()}-test"))


def test_the_bfloat16_model_opens_in_transformers(tmp_path: Path) -> None:
    write_bfloat16(TINY, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_gguf_file_holds_finite_weights_of_the_shape(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(TINY, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 9 * TINY.layers + 2
    for name, size in (("blk.3.ffn_down.weight", (TINY.hidden, TINY.mlp)), ("token_embd.weight", (1024, TINY.hidden))):
        weight = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert weight.shape == size
        assert np.isfinite(weight).all()
        assert 0 < weight.std() < 1


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    write_checkpoint(TINY, tmp_path / "tiny.int4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny.int4").iterdir()}
    write_checkpoint(TINY, tmp_path / "tiny.int4")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny.int4").iterdir()} == before


def test_pythons_share_is_what_neither_kernels_nor_waits_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0.2 s that every pass sleeps, half is told as if a kernel ran: all else is short beside it."""
    write_checkpoint(TINY, tmp_path / "tiny.int4")
    library, forward = TimedLibrary(None), LlamaModel.forward

    def slower(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        library.seconds += 0.1
        return forward(*arguments, **options)

    monkeypatch.setattr(LlamaModel, "forward", slower)
    engine = ENGINES["ours"](tmp_path / "tiny.int4", None, 64)
    for known, expected in ((library, pytest.approx(0.5, abs=0.2)), (None, None)):
        monkeypatch.setattr("eval.speed.native_time.timed_kernels", lambda known=known: nullcontext(known))
        assert engine.python_share(3) == expected
    assert Engine(lambda tokens, fresh: 0, dict).python_share(4) is None


def test_the_calls_that_make_a_token_are_timed(tmp_path: Path) -> None:
    """Also where a caller met the library before, and remembers it: the model has decoded a token already."""
    write_checkpoint(TINY, tmp_path / "tiny.int4")
    model = load(tmp_path / "tiny.int4")
    for timed in (False, True):
        with timed_kernels() if timed else nullcontext() as library, torch.inference_mode():
            model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, eos_token_id=None)
        if timed and library is None:
            pytest.skip("no compiled kernels here")
    assert "int4_decode" in vars(library)
    assert "int4_fast" in vars(library)


def test_kernels_are_timed_while_they_are_asked_for() -> None:
    weight = PackedWeight(torch.zeros(64, 32, dtype=torch.uint8), torch.ones(64, 1, dtype=torch.bfloat16), None, 64)
    with timed_kernels() as timed:
        if timed is None:
            pytest.skip("no compiled kernels here")
        assert timed.seconds == 0
        dequant_matmul(torch.ones(1, 64), weight)
        after = timed.seconds
        assert after > 0
    dequant_matmul(torch.ones(1, 64), weight)
    assert timed.seconds == after
