"""Checkpoints of other tools: the same weights here to the last bit, made once, resumed, made anew, refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from offload import generate
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError, InputError
from offload.executor import executor_of, load
from offload.formats import convert
from offload.formats.foreign import foreign_format
from quant.convert import main
from tests.packers import Grid, random_grid, to_awq, to_compressed_tensors, to_gptq

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])


def ct_config(symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
KINDS: dict[str, tuple[dict[str, Any], bool, bool, Callable[[Grid], dict[str, Tensor]]]] = {
    "awq": (AWQ | {"zero_point": True}, False, False, to_awq),
    "awq, symmetric": (AWQ | {"zero_point": False}, True, False, to_awq),
    "gptq": (GPTQ | {"sym": True, "desc_act": False}, True, False, lambda grid: to_gptq(grid, True)),
    "gptq, asymmetric": (GPTQ | {"sym": False}, False, False, lambda grid: to_gptq(grid, True)),
    "gptq v2": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, False, False, lambda g: to_gptq(g, False)),
    "gptq, reordered": (GPTQ | {"sym": True, "desc_act": True}, True, True, lambda grid: to_gptq(grid, True)),
    "compressed-tensors": (ct_config(True), True, False, lambda grid: to_compressed_tensors(grid, True)),
    "compressed-tensors, asymmetric": (ct_config(False), False, False, lambda g: to_compressed_tensors(g, False)),
}


def foreign(kind: str, tiny_model: Path, directory: Path) -> PreTrainedModel:
    """Write a checkpoint of a kind; return the model with the weights that its format means, in float32."""
    config, symmetric, act_order, pack = KINDS[kind]
    torch.manual_seed(0)
    shutil.copytree(tiny_model, directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tensors = load_file(directory / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            grid = random_grid(*module.weight.shape, 32, symmetric, act_order)
            module.weight.data = grid.weight().float()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in pack(grid).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(convert, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("device_map", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_checkpoint_computes_what_its_format_means(
    kind: str, device_map: str, tiny_model: Path, tmp_path: Path
) -> None:
    reference = foreign(kind, tiny_model, tmp_path / "theirs")
    model = load(convert.opened(tmp_path / "theirs"), dtype=torch.float32, mode="exact", device_map=device_map)
    with torch.inference_mode():
        expected, found = reference(TOKENS).logits, model(TOKENS).logits
        steps = [m.generate(TOKENS, max_new_tokens=12, do_sample=False, pad_token_id=0) for m in (reference, model)]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(*steps)
    executor_of(model).close()


def test_what_others_would_misread_is_not_said_to_be_theirs(tiny_model: Path, tmp_path: Path) -> None:
    methods = {}
    for kind in ("gptq", "gptq, reordered"):
        foreign(kind, tiny_model, tmp_path / kind)
        copy = convert.opened(tmp_path / kind)
        methods[kind] = json.loads((copy / "config.json").read_text())["quantization_config"]["quant_method"]
    assert methods == {"gptq": "compressed-tensors", "gptq, reordered": "int4-offload"}


def test_it_is_converted_once_and_anew_when_it_has_changed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "theirs"
    foreign("awq", tiny_model, directory)
    first = convert.opened(directory)
    assert "re-laid once into" in capsys.readouterr().err
    assert convert.opened(directory) == first
    assert "re-laid" not in capsys.readouterr().err
    assert convert.opened(first) == first  # ours already
    assert convert.opened(tiny_model) == tiny_model  # not quantized
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, directory / "model.safetensors", {"format": "pt", "again": "x" * 64})
    second = convert.opened(directory)
    assert second != first
    assert main(["--list"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == sorted(map(str, (first, second)))
    assert main(["--clear"]) == 0
    assert not first.exists()
    assert main(["--list"]) == 0
    assert capsys.readouterr().out == "nothing was converted yet\n"


def test_an_interrupted_conversion_is_resumed_with_equal_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "theirs"
    foreign("gptq, reordered", tiny_model, directory)
    found = foreign_format(directory)
    assert found is not None
    whole = convert.convert(directory, found, tmp_path / "whole")
    calls = 0
    repack = type(found).repack

    def interrupted(self: Any, *arguments: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return repack(self, *arguments)

    monkeypatch.setattr(type(found), "repack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(directory, found, tmp_path / "resumed")
    resumed = convert.convert(directory, found, tmp_path / "resumed")
    assert calls == 10 + 21 - 7  # of 7 linears a layer the first layer's are not done again
    for one, other in zip(whole.blobs, resumed.blobs, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_commands_take_it(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "theirs"
    foreign("gptq", tiny_model, directory)
    flags = ["--prompt", "The fox", "--no-chat", "--max-new-tokens", "5", "--json"]
    assert generate.main(["--model", str(directory), *flags]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert main(["--model", str(directory), "--output", str(tmp_path / "ours"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "gptq"
    assert generate.main(["--model", str(tmp_path / "ours"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text
    assert Checkpoint.open(tmp_path / "ours").recipe.settings == {"from": "gptq"}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("awq", {"version": "gemv"}, "awq quantization_config: version 'gemv', expected 'gemm': cannot be opened"),
        ("awq", {"bits": 3}, "awq quantization_config: bits 3, expected 4"),
        ("gptq", {"bits": 3}, "gptq quantization_config: 3 bits in groups of 32; expected 4 or 8, in 32, 64 or 128"),
        ("gptq", {"group_size": 100}, "4 bits in groups of 100; expected"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin', expected 'gptq' or 'gptq_v2'"),
        ("gptq", {"dynamic": {"-:x": {}}}, "`dynamic` gives modules settings of their own"),
        (
            "gptq",
            {"quant_method": "bitsandbytes"},
            "quantized by 'bitsandbytes'; expected one of awq, gptq, compressed",
        ),
        ("compressed-tensors", {"format": "nvfp4"}, "format 'nvfp4', expected 'pack-quantized'"),
        (
            "compressed-tensors",
            {"config_groups": {}},
            "compressed-tensors quantization_config: list index out of range",
        ),
    ],
)
def test_what_cannot_be_kept_to_is_refused(
    kind: str, changes: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["quantization_config"] = KINDS[kind][0] | changes
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        convert.opened(tmp_path / "theirs")
    assert message in str(refused.value)


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    reference = foreign("gptq", tiny_model, directory)
    path = directory / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.up_proj.bias"
    save_file(tensors | {name: torch.zeros(128)}, path, {"format": "pt"})
    model = load(directory, dtype=torch.float32, mode="exact")
    with torch.inference_mode():
        expected = reference(TOKENS).logits
        assert (model(TOKENS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    save_file(tensors | {name: torch.ones(128)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is not zero, and LlamaForCausalLM has no such bias"):
        load(directory)


@pytest.mark.parametrize("scheme", [{"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}, None])
def test_scales_of_a_cache_are_left_out_where_the_configuration_names_them(
    scheme: dict[str, Any] | None, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "theirs"
    reference = foreign("compressed-tensors", tiny_model, directory)
    path = directory / "model.safetensors"
    scales = {f"model.layers.1.self_attn.{part}_scale": torch.ones(1) for part in "qkv"}
    scales |= {"model.layers.1.self_attn.k_zero_point": torch.zeros(1)}
    save_file(load_file(path) | scales, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (directory / "config.json").write_text(json.dumps(config))
    if scheme is None:
        with pytest.raises(CheckpointError, match="k_scale' is not one of the model; 0 missing, 4 unexpected"):
            convert.opened(directory)
        return
    with torch.inference_mode():
        found = load(directory, dtype=torch.float32, mode="exact")(TOKENS).logits
        expected = reference(TOKENS).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert f"{directory}: the scales of its float8 cache are left out, the weights do not" in capsys.readouterr().err
    copy = convert.opened(directory)
    assert json.loads((copy / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None


def test_damage_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    foreign("gptq, asymmetric", tiny_model, directory)
    path = directory / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.up_proj"
    for changes, message in (
        ({f"{name}.scales": None}, f"{name}: no 'scales'; the gptq checkpoint is damaged"),
        ({f"{name}.qzeros": whole[f"{name}.qzeros"][1:]}, "do not fit 128 rows of 64 inputs; the gptq checkpoint is"),
        ({f"{name}.scales": whole[f"{name}.scales"] * torch.inf}, "scales that are not finite"),
        ({"model.norm.weight": None}, "tensor 'model.norm.weight' is missing; 1 missing, 0 unexpected"),
        ({"model.extra": torch.ones(1)}, "tensor 'model.extra' is not one of the model; 0 missing, 1 unexpected"),
    ):
        tensors = {key: tensor for key, tensor in (whole | changes).items() if tensor is not None}
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(CheckpointError) as refused:
            convert.opened(directory)
        assert message in str(refused.value)
