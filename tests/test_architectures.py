"""Families of transformers, from tiny random weights all the way: quantized, stored, streamed, computing the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kernels.packed import PackedWeight, dequantize
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError
from offload.executor import executor_of, load
from offload.experts import Experts, make_plain
from offload.linear import PackedLinear
from offload.names import names_in_model
from offload.skeleton import build_skeleton, read_config
from offload.source_weights import SourceWeights
from quant import awq, gptq, rtn, statistics
from quant.groupwise import Grid, minmax, pack_weight
from quant.layer import UnreachedError, linears

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3, 12, 250, 64, 7, 7, 18]])
METHODS = {"rtn": rtn.main, "awq": awq.main, "gptq": gptq.main}
SHARED: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {**GEMMA, "final_logit_softcapping": 3.0},
    "Gemma3Text": GEMMA,
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "Bloom": {"n_head": 4},
    "Falcon": {"alibi": False},
    "Falcon with alibi": {"alibi": True},
    "GPTJ": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "rotary_dim": 8},  # layers return tuples
    "Bert": {"is_decoder": True},  # the module that holds the layers is not the one that embeds
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "DeepseekV3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}


def make_model(kind: str, tokenizer: Path, directory: Path) -> Path:
    """Save a random model of a family, bfloat16, no weight or bias as it starts, with the tiny model's tokenizer."""
    config = getattr(transformers, f"{kind.split()[0]}Config")(**{**SHARED, **FAMILIES[kind]})
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    built.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)
    return directory


def original(model: Path, dtype: torch.dtype) -> PreTrainedModel:
    built: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager")
    return built


