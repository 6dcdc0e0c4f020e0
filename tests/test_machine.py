"""Figures of a machine: measured with the code that runs, kept in a file that is checked, never believed blindly."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kernels.cpu_matmul import cpu_backend
from kernels.kv_block import CHUNK_TOKENS, BlockShape
from offload.checkpoint import Checkpoint
from offload.errors import InputError
from offload.planning import machine
from offload.planning.costs import Overheads, Shape, decode_costs, model_key, prefill_costs, recall_costs
from offload.planning.machine import Machine, cache_file, load_cache, measure, read_machine, save_json
from offload.planning.needs import CacheShape, Needs
from offload.planning.placement import Placement
from offload.planning.wishes import Wishes

FIGURES = Machine(
    description="invented",
    date="2026-01-01",
    read_bytes_per_second=20e9,
    kernel_bytes_per_second=16e9,
    kernel_operations_per_second=1e12,
    disk_bytes_per_second=2e9,
    disk_seconds_per_read=1e-4,
    interference=0.25,
)
GPU = replace(
    FIGURES,
    copy_bytes_per_second=25e9,
    mapped_bytes_per_second=20e9,
    device_bytes_per_second=800e9,
    device_operations_per_second=1e14,
    device_memory_bytes=24 << 30,
    device_runtime_bytes=500 << 20,
)
SHAPE = Shape((160_000_000,) * 2, (320_000_000,) * 2, cache_bytes_per_token=4000.0, head_bytes=400_000_000)


def test_a_machine_is_measured(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_POOL_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "_SAMPLE_SECONDS", 0.01)
    found = measure([blob for blob in Checkpoint.open(tiny_checkpoint).blobs if blob.module])
    assert found.read_bytes_per_second > 1e8
    assert found.kernel_bytes_per_second > 1e7
    assert found.kernel_operations_per_second > 1e8
    assert (found.joint_operations_per_second > 1e8) == (cpu_backend() != "torch")
    assert found.disk_bytes_per_second > 1e5
    assert 0 < found.disk_seconds_per_read < 1
    assert Machine.from_json(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read_bytes_per_second": 0}, "read_bytes_per_second: expected a number above 0"),
        ({"disk_bytes_per_second": -1.0}, "disk_bytes_per_second: expected a number from 0 up, found -1.0"),
        ({"interference": math.nan}, "interference: expected a number from 0 up, found nan"),
        ({"copy_bytes_per_second": "fast"}, "copy_bytes_per_second: expected a number from 0 up, found 'fast'"),
        ({"description": 3}, "description: expected text, found 3"),
        ({"speed": 3}, "expected the keys"),
    ],
)
def test_a_file_of_figures_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({**asdict(FIGURES), **change}))
    with pytest.raises(InputError) as caught:
        read_machine(path)
    assert str(caught.value).startswith(f"--machine {path}: cannot be used ({message}")


def test_a_person_may_leave_the_gpu_out(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    save_json(path, {name: value for name, value in asdict(FIGURES).items() if "device" not in name})
    assert read_machine(path) == FIGURES
    assert not read_machine(path).has_device
    assert GPU.has_device
    with pytest.raises(InputError, match="cannot be used"):
        read_machine(tmp_path / "missing.json")


def test_a_cache_that_cannot_be_read_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "machine.json"
    assert load_cache(path) == {}
    cache = {"machine": asdict(FIGURES), "models": {"key": Overheads().to_json()}}
    save_json(path, cache)
    assert load_cache(path) == cache
    assert [entry.name for entry in path.parent.iterdir()] == ["machine.json"]
    for content in ("", "[]", '{"machine": {}}', path.read_text()[:-20], "[" * 10**5):
        path.write_text(content)
        assert load_cache(path) == {}


def test_costs_are_bytes_over_speed_and_what_was_rehearsed() -> None:
    overheads = Overheads(
        layer_seconds=1e-3,
        streamed_seconds=1.2e-3,
        outside_seconds=3e-3,
        context_seconds=1e-6,
        reading_share=0.8,
    )
    costs = decode_costs(SHAPE, FIGURES, overheads, context_tokens=1000)
    assert costs.host_seconds == pytest.approx((0.010 + 1e-3 + 1e-3,) * 2)
    assert costs.read_seconds == pytest.approx((0.080 / 0.8 + 1e-4,) * 2)
    assert costs.outside_seconds == pytest.approx(0.020 + 3e-3)
    assert costs.streamed_seconds == pytest.approx(2e-4)
    assert costs.computing_beside == 1.0
    batch = decode_costs(SHAPE, FIGURES, overheads, context_tokens=1000, batch_size=4)
    assert batch.host_seconds == pytest.approx((0.010 + 1e-3 + 4e-3,) * 2)


def test_without_a_rehearsal_the_links_alone_count() -> None:
    costs = decode_costs(SHAPE, FIGURES, Overheads(), context_tokens=1_000_000)
    assert costs.host_seconds == pytest.approx((0.010 + 4e9 / 20e9,) * 2)
    assert costs.computing_beside == pytest.approx(0.8)
    assert not Overheads().known
    assert costs.device_seconds == ()


def test_a_prompt_is_bound_by_operations() -> None:
    costs = prefill_costs(SHAPE, GPU, Overheads(prefill_seconds=1e-4), tokens=512)
    assert costs.host_seconds == pytest.approx((2 * 320e6 * 512 / 1e12 + 512e-4,) * 2)
    assert costs.device_seconds == pytest.approx((2 * 320e6 * 512 / 1e14,) * 2)
    assert costs.copy_seconds == pytest.approx((0.0064,) * 2)


def test_what_a_gpu_takes() -> None:
    costs = decode_costs(SHAPE, GPU, Overheads(), context_tokens=0)
    assert costs.device_seconds == pytest.approx((2e-4,) * 2)
    assert costs.mapped_seconds == pytest.approx((8e-3,) * 2)
    assert costs.outside_device_seconds == pytest.approx(5e-4)


def test_keys_and_values_that_are_not_at_hand_cost_what_their_link_lacks() -> None:
    block = BlockShape(1, 8, 128, 128)
    chunk_bytes = CHUNK_TOKENS // 64 * block.nbytes
    shape, tokens = replace(SHAPE, cache=CacheShape(0, 2, block)), 50 * CHUNK_TOKENS
    needs = Needs(1, 1, 1, 1, SHAPE.layers_bytes, shelf_bytes=1)
    costs = decode_costs(shape, GPU, Overheads(reading_share=0.5), tokens)
    away = 2 * 50 * chunk_bytes
    assert costs.cache_read_seconds == pytest.approx(away / (0.5 * GPU.disk_bytes_per_second))
    assert costs.cache_copy_seconds == pytest.approx(away / GPU.copy_bytes_per_second)
    assert decode_costs(shape, GPU, Overheads(), CHUNK_TOKENS - 1).cache_read_seconds == 0
    in_memory = Placement(("host",) * 2, 0, needs, None)
    assert in_memory.seconds(costs) > in_memory.seconds(replace(costs, cache_read_seconds=0.0))
    assert in_memory.seconds(costs) == pytest.approx(costs.cache_read_seconds)
    on_disk = Placement(("host", "disk"), 2, needs, None)
    assert on_disk.seconds(costs) == pytest.approx(costs.cache_read_seconds + costs.read_seconds[1])
    resident = Placement(("resident",) * 2, 0, needs, None)
    assert resident.seconds(costs) == pytest.approx(costs.cache_copy_seconds)
    mixed = Placement(("staged", "host"), 0, needs, None, 2)
    lone = replace(costs, host_seconds=(0.0, 0.0))
    assert mixed.seconds(lone) == pytest.approx(costs.cache_copy_seconds / 2 + costs.copy_seconds[0])


def test_costs_are_recalled_only_where_the_model_was_rehearsed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    assert recall_costs(tiny_checkpoint, 100, Wishes()) is None
    checkpoint = Checkpoint.open(tiny_checkpoint)
    rehearsed = Overheads(layer_seconds=0.5, context_seconds=0.0)
    models = {model_key(checkpoint): rehearsed.to_json()}
    save_json(cache_file(tiny_checkpoint), {"machine": asdict(FIGURES), "models": models})
    costs = recall_costs(tiny_checkpoint, 100, Wishes())
    assert costs is not None
    assert costs.host_seconds == pytest.approx((0.5,) * 3, rel=1e-3)


@pytest.mark.gpu
def test_the_links_of_a_gpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SAMPLE_SECONDS", 0.1)
    links = machine._device_links()
    assert links["device_bytes_per_second"] > links["copy_bytes_per_second"] > 1e9
    assert links["mapped_bytes_per_second"] > 1e9
    assert 0 < links["device_runtime_bytes"] < links["device_memory_bytes"]
