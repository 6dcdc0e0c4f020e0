"""Every tensor that a checkpoint or an export holds, and each setting, is what vLLM's loaders expect; vLLM is not run.

The lists are written down from copies of vLLM's source of 2025 and 2026, under vllm/model_executor:

    models/llama.py, qwen2.py, qwen3.py           modules, stacked_params_mapping, biases, norms of q and k
    model_loader/weight_utils.py                  maybe_remap_kv_scale_name, filter_duplicate_safetensors_files
    layers/quantization/auto_awq.py               create_weights, from_config, TYPE_MAP (read at commit 2211d887)
    layers/quantization/auto_gptq.py              create_weights, from_config, TYPE_MAP (read at commit 4276bd50)
    layers/quantization/utils/gptq_utils.py       is_layer_gptq_quantized
    layers/quantization/utils/marlin_utils.py     MARLIN_SUPPORTED_GROUP_SIZES
    layers/quantization/utils/quant_utils.py      is_layer_skipped
    layers/quantization/compressed_tensors/
        schemes/compressed_tensors_wNa16.py       create_weights, with zero points
        compressed_tensors.py                     from_config, _get_scheme_from_parts, CompressedTensorsKVCacheMethod
        utils.py                                  should_ignore_layer, find_matched_target

N, K, G are outputs, inputs and inputs of a group; a word has 32 / bits codes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant import awq, kv, rtn
from quant.export import main
from tests.test_export_gguf import model_of
from tests.test_walk import awq_flags

HIDDEN, INNER, VOCABULARY, LAYERS, HEADS, KEY_HEADS = 64, 128, 264, 2, 4, 2
HEAD_SIZE = {"llama": 16, "qwen2": 16, "qwen3": 128}

Expected = dict[str, tuple[tuple[int, ...], set[torch.dtype]]]
PARAMS = {torch.float16, torch.bfloat16}
"""`params_dtype`: what is copied into such a parameter is cast to it."""

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""packed_modules_mapping of the three models."""


def linears(kind: str) -> dict[str, tuple[int, int]]:
    """(N, K) of the linears of a layer."""
    queries, keys = HEADS * HEAD_SIZE[kind], KEY_HEADS * HEAD_SIZE[kind]
    return {
        "self_attn.q_proj": (queries, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, queries),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }


def of_the_model(kind: str, tied: bool) -> Expected:
    """What is not quantized."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in (f"model.layers.{index}" for index in range(LAYERS)):
        shapes |= {f"{layer}.{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if kind == "qwen2":
            shapes |= {
                f"{layer}.self_attn.{part}.bias": linears(kind)[f"self_attn.{part}"][:1] for part in JOINED["qkv_proj"]
            }
        if kind == "qwen3":
            shapes |= {f"{layer}.self_attn.{norm}.weight": (HEAD_SIZE[kind],) for norm in ("q_norm", "k_norm")}
    return {name: (shape, PARAMS) for name, shape in shapes.items()}


def of_compressed_tensors(rows: int, inputs: int, group: int, bits: int, symmetric: bool) -> Expected:
    word, groups = 32 // bits, inputs // group
    parts: Expected = {
        "weight_packed": ((rows, inputs // word), {torch.int32}),
        "weight_scale": ((rows, groups), PARAMS),
        "weight_shape": ((2,), {torch.int64}),
    }
    return parts if symmetric else parts | {"weight_zero_point": ((rows // word, groups), {torch.int32})}


def of_awq(rows: int, inputs: int, group: int, bits: int, symmetric: bool) -> Expected:
    return {
        "qweight": ((inputs, rows // 8), {torch.int32}),
        "qzeros": ((inputs // group, rows // 8), {torch.int32}),
        "scales": ((inputs // group, rows), PARAMS),
    }


def of_gptq(rows: int, inputs: int, group: int, bits: int, symmetric: bool) -> Expected:
    word = 32 // bits
    return {
        "qweight": ((inputs // word, rows), {torch.int32}),
        "g_idx": ((inputs,), {torch.int32}),
        "qzeros": ((inputs // group, rows // word), {torch.int32}),
        "scales": ((inputs // group, rows), PARAMS),
    }


PARTS: dict[str, Callable[[int, int, int, int, bool], Expected]] = {
    "compressed-tensors": of_compressed_tensors,
    "awq": of_awq,
    "gptq": of_gptq,
}


def stored(directory: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names: vLLM drops other files where there is one."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for name in set(weight_map.values()):
        found |= load_file(directory / name)
    assert set(found) == set(weight_map)
    return found


def check(found: dict[str, Tensor], expected: Expected) -> None:
    assert set(found) == set(expected)
    for name, (shape, dtypes) in expected.items():
        assert (name, found[name].shape) == (name, shape)
        assert found[name].dtype in dtypes, name


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def seen_by_vllm() -> Iterator[tuple[str, list[str]]]:
    """The linears that vLLM makes, and what each is made of, by their names."""
    for layer in (f"model.layers.{index}" for index in range(LAYERS)):
        for parent, joined in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
            yield f"{layer}.{parent}.{joined}", [f"{layer}.{parent}.{part}" for part in JOINED[joined]]
        for alone in ("self_attn.o_proj", "mlp.down_proj"):
            yield f"{layer}.{alone}", [f"{layer}.{alone}"]


def matched(name: str, parts: list[str], targets: list[str], class_first: bool) -> str | None:
    """`find_matched_target` of a linear; class_first: as in v0.24, until vllm-project/vllm#49483."""
    own = name if name in targets else None
    by_class = next((target for target in targets if target.lower() in "qkvparallellinear"), None)
    by_parts = parts[0] if len(parts) > 1 and all(part in targets for part in parts) else None
    return own or (by_class or by_parts if class_first else by_parts or by_class)


