"""Models nobody quantized: re-laid once, streamed as they are, computing what transformers does, to the last bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import TOKENS, make_model, original
from torch import Tensor
from transformers import PreTrainedModel

from eval.ppl import main as ppl
from offload import generate
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError, ResourceError
from offload.executor import executor_of, load
from offload.formats import convert
from offload.verify import main as verify
from quant.convert import main

FAMILIES = ("Llama", "Qwen3", "Gemma2", "Phi3", "GPTNeoX", "OPT", "Bloom", "Falcon", "Mixtral", "DeepseekV3")
FLAGS = ("--prompt", "The", "--no-chat", "--max-new-tokens", "3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_and_resident_compute_what_transformers_does(family: str, tiny_model: Path, tmp_path: Path) -> None:
    directory = make_model(family, tiny_model, tmp_path / "model")
    expected = logits(original(directory, torch.bfloat16))
    resident = load(directory)
    found = logits(resident)
    if family == "Mixtral":  # its experts are multiplied one by one here, fused there
        assert (found - expected).float().norm() < 0.02 * expected.float().norm()
    else:
        assert torch.equal(found, expected)
    streamed = load(directory, device_map="disk", slots=2, poison=True)
    assert set(executor_of(streamed).placement.tiers) == {"disk"}
    for _ in range(2):
        assert torch.equal(logits(streamed), found)
    executor_of(streamed).close()


def test_it_is_re_laid_once_and_made_anew_when_it_changed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    assert generate.main(["--model", str(model), *FLAGS, "--device-map", "disk"]) == 0
    first = capsys.readouterr()
    assert f"{model}: a plain model, re-laid once into" in first.err
    assert f"`python -m quant.awq --model {model}` makes a quarter of them" in first.err
    assert generate.main(["--model", str(model), *FLAGS]) == 0
    again = capsys.readouterr()
    assert "re-laid" not in again.err
    assert again.out == first.out
    ((copy, nbytes),) = convert.copies()
    assert nbytes > (model / "model.safetensors").stat().st_size
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    load(model)
    assert len(convert.copies()) == 2
    assert main(["--clear"]) == 0
    assert convert.copies() == []


def test_the_bytes_are_those_of_the_model(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "plain"
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert [blob.module for blob in checkpoint.blobs] == ["", *(f"model.layers.{index}" for index in range(3)), ""]
    written = {name: tensor for blob in checkpoint.blobs for name, tensor in load_file(blob.path).items()}
    expected = load_file(tiny_model / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8))
    assert verify(["--model", str(tmp_path / "out"), "--prompt-tokens", "5", "--new-tokens", "2"]) == 0


def test_a_budget_is_kept_and_one_too_small_refused(tiny_model: Path) -> None:
    with pytest.raises(ResourceError, match=r"too small for this model; at least \d+ MiB is needed"):
        load(tiny_model, cpu_memory="1MiB")
    needs = executor_of(load(tiny_model)).placement.needs
    assert sum(needs.layers_bytes) > sum(
        tensor.nbytes for name, tensor in load_file(tiny_model / "model.safetensors").items() if ".layers." in name
    )


def test_a_flipped_bit_of_the_copy_is_caught(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tiny_model), "--output", str(tmp_path / "out")]) == 0
    blob = Checkpoint.open(tmp_path / "out").blobs[2]
    content = bytearray(blob.path.read_bytes())
    content[blob.offset + blob.tensors["model.layers.1.mlp.up_proj.weight"].offset + 9] ^= 4
    blob.path.write_bytes(content)
    assert generate.main(["--model", str(tmp_path / "out"), *FLAGS, "--device-map", "disk"]) == 3
    assert "tensor 'model.layers.1.mlp.up_proj.weight' is damaged" in capsys.readouterr().err


def test_a_tensor_that_is_missing_is_named(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors missing \('model\.layers\.1\.mlp\.up_proj\.weight'\)"):
        load(model)


def test_tensors_without_a_place_are_left_out_and_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"draft.weight": torch.ones(2)}, model / "model.safetensors", metadata={"format": "pt"})
    load(model)
    assert f"{model}: 1 tensors have no place in the model and are left out (draft.weight)" in capsys.readouterr().err


def test_what_measures_an_original_reads_it_where_it_lies(
    tiny_model: Path, calibration_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text", str(calibration_text), "--window", "64", "--limit-windows", "2"]
    assert ppl(["--model", str(tiny_model), *flags]) == 0
    assert "re-laid" not in capsys.readouterr().err
    assert convert.copies() == []
