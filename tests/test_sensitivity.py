"""Which linears get 8 bits: by an error that is recomputed here, for the bytes that the file really holds."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from offload.checkpoint import JOINED, Checkpoint, Recipe
from offload.errors import CheckpointError
from offload.executor import load
from offload.linear import PackedLinear
from offload.skeleton import build_skeleton, read_config
from offload.source_weights import SourceWeights
from offload.text import load_text, sample_windows, tokenize
from quant import awq, gptq
from quant.columns import round_weight
from quant.groupwise import Grid
from quant.hessian import Hessian
from quant.sensitivity import Candidate, candidates, choose
from quant.settings import AwqSettings
from quant.statistics import Statistics
from tests.test_walk import awq_flags, contents, stop_before

WIDE = ["--target-bits", "6"]
TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])


def test_the_best_for_a_byte_are_chosen_while_they_fit() -> None:
    offered = [
        Candidate(("a", "b"), 4.0, 40),
        Candidate(("c",), 3.0, 10),
        Candidate(("d",), 2.0, 30),
        Candidate(("e",), 0.1, 10),
    ]
    assert choose(offered, 80) == {"a", "b", "c", "d"}
    assert choose(offered, 79) == {"a", "b", "c", "e"}
    assert choose(offered, 9) == set()
    assert choose(offered, 90) == {"a", "b", "c", "d", "e"}


@torch.inference_mode()
def test_the_error_is_that_of_the_residual_stream(tiny_model: Path, calibration_text: Path) -> None:
    """Recomputed in plain transformers: the second layer alone, with its gate and up projections rounded."""
    config = read_config(tiny_model)
    skeleton = build_skeleton(config, torch.float32)
    text = load_text(str(calibration_text), "calibration")
    windows = sample_windows(tokenize(text, AutoTokenizer.from_pretrained(tiny_model)), 6, 32, 0)
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    grid = Grid(32, False)
    names = [key.removesuffix(".weight") for key in original.state_dict() if key.endswith("_proj.weight")]
    found = list(candidates(skeleton, SourceWeights.open(tiny_model), dict.fromkeys(names, grid), windows))
    inside = [tuple(name.removeprefix("model.layers.0.") for name in one.linears) for one in found[:4]]
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert inside == [qkv, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert len(found) == 4 * 3

    expected = original(windows, output_hidden_states=True).hidden_states[2].double()
    changed, seen = copy.deepcopy(original), []
    original.model.layers[1].mlp.register_forward_pre_hook(lambda mlp, arguments: seen.append(arguments[0]))
    original(windows)
    x_TK = seen[0].flatten(0, 1).double()
    for name in ("gate_proj", "up_proj"):
        weight = changed.get_parameter(f"model.layers.1.mlp.{name}.weight")
        hessian = Hessian.of(Statistics.of(x_TK.T @ x_TK / len(x_TK)), 0.1)
        _, weight.data = round_weight(weight.data, hessian, grid, AwqSettings())
    output = changed(windows, output_hidden_states=True).hidden_states[2].double()
    error = float((F.mse_loss(output, expected, reduction="none").sum(-1) / expected.square().sum(-1)).mean())
    assert found[6].error == pytest.approx(error, rel=1e-3)
    assert found[6].extra_bytes == 2 * (128 * 64 // 2 + 128 // 8 * 4 * 2)
    assert len({one.error for one in found}) == len(found)


@pytest.mark.parametrize("flags", [["--symmetric"], ["--asymmetric"]])
@torch.inference_mode()
def test_the_bits_are_those_asked_for_and_lower_the_error(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    assert awq.main(awq_flags(tiny_model, calibration_text, narrow, *flags, "--json")) == 0
    assert awq.main(awq_flags(tiny_model, calibration_text, wide, *flags, *WIDE, "--json")) == 0
    uniform, mixed = map(json.loads, capsys.readouterr().out.splitlines())
    checkpoint = Checkpoint.open(wide)
    stored = [
        spec for blob in checkpoint.blobs if blob.module for name, spec in blob.tensors.items() if "weight_" in name
    ]
    quantized_bytes = sum(spec.nbytes for spec in stored if spec.shape != (2,))
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert mixed["bits_per_weight"] == pytest.approx(8 * quantized_bytes / weights, abs=1e-4)
    assert uniform["bits_per_weight"] + 0.5 < mixed["bits_per_weight"] <= 6
    assert mixed["error"] < uniform["error"]
    assert 0 < len(checkpoint.recipe.wide) < 21
    for name in checkpoint.recipe.wide:
        if name.endswith("k_proj"):
            siblings = {name.replace("k_proj", other) for other in ("q_proj", "v_proj")}
            assert siblings <= set(checkpoint.recipe.wide)
    model = load(wide, dtype=torch.float32, mode="exact")
    bits = {name: module.bits for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {name for name, found in bits.items() if found == 8} == set(checkpoint.recipe.wide)
    assert len(bits) == 21
    groups = json.loads((wide / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    targets = groups["group_1"]["targets"]
    assert [name for name in targets if name.rpartition(".")[2] not in JOINED] == list(checkpoint.recipe.wide)
    for name in targets[len(checkpoint.recipe.wide) :]:  # what vLLM joins, of parts that are all there
        parent, _, joined = name.rpartition(".")
        assert {f"{parent}.{part}" for part in JOINED[joined]} <= set(checkpoint.recipe.wide)
    assert (groups["group_0"]["weights"]["num_bits"], groups["group_1"]["weights"]["num_bits"]) == (4, 8)
    assert f"({len(checkpoint.recipe.wide)} linears in 8)" in (wide / "README.md").read_text()


@torch.inference_mode()
def test_two_widths_open_in_transformers_and_here_without_the_names_for_vllm(
    tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    assert awq.main(awq_flags(tiny_model, calibration_text, wide, *WIDE)) == 0
    theirs = LlamaForCausalLM.from_pretrained(wide, dtype=torch.float32)  # the class that offload leaves alone
    ours = load(wide, dtype=torch.float32, mode="exact")
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS).logits)
    config = json.loads((wide / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_1"]
    assert any(name.rpartition(".")[2] in JOINED for name in group["targets"])
    own = [name for name in group["targets"] if name.rpartition(".")[2] not in JOINED]
    for targets, opens in ((own, True), (own[1:], False)):
        group["targets"] = targets
        (wide / "config.json").write_text(json.dumps(config))
        if opens:
            Checkpoint.open(wide)
        else:
            with pytest.raises(CheckpointError, match="quantization_config differs from the recipe"):
                Checkpoint.open(wide)


def test_resumed_it_is_the_same(tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole" / "out", tmp_path / "resumed" / "out"
    assert gptq.main(awq_flags(tiny_model, calibration_text, whole, *WIDE)) == 0
    for index in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            stop_before(index, patch)
            assert gptq.main(awq_flags(tiny_model, calibration_text, resumed, *WIDE)) == 1
    assert gptq.main(awq_flags(tiny_model, calibration_text, resumed, *WIDE)) == 0
    assert contents(resumed) == contents(whole)


@pytest.mark.parametrize(
    ("flags", "range_of_bits"),
    [
        (["--target-bits", "4.2"], "4.500 bits here and 8-bit weights 8.500"),
        (["--bits", "8", *WIDE], "8.500 bits here"),
    ],
)
def test_bits_that_no_choice_has_are_refused(
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    range_of_bits: str,
) -> None:
    assert awq.main(awq_flags(tiny_model, calibration_text, tmp_path / "out", *flags)) == 2
    assert range_of_bits in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_widths_reads_as_before() -> None:
    recipe = Recipe("rtn", 4, 32, True, (), None, "0" * 16, 0)
    assert "wide" not in recipe.to_json()
    assert Recipe.from_json(recipe.to_json()) == recipe
    mixed = Recipe("rtn", 4, 32, True, (), None, "0" * 16, 0, wide=("a.b",))
    assert Recipe.from_json(mixed.to_json()) == mixed
    assert (mixed.bits_of("a.b"), mixed.bits_of("a.c")) == (8, 4)
    with pytest.raises(ValueError, match="wide: 1 modules in 8 bits beside others in 8, expected 4"):
        Recipe("rtn", 8, 32, True, (), None, "0" * 16, 0, wide=("a.b",))
