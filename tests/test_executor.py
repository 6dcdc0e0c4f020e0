"""Streamed equals resident bit for bit, whatever interrupts it; what does not fit the configuration is refused."""

import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer

import offload
from kernels.packed import PackedWeight, dequantize
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError, ResourceError
from offload.executor import executor_of, load
from offload.memory import own_memory_bytes
from offload.planning.needs import CODE_BYTES

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])


@contextmanager
def streamed(directory: Path, depth: int = 2, **options: Any) -> Iterator[PreTrainedModel]:
    """A model all of whose layers come from disk through `depth` slots, freed slots filled with NaN."""
    model = load(directory, poison=True, device_map="disk", slots=depth, **options)
    try:
        yield model
    finally:
        executor_of(model).close()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_8_bits"])
def test_streamed_equals_resident(request: pytest.FixtureRequest, checkpoint: str, depth: int, mode: str) -> None:
    directory = request.getfixturevalue(checkpoint)
    expected = logits(load(directory, mode=mode))
    assert torch.isfinite(expected).all()
    with streamed(directory, depth, mode=mode) as model:
        for _ in range(3):
            assert torch.equal(logits(model), expected)
        assert executor_of(model).stats.layer_reads >= 9


@pytest.mark.parametrize(("name", "bits"), [("tiny_asymmetric", 4), ("tiny_8_bits", 8)])
def test_exact_mode_equals_the_dequantised_model(
    tiny_model: Path, request: pytest.FixtureRequest, name: str, bits: int
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    checkpoint = Checkpoint.open(request.getfixturevalue(name))
    assert checkpoint.recipe.bits == bits
    for blob in checkpoint.blobs:
        tensors = load_file(blob.path)
        for name in [name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")]:
            codes = tensors[f"{name}_packed"].view(torch.uint8)
            weight = PackedWeight(codes, tensors[f"{name}_scale"], tensors[f"{name}_zero_point"], 32, bits)
            reference.get_parameter(name).data = dequantize(weight)
    model = load(checkpoint.directory, dtype=torch.float32, mode="exact")
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)


def test_generate_streams_beams_and_assists(tiny_checkpoint: Path) -> None:
    resident = load(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ways: list[dict[str, Any]] = [
        {"do_sample": False, "streamer": TextStreamer(tokenizer)},
        {"num_beams": 3, "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"do_sample": False, "prefill_chunk_size": 3},
    ]
    with streamed(tiny_checkpoint) as model:
        for way in ways:
            torch.manual_seed(3)
            expected = resident.generate(TOKENS, max_new_tokens=8, attention_mask=torch.ones_like(TOKENS), **way)
            torch.manual_seed(3)
            found = model.generate(TOKENS, max_new_tokens=8, attention_mask=torch.ones_like(TOKENS), **way)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_forward_after_an_interrupted_one_is_right(tiny_checkpoint: Path, depth: int) -> None:
    with streamed(tiny_checkpoint, depth) as model:
        expected = logits(model)
        for name, module in list(model.named_modules()):
            if any(module.children()):
                continue

            def interrupt(*arguments: Any) -> None:
                raise KeyboardInterrupt

            handle = module.register_forward_pre_hook(interrupt)
            try:
                with pytest.raises(KeyboardInterrupt):
                    logits(model)
            finally:
                handle.remove()
            assert torch.equal(logits(model), expected), name


def test_a_flipped_bit_stops_the_run_and_names_the_tensor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    blob = Checkpoint.open(directory).blobs[2]
    spec = blob.tensors[f"{blob.module}.mlp.up_proj.weight_packed"]
    content = bytearray(blob.path.read_bytes())
    content[blob.offset + spec.offset + 7] ^= 16
    blob.path.write_bytes(content)
    message = r"model-00003.*'model.layers.1.mlp.up_proj.weight_packed' is damaged .*copy or download"
    with pytest.raises(CheckpointError, match=message):
        load(directory)
    with streamed(directory) as model, pytest.raises(CheckpointError, match=message):
        logits(model)


def test_a_shard_cut_while_in_use_is_an_error_and_the_model_lives(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    with streamed(directory, depth=1) as model:
        expected = logits(model)
        path = Checkpoint.open(directory).blobs[2].path
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(4096 + 100)
        with pytest.raises(CheckpointError, match=r"model-00003.*ends at byte 4196; it was truncated while in use"):
            logits(model)
        path.write_bytes(whole)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 2, "'model.layers.2.mlp.down_proj' is packed, but no linear layer"),
        ("num_hidden_layers", 4, "missing .*model.layers.3"),
        ("vocab_size", 272, "'model.embed_tokens.weight' is torch.bfloat16 \\[264, 64\\], expected"),
        (
            "intermediate_size",
            256,
            "down_proj.weight_packed' is torch.int32 \\[64, 16\\], expected torch.int32 \\[64, 32\\]",
        ),
    ],
)
def test_a_configuration_that_disagrees_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, key: str, value: int, message: str
) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_device_map_and_plan_agree(tiny_checkpoint: Path) -> None:
    with streamed(tiny_checkpoint) as model:
        assert model.hf_device_map["model.layers.0"] == "disk"
        assert set(executor_of(model).placement.tiers) == {"disk"}
    assert load(tiny_checkpoint).hf_device_map["model.layers.0"] == "cpu"
    resident = load(tiny_checkpoint, cpu_memory=own_memory_bytes() + (1 << 30))
    assert executor_of(resident).placement.disk_bytes == 0


