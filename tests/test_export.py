"""What is exported means the same weights: to a reader of its own, and read back here; what does not fit is refused."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.packed import PackedWeight, dequantize
from offload import convert
from offload.checkpoint import Checkpoint
from offload.executor import load
from quant.export import main

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def nibbles(words: Tensor, order: tuple[int, ...], bits: int = 4) -> Tensor:
    """[..., n] of int32 [..., n * bits / 32]: place i of a word is value order[i] of its 32 / bits."""
    out = torch.empty(*words.shape, len(order), dtype=torch.float64)
    for place, value in enumerate(order):
        out[..., value] = (words.long() >> bits * place & (1 << bits) - 1).double()
    return out.flatten(-2)


def weight_of_awq(tensors: dict[str, Tensor], module: str) -> Tensor:
    """By the definition of the format, in float64, [N, K]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros = (nibbles(tensors[f"{module}.{part}"], order) for part in ("qweight", "qzeros"))
    scales = tensors[f"{module}.scales"].double()
    group = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).t()


def weight_of_gptq(tensors: dict[str, Tensor], module: str, bits: int, version: int) -> Tensor:
    natural = tuple(range(32 // bits))
    codes = nibbles(tensors[f"{module}.qweight"].t(), natural, bits)
    zeros = nibbles(tensors[f"{module}.qzeros"], natural, bits) + (version == 1)
    groups = tensors[f"{module}.g_idx"].long()
    return (codes - zeros[groups].t()) * tensors[f"{module}.scales"].double()[groups].t()


@pytest.mark.parametrize(
    ("fixture", "kind"),
    [
        ("tiny_checkpoint", "awq"),
        ("tiny_asymmetric", "awq"),
        ("tiny_checkpoint", "gptq"),
        ("tiny_asymmetric", "gptq"),
        ("tiny_8_bits", "gptq"),
    ],
)
def test_the_weights_are_the_same(
    fixture: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "cache_directory", lambda: tmp_path / "cache")
    directory = request.getfixturevalue(fixture)
    checkpoint = Checkpoint.open(directory)
    output = tmp_path / "out"
    assert main(["--model", str(directory), "--format", kind, "--output", str(output)]) == 0
    theirs, ours = tensors_of(output), tensors_of(directory)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
    modules = [name.removesuffix(".weight_packed") for name in ours if name.endswith(".weight_packed")]
    assert len(modules) == 21
    for module in modules:
        codes, scale = ours[f"{module}.weight_packed"].view(torch.uint8), ours[f"{module}.weight_scale"]
        zero = ours.get(f"{module}.weight_zero_point")
        expected = dequantize(PackedWeight(codes, scale, zero, 32, checkpoint.recipe.bits), torch.float64)
        bits = checkpoint.recipe.bits
        found = weight_of_awq(theirs, module) if kind == "awq" else weight_of_gptq(theirs, module, bits, version)
        assert torch.equal(found, expected)
    assert not (output / "manifest.json").exists()
    with torch.inference_mode():  # read back by the other door
        back = load(output, dtype=torch.float32, mode="exact")(TOKENS).logits
        assert torch.equal(back, load(directory, dtype=torch.float32, mode="exact")(TOKENS).logits)


def test_refusals(tiny_checkpoint: Path, tiny_8_bits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    for model, kind, output, status, message in (
        (tiny_checkpoint, "gptq", "there", 2, f"--output {tmp_path / 'there'}: exists; name another directory"),
        (tiny_8_bits, "awq", "new", 3, "--format awq: weights of 8 bits; it holds 4, --format gptq holds these"),
    ):
        flags = ["--model", str(model), "--format", kind, "--output", str(tmp_path / output)]
        assert main(flags) == status
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_nothing_is_left_of_an_export_that_failed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(weight: PackedWeight, first_version: bool) -> dict[str, Tensor]:
        raise ValueError("scales that float16 does not hold")

    monkeypatch.setattr("quant.export.to_gptq", refuse)
    flags = ["--model", str(tiny_checkpoint), "--format", "gptq", "--output", str(tmp_path / "out")]
    assert main(flags) == 3
    assert "scales that float16 does not hold; the compressed-tensors layout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs gptqmodel, through which transformers opens these")
@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_their_own_tool_opens_it_with_equal_logits(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """In a process without offload."""
    from quant.rtn import main as rtn

    assert rtn(["--model", str(tiny_model), "--output", str(tmp_path / "ours"), "--group-size", "32"]) == 0
    assert main(["--model", str(tmp_path / "ours"), "--format", kind, "--output", str(tmp_path / "theirs")]) == 0
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as Auto; "
        "model = Auto.from_pretrained(sys.argv[1], dtype=torch.float32); "
        "tokens = torch.tensor([[5, 77, 130, 9, 200, 41, 3]]); "
        "torch.save(model(tokens).logits.detach(), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "theirs"), str(tmp_path / "logits.pt")]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    with torch.inference_mode():
        ours = load(tmp_path / "ours", dtype=torch.float32, mode="exact")(TOKENS).logits
    theirs = torch.load(tmp_path / "logits.pt")
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()
