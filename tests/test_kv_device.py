"""Keys and values beyond a GPU's memory, on one that is faked: the bits of a cache that is whole, and never a race."""

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, fake_gpu
from test_device import placed
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kernels.kv_block import CHUNK_TOKENS, BlockShape
from offload import generate as command
from offload import limit as limit_module
from offload.errors import ResourceError
from offload.executor import executor_of, load, new_cache
from offload.kv.cache import Int8Layer
from offload.kv.shelf import CHUNK_BLOCKS, SLOTS, SPARE, share_out
from offload.kv.shelved_layer import ShelvedLayer
from offload.limit import bounding, bytes_by_link, measure_links
from offload.memory import whole_pages
from offload.trace import Trace

pytestmark = pytest.mark.timeout(120)
LAYERS = 3
PAGES = whole_pages(CHUNK_BLOCKS * BlockShape(1, 2, 16, 16).nbytes)
PLACED = ["resident", "staged, 2 slots", "disk and memory into staged", "mapped and disk into mapped", "host"]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model for longer texts."""
    from quant.rtn import main

    directory = tmp_path_factory.mktemp("long")
    shutil.copytree(tiny_model, directory / "model")
    config = directory / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    output = directory / "int4"
    assert main(["--model", str(directory / "model"), "--output", str(output), "--group-size", "32"]) == 0
    return output


@pytest.fixture(autouse=True)
def _modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused step rounds in another way than the modules of layers on a GPU."""
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)


def budget(chunks: int, more: int = 0, layers: int = LAYERS) -> int:
    """For so many chunks of every layer, and so many slots more."""
    return (layers * chunks + SLOTS + SPARE + more) * PAGES


