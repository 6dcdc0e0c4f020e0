"""Single tokens are replayed through layers on a device, to the bits of the same kernels launched one by one.

The kernels run in Triton's interpreter, in a process of its own; what is captured is every launch with the operands it
had then, so that a value from the host, or a tensor in another place, shows as soon as it is another one.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION_TEXT
from fake_device import FakeDevice
from test_device import placed
from test_recovery import Full
from torch import Tensor
from transformers import PreTrainedModel

from offload.executor import executor_of, load, new_cache
from offload.gpu.captured import CapturedLayer
from offload.single_token import stand_ins
from quant.kv import main as calibrate_kv

pytestmark = pytest.mark.timeout(300)
PROMPT = torch.randint(1, 250, (1, 7), generator=torch.Generator().manual_seed(3))
NEW = [7, 90, 13, 201, 55]
EXACT: dict[str, Any] = {"dtype": torch.float16, "mode": "exact"}
"""What can be compared: the interpreter's bfloat16 is wrong, and activations of 8 bits are the host's alone."""

WHOLE = {
    "staged, 1 slot": 3,
    "staged, 2 slots": 3,
    "disk and memory into staged": 3,
    "mapped": 3,
    "mapped and disk into mapped": 3,
    "host": 2,
}
"""Placements, and the layers that the device computes there."""


@dataclass(frozen=True)
class Decoded:
    """What tokens one by one came to. layers: replayed; captures, replays: that the device was asked for."""

    logits: Tensor
    layers: int
    captures: int
    replays: int


@torch.inference_mode()
def decode(model: PreTrainedModel, prompt: Tensor = PROMPT, new: list[int] = NEW) -> Tensor:
    """The last logits of a prompt, and those of each token after it."""
    cache = new_cache(model)
    found = [model(prompt, past_key_values=cache).logits[0, -1:]]
    found += [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in new]
    return torch.cat(found)


def decoded(directory: Path, name: str, capturing: bool = True, **words: Any) -> Decoded:
    """Decode on a device. capturing: else what is captured is launched kernel by kernel instead."""
    with pytest.MonkeyPatch.context() as patch:
        device = FakeDevice()
        if not capturing:
            patch.setattr(device, "capture", lambda queue: queue)
        with placed(patch, directory, name, device=device, steps=True, **EXACT, **words) as (model, _):
            layers = [layer for layer in stand_ins(executor_of(model).layers) if isinstance(layer, CapturedLayer)]
            return Decoded(decode(model), len(layers), device.captures, device.replays)


def through_modules(directory: Path, prompt: Tensor = PROMPT, **words: Any) -> Tensor:
    """What transformers' modules come to, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.streaming.fuse", lambda *_: 0)
        return decode(load(directory, dtype=torch.float32, mode="exact", **words), prompt)


def alike(found: Tensor, truth: Tensor, steps: int = 16) -> bool:
    """Whether float16 is as near to float32 as its modules are: within some steps of its own."""
    return bool((found.float() - truth).abs().max() < steps * torch.finfo(torch.float16).eps * truth.abs().max())


Within = Callable[..., Any]


@pytest.fixture(scope="module")
def within(interpreter: ProcessPoolExecutor) -> Within:
    """Runs a function where Triton interprets."""
    return lambda function, *arguments, **options: interpreter.submit(function, *arguments, **options).result(300)


@pytest.fixture(scope="module")
def launched(within: Within, tiny_checkpoint: Path) -> Decoded:
    """A resident model, every step of which is launched kernel by kernel."""
    found: Decoded = within(decoded, tiny_checkpoint, "resident", capturing=False)
    assert found.layers == 3
    assert alike(found.logits, through_modules(tiny_checkpoint))
    return found


def test_the_second_token_of_a_layer_is_captured_and_replayed_from_then_on(
    within: Within, tiny_checkpoint: Path, launched: Decoded
) -> None:
    found = within(decoded, tiny_checkpoint, "resident")
    assert torch.equal(found.logits, launched.logits)
    assert (found.captures, found.replays) == (3, 3 * (len(NEW) - 1))


