"""A model on a device, on one that is faked: every placement gives the bits of the resident one, and never races."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, fake_gpu
from torch import Tensor
from transformers import PreTrainedModel

from offload.errors import ResourceError
from offload.executor import executor_of, load
from offload.planning.choice import plan as real_plan
from offload.planning.needs import Needs
from offload.planning.placement import Placement
from offload.planning.predict import Costs
from offload.planning.words import describe

pytestmark = pytest.mark.timeout(120)
TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])

PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"tiers": ("resident",) * 3, "device_depth": 0},
    "staged, 1 slot": {"tiers": ("staged",) * 3, "device_depth": 1},
    "staged, 2 slots": {"tiers": ("staged",) * 3, "device_depth": 2},
    "staged, 3 slots": {"tiers": ("staged",) * 3, "device_depth": 3},
    "staged between resident": {"tiers": ("staged", "resident", "staged"), "device_depth": 2},
    "disk into staged, 1 slot": {"tiers": ("disk",) * 3, "depth": 1, "device_depth": 1, "way": "staged"},
    "disk into staged, 2 slots": {"tiers": ("disk",) * 3, "depth": 2, "device_depth": 2, "way": "staged"},
    "disk and memory into staged": {
        "tiers": ("disk", "staged", "disk"),
        "depth": 1,
        "device_depth": 2,
        "way": "staged",
    },
    "staged in parts, 1 slot": {"tiers": ("staged",) * 3, "device_depth": 1, "split": True},
    "staged in parts, 2 slots": {"tiers": ("staged",) * 3, "device_depth": 2, "split": True},
    "disk into staged in parts, 1 slot": {
        "tiers": ("disk",) * 3,
        "depth": 1,
        "device_depth": 1,
        "way": "staged",
        "split": True,
    },
    "disk and memory into staged in parts": {
        "tiers": ("disk", "staged", "disk"),
        "depth": 2,
        "device_depth": 2,
        "way": "staged",
        "split": True,
    },
    "mapped": {"tiers": ("mapped",) * 3, "way": "mapped"},
    "disk into mapped": {"tiers": ("disk", "resident", "disk"), "depth": 1, "way": "mapped"},
    "mapped and disk into mapped": {"tiers": ("mapped", "disk", "disk"), "depth": 2, "way": "mapped"},
    "host": {"tiers": ("resident", "host", "staged"), "device_depth": 1},
    "disk into host": {"tiers": ("disk", "staged", "disk"), "depth": 1, "device_depth": 1, "way": "host"},
    "resident, in parts and host": {"tiers": ("resident", "staged", "host"), "device_depth": 2, "split": True},
    "in parts and disk into host": {
        "tiers": ("disk", "staged", "disk"),
        "depth": 1,
        "device_depth": 1,
        "way": "host",
        "split": True,
    },
}


@contextmanager
def placed(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    name: str,
    poison: bool = True,
    device: FakeDevice | None = None,
    steps: bool = False,
    **words: Any,
) -> Iterator[tuple[PreTrainedModel, FakeDevice]]:
    """A model placed as PLACEMENTS says, on a fake device. steps: see `fake_gpu`. words: for `load`."""

    def plan(needs: Needs, *_: Any) -> Placement:
        return Placement(**{"depth": 0, "needs": needs, "budget_bytes": None, **PLACEMENTS[name]})

    with fake_gpu(monkeypatch, device, steps) as found:
        monkeypatch.setattr("offload.executor.plan", plan)
        model = load(directory, n_gpu_layers=-1, poison=poison, **words)
        monkeypatch.setattr("offload.executor.plan", real_plan)
        try:
            yield model, found
        finally:
            executor_of(model).close()


@torch.inference_mode()
def passes(model: PreTrainedModel) -> list[Tensor]:
    """Logits of a prompt and of two tokens after it."""
    out = model(TOKENS, use_cache=True)
    found = [out.logits]
    for token in (7, 90):
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        found.append(out.logits)
    return found


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> list[Tensor]:
    """What a model computes whose layers are all on the host, and which takes no fused step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.streaming.fuse", lambda *_: 0)
        return passes(load(tiny_checkpoint))


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_equals_the_resident_model(
    name: str,
    poison: bool,
    eager: bool,
    tiny_checkpoint: Path,
    expected: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)
    with placed(monkeypatch, tiny_checkpoint, name, poison, FakeDevice(eager=eager)) as (model, device):
        for _ in range(3):
            assert same(passes(model), expected)
        assert bool(device.copies) == ("staged" in PLACEMENTS[name]["tiers"] or PLACEMENTS[name].get("way") == "staged")
    assert not device.pinned


