"""Scales of keys and values on their way out: right, in the index, used by transformers as their scheme says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CompressedTensorsConfig, DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offload.checkpoint import Checkpoint
from offload.executor import load
from offload.formats import convert
from offload.kv.calibration import KV_NAME, LayerKV, read_kv, write_kv
from quant import awq, kv
from quant.export import main
from tests.test_walk import awq_flags

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3, 18, 250, 99, 12, 7]])
EXPORTS = [
    (["vllm-fp8"], 448.0, "float", "tensor"),
    (["ct-int8"], 127.0, "int", "tensor"),
    (["ct-int8", "--kv-strategy", "attn_head"], 127.0, "int", "attn_head"),
]
DEQUANTIZED = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
CASES = pytest.mark.parametrize(("flags", "largest", "kind", "strategy"), EXPORTS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "cache_directory", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, its cache calibrated. Not to be changed."""
    return with_cache(tiny_checkpoint, calibration_text, tmp_path_factory.mktemp("calibrated") / "ours")


def with_cache(checkpoint: Path, text: Path, directory: Path) -> Path:
    shutil.copytree(checkpoint, directory)
    windows = ["--calibration", str(text), "--num-samples", "3", "--seq-len", "48"]
    assert kv.main(["--model", str(directory), *windows]) == 0
    return directory


def exported(checkpoint: Path, flags: list[str], output: Path) -> Path:
    assert main(["--model", str(checkpoint), "--kv-export", *flags, "--output", str(output)]) == 0
    return output


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@CASES
def test_the_weights_stay_and_the_scales_are_the_magnitudes_over_the_largest(
    flags: list[str], largest: float, kind: str, strategy: str, calibrated: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in calibrated.iterdir()}
    output = exported(calibrated, flags, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in calibrated.iterdir()} == before
    for path in calibrated.glob("model-*.safetensors"):
        assert (output / path.name).read_bytes() == path.read_bytes()
        assert (output / path.name).stat().st_nlink == 1
    scales = load_file(output / "kv_scales.safetensors")
    found = read_kv(Checkpoint.open(calibrated))
    assert len(scales) == 2 * len(found) == 6
    for index, layer in found.items():
        for part, magnitudes in (("k", layer.key_max), ("v", layer.value_max)):
            scale = scales[f"model.layers.{index}.self_attn.{part}_scale"]
            expected = magnitudes.view(2, 1, 1) if strategy == "attn_head" else magnitudes.max().view(1)
            assert torch.equal(scale, expected / largest)
    index_file = json.loads((output / "model.safetensors.index.json").read_text())
    there = {name: path.name for path in output.glob("*.safetensors") for name in load_file(path)}
    assert index_file["weight_map"] == there
    tensors = [tensor for path in output.glob("*.safetensors") for tensor in load_file(path).values()]
    assert index_file["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    expected_config = config_of(calibrated)
    expected_config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": kind,
        "strategy": strategy,
        "dynamic": False,
        "symmetric": True,
    }
    assert config_of(output) == expected_config
    names = {path.name for path in output.iterdir()} ^ {path.name for path in calibrated.iterdir()}
    assert names == {"kv_scales.safetensors", KV_NAME, "manifest.json", "run.json"}


class RoundingLayer(DynamicLayer):  # type: ignore[misc]
    """A cache whose keys and values are rounded as a scheme says, by its definition."""

    def __init__(self, key_scale: Tensor, value_scale: Tensor, kind: str) -> None:
        super().__init__()
        self._scales, self._kind = (key_scale, value_scale), kind

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        states = zip((key_states, value_states), self._scales, strict=True)
        return super().update(*(rounded(state, scale, self._kind) for state, scale in states))  # type: ignore[no-any-return]


def rounded(values: Tensor, scale: Tensor, kind: str) -> Tensor:
    if kind == "int":
        return (values / scale).round().clamp(-128, 127) * scale
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype) * scale


def opened_by_transformers(directory: Path, **how: Any) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, **how)  # offload leaves the class alone


@DEQUANTIZED
@CASES
@torch.inference_mode()
def test_transformers_rounds_keys_and_values_by_them_and_without_that_the_logits_are_the_checkpoints(
    flags: list[str], largest: float, kind: str, strategy: str, calibrated: Path, tmp_path: Path
) -> None:
    output = exported(calibrated, flags, tmp_path / "out")
    model, original = map(opened_by_transformers, (output, calibrated))
    expected = original(TOKENS).logits

    scales = load_file(output / "kv_scales.safetensors")
    cache = DynamicCache(config=original.config)
    attention = [f"model.layers.{index}.self_attn" for index in range(3)]
    cache.layers = [RoundingLayer(scales[f"{at}.k_scale"], scales[f"{at}.v_scale"], kind) for at in attention]
    reference = original(TOKENS, past_key_values=cache).logits
    found = model(TOKENS).logits
    assert torch.equal(found, reference)
    moved = float((found - expected).norm() / expected.norm())  # 0.081 for fp8, 0.024 and 0.023 for int8
    assert 0 < moved < 0.15

    for name in attention:
        model.get_submodule(name).quantization_enabled = False
    assert torch.equal(model(TOKENS).logits, expected)

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    dense, dense_original = (opened_by_transformers(each, **how) for each in (output, calibrated))
    assert torch.equal(dense(TOKENS).logits, dense_original(TOKENS).logits)