IN_SHORT = ("staged, 2 slots", "mapped and disk into mapped", "host")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_SHORT else [pytest.mark.slow]) for name in WHOLE]
)
def test_replayed_where_weights_come_and_go(
    name: str, within: Within, tiny_checkpoint: Path, launched: Decoded
) -> None:
    found = within(decoded, tiny_checkpoint, name)
    if name == "host":  # whose own step keeps float32 between the parts of a layer
        assert alike(found.logits, launched.logits.float())
    else:
        assert torch.equal(found.logits, launched.logits)
    assert found.layers == WHOLE[name]
    assert found.captures >= WHOLE[name]
    assert found.replays > found.captures


def test_layers_in_parts_go_through_their_modules(within: Within, tiny_checkpoint: Path) -> None:
    found = within(decoded, tiny_checkpoint, "staged in parts, 2 slots")
    assert (found.layers, found.captures) == (0, 0)


def turns(directory: Path, **words: Any) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Two sequences in turns over caches of their own, each alone, captures for both, and places of key offsets."""
    prompts = [PROMPT, torch.cat([PROMPT] * 36, dim=1)]  # the second passes 256 tokens on its way
    with pytest.MonkeyPatch.context() as patch:
        device = FakeDevice()
        with (
            placed(patch, directory, "staged, 1 slot", device=device, steps=True, **EXACT, **words) as (
                model,
                _,
            ),
            torch.inference_mode(),
        ):
            caches, found = [new_cache(model) for _ in prompts], list[list[Tensor]]([[], []])
            for prompt, cache, logits in zip(prompts, caches, found, strict=True):
                logits.append(model(prompt, past_key_values=cache).logits[0, -1:])
            for token in NEW:
                for cache, logits in zip(caches, found, strict=True):
                    logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0])
            captures = device.captures
            alone = [decode(model, prompt) for prompt in prompts]
            return [torch.cat(logits) for logits in found], alone, captures, device.captures - captures


@pytest.mark.parametrize("kv", [None, "int8"])
def test_one_captured_step_serves_every_sequence(
    kv: str | None, within: Within, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    directory = tiny_checkpoint
    if kv is not None:
        directory = shutil.copytree(tiny_checkpoint, tmp_path / "with offsets")
        text = tmp_path / "text.txt"
        text.write_text(CALIBRATION_TEXT)
        calibrated = ["--num-samples", "2", "--seq-len", "64"]
        assert calibrate_kv(["--model", str(directory), "--calibration", str(text), *calibrated]) == 0
    found, alone, captures, later = within(turns, directory, kv=kv)
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)
    for one, prompt in zip(alone, (PROMPT, torch.cat([PROMPT] * 36, dim=1)), strict=True):
        assert alike(one, through_modules(directory, prompt, kv=kv), 16 if kv is None else 48)  # codes may be others
    assert (captures, later) == (3, 3)  # the last token of the second was the first behind 256


def interrupted(directory: Path) -> tuple[Tensor, Tensor]:
    """What tokens come to before an interrupt in each layer, and after all of them."""
    with (
        pytest.MonkeyPatch.context() as patch,
        placed(patch, directory, "staged, 2 slots", steps=True, **EXACT) as (model, _),
    ):
        before = decode(model)
        for layer in executor_of(model).layers:
            calls = iter(range(100))

            def interrupt(*arguments: Any, calls: Any = calls) -> None:
                if next(calls) == 3:
                    raise KeyboardInterrupt

            handle = layer.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                decode(model)
            handle.remove()
        return before, decode(model)


def test_an_interrupted_step_leaves_right_tokens(within: Within, tiny_checkpoint: Path) -> None:
    before, after = within(interrupted, tiny_checkpoint)
    assert torch.equal(before, after)


def rearranged(directory: Path) -> tuple[Tensor, list[str]]:
    """What a model comes to that finds no memory in its second layer amid the text, and what its layers are then."""
    with (
        pytest.MonkeyPatch.context() as patch,
        placed(patch, directory, "resident", steps=True, **EXACT) as (model, _),
    ):
        full = Full(executor_of(model).layers[1], 4)
        found = decode(model)
        assert full.calls == 1 + len(NEW) + 1
        return found, [type(layer).__name__ for layer in stand_ins(executor_of(model).layers)]


def test_layers_that_leave_the_device_amid_a_text_are_no_longer_replayed(within: Within, tiny_checkpoint: Path) -> None:
    found, layers = within(rearranged, tiny_checkpoint)
    assert sorted(layers) == ["CapturedLayer", "CapturedLayer", "FusedLayer"]
    assert alike(found, through_modules(tiny_checkpoint))


def not_taken(directory: Path) -> list[int]:
    """Replays after a batch, a mask, and keys and values that are partly in host memory."""
    found = []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        device = FakeDevice()
        with placed(patch, directory, "resident", device=device, steps=True, **EXACT) as (model, _):
            decode(model, new=[5, 6])
            replays, cache = device.replays, new_cache(model)
            model(PROMPT.expand(2, -1), past_key_values=cache)
            model(torch.tensor([[3], [4]]), past_key_values=cache)
            found.append(device.replays - replays)
            cache, mask = new_cache(model), torch.ones(1, 8, dtype=torch.int64)
            mask[0, 0] = 0
            model(PROMPT, past_key_values=cache, attention_mask=mask[:, :7])
            model(torch.tensor([[3]]), past_key_values=cache, attention_mask=mask)
            found.append(device.replays - replays)
        device = FakeDevice()
        words: dict[str, Any] = {**EXACT, "kv": "int8", "kv_memory": 0}
        with placed(patch, directory, "resident", device=device, steps=True, **words) as (model, _):
            decode(model)
            found.append(device.replays)
    return found


def test_batches_masks_and_pasts_in_host_memory_are_not_replayed(within: Within, tiny_checkpoint: Path) -> None:
    assert within(not_taken, tiny_checkpoint) == [0, 0, 0]


def hidden_states(directory: Path) -> list[Tensor]:
    """What is between the layers for a token that is replayed."""
    with (
        pytest.MonkeyPatch.context() as patch,
        placed(patch, directory, "resident", steps=True, **EXACT) as (model, _),
        torch.inference_mode(),
    ):
        cache = new_cache(model)
        for token in (PROMPT, torch.tensor([[5]]), torch.tensor([[6]])):
            states = model(token, past_key_values=cache, output_hidden_states=True).hidden_states
        return [state[0, 0].clone() for state in states[:-1]]  # the last is normed


def test_what_a_layer_gave_outlives_the_next_one(within: Within, tiny_checkpoint: Path) -> None:
    found = within(hidden_states, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("offload.streaming.fuse", lambda *_: 0)
        model = load(tiny_checkpoint, dtype=torch.float32, mode="exact")
        text = torch.cat([PROMPT, torch.tensor([[5, 6]])], dim=1)
        expected = model(text, output_hidden_states=True).hidden_states
    assert len(found) == 3
    for one, other in zip(found, expected, strict=False):
        assert alike(one, other[0, -1])


def generated(directory: Path) -> tuple[list[int], int, int, int]:
    """What generate() gives, replays, the most that the device held, and what was planned of it but for torch's own."""
    with pytest.MonkeyPatch.context() as patch:
        device = FakeDevice()
        with placed(patch, directory, "staged, 2 slots", device=device, steps=True, **EXACT) as (model, _):
            tokens = model.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
            placement = executor_of(model).placement
            elsewhere = placement.needs.device_runtime_bytes + placement.device_cache_bytes
            planned = placement.device_bytes - elsewhere - placement.needs.working_bytes
            graphs = placement.device_steps_bytes - placement.needs.device.step_bytes
            assert graphs == 3 * 2 * placement.needs.device.graphs_bytes > 0
            return tokens, device.replays, device.peak_bytes, planned - graphs


def test_a_whole_text_is_replayed_within_what_was_planned(within: Within, tiny_checkpoint: Path) -> None:
    tokens, replays, peak, planned = within(generated, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.streaming.fuse", lambda *_: 0)
        model = load(tiny_checkpoint, dtype=torch.float32, mode="exact")
        assert tokens == model.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    assert replays > 0
    assert planned * 0.8 < peak <= planned
