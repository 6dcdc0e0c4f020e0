"""The words of accelerate, FlexGen, vLLM and llama.cpp mean what they mean there; contradictions are named."""

import argparse
from typing import Any

import pytest

from offload.command import Parser
from offload.errors import UsageError
from offload.planning.wishes import Wishes, add_wish_flags, words_of

LAYERS = [f"model.layers.{index}" for index in range(3)]
MODULES = ["model", "model.embed_tokens", "model.layers", "model.norm", "lm_head"]
MODULES += [name for layer in LAYERS for name in (layer, f"{layer}.mlp")]


def parsed(*flags: str) -> Wishes:
    parser: argparse.ArgumentParser = Parser("test", "test")
    add_wish_flags(parser)
    return Wishes.of(words_of(parser.parse_args(list(flags))))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, Wishes()),
        ({"cpu_memory": None, "device_map": None, "slots": None}, Wishes()),
        ({"cpu_memory": 1 << 30}, Wishes(cpu_bytes=1 << 30)),
        ({"cpu_memory": "8GiB", "gpu_memory": "2GB"}, Wishes(cpu_bytes=8 << 30, gpu_bytes=2 * 10**9)),
        ({"max_memory": {"cpu": "8GiB", 0: "2GiB"}}, Wishes(cpu_bytes=8 << 30, gpu_bytes=2 << 30)),
        ({"max_memory": {"cuda:0": 5}, "cpu_memory": 7}, Wishes(cpu_bytes=7, gpu_bytes=5)),
        ({"device_map": "auto"}, Wishes(anywhere=True)),
        ({"device_map": "balanced"}, Wishes(anywhere=True)),
        ({"device_map": "balanced_low_0"}, Wishes(anywhere=True)),
        ({"device_map": "sequential"}, Wishes(sequential=True, anywhere=True)),
        ({"device_map": "cpu"}, Wishes(devices=(("", "cpu"),))),
        ({"device_map": 0}, Wishes(devices=(("", "gpu"),))),
        ({"device_map": {"model": "cuda", "lm_head": "cpu"}}, Wishes(devices=(("model", "gpu"), ("lm_head", "cpu")))),
        ({"n_gpu_layers": 0}, Wishes(gpu_layers=0)),
        ({"gpu_weights_percent": 12.5}, Wishes(gpu_percent=12.5)),
        ({"cpu_offload_gb": 0.5}, Wishes(cpu_offload_bytes=1 << 29)),
        ({"kv": "int8", "kv_memory": "1MiB"}, Wishes(kv="int8", kv_bytes=1 << 20)),
        ({"cache_implementation": "dynamic"}, Wishes()),
        ({"cache_implementation": "quantized", "kv_memory": 7}, Wishes(kv="int8", kv_bytes=7)),
        ({"cache_implementation": "offloaded", "kv": "int8"}, Wishes(kv="int8", kv_bytes=0)),
    ],
)
def test_words(words: dict[str, Any], expected: Wishes) -> None:
    assert Wishes.of(words) == expected  # type: ignore[arg-type]