def reference(model: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Load the original with plain transformers and put the checkpoint's weights, dequantized, where they belong."""
    built = original(model, dtype)
    skeleton = build_skeleton(read_config(model), dtype)
    stored = {key: tensor for blob in checkpoint.blobs for key, tensor in load_file(blob.path).items()}
    tensors = {place: stored[key] for key, place in names_in_model(skeleton, stored).items()}
    assert len(tensors) == len(stored)
    for key, tensor in tensors.items():
        stem, _, part = key.rpartition(".")
        if part == "weight_packed":
            scale, zero = tensors[f"{stem}.weight_scale"], tensors.get(f"{stem}.weight_zero_point")
            place(
                built,
                f"{stem}.weight",
                dequantize(
                    PackedWeight(
                        tensor.view(torch.uint8), scale, zero, checkpoint.recipe.group_size or tensor.shape[1] * 8
                    ),
                    dtype,
                ),
            )
        elif not part.startswith("weight_"):
            place(built, key, tensor.to(dtype))
    return built


def place(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Overwrite a tensor of a model; one of an expert is a slice of the fused parameter."""
    state = model.state_dict()
    if name in state:
        assert not torch.isnan(value).any()
        state[name].copy_(value)
        return
    experts, index, linear, _ = name.rsplit(".", 3)
    if linear == "down_proj":
        state[f"{experts}.down_proj"][int(index)].copy_(value)
    else:
        state[f"{experts}.gate_up_proj"][int(index)].chunk(2)[linear == "up_proj"].copy_(value)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def quantize(method: str, model: Path, text: Path, output: Path, *more: str, samples: int = 6) -> Checkpoint:
    windows = ["--num-samples", str(samples), "--seq-len", "32"]
    flags = [*more, *([] if method == "rtn" else ["--calibration", str(text), *windows])]
    assert METHODS[method](["--model", str(model), "--output", str(output), "--group-size", "32", *flags]) == 0
    return Checkpoint.open(output)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_goes_all_the_way(
    kind: str,
    method: str,
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
) -> None:
    """Streamed it equals resident bit for bit, and in both it computes what transformers does with the same weights."""
    model = make_model(kind, tiny_model, tmp_path / "model")
    checkpoint = quantize(method, model, calibration_text, tmp_path / "out")
    exact = logits(load(checkpoint.directory, dtype=torch.float32, mode="exact"))
    assert torch.isfinite(exact).all()
    truth, theirs = (logits(reference(model, checkpoint, dtype)) for dtype in (torch.float64, torch.float32))
    assert (exact - truth).abs().max() <= 2 * (theirs - truth).abs().max()
    assert (truth - logits(original(model, torch.float64))).abs().max() > 1e-3

    resident = logits(load(checkpoint.directory))
    streamed = load(checkpoint.directory, device_map="disk", slots=2, poison=True)
    for _ in range(2):
        assert torch.equal(logits(streamed), resident)
    executor_of(streamed).close()


@pytest.mark.parametrize("kind", ["Gemma2", "Bloom", "GPTJ", "Mixtral", "DeepseekV3"])
def test_rounding_is_learned_whatever_a_layer_holds(
    kind: str, tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """Layers that return tuples, attention step by step, experts of which a step may see no token."""
    model, slow = make_model(kind, tiny_model, tmp_path / "model"), ["--tier", "slow", "--set", "learn.steps=4"]
    checkpoint = quantize("gptq", model, calibration_text, tmp_path / "out", *slow, samples=9)
    learned = [report["chosen"]["learned"] for report in checkpoint.layer_errors.values() if "chosen" in report]
    assert len(learned) == 2
    assert all(0 < each["before"] < 1 and 0 < each["after"] < 1 for each in learned)


def test_experts_that_stay_fused_are_listed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-OSS keeps its experts transposed and with biases: they are listed, and run as they are."""
    monkeypatch.setitem(FAMILIES, "GptOss", {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8})
    model = make_model("GptOss", tiny_model, tmp_path / "model")
    checkpoint = quantize("rtn", model, tmp_path, tmp_path / "out")
    said = capsys.readouterr().err
    assert "left as it is, no linear: mlp.experts.gate_up_proj of 2 layers, 192.0 KiB" in said
    assert "left as it is, no linear: mlp.router.weight of 2 layers, 1.0 KiB" in said
    exact = logits(load(checkpoint.directory, dtype=torch.float32, mode="exact"))
    theirs, truth = (logits(reference(model, checkpoint, dtype)) for dtype in (torch.float32, torch.float64))
    assert (exact - truth).abs().max() <= 2 * (theirs - truth).abs().max()


class Gateless(torch.nn.Module):
    """Fused experts without a gate, in their plainest form."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.up_proj = torch.nn.Parameter(torch.randn(experts, inner, hidden), requires_grad=False)
        self.down_proj = torch.nn.Parameter(torch.randn(experts, hidden, inner), requires_grad=False)
        self.act_fn = torch.nn.GELU()

    def forward(self, hidden_TD: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = [
            sum(w * (self.down_proj[e] @ self.act_fn(self.up_proj[e] @ x)) for e, w in zip(i, ws, strict=True))
            for x, i, ws in zip(hidden_TD, index, weights, strict=True)
        ]
        return torch.stack(rows)


def test_experts_without_a_gate() -> None:
    gateless = Gateless(4, 32, 24)
    holder = torch.nn.Module()
    holder.experts = gateless
    make_plain(holder)
    assert isinstance(holder.experts, Experts)
    assert list(linears(holder.experts[3])) == ["up_proj", "down_proj"]
    hidden, index, weights = torch.randn(9, 32), torch.randint(4, (9, 1)), torch.rand(9, 1)
    torch.testing.assert_close(holder.experts(hidden, index, weights), gateless(hidden, index, weights))


class Doubling(Gateless):
    """Looks like fused experts and computes something else."""

    def forward(self, hidden_TD: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return 2 * super().forward(hidden_TD, index, weights)


class Halving(torch.nn.Linear):
    """Looks like a linear and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_what_only_looks_like_experts_or_a_linear_stays_as_it_is() -> None:
    holder = torch.nn.Module()
    holder.experts, holder.linear = Doubling(4, 32, 24), Halving(8, 8)
    make_plain(holder)
    assert type(holder.experts) is Doubling
    assert type(holder.linear) is Halving


def test_a_packed_linear_shows_its_weight_while_it_is_in_memory() -> None:
    """Some models look at a linear's weight besides calling it."""
    weight, grid = torch.randn(16, 64), Grid(32, symmetric=True)
    linear = PackedLinear(64, 16, False, torch.bfloat16, 4, "fast")
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        _ = linear.weight
    linear.packed = pack_weight(weight, minmax(weight, grid), grid)
    assert torch.equal(linear.weight, dequantize(linear.packed, torch.bfloat16))


def test_a_model_whose_layers_come_before_all_else(tiny_model: Path, tmp_path: Path) -> None:
    """No shard is empty, though all outer tensors are registered behind the layers."""
    config = transformers.CpmAntConfig(
        vocab_size=264, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=96, num_hidden_layers=2
    )
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    checkpoint = quantize("rtn", model, tmp_path, tmp_path / "out")
    assert all(blob.tensors for blob in checkpoint.blobs)
    assert torch.isfinite(logits(load(checkpoint.directory))).all()


def restored(model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Store a model's tensors again, changed."""
    tensors = change(load_file(model / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / "model.safetensors")
    return model


def as_transformers_names_them(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the hub's tensors of a Mixtral, and fuse its experts."""
    fused = {}
    for layer in range(2):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        gate, down, up = (torch.stack([tensors.pop(f"{experts}.{e}.w{i}.weight") for e in range(4)]) for i in (1, 2, 3))
        fused[f"{experts}.gate_up_proj"], fused[f"{experts}.down_proj"] = torch.cat((gate, up), 1), down
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in (tensors | fused).items()}


def test_experts_stored_fused_give_the_same_as_stored_apart(tiny_model: Path, tmp_path: Path) -> None:
    apart, fused = (make_model("Mixtral", tiny_model, tmp_path / name) for name in ("apart", "fused"))
    shutil.copy(apart / "model.safetensors", fused / "model.safetensors")
    restored(fused, as_transformers_names_them)
    results = [quantize("rtn", model, tmp_path, tmp_path / f"{model.name}-out") for model in (apart, fused)]
    names = [{name for blob in result.blobs for name in blob.tensors} for result in results]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in names[0]
    assert "model.layers.1.mlp.experts.3.down_proj.weight_packed" in names[1]
    assert "model.layers.1.mlp.gate.weight" in names[1]
    first, second = (logits(load(result.directory)) for result in results)
    assert torch.equal(first, second)


def test_a_model_stored_without_its_prefix(tiny_model: Path, tmp_path: Path) -> None:
    """As BLOOM is on the hub: saved from the model without its head."""
    whole, bare = (make_model("Bloom", tiny_model, tmp_path / name) for name in ("whole", "bare"))
    shutil.copy(whole / "model.safetensors", bare / "model.safetensors")
    restored(bare, lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
    first, second = (quantize("rtn", model, tmp_path, tmp_path / f"{model.name}-out") for model in (whole, bare))
    assert {name.removeprefix("transformer.") for blob in first.blobs for name in blob.tensors} == {
        name for blob in second.blobs for name in blob.tensors
    }
    assert torch.equal(logits(load(first.directory)), logits(load(second.directory)))


def test_two_tensors_for_one_place_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = make_model("Bloom", tiny_model, tmp_path / "model")
    restored(model, lambda tensors: {**tensors, "ln_f.bias": tensors["transformer.ln_f.bias"].clone()})
    message = "tensors '.*ln_f.bias' and '.*ln_f.bias' are the same one, 'transformer.ln_f.bias'"
    with pytest.raises(CheckpointError, match=message):
        SourceWeights.open(model).placed(build_skeleton(read_config(model), torch.float32))


def leave_expert_3_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite the routers: the first two experts' scores are opposite, the last one's is zero, below the larger."""
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensor[1], tensor[3] = -tensor[0], 0
    return tensors


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_an_expert_without_tokens_is_rounded_to_nearest_and_said_to_be(
    method: str,
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(FAMILIES, "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1})
    model = restored(make_model("Mixtral", tiny_model, tmp_path / "model"), leave_expert_3_alone)
    nearest = quantize("rtn", model, calibration_text, tmp_path / "nearest")
    checkpoint = quantize(method, model, calibration_text, tmp_path / "out", samples=48)
    said = capsys.readouterr().err
    for index in range(2):
        layer = f"model.layers.{index}"
        unreached = [f"mlp.experts.3.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
        assert set(unreached) <= set(checkpoint.layer_errors[layer]["unreached"])
        assert f"{layer}: no calibration token reaches {len(checkpoint.layer_errors[layer]['unreached'])} of 16" in said
        tensors, rounded = (load_file(result.blobs[index + 1].path) for result in (checkpoint, nearest))
        for part in ("w1", "w2", "w3"):
            name = f"{layer}.block_sparse_moe.experts.3.{part}.weight_packed"
            assert torch.equal(tensors[name], rounded[name])
        assert not checkpoint.layer_errors[layer]["fallback"]


def test_an_expert_that_loses_its_tokens_on_the_way_is_rounded_to_nearest(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = statistics.observe

    def losing(layer: Any, original: Any, inputs: Any, name: str) -> Any:
        if name == "mlp.experts.1.down_proj":
            raise UnreachedError(name)
        return observe(layer, original, inputs, name)

    monkeypatch.setattr("quant.statistics.observe", losing)
    model = make_model("Mixtral", tiny_model, tmp_path / "model")
    checkpoint = quantize("gptq", model, calibration_text, tmp_path / "out")
    chosen = checkpoint.layer_errors["model.layers.0"]["chosen"]
    assert chosen["lost_tokens"] == ["mlp.experts.1.down_proj"]
    assert torch.isfinite(logits(load(checkpoint.directory))).all()


def test_the_result_counts_linears_without_tokens(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--calibration", str(calibration_text)]
    assert awq.main([*arguments, "--num-samples", "4", "--seq-len", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linears_without_tokens"] == 0
