"""One model from tier to tier, on a device that is faked and without one: what is timed, and what is compared."""

import csv
import json
from pathlib import Path

import pytest
import torch
from fake_device import fake_gpu
from torch import Tensor
from transformers import PreTrainedModel

from eval.speed import tiers
from eval.speed.__main__ import main
from eval.speed.random_model import SHAPES, write_checkpoint
from eval.speed.tiers import _next, _prompt
from offload.executor import executor_of, load, new_cache
from offload.planning.arrangement import ARRANGEMENTS, arranged

FLAGS = ["--shape", "tiny", "--batches", "1,3", "--tokens", "2", "--prompt-tokens", "20"]


def test_every_tier_of_a_device_has_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, trace = tmp_path / "tiers.csv", tmp_path / "trace.json"
    flags = [*FLAGS, "--models", str(tmp_path), "--record", "--results", str(results), "--trace", str(trace)]
    for name, rate in {"_disk_rate": 1e9, "_copy_rate": 2e10, "_memory_rate": 4e10, "_device_rate": 1e12}.items():
        monkeypatch.setattr(f"offload.limit.{name}", lambda *_, rate=rate: rate)
    with fake_gpu(monkeypatch):
        assert main(["tiers", *flags]) == 0
    assert "accelerate: left out" in capsys.readouterr().err
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["tier"], row["batch"]) for row in rows] == [(name, batch) for name in ARRANGEMENTS for batch in "13"]
    links = {row["tier"]: row["link"] for row in rows}
    assert links == {
        **{"resident": "device memory", "half staged": "bus", "staged": "bus", "mapped": "bus", "host": "memory"},
        **{"disk to host": "disk", "disk to staged": "disk", "disk to mapped": "disk"},
        **{"staged in parts": "bus", "disk to staged in parts": "disk"},
    }
    bytes_per_token = {row["tier"]: int(row["link_bytes_per_token"]) for row in rows}
    assert bytes_per_token["staged"] == 2 * bytes_per_token["half staged"]
    assert bytes_per_token["disk to staged"] == pytest.approx(bytes_per_token["staged"], rel=0.02)  # in whole pages
    assert all((row["prompt_s"] != "") == (row["batch"] == "1") for row in rows)
    for row in rows:
        assert float(row["tokens_per_s"]) == pytest.approx(int(row["batch"]) / float(row["p50_ms"]) * 1e3, rel=0.01)
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"model.layers.0", "head"}
    copied = [event for event in events if event["tid"] == 3 and event["ph"] == "X"]
    assert len(copied) >= 2 * SHAPES["tiny"].layers  # of the staged tier, whichever comes last


def test_without_a_device_there_are_the_tiers_of_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--models", str(tmp_path)]
    assert main(["tiers", *flags, "--tiers", "host,disk to host", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["tier"], row["link"]) for row in rows[::2]] == [("host", "memory"), ("disk to host", "disk")]
    assert all(row["x_modules"] > 0 for row in rows[::2])
    assert [row["x_modules"] for row in rows[1::2]] == ["", ""]
    assert main(["tiers", *flags]) == 4
    assert "no CUDA device here" in capsys.readouterr().err
    assert main(["tiers", *flags, "--tiers", "attic"]) == 2
    assert "--tiers 'attic': expected some of resident," in capsys.readouterr().err
    assert main(["tiers", *flags, "--tiers", "host", "--trace-tier", "staged"]) == 2
    assert "--trace-tier 'staged': expected one of --tiers, host" in capsys.readouterr().err


def test_a_tier_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(SHAPES["tiny"], tmp_path / "tiny.int4")
    flags = [*FLAGS, "--models", str(tmp_path), "--tiers", "resident,staged,mapped", "--json"]
    with fake_gpu(monkeypatch) as device:
        copy, copies = device.copy, 0

        def failing(target: Tensor, source: Tensor) -> None:
            nonlocal copies
            copies += 1
            if copies == 5:
                raise RuntimeError("an illegal memory access was encountered")
            copy(target, source)

        monkeypatch.setattr(device, "copy", failing)
        assert main(["tiers", *flags]) == 0
    said = capsys.readouterr()
    assert "staged: left out, RuntimeError: an illegal memory access was encountered" in said.err
    assert [row["tier"] for row in json.loads(said.out)] == ["resident"] * 2 + ["mapped"] * 2


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_a_tier_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_checkpoint(SHAPES["tiny"], tmp_path / "model")
    with fake_gpu(monkeypatch):
        model = load(tmp_path / "model", n_gpu_layers=-1, batch_size=2)
        executor, ids = executor_of(model), _prompt(model, 2, 5)
        expected = logits(model, ids)
        executor.rearrange(arranged(executor.placement, name))
        assert torch.equal(logits(model, ids), expected)
        cache = new_cache(model)
        with torch.inference_mode():
            assert torch.equal(_next(model, ids, cache), expected[:, -1].argmax(dim=-1))
        assert cache is not None
        assert cache.get_seq_length() == 5
        executor.close()


def test_the_peer_is_left_out_where_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiers._accelerate_seconds(SHAPES["tiny"]) is None
    assert "accelerate: left out" in capsys.readouterr().err
