"""eval.speed kv-disk: the same attention from disk and from memory, and what it read of the file."""

import json

import pytest
import torch
from fake_device import fake_gpu

from eval.speed.__main__ import main
from eval.speed.kv import Shape
from kernels.kv_block import CHUNK_TOKENS
from offload.kv.cache import Int8Layer, int8_attention
from offload.kv.shelf import Shelf
from offload.kv.shelved_layer import ShelvedLayer
from offload.kv.store import FileStore
from offload.memory import FileReader, whole_pages
from offload.read_queue import ReadQueue

FLAGS = [
    "kv-disk",
    "--layers",
    "2",
    "--slots",
    "3",
    "--heads",
    "4",
    "--key-heads",
    "2",
    "--head-dim",
    "32",
    "--tokens",
    "3",
]


def test_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    context = 2 * CHUNK_TOKENS + 5
    assert main([*FLAGS, "--context", str(context), "--rounds", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    chunk_bytes = whole_pages(CHUNK_TOKENS * 2 * 2 * (32 + 2))
    assert row["disk_bytes_per_token"] == 4 * chunk_bytes  # two layers, two chunks each
    assert min(row["of_disk"], row["of_beside"]) > 0
    assert 0 < row["reading"] <= 1.05
    assert 0 < row["of_memory"] < 1.5
    assert main([*FLAGS, "--context", str(context), "--rounds", "1"]) == 0
    assert "a token over the disk" in capsys.readouterr().out


def test_a_context_that_stays_in_memory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--context", "100"]) == 2
    assert "--context 100: all of it stays in memory; give a longer one" in capsys.readouterr().err
    assert main([*FLAGS, "--slots", "1"]) == 2
    assert "--slots 1: expected from 2 to 3" in capsys.readouterr().err


def test_both_ways_compute_the_same() -> None:
    shape = Shape(4, 2, 32, CHUNK_TOKENS + 5)
    queue = ReadQueue(FileReader(), None)
    shelf = Shelf(FileStore(queue), 0, 1)
    layers, past, (query, key, value) = [ShelvedLayer(0, shelf), Int8Layer(direct=True)], shape.past(), shape.token()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    outs = []
    for layer in layers:
        layer.update(*past)
        outs.append(int8_attention(module, query, *layer.update(key, value), None)[0])
    assert len(shelf.blobs) == 1
    assert torch.equal(*outs)
    queue.close()


def test_the_way_to_a_gpu_is_measured_likewise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*FLAGS, "--context", str(2 * CHUNK_TOKENS + 5), "--rounds", "1", "--device", "cuda", "--json"]
    with fake_gpu(monkeypatch) as device:
        monkeypatch.setattr("eval.speed.kv_disk.find_device", lambda: device)
        assert main(flags) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["link"], row["reading"]) == ("bus", "")
        assert row["disk_bytes_per_token"] == 4 * CHUNK_TOKENS * 2 * 2 * (32 + 2)
        assert device.copied_back_bytes == row["disk_bytes_per_token"]
    monkeypatch.setattr("eval.speed.kv_disk.find_device", lambda: None)
    assert main(flags) == 2
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err
