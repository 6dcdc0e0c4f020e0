"""A single token takes the fused call exactly where it is proved equal to transformers' modules, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from kernels.cpu_matmul import compiled_library
from kernels.decoder import CompiledLayer, Token
from kernels.kv_block import CHUNK_TOKENS
from offload import fused, proved, single_token
from offload.executor import executor_of, load, new_cache
from offload.kv.cache import KVCache
from tests.test_executor import streamed

pytestmark = pytest.mark.skipif(compiled_library() is None, reason="no compiled kernels")

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "phi3": {"pad_token_id": 0, "sliding_window": None},
    "smollm3": {"pad_token_id": 0},
}


def checkpoint_of(family: str, directory: Path, tokenizer_of: Path, **options: Any) -> Path:
    """A tiny random model of a family, in 4 bits."""
    from quant.rtn import main

    settings = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(family, **(settings | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory / "model")
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(directory / "model")
    flags = ["--output", str(directory / "int4"), "--group-size", "32"]
    assert main(["--model", str(directory / "model"), *flags]) == 0
    return directory / "int4"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens before each fused step that is run."""
    counted: list[int] = []
    dense_token = fused.dense_token

    def counting(*arguments: Any) -> Token:
        counted.append(arguments[5])
        return dense_token(*arguments)

    monkeypatch.setattr(fused, "dense_token", counting)
    return counted


