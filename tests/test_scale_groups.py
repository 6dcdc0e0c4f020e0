"""Groups found in layers of many architectures: the expected ones, each true, none false, and the layer untouched."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from offload.experts import make_plain
from offload.skeleton import decoder_layers
from quant.layer import LayerInputs, linears
from quant.scale_groups import ScaleGroup, Trace, find_scale_groups, holds

HEAD_DIM = 8
SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
VALUES_TO_OUTPUT = (("self_attn.o_proj",), "self_attn.v_proj", 0)
UP_TO_DOWN = (("mlp.down_proj",), "mlp.up_proj", 0)
GATED = ("mlp.gate_proj", "mlp.up_proj")

Found = tuple[tuple[str, ...], str, int]


def llama_like(offset: int = 0, before_mlp: str = "post_attention_layernorm") -> list[Found]:
    return [(QKV, "input_layernorm", offset), VALUES_TO_OUTPUT, (GATED, before_mlp, offset), UP_TO_DOWN]


EXPECTED: dict[str, list[Found]] = {
    "Llama": llama_like(),
    "Qwen2": llama_like(),
    "Qwen3": llama_like(),
    "Gemma2": llama_like(1, "pre_feedforward_layernorm"),
    "Gemma3Text": llama_like(1, "pre_feedforward_layernorm"),
    "Olmo2": [VALUES_TO_OUTPUT, UP_TO_DOWN],
    "Phi3": [
        (("self_attn.qkv_proj",), "input_layernorm", 0),
        (("mlp.gate_up_proj",), "post_attention_layernorm", 0),
    ],
    "OPT": [
        (QKV, "self_attn_layer_norm", 0),
        (("self_attn.out_proj",), "self_attn.v_proj", 0),
        (("fc1",), "final_layer_norm", 0),
        (("fc2",), "fc1", 0),
    ],
    "GPTNeoX": [
        (("attention.query_key_value",), "input_layernorm", 0),
        (("mlp.dense_h_to_4h",), "post_attention_layernorm", 0),
    ],
    "Mixtral": [
        (QKV, "input_layernorm", 0),
        VALUES_TO_OUTPUT,
        *(((f"mlp.experts.{i}.down_proj",), f"mlp.experts.{i}.up_proj", 0) for i in range(4)),
    ],
    "Bloom": [
        (("self_attention.query_key_value",), "input_layernorm", 0),
        (("mlp.dense_h_to_4h",), "post_attention_layernorm", 0),
    ],
    "Falcon": [
        (("self_attention.query_key_value", "mlp.dense_h_to_4h"), "input_layernorm", 0),
    ],
    "DeepseekV3": [
        (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "input_layernorm", 0),
        (("self_attn.q_b_proj",), "self_attn.q_a_layernorm", 0),
        (("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm", 0),
        *(((f"mlp.experts.{i}.down_proj",), f"mlp.experts.{i}.up_proj", 0) for i in range(4)),
        (("mlp.shared_experts.down_proj",), "mlp.shared_experts.up_proj", 0),
    ],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": HEAD_DIM},
    "Gemma2": {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM},
    "Gemma3Text": {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Mixtral": {"num_local_experts": 4},
    "Bloom": {"n_head": 4},
    "Falcon": {"alibi": False},
    "DeepseekV3": {
        **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        **{"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4},
    },
}


def layer_of(kind: str) -> tuple[nn.Module, LayerInputs]:
    """Return a random layer of an architecture, and what its model calls it with; no weight or bias is at its start."""
    config: PretrainedConfig = getattr(transformers, f"{kind}Config")(**SHARED | OPTIONS.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    make_plain(model)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    layer = decoder_layers(model)[1][0]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(torch.randint(1, 64, (1, 9)), use_cache=False)
    layer._forward_pre_hooks.clear()
    layer._forward_pre_hooks_with_kwargs.clear()
    (((hidden_BTD,), arguments),) = calls
    return layer, LayerInputs(hidden_BTD, arguments)


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in layer.state_dict().items()}


def is_as(layer: nn.Module, before: dict[str, Tensor]) -> bool:
    after = layer.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def relative_change(layer: nn.Module, inputs: LayerInputs, group: ScaleGroup, scale: Tensor) -> float:
    """Return how far the layer's output moves under a scale, in units of what the layer adds; the layer is restored."""
    before, expected = snapshot(layer), inputs.run(layer)
    group.apply(layer, scale, torch.float32)
    assert not is_as(layer, before)
    change = inputs.run(layer) - expected
    layer.load_state_dict(before)
    return float(change.abs().max() / (expected - inputs.hidden_STD).abs().max())