def check_compressed_tensors(
    config: dict[str, Any], bits: Callable[[str], int], group: int | None, symmetric: bool
) -> None:
    """Settings that `from_config` and `_get_scheme_from_parts` read, and the scheme that each linear gets by them."""
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    schemes = {}
    for each in config["config_groups"].values():
        assert set(each) <= {"targets", "weights", "input_activations", "output_activations", "format"}
        assert each.get("input_activations") is None
        weights = each["weights"]
        assert weights["type"] == "int"
        assert weights["num_bits"] in (4, 8)
        assert not weights["dynamic"]
        assert (weights["strategy"], weights.get("group_size")) == (("group", group) if group else ("channel", None))
        assert weights["symmetric"] == symmetric
        assert weights.get("actorder") is None
        schemes |= dict.fromkeys(each["targets"], weights["num_bits"])
    for name, parts in seen_by_vllm():
        for class_first in (True, False):
            target = matched(name, parts, list(schemes), class_first)
            assert target is not None
            assert {schemes[target]} == {bits(part) for part in parts}
        assert not any(part in config["ignore"] for part in (name, *parts))


def check_awq(config: dict[str, Any], group: int | None) -> None:
    assert (config["quant_method"], config["version"]) == ("awq", "gemm")
    assert config["bits"] == 4  # TYPE_MAP
    assert config["group_size"] == (group or -1)
    assert config["group_size"] in (-1, 32, 64, 128)  # MARLIN_SUPPORTED_GROUP_SIZES
    assert config["zero_point"] is True
    assert not config.get("lm_head", False)
    for _, parts in seen_by_vllm():  # skip_with_substr=True
        assert not any(kept in part for kept in config["modules_to_not_convert"] for part in parts)


