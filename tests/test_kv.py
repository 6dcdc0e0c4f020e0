"""quant.kv: offsets beside a checkpoint, found right, named by its manifest, used with --kv int8, else refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

from eval.likelihood import Protocol, measure
from offload.checkpoint import MANIFEST_NAME, Checkpoint
from offload.errors import CheckpointError
from offload.executor import executor_of, load, new_cache
from offload.kv.cache import Int8Layer, use_int8_attention
from offload.kv.calibration import KV_NAME, read_kv
from quant import awq, gptq, rtn
from quant.kv import listen, main

FLAGS = ["--num-samples", "3", "--seq-len", "48"]


@pytest.fixture
def tiny_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_the_mean_and_the_magnitudes_are_those_of_what_a_cache_holds(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    windows = torch.randint(0, 264, (3, 40))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(windows, past_key_values=cache)
    found = listen(model, windows)
    assert list(found) == [0, 1, 2]
    for layer, kv in zip(cache.layers, found.values(), strict=True):
        torch.testing.assert_close(kv.key_offset, layer.keys.double().mean((0, 2)).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kv.key_max, layer.keys.abs().amax((0, 2, 3)), rtol=1e-4, atol=0)
        torch.testing.assert_close(kv.value_max, layer.values.abs().amax((0, 2, 3)), rtol=1e-4, atol=0)


def test_a_calibrated_checkpoint_is_used_with_its_offsets(
    tiny_copy: Path, calibration_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tiny_copy / "config.json").read_bytes()
    flags = ["--model", str(tiny_copy), "--calibration", str(calibration_text), *FLAGS]
    assert main([*flags, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["layers"] == 3
    assert "vLLM           ignores it; kv_cache_scheme stays null" in printed.err
    assert (tiny_copy / "config.json").read_bytes() == before
    tensors = load_file(tiny_copy / KV_NAME)
    model = load(tiny_copy, kv="int8")
    cache = new_cache(model)
    assert cache is not None
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, Int8Layer)
        assert torch.equal(layer.key_offset, tensors[f"model.layers.{index}.key_offset"])
    executor_of(model).close()
    content = (tiny_copy / KV_NAME).read_bytes()
    assert main(flags) == 0  # again, over what is there
    assert (tiny_copy / KV_NAME).read_bytes() == content
    assert main([*flags, "--seed", "1"]) == 0
    assert (tiny_copy / KV_NAME).read_bytes() != content


@pytest.mark.parametrize("method", [awq, gptq])
def test_it_is_calibrated_in_the_run_that_makes_the_weights_too(
    method: ModuleType, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--output", str(out), "--calibration", str(calibration_text), *FLAGS]
    assert method.main([*arguments, "--kv", "int8"]) == 0
    at_once = read_kv(Checkpoint.open(out))
    assert list(at_once) == [0, 1, 2]
    assert main(["--model", str(out), "--calibration", str(calibration_text), *FLAGS]) == 0  # the same three windows
    for index, layer in read_kv(Checkpoint.open(out)).items():
        assert torch.equal(layer.key_offset, at_once[index].key_offset)
    with pytest.raises(SystemExit):
        rtn.main(["--model", str(tiny_model), "--output", str(out), "--kv", "int8"])


def test_memory_is_left_for_the_pass_of_a_whole_window(
    tiny_copy: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def loading(directory: Path, **words: Any) -> Any:
        given.update(words)
        return load(directory, **words)

    monkeypatch.setattr("quant.kv.load_model", loading)
    assert main(["--model", str(tiny_copy), "--calibration", str(calibration_text), *FLAGS]) == 0
    assert (given["context_tokens"], given["prefill_chunk_tokens"]) == (48, 48)


def test_a_file_that_is_not_the_calibrated_one_is_refused(tiny_copy: Path, calibration_text: Path) -> None:
    assert main(["--model", str(tiny_copy), "--calibration", str(calibration_text), *FLAGS]) == 0
    path = tiny_copy / KV_NAME
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), 997):
        content[at] ^= 4
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{KV_NAME}: not the file that {MANIFEST_NAME} names; run `python"):
            load(tiny_copy, kv="int8")
        content[at] ^= 4
    load(tiny_copy)  # who does not use it does not read it
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{KV_NAME}: missing"):
        read_kv(Checkpoint.open(tiny_copy))


def test_strong_biases_of_keys_cost_nothing_once_they_are_calibrated() -> None:
    """Perplexity through 8 bits within 0.1% with the offsets; without them, several times as far."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        rope_parameters={"rope_type": "linear", "factor": 1e4, "rope_theta": 1e4},
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data += 40 * torch.randn(32)
    with torch.inference_mode():  # text that the model itself finds likely
        text = model.generate(torch.tensor([[5]]), max_new_tokens=900, do_sample=True, pad_token_id=0)[0]
    offsets = {index: kv.key_offset for index, kv in listen(model, text[:512].view(4, 128)).items()}
    tokens, protocol = text[512:], Protocol(128, 128)
    expected = sum(measure(model, tokens, protocol, "float32")[0])
    rises = []
    for given in (offsets, None):
        assert use_int8_attention(model, given)
        found = sum(measure(model, tokens, replace(protocol, kv="int8"), "int8")[0])
        rises.append(abs(found - expected) / (len(tokens) // 128))
    assert rises[0] < 1e-3
    assert rises[1] > 3 * rises[0]
    assert rises[1] > 1e-3


def test_a_plan_says_what_the_cache_adds_and_a_budget_that_the_result_breaks_is_refused_before_work(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--calibration", str(calibration_text)]
    arguments += ["--num-samples", "9", "--seq-len", "32", "--group-size", "32", "--kv", "int8"]
    assert awq.main([*arguments, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "\ncache    then 9 of the windows run through the result, all of it in memory\n" in said
    assert re.search(r"\d .iB  running the result for its cache, after that\n", said)
    monkeypatch.setattr("quant.running.activation_bytes", lambda _, tokens: (9 << 30) if tokens == 32 else 0)
    assert awq.main([*arguments, "--plan"]) == 0
    assert re.search(r"\nmemory   at most 9\.\d GiB for the whole process\n", capsys.readouterr().out)
    for more in (["--plan"], []):
        assert awq.main([*arguments, *more, "--cpu-memory", "8GiB"]) == 4
        error = capsys.readouterr().err
        assert re.search(r"--cpu-memory 8\.0 GiB: --kv runs the result, which takes 9\.\d GiB; leave --kv away", error)
        assert not (tmp_path / "out").exists()
