"""Families of transformers, from tiny random weights all the way: quantized, stored, streamed, computing the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kernels.packed import PackedWeight, dequantize
from offload.checkpoint import Checkpoint
from offload.executor import executor_of, load
from offload.names import names_in_model
from offload.placement import Placement, plan
from offload.skeleton import build_skeleton, read_config
from quant import awq, gptq, rtn

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3, 12, 250, 64, 7, 7, 18]])
SHORT = ["--num-samples", "6", "--seq-len", "32"]
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
    config = getattr(transformers, f"{kind}Config")(**{**SHARED, **FAMILIES[kind]})
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
            place(built, f"{stem}.weight", dequantize(PackedWeight(tensor.view(torch.uint8), scale, zero, 32), dtype))
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


def quantize(method: str, model: Path, text: Path, output: Path) -> Checkpoint:
    flags = [] if method == "rtn" else ["--calibration", str(text), *SHORT]
    assert METHODS[method](["--model", str(model), "--output", str(output), "--group-size", "32", *flags]) == 0
    return Checkpoint.open(output)


def all_on_disk(needs: Any, budget_bytes: int | None) -> Placement:
    return Placement(("disk",) * len(needs.layers_bytes), 2, needs, budget_bytes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_goes_all_the_way(
    kind: str,
    method: str,
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    monkeypatch.setattr("offload.executor.plan", all_on_disk)
    streamed = load(checkpoint.directory, poison=True)
    monkeypatch.setattr("offload.executor.plan", plan)
    for _ in range(2):
        assert torch.equal(logits(streamed), resident)
    executor_of(streamed).close()