def test_a_device_map_comes_back_as_it_was_asked_for(tiny_checkpoint: Path) -> None:
    asked = {"model.embed_tokens": "cpu", "model": "cpu", "model.layers.1": "disk"}
    model = offload.load(tiny_checkpoint, device_map=asked, slots=1)
    assert [model.hf_device_map[f"model.layers.{index}"] for index in range(3)] == ["cpu", "disk", "cpu"]
    again = offload.load(tiny_checkpoint, device_map=model.hf_device_map)
    assert again.hf_device_map == model.hf_device_map
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"gpu_memory": "8GiB"}, "--gpu-memory 8.0 GiB"),
        ({"max_memory": {0: "8GiB"}}, "--gpu-memory 8.0 GiB"),
        ({"n_gpu_layers": 2}, "--n-gpu-layers 2"),
        ({"cpu_offload_gb": 1.5}, "--cpu-offload-gb 1.5"),
        ({"gpu_weights_percent": 50}, "--gpu-weights-percent 50"),
        ({"device_map": {"": 0}}, "--device-map"),
    ],
)
def test_a_gpu_that_is_not_there_is_said_before_any_work(
    words: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError) as caught:
        load("no-such-directory", **words)
    assert str(caught.value) == f"{named}: no CUDA device here; leave it out"


def test_a_model_that_nobody_holds_leaves_no_file_open(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "alone").resolve()

    def open_files() -> int:
        return sum(path.resolve().is_relative_to(directory) for path in Path("/proc/self/fd").iterdir())

    model = load(directory, device_map="disk", slots=2)
    logits(model)
    assert open_files() > 0
    del model
    deadline = time.monotonic() + 10
    while open_files() and time.monotonic() < deadline:
        gc.collect()  # the reading thread holds its queue until it has stopped
        time.sleep(0.01)
    assert open_files() == 0


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, offload; assert 'torch' not in sys.modules; assert not hasattr(offload, 'loads')"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
    assert offload.load is load


@pytest.mark.parametrize(("spare_mib", "times"), [(64, 1), (4096, 0)])
def test_a_budget_without_room_for_freed_memory_has_it_given_back(
    tiny_checkpoint: Path, spare_mib: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C library keeps up to twice the activations of what was freed."""
    calls: list[int] = []
    monkeypatch.setattr("offload.executor.give_memory_back_at_once", lambda: calls.append(1))
    many = {"context_tokens": 32768, "prefill_chunk_tokens": 32768}
    needs = executor_of(load(tiny_checkpoint, **many)).placement.needs
    assert needs.activation_bytes > 64 << 20
    whole_bytes = needs.around_bytes - needs.runtime_bytes + sum(needs.layers_bytes)
    budget_bytes = own_memory_bytes() + CODE_BYTES + whole_bytes + (spare_mib << 20)
    assert executor_of(load(tiny_checkpoint, cpu_memory=budget_bytes, **many)).placement.disk_bytes == 0
    assert len(calls) == times