def test_flags_say_the_same_as_words() -> None:
    assert parsed() == Wishes()
    assert parsed("--cpu-memory", "540MiB", "--slots", "2") == Wishes(cpu_bytes=540 << 20, slots=2)
    assert parsed("--max-memory", "0=10GiB, cpu=60GiB") == Wishes(cpu_bytes=60 << 30, gpu_bytes=10 << 30)
    assert parsed("--device-map", "disk") == Wishes(devices=(("", "disk"),))
    mapped = parsed("--device-map", '{"model.layers.0": "disk", "": 0}')
    assert mapped == Wishes(devices=(("model.layers.0", "disk"), ("", "gpu")))
    assert parsed("--n-gpu-layers", "-1") == Wishes(gpu_layers=-1)
    assert parsed("--gpu-weights-percent", "50") == Wishes(gpu_percent=50.0)
    assert parsed("--cpu-offload-gb", "2") == Wishes(cpu_offload_bytes=2 << 30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kv_memory": "1GiB"}, "--kv-memory: only keys and values in 8 bits can lie elsewhere; add --kv int8"),
        (
            {"cache_implementation": "static"},
            "--cache-implementation static: expected dynamic, quantized or offloaded",
        ),
        (
            {"kv": "int8", "cache_implementation": "dynamic"},
            "--kv and --cache-implementation: both say how keys and values are kept; leave one of them out",
        ),
        (
            {"kv_memory": 7, "cache_implementation": "offloaded"},
            "--kv-memory and --cache-implementation: both say how much of them lies in memory; leave one of them out",
        ),
        (
            {"cpu_memory": "1GiB", "max_memory": {"cpu": "2GiB"}},
            "--cpu-memory and --max-memory: both are a budget for the CPU; leave one of them out",
        ),
        (
            {"gpu_memory": "1GiB", "max_memory": {0: "2GiB"}},
            "--gpu-memory and --max-memory: both are a budget for the GPU; leave one of them out",
        ),
        (
            {"n_gpu_layers": 3, "cpu_offload_gb": 2},
            "--n-gpu-layers and --cpu-offload-gb: each of them says how many layers are on the GPU; "
            "leave one of them out",
        ),
        (
            {"device_map": "cpu", "gpu_weights_percent": 2},
            "--device-map and --gpu-weights-percent: both say which layers are on the GPU; leave one of them out",
        ),
        (
            {"device_map": {"": "disk"}, "gpu_memory": 5},
            "--device-map and --gpu-memory: no module of the map is on the GPU; leave one of them out",
        ),
        ({"max_memory": {"disk": 5}}, "--max-memory: disk has no budget; it holds what fits nowhere else"),
        ({"max_memory": {1: 5}}, "--max-memory: device 1: only one GPU is used, 0"),
        ({"max_memory": {"tpu": 5}}, "--max-memory: device 'tpu': expected 0, cpu or disk"),
        (
            {"device_map": "automatic"},
            "--device-map: device 'automatic': expected auto, balanced, balanced_low_0, sequential, 0, cpu or disk",
        ),
        ({"device_map": {}}, "--device-map: an empty map; it has to place every layer"),
        ({"n_gpu_layers": -2}, "--n-gpu-layers -2: expected a whole number from -1 up"),
        ({"n_gpu_layers": 2.5}, "--n-gpu-layers 2.5: expected a whole number from -1 up"),
        ({"gpu_weights_percent": 101}, "--gpu-weights-percent 101: expected a number between 0 and 100"),
        ({"cpu_offload_gb": float("inf")}, "--cpu-offload-gb inf: expected a number from 0 up"),
        ({"cpu_offload_gb": float("nan")}, "--cpu-offload-gb nan: expected a number from 0 up"),
        ({"slots": 4}, "--slots 4: expected a whole number between 1 and 3"),
        (
            {"max_memory": {"cpu": "much"}},
            '--max-memory cpu \'much\': expected a size such as "540MiB", "8GiB" or "10GB" (powers of 1000)',
        ),
    ],
)
def test_what_cannot_be_meant(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Wishes.of(words)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-memory", "10GiB"), "--max-memory '10GiB': expected devices and sizes, such as \"0=10GiB,cpu=60GiB\""),
        (("--max-memory", "0=1,0=2"), "--max-memory '0=1,0=2': a device stands twice"),
        (("--device-map", "{model: 0}"), "--device-map '{model: 0}': not valid JSON (Expecting property name"),
    ],
)
def test_flags_that_cannot_be_read(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(*flags)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("device_map", "devices"),
    [
        ({"": "disk"}, ("disk", "disk", "disk")),
        ({"": "cpu", "model.layers.1": "disk"}, ("cpu", "disk", "cpu")),
        ({"model": 0, "model.layers": "disk", "model.layers.2": "cpu", "lm_head": 0}, ("disk", "disk", "cpu")),
        ({"model.layers.0": 0, "model.layers.1": 0, "model.layers.2": "cpu"}, ("gpu", "gpu", "cpu")),
    ],
)
def test_the_longest_name_places_a_layer(device_map: dict[str, Any], devices: tuple[str, ...]) -> None:
    assert Wishes.of({"device_map": device_map}).on(MODULES, LAYERS).layers == devices


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model.layers.0": "cpu"}, "--device-map: no device for model.layers.1, model.layers.2"),
        (
            {"": "cpu", "model.layers.3": "disk"},
            "--device-map: no module 'model.layers.3' in this model; its layers: "
            "model.layers.0, model.layers.1, model.layers.2",
        ),
        (
            {"": "cpu", "model.layers.1.mlp": "disk"},
            "--device-map: 'model.layers.1.mlp': a layer is placed as a whole; name 'model.layers.1'",
        ),
        ({"": "cpu", "lm_head": "disk"}, "--device-map: 'lm_head' cannot be on disk; only decoder layers can"),
    ],
)
def test_a_map_that_is_none_of_this_model(device_map: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Wishes.of({"device_map": device_map}).on(MODULES, LAYERS)
    assert str(caught.value) == message


def test_what_only_a_gpu_could_grant() -> None:
    granted = [{}, {"cpu_memory": 5}, {"n_gpu_layers": 0}, {"cpu_offload_gb": 0}, {"device_map": "disk"}]
    assert {Wishes.of(words).gpu_word for words in granted} == {None}  # type: ignore[arg-type]
    assert Wishes.of({"gpu_memory": "2GiB"}).gpu_word == "gpu_memory 2.0 GiB"
    assert Wishes.of({"max_memory": {0: "2GiB"}}).gpu_word == "gpu_memory 2.0 GiB"
    assert Wishes.of({"device_map": {"": 0}}).gpu_word == "device_map"
    assert Wishes.of({"n_gpu_layers": 7}).gpu_word == "n_gpu_layers 7"
    assert Wishes.of({"gpu_weights_percent": 7}).gpu_word == "gpu_weights_percent 7"
    assert Wishes.of({"cpu_offload_gb": 7.5}).gpu_word == "cpu_offload_gb 7.5"
