"""Sequences that share the passes of a model on a GPU, on a faked one: tokens, copies, and what one does to others."""

import gc
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, fake_gpu
from test_architectures import make_model, quantize
from test_device import PLACEMENTS, placed
from test_recovery import Full, check_memory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offload.checkpoint import LayerBlob
from offload.executor import executor_of, load, new_cache
from offload.kv.cache import Int8Layer
from offload.limit import Limit, bytes_by_link
from offload.linear import PackedLinear
from offload.planning.arrangement import arranged
from offload.planning.needs import Needs
from offload.planning.placement import Placement
from offload.sampling import Sampling
from offload.serving import rounds as module
from offload.serving.metrics import Metrics
from offload.serving.prefixes import Prefixes
from offload.serving.rounds import Cancelled, Rounds
from offload.session import Prompts, Session
from offload.transfer import Slots

pytestmark = pytest.mark.timeout(120)
PROMPTS = [(5, 77, 130, 9, 200, 41, 3), (8,), tuple(range(1, 80)), (100, 4, 9)]
"""The third is longer than what is multiplied straight across the bus, and than what needs no dequantized weight."""

NEW_TOKENS, PASS_TOKENS = 4, 64
SOME = ["resident", "staged, 1 slot", "disk and memory into staged in parts", "mapped and disk into mapped", "host"]


class Asked:
    """A sequence of its own, with what became of it. ended: called at its end. pass_tokens: of a prompt at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Sequence[int],
        ended: Callable[[], Any] = list,
        pass_tokens: int | None = None,
    ) -> None:
        self.model, self.prompt, self.ended, self.pass_tokens = model, prompt, ended, pass_tokens
        self.found: list[int] | None = None
        self.error: BaseException | None = None
        self.done = Event()
        self.sequence = module.Sequence(self.run, self.end)

    @torch.inference_mode()
    def generated(self) -> list[int]:
        tokens = torch.tensor([self.prompt])
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        options |= {"prefill_chunk_size": self.pass_tokens}
        found: list[int] = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()
        return found

    def run(self) -> None:
        self.found = self.generated()

    def end(self, error: BaseException | None) -> None:
        self.error = error
        self.ended()
        self.done.set()


def alone(model: PreTrainedModel) -> list[list[int]]:
    return [Asked(model, prompt).generated() for prompt in PROMPTS]


def together(model: PreTrainedModel, asked: Sequence[Asked], most: int = 4) -> Rounds:
    """Run all of them from the same round on, as far as they may, to their ends."""
    rounds = Rounds(model, most)
    with rounds._change:
        rounds._waiting.extend(one.sequence for one in asked)
        rounds._change.notify_all()
    assert all(one.done.wait(60) for one in asked)
    rounds.close()
    return rounds


def count_copies(model: PreTrainedModel) -> list[str]:
    """Return the names of what is copied to the device from now on, as they come."""
    copied: list[str] = []
    side = executor_of(model).device_side
    assert side is not None

    def note(blob: LayerBlob, *_: Any) -> None:
        copied.append(blob.module)

    side.layer_copies.on_copy = note
    return copied


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_each_gets_the_tokens_that_it_gets_alone_for_the_copies_of_one(
    name: str, eager: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name, device=FakeDevice(eager=eager)) as (model, _):
        executor = executor_of(model)
        expected = alone(model)
        copied, reads = count_copies(model), executor.stats.layer_reads
        asked = [Asked(model, prompt) for prompt in PROMPTS]
        rounds = together(model, asked)
        assert [one.error for one in asked] == [None] * 4
        assert [one.found for one in asked] == expected
        assert rounds.rounds == NEW_TOKENS
        ring = executor.device_side.ring if executor.device_side is not None else None
        units = [] if ring is None else [blob.module for blob in ring.blobs]
        for unit in units:  # those that were copied ahead before the first round, and after the last one
            assert NEW_TOKENS - 1 <= copied.count(unit) <= NEW_TOKENS + 1
        assert abs(len(copied) - NEW_TOKENS * len(units)) <= executor.placement.device_depth
        read = executor.stats.layer_reads - reads
        ahead = executor.placement.depth + executor.placement.device_depth
        assert abs(read - NEW_TOKENS * len(executor.streamed_blobs)) <= ahead
        assert sum(each.bytes_copied for each in rounds.recent) >= (NEW_TOKENS - 1) * sum(
            blob.nbytes for blob in (() if ring is None else ring.blobs)
        )
        assert alone(model) == expected  # the model is what it was


@pytest.mark.parametrize("unpinned", [None, 0], ids=["pinned", "not pinned"])
@pytest.mark.parametrize("name", ["mapped", "disk into mapped", "mapped and disk into mapped"])
def test_a_layer_that_is_read_across_the_bus_crosses_it_once_a_round(
    name: str, unpinned: int | None, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name, device=FakeDevice(unpinned=unpinned)) as (model, device):
        executor = executor_of(model)
        layers = zip(executor.blobs, executor.placement.hows, strict=True)
        mapped_bytes = sum(blob.nbytes for blob, how in layers if how == "mapped")
        crossed = []
        for count in (1, 2, 4):
            before = device.crossed_bytes
            rounds = together(model, [Asked(model, (5, *range(number))) for number in range(count)])
            crossed.append(device.crossed_bytes - before)
            assert [each.bytes_copied for each in rounds.recent] == [mapped_bytes] * NEW_TOKENS
        assert crossed[1:] == [NEW_TOKENS * mapped_bytes] * 2
        assert 0.9 * crossed[1] < crossed[0] <= crossed[1]  # one alone leaves out norms, of which copies are made


def test_products_are_launched_for_each_as_for_it_alone(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel across the bus rounds in another way than one in the device's memory, where a round has the layer."""
    launched: dict[int, list[tuple[int, bool]]] = {}
    with placed(monkeypatch, tiny_checkpoint, "mapped and disk into mapped") as (model, device):

        def multiply(linear: PackedLinear, x: Tensor) -> None:
            assert linear.packed is not None
            pinned = any(
                region.start <= linear.packed.codes.data_ptr() < region.end for region in device.pinned.values()
            )
            launch = x.numel() // x.shape[-1], linear.packed.as_mapped or pinned
            launched.setdefault(threading.get_ident(), []).append(launch)

        monkeypatch.setattr(device, "multiply", multiply)
        expected = []
        for prompt in PROMPTS:
            Asked(model, prompt).generated()
            expected.append(launched.pop(threading.get_ident()))
        together(model, [Asked(model, prompt) for prompt in PROMPTS])
    assert sorted(launched.values()) == sorted(expected)
    assert {mapped for launches in expected for _, mapped in launches} == {False, True}