@pytest.mark.parametrize(
    "name",
    [
        "staged, 2 slots",
        "staged in parts, 2 slots",
        "disk into staged, 2 slots",
        "disk and memory into staged in parts",
        "mapped and disk into mapped",
        "host",
    ],
)
def test_a_pass_after_an_interrupted_one_is_right(
    name: str, tiny_checkpoint: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)
    with placed(monkeypatch, tiny_checkpoint, name) as (model, _):
        leaves = [module for module in model.modules() if not list(module.children())]
        for leaf in leaves:
            interrupted = leaf.register_forward_pre_hook(raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                passes(model)
            interrupted.remove()
            assert same(passes(model), expected)


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_generation_is_that_of_the_host(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    host = load(tiny_checkpoint).generate(TOKENS, **options)
    with placed(monkeypatch, tiny_checkpoint, "staged between resident") as (model, _):
        assert torch.equal(model.generate(TOKENS, **options), host)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_device_holds_no_more_of_layers_than_is_planned(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name) as (model, device):
        executor = executor_of(model)
        around = sum(blob.nbytes for blob in executor.checkpoint.blobs if not blob.module)
        planned, page = executor.placement.layers_device_bytes, 4096
        pieces = planned // executor.placement.device_slot_bytes + len(executor.layers) * executor.placement.split
        held = device.held_bytes - around - executor.placement.device_copies_bytes
        assert planned - pieces * page < held <= planned
        shown = describe(executor.placement)
        assert ("one more, for prompts of layers read across the bus" in shown) == ("mapped" in executor.placement.hows)


@pytest.mark.parametrize("name", [name for name, placement in PLACEMENTS.items() if "staged" in str(placement)])
@pytest.mark.parametrize("unpinned", [0, 1], ids=["nothing", "not the first"])
def test_memory_that_cannot_be_pinned_is_gone_around_and_said(
    name: str,
    unpinned: int,
    tiny_checkpoint: Path,
    expected: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)
    refused = FakeDevice(unpinned=unpinned)
    with placed(monkeypatch, tiny_checkpoint, name, device=refused) as (model, device):
        assert same(passes(model), expected)
        assert device.copies
    assert "cannot be pinned (`ulimit -l`)" in caplog.text
    assert not refused.pinned


def test_a_gpu_that_others_have_filled_is_left_out_unless_it_was_asked_for(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_gpu(monkeypatch) as device:
        device.used_bytes = device.total_bytes
        model = load(tiny_checkpoint, device_map="auto")
        assert set(executor_of(model).placement.tiers) == {"host"}
        assert executor_of(model).device_side is None
        assert "the GPU is left out, everything is computed on the host: " in caplog.text
        assert same(passes(model), passes(load(tiny_checkpoint)))
        with pytest.raises(ResourceError, match="too small for this model"):
            load(tiny_checkpoint, n_gpu_layers=1)


@pytest.mark.parametrize("name", ["resident", "staged, 2 slots", "mapped"])
def test_a_gpu_that_is_full_is_an_error_and_leaves_nothing_pinned(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = FakeDevice(fail_at=1)
    with (
        pytest.raises(ResourceError, match=r"the GPU ran out of memory .* give a smaller --gpu-memory"),
        placed(monkeypatch, tiny_checkpoint, name, device=full),
    ):
        pass
    assert not full.pinned


@pytest.mark.parametrize("eager", [False, True])
def test_one_slot_that_was_planned_for_a_small_budget_equals_the_resident_model(
    eager: bool, tiny_checkpoint: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)
    with placed(monkeypatch, tiny_checkpoint, "staged, 1 slot") as (model, _):
        one_slot = executor_of(model).placement.device_bytes
    count, slow, fast = 3, 1.0, 1e-4
    costs = Costs(
        host_seconds=(slow,) * count,
        read_seconds=(slow,) * count,
        outside_seconds=slow,
        device_seconds=(fast,) * count,
        mapped_seconds=(slow,) * count,
        copy_seconds=(fast,) * count,
    )
    with fake_gpu(monkeypatch, FakeDevice(eager=eager)):
        model = load(tiny_checkpoint, gpu_memory=one_slot, costs=costs, poison=True)
        assert executor_of(model).placement.device_depth == 1
        assert executor_of(model).placement.tiers == ("staged",) * count
        for _ in range(2):
            assert same(passes(model), expected)
        executor_of(model).close()
