"""Passes through layers in bfloat16: what they compute, who chooses them, and that a resumed run keeps the choice."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from offload.checkpoint import Checkpoint
from offload.errors import UsageError
from quant import gptq
from quant.layer import LayerInputs, inputs_of, multiplying_in
from quant.moments import Moments, add_gram, mirror
from quant.pass_dtype import AUTO, of_processor, settled
from quant.settings import GptqSettings
from tests.test_awq import Layer
from tests.test_gptq import gptq_run
from tests.test_walk import contents, shards, stop_before

FAST = ("--tier", "fast", "--asymmetric")
WITH_BFLOAT16: list[Mapping[str, object]] = [{"avx512_bf16": True}, {"avx512_bf16": False, "amx_bf16": True}]
WITHOUT: list[Mapping[str, object]] = [{"avx512_bf16": False, "amx_bf16": False}, {"bf16": True}, {}]


def processor_with(capabilities: Mapping[str, object], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(dict(capabilities)))


def settings_in(output: Path) -> object:
    return Checkpoint.open(output).recipe.settings["pass_dtype"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_multiplies_rounded_values_and_keeps_its_own(bias: bool) -> None:
    layer, x_BTD = (
        nn.Sequential(nn.Linear(96, 40, bias=bias), nn.LayerNorm(40)).requires_grad_(False),
        torch.randn(2, 7, 96),
    )
    weight, before = layer[0].weight.clone(), layer(x_BTD)
    with multiplying_in(layer, torch.bfloat16):
        inside, narrow = layer(x_BTD), layer[0](x_BTD)
    exact = x_BTD.bfloat16().double() @ weight.bfloat16().double().T
    expected = exact.bfloat16().float() + (layer[0].bias if bias else 0)
    off = (narrow - expected).abs() / exact.abs().clamp(min=0.1)  # another order of sums can round to a neighbour
    assert narrow.dtype == inside.dtype == torch.float32
    assert off.max() <= 2**-7
    assert (off == 0).float().mean() > 0.9
    assert torch.equal(inside, layer[1](narrow))
    assert not torch.equal(inside, before)
    assert torch.equal(layer(x_BTD), before)
    assert torch.equal(layer[0].weight, weight)


def test_every_pass_over_a_layer_is_in_the_dtype_of_its_inputs(tmp_path: Path) -> None:
    layer = Layer().requires_grad_(False)
    wide = LayerInputs(torch.randn(5, 16, 64), {}, 2, original_STD=torch.randn(5, 16, 64))
    narrow = LayerInputs(wide.hidden_STD, {}, 2, wide.original_STD, pass_dtype=torch.bfloat16)
    with multiplying_in(layer, torch.bfloat16):
        expected = wide.run(layer)
        expected_original = wide.original().run(layer)
        seen = torch.cat(list(inputs_of(layer, wide, "mlp.down")))
    assert not torch.equal(expected, wide.run(layer))
    assert torch.equal(narrow.run(layer), expected)
    assert torch.equal(narrow.original().run(layer), expected_original)
    assert torch.equal(narrow.select(slice(1, 4)).run(layer), narrow.run(layer)[1:4])
    assert torch.equal(torch.cat(list(inputs_of(layer, narrow, "mlp.down"))), seen)
    gram = Moments(layer, narrow, ["mlp.down"]).gram("mlp.down").read(0, 0)
    rounded = seen.bfloat16().double()
    torch.testing.assert_close(gram.double(), rounded.T @ rounded / len(rounded), rtol=2**-7, atol=1e-3)
    on_disk = Moments(layer, replace(narrow, statistics_to=tmp_path), ["mlp.down"])
    assert torch.equal(on_disk.gram("mlp.down").read(0, 0), gram)


@pytest.mark.parametrize("width", [64, 700])
def test_grams_of_bfloat16_are_summed_in_float32(width: int) -> None:
    """A sum kept in bfloat16 would stand still long before the last of 400 batches."""
    gram, exact = torch.zeros(width, width), torch.zeros(width, width, dtype=torch.float64)
    for _ in range(400):
        x_TK: Tensor = (1 + 0.1 * torch.randn(3, width)).bfloat16()
        add_gram(gram, x_TK)
        exact += x_TK.double().T @ x_TK.double()
    assert gram.dtype == torch.float32
    torch.testing.assert_close(mirror(gram).double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("capabilities", [*WITH_BFLOAT16, *WITHOUT])
def test_the_processor_chooses(capabilities: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    processor_with(capabilities, monkeypatch)
    assert of_processor() == ("bfloat16" if capabilities in WITH_BFLOAT16 else "float32")


@pytest.mark.parametrize("flags", [{"bits": 8}, {"target_bits": 5.0}])
def test_weights_of_eight_bits_are_not_judged_by_coarser_products(
    flags: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_with(WITH_BFLOAT16[0], monkeypatch)
    options = argparse.Namespace(**({"bits": 4, "target_bits": None, "overwrite": False} | flags))
    assert settled(GptqSettings(pass_dtype=AUTO), tmp_path, options).pass_dtype == "float32"
    with pytest.raises(UsageError, match="--pass-dtype bfloat16: rounds more than weights of 8 bits do; leave it away"):
        settled(GptqSettings(pass_dtype="bfloat16"), tmp_path, options)
    assert settled(None, tmp_path, options) is None


@pytest.mark.parametrize("flags", [("--pass-dtype", "bfloat16"), ("--pass-dtype", "bfloat16", "--num-samples", "11")])
def test_resumed_it_is_the_same(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    whole, again, resumed = (tmp_path / name / "out" for name in ("whole", "again", "resumed"))
    assert gptq_run(tiny_model, calibration_text, whole, *FAST, *flags) == 0
    assert gptq_run(tiny_model, calibration_text, again, *FAST, *flags) == 0
    for index in (1, 3, 4):
        with pytest.MonkeyPatch.context() as patch:
            stop_before(index, patch)
            assert gptq_run(tiny_model, calibration_text, resumed, *FAST, *flags) == 1
    assert gptq_run(tiny_model, calibration_text, resumed, *FAST, *flags) == 0
    assert contents(again) == contents(whole)
    assert contents(resumed) == contents(whole)
    assert settings_in(whole) == "bfloat16"


def test_what_was_chosen_is_kept_on_another_processor_and_a_change_refused(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, moved, wide = (tmp_path / name / "out" for name in ("whole", "moved", "wide"))
    with pytest.MonkeyPatch.context() as patch:
        processor_with(WITH_BFLOAT16[0], patch)
        assert gptq_run(tiny_model, calibration_text, whole, *FAST) == 0
        stop_before(3, patch)
        assert gptq_run(tiny_model, calibration_text, moved, *FAST) == 1
    with pytest.MonkeyPatch.context() as patch:
        processor_with(WITHOUT[0], patch)
        assert gptq_run(tiny_model, calibration_text, wide, *FAST) == 0
        capsys.readouterr()
        assert gptq_run(tiny_model, calibration_text, moved, *FAST, "--pass-dtype", "float32") == 2
        refused = capsys.readouterr().err
        assert gptq_run(tiny_model, calibration_text, moved, *FAST, "--plan") == 0
        assert "passes   through the layers in bfloat16" in capsys.readouterr().out
        assert gptq_run(tiny_model, calibration_text, moved, *FAST) == 0
        assert gptq_run(tiny_model, calibration_text, moved, *FAST) == 0
        assert "already complete" in capsys.readouterr().err
    assert f"--output {moved}: holds an unfinished run of another recipe (settings: " in refused
    assert "'pass_dtype': 'bfloat16'} there, " in refused
    assert "'pass_dtype': 'float32'} asked); use --overwrite to replace it or another --output" in refused
    assert contents(moved) == contents(whole)
    assert (settings_in(whole), settings_in(wide)) == ("bfloat16", "float32")
    assert shards(whole) != shards(wide)
    with pytest.MonkeyPatch.context() as patch:
        processor_with(WITHOUT[0], patch)
        assert gptq_run(tiny_model, calibration_text, whole, *FAST, "--overwrite") == 0
    assert contents(whole) == contents(wide)


def test_only_the_fast_tier_leaves_it_to_the_processor(
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    processor_with(WITH_BFLOAT16[0], monkeypatch)
    planned = {}
    for tier in ("best", "fast", "slow"):
        assert gptq_run(tiny_model, calibration_text, tmp_path / "out", "--tier", tier, "--plan") == 0
        planned[tier] = capsys.readouterr().out
    assert {tier: "passes   through the layers in bfloat16" in plan for tier, plan in planned.items()} == {
        "best": False,
        "fast": True,
        "slow": False,
    }
    assert "the largest weight as passes multiply it" in planned["fast"]
    assert "the largest weight as passes multiply it" not in planned["best"]
    assert gptq.main(["--tier", "best", "--pass-dtype", "bfloat16", "--model", str(tiny_model), "--plan"]) == 0
    assert "passes   through the layers in bfloat16" in capsys.readouterr().out


def test_the_error_it_measures_is_that_of_float32(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same codes, judged in both: what is reported may not be a matter of the products' own rounding."""
    errors = {}
    for dtype in ("float32", "bfloat16"):
        flags = (*FAST, "--json", "--pass-dtype", dtype)
        assert gptq_run(tiny_model, calibration_text, tmp_path / dtype, *flags) == 0
        result = json.loads(capsys.readouterr().out)
        errors[dtype] = result["rtn_error"]
        assert result["error"] < result["rtn_error"]
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.05)
    assert errors["bfloat16"] != errors["float32"]