@pytest.mark.parametrize("name", SOME)
def test_one_that_fails_or_is_cancelled_amid_a_pass_leaves_the_others_alone(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)  # it calls no modules
    with placed(monkeypatch, tiny_checkpoint, name) as (model, _):
        expected = alone(model)
        for place in range(len(executor_of(model).layers)):
            leaf = executor_of(model).layers[place].mlp.down_proj
            asked = [Asked(model, prompt) for prompt in PROMPTS]
            calls = 0

            def interfere(*_: Any, asked: list[Asked] = asked) -> None:
                nonlocal calls
                calls += asked[1].sequence.is_current()
                if asked[1].sequence.is_current() and calls == 2:
                    asked[3].sequence.cancelled = True  # before the next unit or pass that it would compute
                    raise RuntimeError("mine alone")

            handle = leaf.register_forward_pre_hook(interfere)
            together(model, asked)
            handle.remove()
            assert str(asked[1].error) == "mine alone"
            assert isinstance(asked[3].error, Cancelled)
            assert [asked[0].found, asked[2].found] == [expected[0], expected[2]]
            assert alone(model) == expected


@pytest.mark.parametrize("name", SOME)
def test_a_gpu_that_is_full_gives_up_layers_when_nobody_is_amid_a_pass(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)  # it rounds in another way than modules on a GPU
    with placed(monkeypatch, tiny_checkpoint, name) as (model, device):
        expected, first = alone(model), executor_of(model).placement
        asked = [Asked(model, prompt) for prompt in PROMPTS]
        full = [Full(executor_of(model).layers[1].mlp, nth) for nth in (2, 2, 9)]  # of two in one round, and later
        together(model, asked)
        assert all(one.calls > one.nth for one in full)
        assert [one.error for one in asked] == [None] * 4
        assert [one.found for one in asked] == expected
        assert executor_of(model).placement.device_bytes < first.device_bytes
        assert caplog.text.count("generation goes on with the tokens it has") == 2
        check_memory(model, device)
        assert executor_of(model).between_passes is None
        assert all(ring.gate is None for ring in executor_of(model).rings)
    assert not device.pinned


