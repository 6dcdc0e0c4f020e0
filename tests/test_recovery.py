"""A GPU that runs out of memory while a model runs, on a fake: the same tokens come, from fewer layers."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from test_device import TOKENS, expected, passes, placed, same
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kernels.kv_block import BLOCK_TOKENS
from offload import generate as command
from offload.errors import ResourceError
from offload.executor import executor_of, load
from offload.gpu.recovery import _undo_of, move_layer
from offload.kv.cache import Int8Layer
from offload.planning.choice import plan, plan_smaller
from offload.planning.needs import Needs
from offload.planning.wishes import Wishes
from offload.sampling import Sampling
from offload.session import Prompts, Session

pytestmark = pytest.mark.timeout(120)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
STARTS = [
    *("resident", "staged, 2 slots", "staged in parts, 2 slots", "disk into staged, 2 slots"),
    *("disk and memory into staged in parts", "mapped and disk into mapped", "host"),
]
__all__ = ["expected"]


@pytest.fixture(autouse=True)
def _modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused step rounds in another way than the modules of layers on a GPU."""
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)


class Full:
    """Finds no memory when a module runs for the nth time from now on, once."""

    def __init__(self, module: nn.Module, nth: int = 1) -> None:
        self.calls, self.nth = 0, nth
        self.handle = module.register_forward_pre_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.nth:
            raise torch.OutOfMemoryError("told to have no memory")


