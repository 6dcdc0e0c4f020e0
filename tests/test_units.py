"""Experts come when they are routed to, the head in blocks: equal bit for bit to a model that is all in memory."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_architectures import FAMILIES, SHARED
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from eval.speed.random_model import SHAPES, write_checkpoint
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError, ResourceError
from offload.executor import executor_of, load
from offload.experts import Experts
from offload.head import StreamedHead
from offload.limit import measure_limit
from offload.planning.choice import plan
from offload.planning.needs import ExpertNeeds, Needs
from offload.planning.placement import Placement
from offload.units import part
from quant import rtn

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])
MIB = 1 << 20


@pytest.fixture(scope="module", params=("Mixtral", "Qwen3Moe", "DeepseekV3"))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with experts, rounded to nearest."""
    directory = tmp_path_factory.mktemp(request.param)
    config = getattr(transformers, f"{request.param}Config")(**{**SHARED, **FAMILIES[request.param]})
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory / "model")
    flags = ["--model", str(directory / "model"), "--output", str(directory / "out"), "--group-size", "32"]
    assert rtn.main(flags) == 0
    return directory / "out"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose head is a packed weight of 8 bits."""
    directory = tmp_path_factory.mktemp("random") / "tiny.int4"
    write_checkpoint(SHAPES["tiny"], directory)
    return directory


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> list[Tensor]:
    """Those of a prompt, and of the token after it."""
    output = model(tokens, use_cache=True)
    return [output.logits, model(tokens[:, -1:], past_key_values=output.past_key_values).logits]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture
def slots_for_experts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give a planned model so many slots for experts."""

    def give(count: int) -> None:
        def planned(*arguments: Any) -> Placement:
            return replace(plan(*arguments), expert_slots=count)

        monkeypatch.setattr("offload.executor.plan", planned)

    return give


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_experts_that_are_fetched_change_no_bit(
    mixture: Path, slots: int, slots_for_experts: Callable[[int], None]
) -> None:
    expected = logits(load(mixture))
    slots_for_experts(slots)
    model = load(mixture, device_map="disk", slots=1, poison=True)
    for _ in range(3):
        assert equal(logits(model), expected)
    executor_of(model).close()


def test_experts_of_a_checkpoint_that_scattered_them_are_ranges_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots_for_experts: Callable[[int], None]
) -> None:
    config = transformers.MixtralConfig(**{**SHARED, **FAMILIES["Mixtral"]})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("offload.checkpoint_writer._EXPERT", re.compile("nothing"))  # as it was written at first
    flags = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--group-size", "32"]
    assert rtn.main(flags) == 0
    expected = logits(load(tmp_path / "out"))
    slots_for_experts(3)
    model = load(tmp_path / "out", device_map="disk", slots=1, poison=True)
    assert any(len(blob.ranges) > 1 for blob in executor_of(model).expert_blobs)
    for _ in range(2):
        assert equal(logits(model), expected)
    executor_of(model).close()


def test_a_model_of_which_only_experts_are_streamed_is_bound_by_the_disk(
    mixture: Path, slots_for_experts: Callable[[int], None]
) -> None:
    slots_for_experts(1)
    model = load(mixture, device_map="disk", slots=1)
    executor = executor_of(model)
    executor.slots, executor.streamed_blobs = None, []  # as where all that surrounds the experts is kept
    limit = measure_limit(executor)
    assert limit.link == "disk"
    assert limit.bytes_per_second > 0
    executor.close()


def test_an_expert_that_is_not_routed_to_is_not_read(mixture: Path, slots_for_experts: Callable[[int], None]) -> None:
    slots_for_experts(8)
    model = load(mixture, device_map="disk", slots=1)
    executor = executor_of(model)
    routed: set[str] = set()
    read: list[str] = []
    assert executor.queue is not None
    executor.queue.on_read = lambda blob, *_: read.append(blob.module)
    lists = {module: name for name, module in model.named_modules() if isinstance(module, Experts)}
    for module in lists:

        def note(experts: Any, arguments: tuple[Tensor, ...]) -> None:
            routed.update(f"{lists[experts]}.{index}" for index in arguments[1].unique().tolist())

        module.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(TOKENS[:, :1])
    assert sorted(name for name in read if ".experts." in name) == sorted(routed)
    assert 0 < len(routed) < 4 * len(lists)
    executor.close()