@pytest.mark.parametrize("kind", EXPECTED)
@torch.no_grad()
def test_the_groups_of_an_architecture(kind: str) -> None:
    layer, inputs = layer_of(kind)
    before, places = snapshot(layer), {key: parameter for key, parameter in layer.named_parameters()}
    groups = find_scale_groups(layer, inputs, HEAD_DIM)
    assert [(group.linears, group.absorber, group.offset) for group in groups] == EXPECTED[kind]
    assert is_as(layer, before)
    assert all(layer.get_parameter(key) is parameter for key, parameter in places.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    for group in groups:
        width = int(layer.get_parameter(f"{group.absorber}.weight").shape[0])
        for _ in range(3):
            scale = torch.exp2(4 * torch.rand(width) - 2)
            assert relative_change(layer, inputs, group, scale) < 1e-5, group
        assert group.channels.shape == (layer.get_submodule(group.linears[0]).in_features,)
        assert int(group.channels.max()) == width - 1
        block = layer.get_submodule(group.block)
        inside = {f"{group.block}.{name}".removeprefix(".") for name in linears(block)}
        assert len(group.linears) == 1 or inside >= set(group.linears)


@torch.no_grad()
def test_false_groups_are_refused() -> None:
    layer, inputs = layer_of("Llama")
    groups = {group.absorber: group for group in find_scale_groups(layer, inputs, HEAD_DIM)}
    before_attention, before_output = groups["input_layernorm"], groups["self_attn.v_proj"]
    wrong = {
        "a norm whose output it does not read": replace(before_attention, linears=("self_attn.o_proj",)),
        "the norm of the other half": replace(before_attention, absorber="post_attention_layernorm"),
        "not every reader": replace(before_attention, linears=QKV[:2]),
        "one linear too many": replace(before_attention, linears=(*QKV, "mlp.gate_proj")),
        "an offset the norm does not have": replace(before_attention, offset=1),
        "keys, which pass a softmax": replace(before_output, absorber="self_attn.k_proj"),
        "heads in the wrong order": replace(before_output, channels=torch.arange(32) % 16),
        "the gate, which passes a SiLU": replace(groups["mlp.up_proj"], absorber="mlp.gate_proj"),
    }
    before = snapshot(layer)
    for what, group in wrong.items():
        assert not holds(layer, Trace.of(layer, inputs), group), what
        assert is_as(layer, before), what
    for group in groups.values():
        assert holds(layer, Trace.of(layer, inputs), group)
        assert is_as(layer, before)


@torch.no_grad()
def test_a_norm_of_one_plus_weight_needs_its_offset() -> None:
    layer, inputs = layer_of("Gemma2")
    group = find_scale_groups(layer, inputs, HEAD_DIM)[0]
    assert group.offset == 1
    assert not holds(layer, Trace.of(layer, inputs), replace(group, offset=0))


@torch.no_grad()
def test_an_output_that_is_not_finite_proves_nothing() -> None:
    layer, inputs = layer_of("Llama")
    group = find_scale_groups(layer, inputs, HEAD_DIM)[0]
    layer.get_parameter("mlp.down_proj.weight")[0, 0] = float("nan")
    assert not holds(layer, Trace.of(layer, inputs), group)


@pytest.mark.parametrize(("kind", "index"), [("Llama", 0), ("Gemma2", 0), ("OPT", 0), ("Qwen2", 1)])
@torch.no_grad()
def test_a_norm_is_rounded_as_it_will_be_stored_and_the_product_kept(kind: str, index: int) -> None:
    """The scale that comes back is the one applied; the product of absorber and linears is what it was."""
    layer, inputs = layer_of(kind)
    group = find_scale_groups(layer, inputs, HEAD_DIM)[index]
    expected, asked = inputs.run(layer), torch.exp2(torch.rand(layer.get_submodule(group.absorber).weight.shape[0]))
    columns = layer.get_parameter(f"{group.linears[0]}.weight").clone()
    applied = group.apply(layer, asked, torch.bfloat16)
    absorber = layer.get_submodule(group.absorber)
    if not isinstance(absorber, nn.Linear):
        assert torch.equal(absorber.weight, absorber.weight.bfloat16().float())
        assert not torch.equal(applied, asked)
    torch.testing.assert_close(applied, asked, rtol=0.03, atol=0)
    scaled = layer.get_parameter(f"{group.linears[0]}.weight")
    assert torch.equal(scaled, columns * applied[group.channels])
    change = (inputs.run(layer) - expected).abs().max() / (expected - inputs.hidden_STD).abs().max()
    assert change < 1e-5


@torch.no_grad()
def test_a_dead_channel_of_a_norm_is_left_alone() -> None:
    layer, inputs = layer_of("Llama")
    layer.get_parameter("input_layernorm.weight")[5] = 0
    group = find_scale_groups(layer, inputs, HEAD_DIM)[0]
    expected = inputs.run(layer)
    applied = group.apply(layer, torch.full((32,), 2.0), torch.bfloat16)
    assert applied[5] == 1
    assert layer.get_parameter("input_layernorm.weight")[5] == 0
    assert torch.isfinite(layer.get_parameter("self_attn.q_proj.weight")).all()
    torch.testing.assert_close(inputs.run(layer), expected, rtol=1e-4, atol=1e-5)
