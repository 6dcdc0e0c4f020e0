"""What a plan counts of a GPU's memory, and of the host's for its sake, is what is taken there: on a faked device."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, fake_gpu
from test_device import PLACEMENTS, TOKENS, passes, placed, same
from test_units import untied
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.executor import executor_of, load
from offload.gpu.copy_queue import BOUNCE_BUFFERS, BOUNCE_BYTES
from offload.linear import PackedLinear
from offload.memory import Arena, whole_pages
from offload.planning import needs as needs_module
from offload.planning import words as words_module
from offload.planning.placement import Placement
from offload.planning.words import describe, parts_in_memory, parts_on_device, too_small

pytestmark = pytest.mark.timeout(120)
__all__ = ["untied"]
PROMPT = torch.randint(1, 250, (1, 100), generator=torch.Generator().manual_seed(1))
"""More tokens than a product takes without its weight dequantized."""

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
"""The checkpoint's own, one of the same size, one of another."""


@pytest.fixture(autouse=True)
def _modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused step rounds in another way than the modules of layers on a GPU."""
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)


@torch.inference_mode()
def run(model: PreTrainedModel) -> list[Tensor]:
    """Logits of a long prompt, of a token after it, of a prompt that just needs no weight dequantized, and others."""
    out = model(PROMPT, use_cache=True)
    after = model(torch.tensor([[7]]), past_key_values=out.past_key_values)
    return [out.logits, after.logits, model(PROMPT[:, :64]).logits, *passes(model)]


def page_rounding(model: PreTrainedModel) -> int:
    """What a plan counts of layers and slots on the GPU for whole pages, which only host memory comes in."""
    executor = executor_of(model)
    placement, units = executor.placement, executor.units
    rests = [layer.rest for layer in units.staged(placement.split)]
    stay = [
        blob if how == "resident" else rest
        for how, blob, rest in zip(placement.hows, units.layers, rests, strict=True)
        if how == "resident" or (how == "staged" and rest is not None)
    ]
    pass_through = [part for layer in units.staged(placement.split) for part in layer.parts]
    slots = placement.device_depth * [max(pass_through, key=lambda part: part.nbytes)]
    slots += ("mapped" in placement.hows) * [max(units.layers, key=lambda layer: layer.nbytes)]
    return sum(whole_pages(blob.nbytes) - blob.nbytes for blob in (*stay, *slots))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_peak_on_the_device_is_what_is_planned(
    name: str, dtype: torch.dtype, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(load(tiny_checkpoint, dtype=dtype))
    with placed(monkeypatch, tiny_checkpoint, name, dtype=dtype) as (model, device):
        assert same(run(model), expected)
        placement = executor_of(model).placement
        needs = placement.needs
        elsewhere = needs.device_runtime_bytes + needs.working_bytes + placement.device_cache_bytes  # torch's own
        loading = max(0, needs.device.raw_bytes - needs.device.product_bytes)  # there is no cache yet
        planned = placement.device_bytes - elsewhere - page_rounding(model)
        assert placement.device_loading_bytes == 0  # hidden behind activations
        assert device.peak_bytes <= planned + loading
        assert device.peak_bytes >= planned - (0 if dtype == torch.bfloat16 else needs.device.raw_bytes)
        assert bool(needs.device.raw_bytes) == (dtype != torch.bfloat16)


def test_a_shard_that_is_converted_on_the_device_has_room_there(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_module, "_RESERVE_BYTES", 0)
    words: dict[str, Any] = {"dtype": torch.float16, "context_tokens": 1, "prefill_chunk_tokens": 1}
    with placed(monkeypatch, tiny_checkpoint, "resident", **words) as (model, device):
        placement = executor_of(model).placement
        assert placement.device_loading_bytes > 0
        planned = placement.device_bytes - placement.needs.device_runtime_bytes - page_rounding(model)
        *_, last = executor_of(model).checkpoint.blobs  # it is not there yet when the first is converted
        assert planned - 2 * last.nbytes <= device.peak_bytes <= planned


@pytest.mark.parametrize("name", ["mapped", "disk into mapped"])
def test_layers_that_are_read_across_the_bus_share_the_memory_of_their_copies(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name) as (model, device):
        layers = [layer for layer, how in zip(executor_of(model).layers, executor_of(model).placement.hows, strict=True)
                  if how == "mapped"]  # fmt: skip
        seen: list[tuple[int, bool]] = []

        def look(norm: nn.Module, *_: Any) -> None:
            address = norm.weight.data_ptr()
            seen.append((address, device._region(address, device.regions) is not None))

        for layer in layers:
            layer.input_layernorm.register_forward_pre_hook(look)
        with torch.inference_mode():
            model(torch.tensor([[7]]))
        assert seen == [(seen[0][0], True)] * len(layers)


def test_the_largest_weight_is_counted_as_it_is_dequantized(
    tiny_checkpoint: Path, tiny_8_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of splits, of which so small products are only a few less, do not hide it."""
    monkeypatch.setattr("kernels.triton_tuning._LARGEST_SPLIT", 1)
    for checkpoint in (tiny_checkpoint, tiny_8_bits):
        with placed(monkeypatch, checkpoint, "resident") as (model, _):
            linears = [module for module in model.model.layers.modules() if isinstance(module, PackedLinear)]
            largest = max(linear.weight.nbytes for linear in linears)
            assert executor_of(model).placement.needs.device.product_bytes == largest


