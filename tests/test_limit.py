"""What bounds decoding: the link that a token keeps busy for longest, on a device that is faked and without one."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from test_device import PLACEMENTS, TOKENS, placed
from torch import Tensor
from transformers import PreTrainedModel

from offload import limit as limit_module
from offload.executor import executor_of, load
from offload.limit import Limit, bounding, bytes_by_link, measure_limit, measure_links
from offload.memory import whole_pages
from offload.planning.placement import Placement

LAYERS = 3
MACHINE = {"disk": 1e9, "bus": 20e9, "memory": 40e9, "device memory": 1000e9}
BOUNDS = {
    "resident": "device memory",
    "staged, 1 slot": "bus",
    "staged between resident": "bus",
    "mapped": "bus",
    "host": "bus",
    "disk into staged, 2 slots": "disk",
    "disk and memory into staged": "disk",
    "disk into host": "disk",
}


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Bytes a second that every link is found to carry, to be changed."""
    found = dict(MACHINE)
    monkeypatch.setattr(limit_module, "_disk_rate", lambda *_: found["disk"])
    monkeypatch.setattr(limit_module, "_copy_rate", lambda *_: found["bus"])
    monkeypatch.setattr(limit_module, "_memory_rate", lambda *_: found["memory"])
    monkeypatch.setattr(limit_module, "_device_rate", lambda *_: found["device memory"])
    return found


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("name", BOUNDS)
def test_the_link_that_bounds_each_placement_of_a_common_machine(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rates: dict[str, float], name: str
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name) as (model, _):
        assert measure_limit(executor_of(model)).link == BOUNDS[name]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_link_carries_what_a_token_takes_over_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rates: dict[str, float], name: str
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name) as (model, _):
        executor = executor_of(model)
        hows, layer = executor.placement.hows, executor.blobs[0].nbytes
        head = executor.head_memory.nbytes
        assert {blob.nbytes for blob in executor.blobs} == {layer}
        copied, from_disk = layer, executor.placement.needs.layers_bytes[0]
        if executor.placement.split:
            parts = [part.nbytes for part in executor.units.split[0].parts]
            copied = sum(parts)
            from_disk = sum(map(whole_pages, parts)) if executor.placement.way == "staged" else from_disk
        crossing = hows.count("staged") * copied + hows.count("mapped") * layer
        assert bytes_by_link(executor) == {
            "disk": executor.placement.tiers.count("disk") * from_disk,
            "bus": crossing,
            "memory": crossing + hows.count("host") * layer,
            "device memory": (hows.count("resident") + hows.count("staged")) * layer + head,
        }
        for link in measure_links(executor):
            assert (link.bytes_per_token, link.bytes_per_second) == (
                bytes_by_link(executor)[link.link],
                rates[link.link],
            )


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("unpinned", [None, 1])
def test_measuring_asks_nothing_of_a_full_device_and_changes_no_bit(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, unpinned: int | None
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name, device=FakeDevice(unpinned=unpinned)) as (model, device):
        executor = executor_of(model)
        expected = logits(model)
        held, pinned = device.held_bytes, len(device.pinned)
        device.limit = held  # the device is full
        links = measure_links(executor)
        assert (device.held_bytes, len(device.pinned)) == (held, pinned)
        assert {link.link for link in links} == {link for link, nbytes in bytes_by_link(executor).items() if nbytes}
        assert all(link.bytes_per_second > 0 for link in links)
        device.limit = None  # a pass takes some for its products
        assert torch.equal(logits(model), expected)


