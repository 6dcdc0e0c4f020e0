"""What bounds decoding: the slowest link that weights take for a token, on a device that is faked and without one."""

from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice
from test_device import TOKENS, placed
from torch import Tensor
from transformers import PreTrainedModel

from offload.executor import executor_of, load
from offload.limit import measure_limit

LAYERS = 3
LINKS = {
    "resident": ("device memory", None),
    "staged, 1 slot": ("bus", LAYERS),
    "staged between resident": ("bus", 2),
    "mapped": ("bus", LAYERS),
    "host": ("bus", 1),
    "disk into staged, 2 slots": ("disk", LAYERS),
    "disk and memory into staged": ("disk", 2),
    "disk into host": ("disk", 2),
}


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("unpinned", [None, 1])
def test_the_slowest_link_of_each_placement(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, unpinned: int | None
) -> None:
    link, layers = LINKS[name]
    with placed(monkeypatch, tiny_checkpoint, name, device=FakeDevice(unpinned=unpinned)) as (model, device):
        executor = executor_of(model)
        expected = logits(model)
        held, pinned = device.held_bytes, len(device.pinned)
        device.limit = held  # the device is full
        limit = measure_limit(executor)
        assert (device.held_bytes, len(device.pinned)) == (held, pinned)
        layer_bytes = executor.placement.needs.layers_bytes[0]
        assert limit.link == link
        assert limit.bytes_per_token == (executor.bytes_per_token if layers is None else layers * layer_bytes)
        assert limit.bytes_per_second > 0
        assert torch.equal(logits(model), expected)


def test_layers_of_the_host_beside_those_of_a_device_are_bound_by_memory(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, "host") as (model, _):
        executor = executor_of(model)
        monkeypatch.setattr(
            executor,
            "placement",
            executor.placement.__class__(("resident", "host", "host"), 0, executor.placement.needs, None),
        )
        limit = measure_limit(executor)
    assert (limit.link, limit.bytes_per_token) == ("memory", 2 * executor.placement.needs.layers_bytes[0])


def test_without_a_device(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    limit = measure_limit(executor_of(model))
    assert (limit.link, limit.bytes_per_token) == ("memory", executor_of(model).bytes_per_token)
    streamed = load(tiny_checkpoint, device_map="disk", slots=2)
    limit = measure_limit(executor_of(streamed))
    assert (limit.link, limit.bytes_per_token) == ("disk", LAYERS * executor_of(model).placement.needs.layers_bytes[0])
    executor_of(streamed).close()