def test_interrupted_in_an_expert_the_next_pass_is_right(
    mixture: Path, slots_for_experts: Callable[[int], None]
) -> None:
    slots_for_experts(2)
    model = load(mixture, device_map="disk", slots=1, poison=True)
    expected = logits(model)
    for name, module in list(model.named_modules()):
        if ".experts." not in name or any(module.children()):
            continue
        fired = []

        def interrupt(*_: Any, fired: list[bool] = fired) -> None:
            fired.append(True)
            raise KeyboardInterrupt

        handle = module.register_forward_pre_hook(interrupt)
        try:
            logits(model)
        except KeyboardInterrupt:
            assert fired
        finally:
            handle.remove()
        assert equal(logits(model), expected), name
    executor_of(model).close()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_head_in_blocks_changes_no_bit(untied: Path, depth: int, head_apart: None) -> None:
    whole = load_whole(untied)
    model = load(untied, device_map="disk", slots=depth, poison=True)
    assert isinstance(model.get_output_embeddings(), StreamedHead)
    assert len(executor_of(model).placement.head_tiers) >= 4
    executor = executor_of(model)
    assert equal(logits(model), whole)
    before = executor.stats.layer_reads
    for _ in range(3):
        assert equal(logits(model), whole)
    assert executor.queue is not None
    read: list[str] = []
    executor.queue.on_read = lambda blob, *_: read.append(blob.module)
    assert equal(logits(model), whole)
    deadline = time.monotonic() + 20
    while (not read or read[-1].startswith("lm_head")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not read[-1].startswith("lm_head")  # after the head's last block comes the next token's first layer
    passes = (executor.stats.layer_reads - before) / len(executor.streamed_blobs)
    assert abs(passes - 8) * len(executor.streamed_blobs) <= depth  # each once a pass, but for what is read ahead
    executor.close()


def load_whole(directory: Path) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.executor.plan", plan)
        return logits(load(directory))


@pytest.mark.parametrize("kind", ["flip", "scale"])
def test_a_damaged_head_is_refused_before_a_token(untied: Path, kind: str, head_apart: None) -> None:
    blob = Checkpoint.open(untied).blobs[-1]
    name = "lm_head.weight_packed" if kind == "flip" else "lm_head.weight_scale"
    whole, threads = blob.path.read_bytes(), threading.active_count()
    content = bytearray(whole)
    content[blob.offset + blob.tensors[name].offset + 100_000 * (kind == "flip")] ^= 1
    try:
        blob.path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"tensor '{name}' is damaged"):
            load(untied, device_map="disk", slots=1)
        assert threading.active_count() == threads
    finally:
        blob.path.write_bytes(whole)


def test_a_part_is_the_pages_of_its_tensors(untied: Path) -> None:
    blob = Checkpoint.open(untied).blobs[1]
    for name, spec in blob.tensors.items():
        found = part(blob, {name: spec}, "")
        assert found.offset % 4096 == 0
        assert found.offset + found.tensors[name].offset == blob.offset + spec.offset
        assert found.checksums == {name: blob.checksums[name]}


def test_an_expert_is_one_range_of_its_shard(mixture: Path) -> None:
    model = load(mixture, device_map="disk", slots=1)
    units = executor_of(model).units
    assert [len(experts) for experts in units.experts] == list(executor_counts(model))
    for around, experts in zip(units.around, units.experts, strict=True):
        assert len(around.ranges) in (0, 2)  # what is odd in size lies behind the experts
        assert all(not expert.ranges for expert in experts)
    executor_of(model).close()


def executor_counts(model: PreTrainedModel) -> Iterator[int]:
    for layer in executor_of(model).layers:
        yield sum(len(module) for module in layer.modules() if isinstance(module, Experts))


def test_the_head_is_streamed_when_the_budget_asks_for_it() -> None:
    needs = Needs(400 * MIB, 110 * MIB, 40 * MIB, 30 * MIB, (20 * MIB,) * 10, 0, 0, (10 * MIB,) * 10)
    least = needs.without_head().around_bytes + 20 * MIB
    placement = plan(needs, least)
    assert placement.head_tiers == ("disk",) * 10
    assert placement.disk_bytes == 300 * MIB
    with pytest.raises(ResourceError, match="for embeddings and norms"):
        plan(needs, least - 1)
    for more in range(0, 320, 20):
        assert plan(needs, least + more * MIB).expected_bytes <= least + more * MIB


def test_experts_get_what_is_left() -> None:
    experts = ExpertNeeds(2 * MIB, (10,) * 4, (5 * MIB,) * 4, 2)
    needs = Needs(400 * MIB, 50 * MIB, 40 * MIB, 30 * MIB, (25 * MIB,) * 4, experts=experts)
    for room in range(7, 100):
        placement = plan(needs, needs.around_bytes + room * MIB)
        assert placement.fits
        if room >= 28:
            assert placement.tiers == ("host",) * 4
            assert placement.expert_slots == (room - 20) // 2
    with pytest.raises(ResourceError, match="for one expert"):
        plan(needs, needs.around_bytes + 6 * MIB)