@DEQUANTIZED
@torch.inference_mode()
def test_with_zero_points_transformers_opens_it_dequantized_without_the_scales(
    tiny_asymmetric: Path, calibration_text: Path, tmp_path: Path
) -> None:
    ours = with_cache(tiny_asymmetric, calibration_text, tmp_path / "ours")
    output = exported(ours, ["vllm-fp8"], tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        opened_by_transformers(output)
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert torch.equal(*(opened_by_transformers(each, **how)(TOKENS).logits for each in (output, ours)))


@CASES
@torch.inference_mode()
def test_here_it_opens_without_the_scales_which_is_said(
    flags: list[str],
    largest: float,
    kind: str,
    strategy: str,
    calibrated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = exported(calibrated, flags, tmp_path / "out")
    back = load(output, dtype=torch.float32, mode="exact")(TOKENS).logits
    assert torch.equal(back, load(calibrated, dtype=torch.float32, mode="exact")(TOKENS).logits)
    said = capsys.readouterr().err
    assert f"{output}: the scales of its {kind}8 cache are left out, the weights do not need them; `python -m" in said


def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = shutil.copytree(calibrated, tmp_path / "models" / "half")
    checkpoint = Checkpoint.open(half)
    write_kv(checkpoint, {"model.layers.0": read_kv(checkpoint)[0]}, {})
    damaged = shutil.copytree(calibrated, tmp_path / "models" / "damaged")
    (damaged / KV_NAME).write_bytes((damaged / KV_NAME).read_bytes()[:-1])
    before = sorted(tmp_path.rglob("*"))
    for model, flags, status, message in (
        (tiny_checkpoint, ["ct-int8"], 3, f"is not calibrated; `python -m quant.kv --model {tiny_checkpoint}` does it"),
        (half, ["vllm-fp8"], 3, "--kv-export vllm-fp8: layer 'model.layers.1' keeps no plain keys and values of its"),
        (damaged, ["vllm-fp8"], 3, "not the file that manifest.json names; run `python -m quant.kv` again"),
        (
            calibrated,
            ["vllm-fp8", "--kv-strategy", "attn_head"],
            2,
            "--kv-strategy attn_head: goes with --kv-export ct",
        ),
    ):
        out = str(tmp_path / "out")
        assert main(["--model", str(model), "--kv-export", *flags, "--output", out]) == status
        assert message in capsys.readouterr().err
    for flags in (["--kv-export", "ct-int8", "--format", "awq"], [], ["--kv-export", "channel"]):
        with pytest.raises(SystemExit, match="2"):
            main(["--model", str(calibrated), *flags, "--output", str(tmp_path / "out")])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_head_of_zeros_has_a_scale_that_divides(calibrated: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(calibrated, tmp_path / "copy")
    checkpoint = Checkpoint.open(copy)
    layers = {
        f"model.layers.{index}": LayerKV(kv.key_offset, kv.key_max, torch.tensor([0.0, 2.54]))
        for index, kv in read_kv(checkpoint).items()
    }
    write_kv(checkpoint, layers, {})
    scales = load_file(exported(copy, EXPORTS[2][0], tmp_path / "out") / "kv_scales.safetensors")
    torch.testing.assert_close(scales["model.layers.1.self_attn.v_scale"].flatten(), torch.tensor([1.0, 0.02]))


def test_its_card_says_what_each_runtime_does(
    calibrated: Path, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    cards = {}
    for flags, *_ in EXPORTS:
        output = exported(calibrated, flags, tmp_path / "".join(flags))
        cards["".join(flags)] = " ".join((output / "README.md").read_text().split())
    fp8, int8, heads = cards.values()
    seen = f"on 3 windows of 48 tokens of {calibration_text.name}, over"
    assert "# ours, with scales of an fp8 cache" in fp8
    assert f"one a layer: the largest magnitude {seen} 448." in fp8
    assert "| vLLM | no, its source was read | its cache becomes fp8 without being asked, with these scales" in fp8
    assert "# ours, with scales of an int8 cache" in int8
    assert f"one a layer: the largest magnitude {seen} 127." in int8
    assert "its cache becomes **fp8, not int8**, without being asked |" in int8
    assert "| SGLang | no, its source was read | has no such cache, and serves an unquantized one" in int8
    assert f"one a head: the largest magnitude {seen} 127." in heads
    assert "refuses it where its attention backend takes no scale a head" in heads
    for card in cards.values():
        assert "| this toolkit | yes | re-laid once when it is opened, less the scales, which it says" in card
        assert "with compressed-tensors 0.20, on a CPU | yes | rounds keys and values to it and back" in card
        assert "Nothing is known to fail." in card
    ours, mixed = tmp_path / "mixed", tmp_path / "mixed-out"
    flags = awq_flags(tiny_model, calibration_text, ours, "--target-bits", "6", "--asymmetric", "--kv", "int8")
    assert awq.main(flags) == 0
    card = " ".join((exported(ours, ["vllm-fp8"], mixed) / "README.md").read_text().split())
    assert "| this toolkit | yes | refuses weights of two widths that have no manifest; open the original" in card
    assert "- transformers: zero points and two widths; its default path refuses the zero points" in card
