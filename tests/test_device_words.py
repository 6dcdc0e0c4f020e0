"""What people type of a GPU leads to the placement that it means elsewhere, and to the host's bits: on a faked GPU."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import fake_gpu
from test_device import passes, same
from torch import Tensor

from offload.errors import ResourceError
from offload.executor import executor_of, load
from offload.planning.placement import Placement

pytestmark = pytest.mark.timeout(120)
LAYERS = 6
GPU, HOST, DISK = "resident", "host", "disk"
ALL_ON_GPU, ALL_ON_HOST = (GPU,) * LAYERS, (HOST,) * LAYERS
SPREAD, FIRST = (GPU, HOST, HOST, GPU, HOST, HOST), (GPU, GPU, HOST, HOST, HOST, HOST)
EVERY_OTHER = (GPU, HOST) * 3


@pytest.fixture(autouse=True)
def _same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets are of this process, whose memory differs from test to test; layers on the host take their modules."""
    monkeypatch.setattr("offload.planning.needs.own_memory_bytes", lambda: 100 << 20)
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny model, of six layers: so many that first ones and some in between are not the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from quant.rtn import main

    directory = tmp_path_factory.mktemp("six")
    shutil.copytree(tiny_model, directory / "model")
    torch.manual_seed(2)
    config = LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=LAYERS)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "model")
    output = directory / "int4"
    assert main(["--model", str(directory / "model"), "--output", str(output), "--group-size", "32"]) == 0
    return output


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.streaming.fuse", lambda *_: 0)
        return passes(load(checkpoint))


@pytest.fixture
def two_layers(checkpoint: Path) -> Placement:
    """A placement with two layers on the GPU and the others on the host, to take budgets from."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch):
        model = load(checkpoint, n_gpu_layers=2)
        executor_of(model).close()
    placement = executor_of(model).placement
    assert placement.tiers == SPREAD
    return placement


WORDS: list[tuple[Any, tuple[str, ...]]] = [
    ({"device_map": "auto"}, ALL_ON_GPU),
    ({"device_map": "balanced"}, ALL_ON_GPU),
    ({"device_map": "balanced_low_0"}, ALL_ON_GPU),
    ({"device_map": "sequential"}, ALL_ON_GPU),
    ({"device_map": 0}, ALL_ON_GPU),
    ({"device_map": "cuda"}, ALL_ON_GPU),
    ({"device_map": "cuda:0"}, ALL_ON_GPU),
    ({"device_map": {"": 0}}, ALL_ON_GPU),
    ({"device_map": {"": 0, "model.layers.1": "cpu", "model.layers.4": "disk"}}, (GPU, HOST, GPU, GPU, DISK, GPU)),
    (
        {"device_map": {"model.embed_tokens": 0, "model.layers": "cpu", "model.layers.2": 0, "lm_head": 0}},
        (HOST, HOST, GPU, HOST, HOST, HOST),
    ),
    ({"device_map": "cpu"}, ALL_ON_HOST),
    ({"device_map": {"": "cpu", "model.layers.3": "disk"}}, (HOST, HOST, HOST, DISK, HOST, HOST)),
    ({"n_gpu_layers": -1}, ALL_ON_GPU),
    ({"n_gpu_layers": 99}, ALL_ON_GPU),
    ({"n_gpu_layers": 2}, SPREAD),
    ({"n_gpu_layers": 2, "device_map": "sequential"}, FIRST),
    ({"n_gpu_layers": 0}, ALL_ON_HOST),
    ({"gpu_weights_percent": 100}, ALL_ON_GPU),
    ({"gpu_weights_percent": 50}, EVERY_OTHER),
    ({"gpu_weights_percent": 49.9}, SPREAD),
    ({"cpu_offload_gb": 0}, ALL_ON_GPU),
    (lambda two: {"cpu_offload_gb": 2.5 * max(two.needs.layers_bytes) / 2**30}, EVERY_OTHER),
    (lambda two: {"gpu_memory": two.device_bytes}, SPREAD),
    (lambda two: {"gpu_memory": two.device_bytes - 1}, (GPU, *ALL_ON_HOST[1:])),
    (lambda two: {"max_memory": {0: two.device_bytes}}, SPREAD),
    (lambda two: {"max_memory": {0: two.device_bytes}, "device_map": "auto"}, SPREAD),
    (lambda two: {"max_memory": {0: two.device_bytes}, "device_map": "balanced"}, SPREAD),
    (lambda two: {"max_memory": {0: two.device_bytes}, "device_map": "balanced_low_0"}, SPREAD),
    (lambda two: {"max_memory": {0: two.device_bytes}, "device_map": "sequential"}, FIRST),
    (lambda two: {"max_memory": {0: two.device_bytes, "cpu": two.expected_bytes}}, SPREAD),
    (
        lambda two: {"max_memory": {0: two.device_bytes, "cpu": two.expected_bytes - 1}},
        (GPU, DISK, DISK, GPU, DISK, DISK),  # a ring of three slots instead of four layers
    ),
    ({"max_memory": {"cpu": "8GiB"}, "device_map": "auto"}, ALL_ON_HOST),
    ({"max_memory": {"cpu": "8GiB"}}, ALL_ON_HOST),
]


@pytest.mark.parametrize(("words", "tiers"), WORDS)
def test_words_mean_what_they_mean_elsewhere(
    words: dict[str, Any] | Callable[[Placement], dict[str, Any]],
    tiers: tuple[str, ...],
    checkpoint: Path,
    expected: list[Tensor],
    two_layers: Placement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fake_gpu(monkeypatch) as device:
        model = load(checkpoint, poison=True, **(words(two_layers) if callable(words) else words))
        executor = executor_of(model)
        assert executor.placement.tiers == tiers
        around: str | int = 0 if GPU in tiers else "cpu"
        named = {GPU: 0, HOST: "cpu", DISK: "disk"}
        assert model.hf_device_map == {"": around} | {
            f"model.layers.{at}": named[tier] for at, tier in enumerate(tiers)
        }
        assert bool(device.held_bytes) == (GPU in tiers)
        assert same(passes(model), expected)
        assert same(passes(model), expected)
        executor.close()


def test_transformers_own_door_takes_them_too(
    checkpoint: Path, expected: list[Tensor], two_layers: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    with fake_gpu(monkeypatch):
        for device_map, tiers in (("auto", SPREAD), ("sequential", FIRST)):
            memory = {0: two_layers.device_bytes, "cpu": "8GiB"}
            model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map, max_memory=memory)
            assert executor_of(model).placement.tiers == tiers
            assert [model.hf_device_map[f"model.layers.{at}"] for at in (0, 1, 2)] == (
                [0, "cpu", "cpu"] if tiers == SPREAD else [0, 0, "cpu"]
            )
            assert same(passes(model), expected)
            executor_of(model).close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gpu_memory": "9GiB"}, "--gpu-memory 9.0 GiB: the GPU has 8.0 GiB"),
        ({"max_memory": {0: "9GiB"}, "device_map": "auto"}, "--gpu-memory 9.0 GiB: the GPU has 8.0 GiB"),
        ({"gpu_memory": "1MiB"}, "--gpu-memory 1.0 MiB: too small for this model; at least "),
        ({"n_gpu_layers": 6, "gpu_memory": "101MiB"}, "--gpu-memory 101.0 MiB: too small for this model; at least "),
    ],
)
def test_what_the_gpu_does_not_have_is_refused(
    words: dict[str, Any], message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gpu(monkeypatch) as device:
        with pytest.raises(ResourceError) as refused:
            load(checkpoint, **words)
        assert str(refused.value).startswith(message)
        assert device.allocations == 0