def tokens(count: int) -> Tensor:
    return torch.randint(1, 250, (1, count), generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def logits(model: PreTrainedModel, cache: Cache | None, *parts: Tensor) -> Tensor:
    """The last logits of each pass."""
    assert cache is not None
    return torch.cat([model(part, past_key_values=cache, logits_to_keep=1).logits[0] for part in parts])


TEXT = [tokens(700), tokens(2 * CHUNK_TOKENS), tokens(5), *tokens(6).split(1, dim=1), tokens(900), tokens(1)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Tensor:
    """What a model on the host gives whose keys and values are whole in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.streaming.fuse", lambda *_: 0)
        model = load(checkpoint, kv="int8")
        return logits(model, new_cache(model), *TEXT)


@contextmanager
def on_device(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, name: str, kv_memory: int, device: FakeDevice | None = None
) -> Iterator[tuple[PreTrainedModel, FakeDevice]]:
    with placed(monkeypatch, checkpoint, name, device=device, kv="int8", kv_memory=kv_memory) as (model, found):
        yield model, found


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", PLACED)
def test_the_bits_are_those_of_a_cache_on_the_host(
    name: str, eager: bool, checkpoint: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice(eager=eager)
    with on_device(monkeypatch, checkpoint, name, 0, device) as (model, _):
        weights, cache = device.held_bytes, new_cache(model)
        assert torch.equal(logits(model, cache, *TEXT), expected)
        layers = [layer for layer in cache.layers if isinstance(layer, ShelvedLayer)]
        hows = executor_of(model).placement.hows
        assert [isinstance(layer, ShelvedLayer) for layer in cache.layers] == [how != "host" for how in hows]
        chunk_bytes = CHUNK_BLOCKS * layers[0].blocks.shape.nbytes
        assert device.held_bytes - weights == (len(layers) + SLOTS + SPARE) * chunk_bytes
        full = cache.get_seq_length() // CHUNK_TOKENS
        assert device.copied_back_bytes == len(layers) * full * chunk_bytes
        shelf = layers[0]._shelf
        assert shelf.store._registered[0].nbytes == len(layers) * whole_pages(chunk_bytes)
        assert len(shelf.store._registered) == full
        del shelf
        del cache, layers
        gc.collect()
        assert device.held_bytes == weights


@pytest.mark.parametrize(("chunks", "more"), [(1, 0), (1, 2), (2, 1), (9, 0)])
def test_a_budget_becomes_chunks_of_each_layer_and_slots_and_is_kept(
    chunks: int, more: int, checkpoint: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_device(monkeypatch, checkpoint, "staged, 2 slots", budget(chunks, more)) as (model, device):
        weights, cache = device.held_bytes, new_cache(model)
        assert torch.equal(logits(model, cache, *TEXT), expected)
        assert device.held_bytes - weights <= budget(chunks, more)
        assert bool(device.copied_back_bytes) == (chunks < 9)
        room = share_out(budget(chunks, more), LAYERS, PAGES)
        assert (room.chunks, room.slots) == (chunks, SLOTS + more)


@torch.inference_mode()
def batch_logits(model: PreTrainedModel, cache: Cache | None) -> Tensor:
    """The logits of three texts that go on from each other, and after a crop into what was put away."""
    assert cache is not None
    texts, found = torch.cat([tokens(2 * CHUNK_TOKENS + 60 + seed)[:, seed:] for seed in range(3)]), []
    orders = ([2, 0, 0], [1, 1, 2], [0, 1, 2], [2, 1, 0])
    for number, part in enumerate([texts, *torch.cat([tokens(8)] * 3).split(1, dim=1)]):
        found.append(model(part, past_key_values=cache, logits_to_keep=1).logits)
        cache.reorder_cache(torch.tensor(orders[number % 4]))
        if number == 4:
            cache.crop(-CHUNK_TOKENS)
    return torch.stack(found)


def test_sequences_that_go_on_from_others_and_crops_find_what_was_put_away(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint, kv="int8")
    whole = batch_logits(model, new_cache(model))
    with on_device(monkeypatch, checkpoint, "staged between resident", 0) as (model, device):
        assert torch.equal(batch_logits(model, new_cache(model)), whole)
        assert device.copied_back_bytes


def test_generation_is_that_of_the_host(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tokens(2 * CHUNK_TOKENS + 30)
    options: dict[str, Any] = {"max_new_tokens": 8, "prefill_chunk_size": 512, "eos_token_id": None}
    for more in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}, {"prompt_lookup_num_tokens": 3}):
        host = load(checkpoint, kv="int8").generate(prompt, **options, **more)
        with on_device(monkeypatch, checkpoint, "staged, 2 slots", 0) as (model, device):
            assert torch.equal(model.generate(prompt, **options, **more), host)
            assert device.copied_back_bytes


def test_no_pass_waits_for_the_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with placed(monkeypatch, checkpoint, "staged, 2 slots", False, kv="int8", kv_memory=0) as (model, device):
        logits(model, new_cache(model), *TEXT)
        assert device.copied_back_bytes
        assert device.waited_in == []


def test_the_next_chunk_is_always_on_its_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_device(monkeypatch, checkpoint, "resident", 0) as (model, _):
        cache = new_cache(model)
        logits(model, cache, tokens(4 * CHUNK_TOKENS + 1))
        order = [(layer, number) for layer in range(LAYERS) for number in range(4)]
        shelf, walked = cache.layers[0]._shelf, []
        for _ in range(2):
            for layer in cache.layers:
                for start, _ in layer.parts():
                    if start < 4 * CHUNK_TOKENS:  # the last chunk is at hand
                        walked.append((layer._index, start // CHUNK_TOKENS))
                        assert set(shelf._held) == {walked[-1], order[len(walked) % len(order)]}
        assert walked == order * 2


@pytest.mark.parametrize("name", ["resident", "staged, 2 slots"])
def test_a_pass_after_an_interrupted_one_is_right(name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = [tokens(2 * CHUNK_TOKENS + 9), tokens(3), tokens(1)]
    model = load(checkpoint, kv="int8")
    whole = logits(model, new_cache(model), *text)
    with on_device(monkeypatch, checkpoint, name, 0) as (model, _):
        for leaf in [module for module in model.modules() if not list(module.children())][::4]:
            cache = new_cache(model)
            logits(model, cache, *text[:1])
            interrupted = leaf.register_forward_pre_hook(raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                logits(model, cache, *text[1:])
            interrupted.remove()
            for layer in cache.layers:
                layer.crop(text[0].shape[1] - layer.get_seq_length())
            assert torch.equal(logits(model, cache, *text[1:]), whole[1:])


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["resident", "staged, 2 slots", "host"])
def test_a_device_that_is_full_gives_up_layers_and_their_keys_and_values(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [tokens(CHUNK_TOKENS + 700), tokens(500), tokens(1), tokens(1)]
    model = load(checkpoint, kv="int8")
    whole = logits(model, new_cache(model), *text)
    for layer in (1, 2):
        with on_device(monkeypatch, checkpoint, name, 0) as (model, _):
            cache = new_cache(model)
            found = [logits(model, cache, *text[:1])]
            Full(executor_of(model).layers[layer].mlp)
            found += [logits(model, cache, part) for part in text[1:]]
            assert torch.equal(torch.cat(found), whole)
            hows = executor_of(model).placement.hows
            assert [type(layer) is Int8Layer for layer in cache.layers] == [how == "host" for how in hows]


class Full:
    """Finds no memory when a module runs, once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.left = 1
        module.register_forward_pre_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("told to have no memory")


def test_memory_that_cannot_be_registered_is_the_drivers(
    checkpoint: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with on_device(monkeypatch, checkpoint, "resident", 0, FakeDevice(unpinned=0)) as (model, device):
        cache = new_cache(model)
        assert torch.equal(logits(model, cache, *TEXT), expected)
        assert [record.message[:45] for record in caplog.records] == ["memory for keys and values cannot be pinned ("]
        assert device.pinned

        def refuse(nbytes: int) -> Tensor:
            raise RuntimeError("no more\nof it")

        device.allocate_pinned = refuse  # type: ignore[method-assign]
        with pytest.raises(ResourceError, match=r"pinned memory for keys and values are not to be had: no more$"):
            logits(model, new_cache(model), *TEXT)
        del cache
        gc.collect()
    assert not device.pinned


def test_the_plan_counts_what_is_on_the_device_and_what_is_beside_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"context_tokens": 5000, "kv": "int8", "n_gpu_layers": -1}
    with fake_gpu(monkeypatch):
        whole = executor_of(load(checkpoint, **words)).placement
        least = executor_of(load(checkpoint, **words, kv_memory=0)).placement
        some = executor_of(load(checkpoint, **words, kv_memory=budget(2, 1))).placement
    blocks = -(-5000 // 64) * BlockShape(1, 2, 16, 16).nbytes
    assert (whole.device_cache_bytes, whole.host_cache_bytes) == (LAYERS * blocks, 0)
    assert (least.device_cache_bytes, least.host_cache_bytes) == (budget(1), 4 * LAYERS * PAGES)
    assert (some.device_cache_bytes, some.host_cache_bytes) == (budget(2, 1), 3 * LAYERS * PAGES)
    with fake_gpu(monkeypatch), pytest.raises(ResourceError, match=r"--kv-memory .*: 3 layers take .* at least"):
        load(checkpoint, **words, kv_memory=budget(1) - 1)


def test_a_device_that_may_be_used_takes_keys_and_values_too(
    checkpoint: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gpu(monkeypatch) as device:
        model = load(checkpoint, device_map="auto", cache_implementation="offloaded", kv="int8", context_tokens=5000)
        assert torch.equal(logits(model, new_cache(model), *TEXT), expected)
        assert device.copied_back_bytes


@pytest.mark.parametrize("name", ["resident", "staged, 2 slots", "disk and memory into staged", "host"])
def test_copies_of_keys_and_values_are_in_the_trace_and_counted(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, checkpoint, name, False, kv="int8", kv_memory=0) as (model, device):
        executor, trace = executor_of(model), Trace(executor_of(model))
        device.copies, device.waited_in = 0, []
        logits(model, new_cache(model), *TEXT)
        copies, back_bytes = device.copies, device.copied_back_bytes
        assert "MainThread" not in device.waited_in
        described = trace.describe_links()
        trace.write(tmp_path / "trace.json")
        counted = executor.stats.cache_bytes_copied
        trace.close()
        assert executor.device_side is not None
        assert executor.device_side.cache_copies.on_copy is executor.device_side.cache_copies_back.on_copy is None
    events = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    of_cache = [event for event in events if event["name"].startswith("keys and values ")]
    there, back = ([event["args"]["bytes"] for event in of_cache if event["tid"] == line] for line in (3, 4))
    assert sum(back) == back_bytes > 0
    assert len(there) + len([event for event in events if event["tid"] == 3 and event not in of_cache]) == copies
    assert sum(there) + sum(back) == counted
    assert there
    assert "copies to the device busy" in described
    assert "copies from the device busy" in described


@pytest.mark.parametrize("name", ["resident", "staged, 2 slots", "mapped and disk into mapped"])
def test_keys_and_values_count_in_the_share_of_the_bus(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for measured in ("_disk_rate", "_copy_rate", "_memory_rate", "_device_rate"):
        monkeypatch.setattr(limit_module, measured, lambda *_: 1e9)
    with on_device(monkeypatch, checkpoint, name, 0) as (model, _):
        executor = executor_of(model)
        planned = bytes_by_link(executor)
        for cache_bytes in (0, 1 << 30):
            found = {link.link: link.bytes_per_token for link in measure_links(executor, None, cache_bytes)}
            crossing = {"bus", "memory"} if planned["memory"] else {"bus"}
            expected_bytes = {link: nbytes for link, nbytes in planned.items() if nbytes or link in crossing}
            assert found == {link: n + (cache_bytes if link in crossing else 0) for link, n in expected_bytes.items()}
        assert bounding(measure_links(executor, None, 1 << 30)).link == "bus"
    with placed(monkeypatch, checkpoint, "resident", kv="int8") as (model, _):
        assert [link.link for link in measure_links(executor_of(model))] == ["device memory"]


def test_the_bus_is_measured_on_a_full_device_where_all_layers_stay(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tokens(9)
    with on_device(monkeypatch, checkpoint, "resident", 0) as (model, device):
        whole = logits(model, new_cache(model), text)
        device.limit, pinned = device.held_bytes, len(device.pinned)
        rates = {link.link: link.bytes_per_second for link in measure_links(executor_of(model))}
        assert rates["bus"] > 0
        assert len(device.pinned) == pinned
        device.limit = None
        assert torch.equal(logits(model, new_cache(model), text), whole)


def test_the_command_tells_what_was_copied(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 60
    flags = ["--model", str(checkpoint), "--prompt", prompt, "--max-new-tokens", "4", "--n-gpu-layers", "-1"]
    flags += ["--kv", "int8", "--kv-memory", "0"]
    for measured, rate in (("_copy_rate", 1e3), ("_device_rate", 1e9)):
        monkeypatch.setattr(limit_module, measured, lambda *_, rate=rate: rate)
    with fake_gpu(monkeypatch):
        assert command.main([*flags, "--json"]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["cache_bytes_per_token"] > 0
        assert (report["limit"], report["limit_bytes_per_second"]) == ("bus", 1e3)
        expected_share = report["cache_bytes_per_token"] / 1e3 * report["decode_tokens_per_second"]
        assert report["fraction"] == pytest.approx(expected_share)
        assert command.main(flags) == 0
        assert "of keys and values copied per token" in capfd.readouterr().err
