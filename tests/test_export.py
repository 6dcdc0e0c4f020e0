"""What is exported means the same weights: to a reader of its own, and read back here; what does not fit is refused."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.packed import PackedWeight, dequantize
from offload.checkpoint import Checkpoint
from offload.executor import load
from offload.formats import convert
from quant.convert import main as convert_main
from quant.export import main
from quant.rtn import main as rtn
from tests.packers import random_grid, to_compressed_tensors
from tests.test_convert import foreign
from tests.test_export_gguf import model_of

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


def test_what_is_no_quantized_checkpoint_in_order_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_main(["--model", str(tiny_model), "--output", str(tmp_path / "plain")]) == 0
    foreign("gptq, reordered", tiny_model, tmp_path / "theirs")
    assert convert_main(["--model", str(tmp_path / "theirs"), "--output", str(tmp_path / "reordered")]) == 0
    for name, message in (
        ("plain", f": nothing in {tmp_path / 'plain'} is quantized; export what `quant.awq` makes of it"),
        ("reordered", ": inputs in an order of their own; export the checkpoint it was made from"),
    ):
        for flags in (["--format", "awq"], ["--format", "gptq"], ["--kv-export", "vllm-fp8"]):
            capsys.readouterr()
            assert main(["--model", str(tmp_path / name), *flags, "--output", str(tmp_path / "out")]) == 3
            assert " ".join(flags) + message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_packed_head_is_said_to_be_packed(tiny_model: Path, tmp_path: Path) -> None:
    source, theirs, ours = tmp_path / "source", tmp_path / "theirs", tmp_path / "ours"
    model_of("llama", tiny_model, source)
    assert rtn(["--model", str(source), "--output", str(theirs), "--group-size", "32"]) == 0
    (theirs / "manifest.json").unlink()
    shard = theirs / "model-00004-of-00004.safetensors"
    tensors = load_file(shard)
    packed = to_compressed_tensors(random_grid(*tensors.pop("lm_head.weight").shape, 32, True), True)
    save_file(tensors | {f"lm_head.{part}": tensor for part, tensor in packed.items()}, shard, {"format": "pt"})
    for file, change in (
        ("config.json", lambda values: values["quantization_config"].update(ignore=[])),
        (
            "model.safetensors.index.json",
            lambda values: values["weight_map"].update(dict.fromkeys(load_file(shard), shard.name)),
        ),
    ):
        values = json.loads((theirs / file).read_text())
        change(values)
        values.get("weight_map", {}).pop("lm_head.weight", None)
        (theirs / file).write_text(json.dumps(values))
    assert convert_main(["--model", str(theirs), "--output", str(ours)]) == 0
    for kind in ("awq", "gptq"):
        assert main(["--model", str(ours), "--format", kind, "--output", str(tmp_path / kind)]) == 0
        assert "lm_head.qweight" in tensors_of(tmp_path / kind)
        assert json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]["lm_head"] is True


def test_nothing_is_left_of_an_export_that_failed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(weight: PackedWeight, first_version: bool) -> dict[str, Tensor]:
        raise ValueError("scales that float16 does not hold")

    monkeypatch.setattr("quant.layouts.to_gptq", refuse)
    flags = ["--model", str(tiny_checkpoint), "--format", "gptq", "--output", str(tmp_path / "out")]
    assert main(flags) == 3
    assert "scales that float16 does not hold; the compressed-tensors layout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs gptqmodel, through which transformers opens these")
@pytest.mark.parametrize(
    ("kind", "flags", "tolerance"),
    [
        ("awq", [], 1e-4),
        ("awq", ["--asymmetric"], 1e-3),
        ("gptq", [], 1e-4),
        ("gptq", ["--asymmetric"], 1e-3),
        ("awq", ["--skip", "*.1.mlp.gate_proj", "--skip", "*.v_proj"], 1e-4),
        ("gptq", ["--skip", "*.1.mlp.gate_proj", "--skip", "*.v_proj"], 1e-4),
        ("awq", ["--group-size", "row"], 2e-2),
        ("gptq", ["--bits", "8"], 2e-3),
        ("gptq", ["--bits", "8", "--asymmetric"], 2e-3),
    ],
)
def test_their_own_tool_opens_it_with_equal_logits(
    kind: str, flags: list[str], tolerance: float, tiny_model: Path, tmp_path: Path
) -> None:
    """In a process without offload. It was 7e-7; 3e-4 with zero points, 1.2e-3 and 9e-4 in 8 bits, 1.3e-2 by rows."""
    assert (
        rtn(["--model", str(tiny_model), "--output", str(tmp_path / "ours"), "--group-size", "32", *flags]) == 0
    )  # the last counts
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
    assert (theirs - ours).abs().max() <= tolerance * ours.abs().max()