def leaves(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


def check_memory(model: PreTrainedModel, device: FakeDevice) -> None:
    """What the placement says is on the device is there, once, and nothing else; likewise what is pinned."""
    gc.collect()
    executor = executor_of(model)
    placement, blobs = executor.placement, executor.blobs
    staged = executor.units.staged(placement.split)
    on_device = sum(blob.nbytes for blob, tier in zip(blobs, placement.tiers, strict=True) if tier == "resident")
    on_device += sum(
        layer.rest.nbytes for layer, how in zip(staged, placement.hows, strict=True) if how == "staged" and layer.rest
    )
    slots = placement.device_depth * max(part.nbytes for layer in staged for part in layer.parts)
    slots += ("mapped" in placement.hows) * max(blob.nbytes for blob in blobs)
    around = sum(blob.nbytes for blob in executor.checkpoint.blobs if not blob.module)
    assert device.held_bytes == around + on_device + slots + placement.device_copies_bytes
    pinned = placement.tiers.count("mapped")
    pinned += sum(len(layer.parts) for layer, tier in zip(staged, placement.tiers, strict=True) if tier == "staged")
    ring = placement.depth if "disk" in placement.tiers and placement.way != "host" else 0
    assert len(device.pinned) == pinned + ring
    for layer, parts, how in zip(executor.layers, staged, placement.hows, strict=True):
        hooks = [
            hook
            for module in layer.modules()
            for hook in module._forward_pre_hooks.values()
            if not isinstance(getattr(hook, "__self__", None), Full)
        ]
        assert len(hooks) == {"resident": 0, "staged": len(parts.parts)}.get(how, 1), how


@pytest.mark.parametrize(
    ("name", "nth", "stride"),
    [
        ("resident", 3, 6),
        *(
            pytest.param(name, nth, 1, marks=[pytest.mark.slow, pytest.mark.timeout(300)])
            for name in STARTS
            for nth in (1, 3)
        ),
    ],
)
def test_a_pass_that_finds_no_memory_at_any_module_is_run_again_with_fewer_layers(
    name: str,
    nth: int,
    stride: int,
    tiny_checkpoint: Path,
    expected: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the prompt, and in the second token after it; at every module in the slow suite, else at some."""
    with placed(monkeypatch, tiny_checkpoint, name) as (model, device):
        first = executor_of(model).placement
        for leaf in list(leaves(model))[::stride]:
            full = Full(leaf, nth)
            assert same(passes(model), expected)
            full.handle.remove()
            if full.calls < nth:  # an embedding of positions, say, runs outside
                continue
            assert full.calls == nth + (3 - nth) + 1
            after = executor_of(model).placement
            assert after.device_bytes < first.device_bytes
            assert model.hf_device_map == executor_of(model).device_map
            check_memory(model, device)
            with torch.inference_mode(False), torch.no_grad():
                executor_of(model).rearrange(first)
            check_memory(model, device)
    assert not device.pinned


def test_generation_goes_on_with_the_tokens_it_has_and_says_so_once(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host = load(tiny_checkpoint).generate(TOKENS, **GREEDY)
    with placed(monkeypatch, tiny_checkpoint, "resident") as (model, device):
        full = Full(executor_of(model).layers[1], 4)
        assert torch.equal(model.generate(TOKENS, **GREEDY), host)
        assert full.calls == 6 + 1  # the prompt and what was decoded were computed once
        check_memory(model, device)
    said = [record.message for record in caplog.records if "ran out of memory" in record.message]
    assert len(said) == 1
    assert "with 2 of 3 layers computed there instead of 3; generation goes on with the tokens it has" in said[0]


@pytest.mark.parametrize("kv", [None, "int8"])
def test_what_is_drawn_is_drawn_once(kv: str | None, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_it(needs: Needs, *_: Any) -> Any:
        return plan(needs, Wishes(gpu_bytes=8 << 30))

    drawn = Sampling(0.9, seed=3)
    prompts = Prompts(tiny_checkpoint)
    session = Session(prompts, 64, {"device_map": "cpu", "kv": kv})
    whole = session.generate([5, 77, 130], 8, drawn)
    with placed(monkeypatch, tiny_checkpoint, "resident"):
        monkeypatch.setattr("offload.executor.plan", plan_it)
        on_device = Session(prompts, 64, {"n_gpu_layers": -1, "kv": kv})
        full = Full(executor_of(on_device.model).layers[2].mlp, 3)
        assert on_device.generate([5, 77, 130], 8, drawn) == whole
        assert full.calls > full.nth
        executor_of(on_device.model).close()


def test_layers_that_find_no_room_either_leave_until_they_do(
    tiny_checkpoint: Path, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, "resident") as (model, device):
        one = max(blob.nbytes for blob in executor_of(model).blobs)
        device.limit = device.held_bytes - 2 * one + 4096  # for the sums of a product that is split
        assert same(passes(model), expected)
        assert executor_of(model).placement.tiers.count("resident") == 1
        check_memory(model, device)


def test_no_share_that_fits_is_an_error_of_exit_code_4_and_memory_that_comes_back_is_used(
    tiny_checkpoint: Path, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, "resident") as (model, device):
        device.limit = 0
        full = Full(executor_of(model).layers[2])
        wanted = r"the GPU ran out of memory with .* a smaller share .* cannot be had .* give a shorter context"
        for _ in range(2):
            with pytest.raises(ResourceError, match=wanted) as refused:
                passes(model)
            assert refused.value.exit_code == 4
        full.handle.remove()
        device.limit = None
        assert same(passes(model), expected)
        check_memory(model, device)


def test_an_interrupt_while_layers_are_moved_leaves_a_model_that_gives_right_tokens(
    tiny_checkpoint: Path, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for nth in range(1, 4):
        with (
            placed(monkeypatch, tiny_checkpoint, "staged, 2 slots") as (model, device),
            pytest.MonkeyPatch.context() as m,
        ):
            executor = executor_of(model)
            read, reads = executor.reader.read_into, 0

            def interrupted(*arguments: Any, nth: int = nth, read: Any = read) -> None:
                nonlocal reads
                reads += 1
                if reads == nth:
                    raise KeyboardInterrupt
                read(*arguments)

            full = Full(executor.layers[0])
            m.setattr(executor.reader, "read_into", interrupted)
            with pytest.raises(KeyboardInterrupt):
                passes(model)
            full.handle.remove()
            assert same(passes(model), expected)
            check_memory(model, device)


def test_the_command_ends_with_exit_code_4(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Session.generate

    def full(session: Session, *arguments: Any, **options: Any) -> Any:
        device.limit = 0
        Full(session.executor.layers[0])
        return generate(session, *arguments, **options)

    with placed(monkeypatch, tiny_checkpoint, "resident") as (_, device):
        monkeypatch.setattr(Session, "generate", full)
        flags = ["--prompt", "the", "--max-new-tokens", "4", "--n-gpu-layers", "-1"]
        assert command.main(["--model", str(tiny_checkpoint), *flags]) == 4
    assert "the GPU ran out of memory" in capsys.readouterr().err


def test_a_map_gives_up_its_last_layers_on_the_gpu_and_keeps_what_is_on_disk() -> None:
    needs = Needs(100, 10, 3, 5, (100,) * 4, 7)
    wishes = Wishes(layers=("gpu", "disk", "gpu", "gpu"), gpu_bytes=1 << 30)
    first = plan(needs, wishes)
    second = plan_smaller(first, wishes)
    assert second.tiers == ("resident", "disk", "resident", "host")
    assert plan_smaller(second, wishes).tiers == ("resident", "disk", "host", "host")


def test_a_number_of_layers_that_was_wished_is_given_up() -> None:
    needs = Needs(100, 10, 3, 5, (100,) * 16, 7)
    wishes = Wishes(gpu_layers=-1, gpu_bytes=1 << 30)
    first = plan(needs, wishes)
    assert first.tiers.count("resident") == 16
    assert plan_smaller(first, wishes).tiers.count("resident") == 12


def keys(tokens: int) -> torch.Tensor:
    return torch.randn(1, 2, tokens, 32)


@pytest.mark.parametrize("before", [0, 3, 9, BLOCK_TOKENS + 1])
@pytest.mark.parametrize("after", [1, 5, BLOCK_TOKENS])
@pytest.mark.parametrize("kind", [DynamicLayer, Int8Layer, lambda: DynamicSlidingWindowLayer(sliding_window=5)])
def test_undoing_leaves_what_was_there(kind: Any, after: int, before: int) -> None:
    cache, added = DynamicCache(), (keys(after), keys(after))
    cache.layers.append(kind())
    if before:
        cache.layers[0].update(keys(before), keys(before))
    undo = _undo_of(cache)
    first = [x.clone() for x in cache.layers[0].update(*added)]
    cache.layers.append(DynamicLayer())
    assert undo is not None
    undo()
    assert len(cache.layers) == 1
    assert cache.layers[0].get_seq_length() == before
    again = cache.layers[0].update(*added)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_key_without_its_value_is_undone() -> None:
    cache = DynamicCache()
    held = cache.update(keys(3), keys(3), 0)
    undo = _undo_of(cache)
    cache.layers[0].keys = torch.cat([cache.layers[0].keys, keys(1)], dim=-2)
    assert undo is not None
    undo()
    assert torch.equal(cache.layers[0].keys, held[0])
    assert torch.equal(cache.layers[0].values, held[1])


def test_a_cache_that_cannot_be_undone_is_an_error_that_says_what_to_do(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, "resident") as (model, _):
        Full(executor_of(model).layers[1])
        with pytest.raises(ResourceError, match=r"cannot be put back .* give a smaller --gpu-memory"):
            model.generate(TOKENS, cache_implementation="static", **GREEDY)


@pytest.mark.parametrize("kind", [DynamicLayer, Int8Layer, lambda: DynamicSlidingWindowLayer(sliding_window=5)])
def test_keys_and_values_follow_their_layer(kind: Any) -> None:
    layer, there = kind(), torch.device("meta")
    move_layer(layer, there)  # nothing is held yet
    layer.update(keys(3), keys(3))
    move_layer(layer, there)
    held = [layer.blocks[0].memory] if isinstance(layer, Int8Layer) else [layer.keys, layer.values]
    assert layer.device == there
    assert all(tensor.device == there for tensor in held)