def test_who_finds_no_share_that_fits_ends_alone(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)  # it rounds in another way than modules on a GPU
    with placed(monkeypatch, tiny_checkpoint, "staged, 2 slots") as (model, device):
        expected = alone(model)
        asked = [Asked(model, prompt) for prompt in PROMPTS if len(prompt) < device.fused_batch]
        asked[0].ended = lambda: setattr(device, "limit", None)

        def fill(*_: Any) -> None:
            if asked[0].sequence.is_current():
                device.limit = 0
                raise torch.OutOfMemoryError("told to have no memory")

        executor_of(model).layers[2].mlp.register_forward_pre_hook(fill)
        rearrange, moved = executor_of(model).rearrange, []

        def counted(placement: Placement) -> None:
            rearrange(placement)
            moved.append(placement)

        monkeypatch.setattr(executor_of(model), "rearrange", counted)
        together(model, asked)
        assert len(moved) == 1  # by one of those that go on, for both
        assert "a smaller share" in str(asked[0].error)
        assert [one.found for one in asked[1:]] == [expected[1], expected[3]]
        assert executor_of(model).arranged


@pytest.mark.parametrize("kv", [None, "int8"])
def test_what_is_drawn_and_what_prompts_share_is_that_of_each_alone(
    kv: str | None, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(needs: Needs, *_: Any) -> Placement:
        return Placement(depth=0, needs=needs, budget_bytes=None, **PLACEMENTS["staged between resident"])

    monkeypatch.setattr("offload.session.PREFILL_CHUNK_TOKENS", PASS_TOKENS)
    begun = list(range(1, 2 * PASS_TOKENS + 1))
    prompts = [[*begun, 7], [*begun[:PASS_TOKENS], 9, 9], [8, 3], [*begun, 100, 4]]
    found: dict[int, list[int]] = {}
    with fake_gpu(monkeypatch):
        monkeypatch.setattr("offload.executor.plan", plan)
        session = Session(Prompts(tiny_checkpoint), 512, {"n_gpu_layers": -1, "kv": kv})
        prefixes = Prefixes(1024, PASS_TOKENS)

        def answer(number: int, kept: Prefixes | None) -> list[int]:
            cache = session.new_cache()
            if kept is not None and cache is not None:
                kept.take(prompts[number], cache)
            tokens = session.generate(prompts[number], NEW_TOKENS, Sampling(0.9, seed=number), cache=cache)
            if kept is not None and cache is not None:
                kept.keep(prompts[number], cache)
            return tokens

        def asked(at: int) -> module.Sequence:
            return module.Sequence(
                lambda: found.update({at: answer(at % len(prompts), prefixes)}), lambda error: ends[at].set()
            )

        ends = [Event() for _ in range(2 * len(prompts))]
        rounds = Rounds(session.model, 3)
        for at in range(len(ends)):
            rounds.add(asked(at))
        assert all(end.wait(60) for end in ends)
        rounds.close()
        assert prefixes.tokens == 2 * PASS_TOKENS
        expected = [answer(number, None) for number in range(len(prompts))]
        assert [found[at] for at in range(len(ends))] == expected * 2
        session.close()


@pytest.mark.parametrize("name", ["host", "mapped"])
def test_the_share_of_each_link_counts_what_crosses_once_and_what_each_reads(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 bytes in a second, in two rounds of 3 and 1, cross the bus, whoever takes part."""
    with placed(monkeypatch, tiny_checkpoint, name) as (model, _):
        executor, planned = executor_of(model), bytes_by_link(executor_of(model))
        recent = [module.Round(0.5, 3, 40, 300), module.Round(0.5, 1, 60, 300)]
        rounds = SimpleNamespace(recent=recent, running=3, waiting=0, rounds=2)
        links = [Limit("disk", 1e3, 0), *(Limit(link, 1e6, planned[link]) for link in ("bus", "memory"))]
        links.append(Limit("device memory", 1e6, planned["device memory"]))
        text = Metrics(rounds, executor, links).text().decode()  # type: ignore[arg-type]
        shares = dict(re.findall(r'offload_link_fraction{link="([a-z ]+)"} (.*)', text))
        on_host = executor.blobs[1].nbytes if name == "host" else 0
        assert float(shares["disk"]) == pytest.approx(100 / 1e3)
        assert float(shares["bus"]) == pytest.approx(600 / 1e6)
        assert float(shares["memory"]) == pytest.approx((600 + 4 * on_host) / 1e6)
        assert float(shares["device memory"]) == pytest.approx(4 * planned["device memory"] / 1e6)


def test_parts_that_attention_uses_in_another_order_than_it_lists_are_copied_once_a_round(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantize(
        "rtn", make_model("OPT", tiny_model, tmp_path / "model"), tmp_path, tmp_path / "out"
    ).directory
    with fake_gpu(monkeypatch), torch.no_grad():
        model = load(checkpoint, n_gpu_layers=-1, poison=True)
        executor = executor_of(model)
        executor.rearrange(arranged(executor.placement, "staged in parts", 2))
        prompts = [prompt for prompt in PROMPTS if len(prompt) < 64]  # as many positions as it knows
        asked = [Asked(model, prompt) for prompt in prompts]
        copied = count_copies(model)
        rounds = together(model, asked)
        first = len(copied)
        again = together(model, [Asked(model, prompt) for prompt in prompts])
        units = sum(len(layer.parts) for layer in executor.units.split)
        assert first > rounds.rounds * units + 2  # before the order was known
        assert abs(len(copied) - first - again.rounds * units) <= 2
        assert [one.found for one in asked] == [one.generated() for one in asked]
        executor.close()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of what tensors are views of, by address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.device.type == "cpu"}


def living(kind: type[Any]) -> list[Any]:
    """Return all objects of a kind; asked for their class, not through a property of theirs."""
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


@pytest.mark.parametrize("name", ["staged, 2 slots", "staged in parts, 2 slots"])
def test_what_sequences_hold_that_stand_still_is_planned(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"context_tokens": 159 + NEW_TOKENS, "prefill_chunk_tokens": PASS_TOKENS}
    with placed(monkeypatch, tiny_checkpoint, name, **words) as (model, _):
        of_one = executor_of(model).placement
    with placed(monkeypatch, tiny_checkpoint, name, parallel=3, **words) as (model, _):
        of_three, release, held = executor_of(model).placement, Slots.release, []
        gc.collect()
        others = storages(living(Tensor)).keys()

        def released(slots: Slots, position: int) -> None:
            if threading.current_thread().name == "rounds" and position in (1, 2):  # both stand still
                caches = [tensor for layer in living(DynamicLayer) for tensor in (layer.keys, layer.values)]
                known = others | storages(tensor for tensor in caches if tensor is not None).keys()
                held.append(sum(nbytes for at, nbytes in storages(living(Tensor)).items() if at not in known))
            release(slots, position)

        monkeypatch.setattr(Slots, "release", released)
        prompts = [range(1, 160), range(60, 219)]
        together(model, [Asked(model, prompt, pass_tokens=PASS_TOKENS) for prompt in prompts])
    planned = of_three.device_working_bytes - of_one.device_working_bytes
    assert 0.8 * planned <= max(held) <= planned


@pytest.mark.parametrize("kv", [None, "int8"])
def test_keys_and_values_of_all_are_planned(
    kv: str | None, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 tokens are two blocks in 8 bits, and of 300 each three times as many: not the five that all would fill."""
    words: dict[str, Any] = {"context_tokens": 100, "kv": kv}
    with placed(monkeypatch, tiny_checkpoint, "staged between resident", parallel=3, **words) as (model, _):
        planned = executor_of(model).placement
        caches = [new_cache(model) for _ in range(3)]

        @torch.inference_mode()
        def run(cache: Any) -> None:
            model(torch.arange(1, 101)[None], past_key_values=cache)

        ends = [Event() for _ in caches]
        rounds = Rounds(model, 3)
        for cache, end in zip(caches, ends, strict=True):
            rounds.add(module.Sequence(partial(run, cache), lambda error, end=end: end.set()))
        assert all(end.wait(60) for end in ends)
        rounds.close()
        held = 0
        for layer in (layer for cache in caches if cache is not None for layer in cache.layers):
            held += layer.nbytes if isinstance(layer, Int8Layer) else layer.keys.nbytes + layer.values.nbytes
        assert planned.device_cache_bytes == held
    with placed(monkeypatch, tiny_checkpoint, "resident", kept_tokens=128, **words) as (model, _):
        more = executor_of(model).placement.device_cache_bytes
    with placed(monkeypatch, tiny_checkpoint, "resident", kv=kv, context_tokens=128) as (model, _):
        assert more == planned.device_cache_bytes // 3 + executor_of(model).placement.device_cache_bytes


def test_all_threads_compute_in_one_stream(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("staged, 2 slots", "disk into staged, 2 slots", "disk into mapped"):
        fake = FakeDevice()
        with fake.in_stream("of the caller"), placed(monkeypatch, tiny_checkpoint, name, device=fake) as (model, _):
            together(model, [Asked(model, prompt) for prompt in PROMPTS])
        assert fake.streams == {"of the caller"}


def test_no_round_waits_for_the_device(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with placed(monkeypatch, tiny_checkpoint, "staged, 2 slots", poison=False) as (model, device):
        together(model, [Asked(model, prompt) for prompt in PROMPTS])
        assert device.copies
        assert device.waited_in == []