@torch.inference_mode()
def decode(model: PreTrainedModel, count: int = 6, cache: DynamicCache | None = None) -> Tensor:
    """Logits of each greedy token after a prompt, [count, vocabulary]."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = [model(TOKENS, past_key_values=cache).logits[0, -1]]
    while len(logits) < count:
        logits.append(model(logits[-1].argmax().view(1, 1), past_key_values=cache).logits[0, -1])
    return torch.stack(logits)


@torch.inference_mode()
def generate(model: PreTrainedModel, **options: Any) -> Tensor:
    given = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    return model.generate(TOKENS, **(given | options))[0]


def through_modules(monkeypatch: pytest.MonkeyPatch, directory: Path, **options: Any) -> PreTrainedModel:
    with monkeypatch.context() as patched:
        patched.setattr("offload.streaming.fuse", lambda *arguments: 0)
        return load(directory, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_are_fused_and_compute_what_their_modules_do(
    family: str, tiny_model: Path, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint_of(family, tmp_path, tiny_model, **FAMILIES[family])
    model = load(directory, dtype=torch.float32, mode="exact")
    steps.clear()
    found = decode(model)
    assert steps == [tokens for tokens in range(7, 12) for _ in range(3)]
    expected = decode(through_modules(monkeypatch, directory, dtype=torch.float32, mode="exact"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_only_looks_alike_is_left_to_its_modules(
    tiny_model: Path,
    tmp_path: Path,
    steps: list[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = checkpoint_of("granite", tmp_path, tiny_model, residual_multiplier=0.22)
    model = load(directory)
    assert "GraniteDecoderLayer: the fused decode step differs from the modules" in caplog.text
    steps.clear()
    found = decode(model)
    assert steps == []
    assert torch.equal(found, decode(through_modules(monkeypatch, directory)))


def test_an_unrelated_layer_is_left_alone_silently(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: list[int]
) -> None:
    directory = checkpoint_of("stablelm", tmp_path, tiny_model)
    decode(load(directory))
    assert steps == []
    assert caplog.text == ""


def test_layers_of_another_kind_are_proved_apart(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs: list[int] = []
    is_proved = proved._is_proved

    def counting(model: PreTrainedModel, layer: Any, *more: Any) -> bool:
        proofs.append(layer.self_attn.layer_idx)
        return is_proved(model, layer, *more)

    monkeypatch.setattr(proved, "_is_proved", counting)
    load(checkpoint_of("smollm3", tmp_path, tiny_model, pad_token_id=0, no_rope_layers=[1, 0, 1]))
    assert proofs == [0, 1]


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_streamed_decoding_equals_resident(
    tiny_checkpoint: Path,
    steps: list[int],
    depth: int,
    mode: Any,
    dtype: torch.dtype,
) -> None:
    expected = decode(load(tiny_checkpoint, mode=mode, dtype=dtype))
    assert torch.isfinite(expected).all()
    with streamed(tiny_checkpoint, depth, mode=mode, dtype=dtype) as model:
        steps.clear()
        for _ in range(2):
            assert torch.equal(decode(model), expected)
        assert len(steps) == 2 * 5 * 3


def test_an_interrupted_decode_step_leaves_right_tokens(tiny_checkpoint: Path) -> None:
    expected = decode(load(tiny_checkpoint))
    with streamed(tiny_checkpoint, depth=2) as model:
        for position in range(3):
            layer = executor_of(model).layers[position]
            calls = iter(range(100))

            def interrupt(*arguments: Any, calls: Any = calls) -> None:
                if next(calls) == 2:
                    raise KeyboardInterrupt

            hook = layer.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                decode(model)
            hook.remove()
            assert torch.equal(decode(model), expected)


def test_the_cache_is_taken_over_whatever_was_done_to_it(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    whole = decode(model, 8)
    cache = DynamicCache(config=model.config)
    decode(model, 8, cache)
    assert cache.get_seq_length() == 14
    cache.crop(-3)  # three tokens are taken back and decoded again
    with torch.inference_mode():
        for index in (4, 5, 6):
            logits = model(whole[index].argmax().view(1, 1), past_key_values=cache).logits[0, -1]
            assert torch.equal(logits, whole[index + 1])
    cache.batch_select_indices(torch.tensor([0]))  # copies the cache
    assert cache.get_seq_length() == 14


def test_the_cache_grows_past_its_room(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_checkpoint)
    whole = decode(model, 20)
    monkeypatch.setattr(single_token, "_ROOM_TOKENS", 3)
    assert torch.equal(decode(model, 20), whole)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_every_way_of_generating_agrees_with_the_modules(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    exact: dict[str, Any] = {"dtype": torch.float32, "mode": "exact"}  # no token is a matter of rounding
    expected = generate(through_modules(monkeypatch, tiny_checkpoint, **exact), **options)
    assert torch.equal(generate(load(tiny_checkpoint, **exact), **options), expected)


def test_batches_and_padding_go_through_the_modules(tiny_checkpoint: Path, steps: list[int]) -> None:
    model = load(tiny_checkpoint)
    steps.clear()
    two = TOKENS.repeat(2, 1)
    mask = torch.ones_like(two)
    mask[1, :2] = 0
    with torch.inference_mode():
        model.generate(two, attention_mask=mask, max_new_tokens=4, do_sample=False)
        model.generate(two[1:], attention_mask=mask[1:], max_new_tokens=4, do_sample=False)
    assert steps == []


def test_a_cache_whose_beginning_was_dropped_is_taken_over_as_it_is(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    token, logits = torch.tensor([[9]]), []
    for whole in (False, True):
        cache = DynamicCache(config=model.config)
        decode(model, 4, cache)
        for (
            layer
        ) in cache.layers:  # views into the buffers, which begin elsewhere but step alike; or tensors of their own
            layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
            if whole:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        with torch.inference_mode():
            logits.append(model(token, past_key_values=cache, position_ids=torch.tensor([[10]])).logits)
    assert torch.equal(*logits)


@torch.inference_mode()
def decode_int8(model: PreTrainedModel, count: int = 70) -> Tensor:
    cache = new_cache(model)
    assert isinstance(cache, KVCache)
    return decode(model, count, cache)


@pytest.fixture
def int8_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens before each fused step over int8 blocks that is run."""
    counted: list[int] = []
    int8_token = fused.int8_token

    def counting(*arguments: Any) -> Token:
        counted.append(arguments[4])
        return int8_token(*arguments)

    monkeypatch.setattr(fused, "int8_token", counting)
    return counted


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_over_int8_keys_compute_what_the_modules_do(
    family: str, tiny_model: Path, tmp_path: Path, int8_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to what the last bits of float32 do to the modules themselves: a key beside the middle takes another code."""
    directory = checkpoint_of(family, tmp_path, tiny_model, **FAMILIES[family])
    words: dict[str, Any] = {"dtype": torch.float32, "mode": "exact", "kv": "int8"}
    found = decode_int8(load(directory, **words))
    assert int8_steps == [tokens for tokens in range(7, 76) for _ in range(3)]
    model = through_modules(monkeypatch, directory, **words)
    expected = decode_int8(model)
    model.get_input_embeddings().register_forward_hook(shaken)
    noise = max(float((decode_int8(model) - expected).norm()) for _ in range(3))
    assert noise < 0.01 * expected.norm()
    assert (found - expected).norm() <= max(2 * noise, 1e-3 * float(expected.norm()))


def shaken(module: Any, arguments: Any, hidden: Tensor) -> Tensor:
    """Change every number by its last bits in float32."""
    return hidden * (1 + 2e-7 * torch.randn_like(hidden))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_loaded_model_generates_with_the_cache_it_was_asked_for(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model = load(tiny_checkpoint, kv="int8")
    expected = generate(model, past_key_values=new_cache(model), **options)
    made: list[Any] = []
    monkeypatch.setattr("offload.executor.new_cache", lambda model: made.append(new_cache(model)) or made[-1])
    assert torch.equal(generate(model, **options), expected)
    assert [type(cache) for cache in made] == [KVCache]
    assert made[0].get_seq_length() >= len(expected) - 1
    told: list[dict[str, Any]] = [{"past_key_values": DynamicCache(config=model.config)}, {"use_cache": False}]
    for other in [*told, {"cache_implementation": "static"}]:
        generate(model, **other)
    assert len(made) == 1  # who tells of another cache gets that


@pytest.mark.parametrize("depth", [1, 2])
def test_streamed_decoding_over_int8_keys_equals_resident_whatever_interrupts_it(
    tiny_checkpoint: Path, depth: int
) -> None:
    expected = decode_int8(load(tiny_checkpoint, kv="int8"), 10)
    with streamed(tiny_checkpoint, depth, kv="int8") as model:
        for position in range(3):
            calls = iter(range(100))

            def interrupt(*arguments: Any, calls: Any = calls) -> None:
                if next(calls) == 2:
                    raise KeyboardInterrupt

            hook = executor_of(model).layers[position].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                decode_int8(model, 10)
            hook.remove()
            assert torch.equal(decode_int8(model, 10), expected)


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("depth", [1, 2])
def test_steps_over_keys_on_disk_give_the_bits_of_those_in_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, mode: Any
) -> None:
    """The context passes the end of a chunk in the middle, and is cut back into one that was on disk."""
    monkeypatch.setattr("offload.kv.store.cache_directory", lambda: tmp_path)
    directory = checkpoint_of("llama", tmp_path, tiny_model, max_position_embeddings=8192)
    prompt = torch.randint(4, 250, (1, 3 * CHUNK_TOKENS - 2), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def run(model: PreTrainedModel) -> tuple[Tensor, Any]:
        cache = new_cache(model)
        logits = [model(prompt, past_key_values=cache, logits_to_keep=1).logits[0, -1]]
        for _ in range(2):
            for _ in range(6):
                logits.append(model(logits[-1].argmax().view(1, 1), past_key_values=cache).logits[0, -1])
            cache.crop(-7)  # one token into what was on disk, the second time
        return torch.stack(logits), cache

    expected, _ = run(load(directory, kv="int8", mode=mode, context_tokens=4096))
    steps: list[int] = []
    append = CompiledLayer.append_int8
    monkeypatch.setattr(CompiledLayer, "append_int8", lambda self, *given: steps.append(1) or append(self, *given))
    with streamed(directory, depth, cache_implementation="offloaded", mode=mode, context_tokens=4096) as model:
        found, cache = run(model)
        assert torch.equal(found, expected)
        assert len(steps) == 12 * 3
        assert cache.layers[0]._chunks.count(None) == 2