@pytest.mark.parametrize("name", ["resident", "staged, 2 slots", "mapped"])
def test_sums_of_splits_are_counted_where_no_weight_is_dequantized(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(monkeypatch, tiny_checkpoint, name, context_tokens=TOKENS.shape[1]) as (model, device):
        before = device.peak_bytes = device.held_bytes
        passes(model)
        assert device.split_products
        taken = executor_of(model).placement.needs.device.product_bytes
        assert device.peak_bytes - before == taken > 0


def test_a_head_is_counted_as_it_is_dequantized_for_a_large_batch(
    untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffer is the largest, but for 64 sequences it is multiplied as it is; no product is split."""
    monkeypatch.setattr("kernels.triton_tuning._LARGEST_SPLIT", 1)
    for batch, whole in ((64, False), (65, True)):
        with fake_gpu(monkeypatch) as device:
            model = load(untied, n_gpu_layers=-1, context_tokens=2, batch_size=batch)
            before = device.peak_bytes = device.held_bytes
            with torch.inference_mode():
                model(torch.ones(batch, 2, dtype=torch.int64), logits_to_keep=1)
            head = model.get_output_embeddings()
            taken = executor_of(model).placement.needs.device.product_bytes
            assert device.peak_bytes - before == taken
            assert (taken == head.weight.nbytes) == whole
            executor_of(model).close()


class Arenas:
    """Counts host memory that arenas hold, and held at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held_bytes = self.peak_bytes = 0
        make = Arena.__init__

        def made(arena: Arena, nbytes: int) -> None:
            make(arena, nbytes)
            self.held_bytes += arena.nbytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            weakref.finalize(arena._memory, self._freed, arena.nbytes)

        monkeypatch.setattr(Arena, "__init__", made)

    def _freed(self, nbytes: int) -> None:
        self.held_bytes -= nbytes


@pytest.mark.parametrize("unpinned", [None, 0], ids=["pinned", "not pinned"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_peak_on_the_host_is_what_is_planned(
    name: str, unpinned: int | None, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is computed, which is in no arena, and for buffers that were not needed."""
    monkeypatch.setattr(needs_module, "_RESERVE_BYTES", 0)
    gc.collect()
    arenas, fake = Arenas(monkeypatch), FakeDevice(unpinned=unpinned)
    words: dict[str, Any] = {"context_tokens": 1, "prefill_chunk_tokens": 1}
    with placed(monkeypatch, tiny_checkpoint, name, device=fake, **words) as (model, device):
        placement = executor_of(model).placement
        passes(model)
        needs, not_taken = placement.needs, placement.bounce_bytes - device.buffers_bytes
        planned = placement.expected_bytes - needs.runtime_bytes - placement.host_cache_bytes - not_taken
        assert planned - needs.working_bytes <= arenas.peak_bytes <= planned
        assert not_taken == (0 if unpinned == 0 or "staged" not in placement.hows else BOUNCE_BUFFERS * BOUNCE_BYTES)
    assert device.buffers_bytes == 0


@pytest.mark.parametrize("name", PLACEMENTS)
def test_what_is_printed_and_refused_adds_up(name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs_module, "_RESERVE_BYTES", 0)
    words: dict[str, Any] = {"dtype": torch.float16, "context_tokens": 1, "prefill_chunk_tokens": 1}
    with placed(monkeypatch, tiny_checkpoint, name, **words) as (model, _):
        placement = executor_of(model).placement
    shown = describe(placement)
    assert ("buffers for copies, should memory not be pinned" in shown) == ("staged" in placement.hows)
    assert "copies of norms and biases" in shown
    assert "a weight dequantized, or sums of its splits" in shown
    assert "a shard while it is converted" in shown
    assert "shards on their way to the GPU, beyond activations" in shown
    assert sum(part.nbytes for part in parts_in_memory(placement)) == placement.expected_bytes
    assert sum(part.nbytes for part in parts_on_device(placement)) == placement.device_bytes
    sums: list[tuple[int, int]] = []
    monkeypatch.setattr(
        words_module, "_refusal", lambda _, __, least, parts: str(sums.append((sum(n for n, _ in parts), least)))
    )
    decided = {
        field: getattr(placement, field) for field in ("tiers", "depth", "needs", "device_depth", "way", "split")
    }
    too_small(Placement(**decided, budget_bytes=None, device_budget_bytes=1))
    too_small(Placement(**decided, budget_bytes=1))
    assert len(sums) == 2
    assert all(parts == total for parts, total in sums)