def test_a_small_layer_on_disk_beside_many_in_memory_is_memory_bound(
    tiny_checkpoint: Path, rates: dict[str, float]
) -> None:
    model = load(tiny_checkpoint, device_map={"": "cpu", "model.layers.1": "disk"})
    executor = executor_of(model)
    disk_bytes, whole = executor.placement.disk_bytes, executor.bytes_per_token
    rates["disk"] = 1.1 * disk_bytes / whole * rates["memory"]  # it keeps up, just
    found = measure_limit(executor)
    assert (found.link, found.bytes_per_token) == ("memory", whole)
    rates["disk"] = 0.9 * disk_bytes / whole * rates["memory"]
    assert measure_limit(executor).link == "disk"
    assert measure_limit(executor, disk_bytes_per_token=disk_bytes // 2).link == "memory"  # as counted, not as planned
    assert [link.link for link in measure_links(executor, disk_bytes_per_token=0)] == ["memory"]
    executor.close()


def test_one_layer_across_a_bus_beside_two_on_a_host_with_slow_memory(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rates: dict[str, float]
) -> None:
    with placed(monkeypatch, tiny_checkpoint, "host") as (model, _):
        executor = executor_of(model)
        tiers = ("staged", "host", "host")
        placement = Placement(tiers, 0, executor.placement.needs, None, 1)
        monkeypatch.setattr(executor, "placement", placement)
        assert (found := measure_limit(executor)).link == "memory"
        assert found.bytes_per_token == LAYERS * executor.blobs[0].nbytes
        rates["memory"] = 61e9
        assert measure_limit(executor).link == "bus"
        rates["device memory"] = 1e9  # a head alone can be what bounds
        assert measure_limit(executor).link == "device memory"


def test_without_a_device(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    (memory,) = measure_links(executor_of(model))
    assert (memory.link, memory.bytes_per_token) == ("memory", executor_of(model).bytes_per_token)
    streamed = load(tiny_checkpoint, device_map="disk", slots=2)
    expected = logits(streamed)
    started = time.perf_counter()
    disk, memory = measure_links(executor_of(streamed))
    assert time.perf_counter() - started < 10  # it is two on a machine that does nothing else
    assert disk.bytes_per_token == LAYERS * executor_of(model).placement.needs.layers_bytes[0]
    assert memory.bytes_per_token == executor_of(model).bytes_per_token
    assert bounding((disk, memory)) in (disk, memory)
    assert torch.equal(logits(streamed), expected)
    executor_of(streamed).close()


def test_keys_and_values_alone_can_be_what_a_disk_is_read_for(tiny_checkpoint: Path, rates: dict[str, float]) -> None:
    executor = executor_of(load(tiny_checkpoint, kv="int8", kv_memory=0, context_tokens=5000))
    assert bytes_by_link(executor)["disk"] == 0
    disk, memory = measure_links(executor)  # how much it will be, is not known yet
    assert (disk.link, disk.bytes_per_token, memory.link) == ("disk", 0, "memory")
    counted = 2 * executor.bytes_per_token
    assert measure_limit(executor, counted) == Limit("disk", rates["disk"], counted)
    executor.close()


def test_the_disk_of_keys_and_values_is_timed_on_pieces_of_the_layers(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_module, "_COPY_BYTES", 4096)
    monkeypatch.setattr(limit_module, "_DISK_SECONDS", 0.0)
    executor = executor_of(load(tiny_checkpoint, kv="int8", kv_memory=0, context_tokens=5000))
    read, arenas = [], set()

    def reading(reader: Any, blob: Any, arena: Any) -> None:
        read.append(blob.nbytes)
        arenas.add(arena.nbytes)

    monkeypatch.setattr(limit_module, "read_blob", reading)
    assert limit_module._disk_rate(executor) > 0
    assert (read, arenas) == ([4096], {4096})  # no memory is planned for more
    executor.close()


def test_a_disk_is_read_for_a_while_however_long_a_pass_over_the_model_takes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executor_of(load(tiny_checkpoint, device_map="disk", slots=2))
    now, read = 0.0, []

    def slow(reader: Any, blob: Any, arena: Any) -> None:
        nonlocal now
        now += 0.4
        read.append(blob.nbytes)

    monkeypatch.setattr(limit_module, "read_blob", slow)
    monkeypatch.setattr(limit_module.time, "perf_counter", lambda: now)
    assert limit_module._disk_rate(executor) == pytest.approx(sum(read) / 0.8)
    assert len(read) == 2
    executor.close()


def test_memory_is_measured_on_more_than_a_cache_holds_as_far_as_the_budget_has_room(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executor_of(load(tiny_checkpoint, device_map="disk", slots=2))
    assert sum(piece.nbytes for piece in limit_module._host_pieces(executor)) >= 256 << 20
    executor.close()
    executor = executor_of(load(tiny_checkpoint, cpu_memory="4GiB"))
    placement = executor.placement
    for spare_bytes in (0, 40 << 20):
        tight = placement.expected_bytes + spare_bytes
        monkeypatch.setattr(executor, "placement", Placement(placement.tiers, placement.depth, placement.needs, tight))
        taken = sum(piece.nbytes for piece in limit_module._host_pieces(executor))
        model_bytes = sum(piece.nbytes for piece in executor.host_memory)
        room = spare_bytes + placement.needs.working_bytes
        assert min(room, 1 << 20) <= taken <= room + model_bytes + 4096
    executor.close()
