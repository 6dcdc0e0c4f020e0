"""eval.speed kv: what it compares computes the same, and its rows say what they should."""

import json

import pytest
import torch

from eval.speed import kv
from eval.speed.__main__ import main
from eval.speed.kv import Shape


def test_the_contenders_compute_the_same_attention() -> None:
    shape = Shape(heads=4, key_heads=2, head_dim=32, context=100)
    past, token = shape.past(), shape.token()
    found = {}
    for name, contender in kv.contenders(shape, past, token, copies=2):
        with torch.inference_mode():
            outs = [contender.step(index) for index in (0, 1, 0)]
        found[name] = outs[0].reshape(-1).float()
        assert all(torch.equal(out, outs[0]) for out in outs)
    expected = found.pop("bf16 sdpa")
    assert {"int8", "bf16 in place"} <= set(found)
    for out in found.values():
        assert (out - expected).norm() < 0.02 * expected.norm()


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kv, "_POOL_BYTES", 1 << 20)
    monkeypatch.setattr(kv, "_SAMPLE_SECONDS", 0.002)
    flags = ["kv", "--contexts", "128,300", "--heads", "4", "--key-heads", "2", "--head-dim", "32", "--rounds", "2"]
    assert main([*flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["context"] for row in rows} == {128, 300}
    int8 = [row for row in rows if row["contender"] == "int8"]
    assert [row["bytes_per_token"] for row in int8] == [2 * 2 * (32 + 2), 145]  # of 300 tokens, blocks for 320
    assert all(row["x_int8"] == 1 and row["of_read"] > 0 for row in int8)
    assert main(flags) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


@pytest.mark.gpu
def test_rows_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "--device", "cuda", "--contexts", "2000", "--rounds", "2", "--json"]) == 0
    rows = {row["contender"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"int8", "bf16 sdpa", "bf16 in place"} <= set(rows)
    assert all(row["device"] == "cuda" for row in rows.values())
    assert 0 < rows["int8"]["of_read"] < 1.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contexts", "0"], "--contexts '0': expected numbers above zero, separated by commas"),
        (["--heads", "5"], "--heads 5: not a multiple of --key-heads 8"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch finds no CUDA device; leave it out to measure the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_refusals(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