def check_gptq(config: dict[str, Any], bits: int, group: int | None) -> None:
    assert config["quant_method"] == "gptq"
    assert config["checkpoint_format"] == "gptq"
    assert (config["bits"], config["sym"]) in {(4, True), (8, True)}  # TYPE_MAP
    assert config["bits"] == bits
    assert config["group_size"] == (group or -1)
    assert config["group_size"] in (-1, 32, 64, 128)
    assert config["desc_act"] is False
    assert not config.get("lm_head", False)
    assert not config.get("dynamic")
    assert "modules_in_block_to_quantize" not in config


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "exports"),
    [
        (4, 32, True, ["awq", "gptq"]),
        (4, 32, False, ["awq"]),
        (8, 32, True, ["gptq"]),
        (8, 64, False, []),
        (4, None, True, ["awq", "gptq"]),
    ],
)
def test_names_shapes_dtypes_and_settings(
    kind: str, bits: int, group: int | None, symmetric: bool, exports: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    tied = kind == "qwen2"
    source = model_of(kind, tiny_model, tmp_path / "model", tie_word_embeddings=tied)
    ours = tmp_path / "ours"
    flags = ["--bits", str(bits), "--group-size", str(group or "row"), "--symmetric" if symmetric else "--asymmetric"]
    assert rtn.main(["--model", str(source), "--output", str(ours), *flags]) == 0
    directories = {"compressed-tensors": ours}
    for name in exports:
        directories[name] = tmp_path / name
        assert main(["--model", str(ours), "--format", name, "--output", str(directories[name])]) == 0
    for name, directory in directories.items():
        expected = of_the_model(kind, tied)
        for layer in range(LAYERS):
            for linear, (rows, inputs) in linears(kind).items():
                parts = PARTS[name](rows, inputs, group or inputs, bits, symmetric)
                expected |= {f"model.layers.{layer}.{linear}.{part}": spec for part, spec in parts.items()}
        check(stored(directory), expected)
    check_compressed_tensors(config_of(ours), lambda _: bits, group, symmetric)
    assert config_of(ours)["kv_cache_scheme"] is None
    if "awq" in exports:
        check_awq(config_of(directories["awq"]), group)
    if "gptq" in exports:
        check_gptq(config_of(directories["gptq"]), bits, group)
        assert json.loads((directories["gptq"] / "quantize_config.json").read_text()) == config_of(directories["gptq"])


def test_two_widths_find_their_linears_in_releases_that_look_for_the_class_first(
    tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    source = model_of("llama", tiny_model, tmp_path / "model")
    ours = tmp_path / "ours"
    assert awq.main(awq_flags(source, calibration_text, ours, "--target-bits", "6")) == 0
    wide = set(json.loads((ours / "manifest.json").read_text())["recipe"]["wide"])
    assert any(name.endswith("q_proj") for name in wide) or any(name.endswith("gate_proj") for name in wide)
    check_compressed_tensors(config_of(ours), lambda part: 8 if part in wide else 4, 32, True)


def test_what_is_left_alone_is_listed(tiny_model: Path, tmp_path: Path) -> None:
    source, ours = model_of("llama", tiny_model, tmp_path / "model"), tmp_path / "ours"
    skipped = ["--skip", "*.0.self_attn.?_proj", "--skip", "*.1.mlp.down_proj"]
    assert rtn.main(["--model", str(source), "--output", str(ours), "--group-size", "32", *skipped]) == 0
    for name in ("awq", "gptq"):
        assert main(["--model", str(ours), "--format", name, "--output", str(tmp_path / name)]) == 0
    packed = {name.removesuffix(".qweight") for name in stored(tmp_path / "gptq") if name.endswith(".qweight")}
    assert len(packed) == 7 * LAYERS - 5
    (named,) = config_of(tmp_path / "gptq")["modules_in_block_to_quantize"]  # a list of lists, joined where it is read
    assert sorted(named) == sorted(packed)
    kept = config_of(tmp_path / "awq")["modules_to_not_convert"]
    for _, parts in seen_by_vllm():  # is_layer_gptq_quantized and is_layer_skipped
        for part in parts:
            assert any(name in part for name in named) == (part in packed)
            assert any(name in part for name in kept) == (part not in packed)
            assert (part in config_of(ours)["ignore"]) == (part not in packed)


@pytest.mark.parametrize(
    ("flags", "kind", "shape"),
    [
        (["vllm-fp8"], "float", (1,)),
        (["ct-int8"], "int", (1,)),
        (["ct-int8", "--kv-strategy", "attn_head"], "int", (KEY_HEADS, 1, 1)),
    ],
)
def test_scales_of_keys_and_values(
    flags: list[str], kind: str, shape: tuple[int, ...], tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    source = model_of("qwen3", tiny_model, tmp_path / "model")
    ours, output = tmp_path / "ours", tmp_path / "out"
    assert rtn.main(["--model", str(source), "--output", str(ours), "--group-size", "32"]) == 0
    windows = ["--calibration", str(calibration_text), "--num-samples", "2", "--seq-len", "32"]
    assert kv.main(["--model", str(ours), *windows]) == 0
    assert main(["--model", str(ours), "--kv-export", *flags, "--output", str(output)]) == 0
    found, weights = stored(output), stored(ours)
    scales = {name: found[name] for name in set(found) - set(weights)}
    attention = [f"model.layers.{index}.self_attn" for index in range(LAYERS)]
    check(scales, {f"{name}.{part}_scale": (shape, {torch.float32}) for name in attention for part in "kv"})
    # maybe_remap_kv_scale_name: what ends in .k_scale or .v_scale becomes a parameter of Attention, in self_attn.attn
    remapped = {name.replace(f".{part}_scale", f".attn.{part}_scale") for name in scales for part in "kv"} - set(scales)
    assert remapped == {f"{name}.attn.{part}_scale" for name in attention for part in "kv"}
    scheme = config_of(output)["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"]) == (8, kind)  # validate_kv_cache_scheme
    assert scheme["strategy"] in ("tensor", "attn_head")
    assert scheme["symmetric"] is True
    assert scheme["dynamic"] is False
    check_compressed_tensors(config_of(output), lambda _: 4, 32, True)
