"""The int8 cache: every way of generating gives the tokens of a cache that rounds its content and attends in torch."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kernels.kv_block import BLOCK_TOKENS, quantize_tokens
from offload.errors import UsageError
from offload.kv.cache import INT8_ATTENTION, Int8Layer, KVCache, int8_attention, use_int8_attention

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
SLOW = {"rope_type": "linear", "factor": 1e4, "rope_theta": 1e4}
"""Angles so small that a key hardly turns within the prompt."""

PROMPT = torch.randint(1, 128, (1, 90), generator=torch.Generator().manual_seed(1))


def tiny(kind: type = LlamaConfig, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **more})).eval()
    model.generation_config.pad_token_id = 0
    return model


class RoundedLayer(DynamicLayer):  # type: ignore[misc]
    """Transformers' own cache, of keys and values that went through 8 bits."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return super().update(rounded(key_states), rounded(value_states))  # type: ignore[no-any-return]


def rounded(x: Tensor) -> Tensor:
    codes, scale = quantize_tokens(x)
    return (codes.float() * scale.float()[..., None]).to(x.dtype)


def rounded_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [RoundedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def int8_cache(model: PreTrainedModel) -> KVCache:
    assert use_int8_attention(model)
    return KVCache(model.config)


def generate(model: PreTrainedModel, cache: Any, tokens: Tensor = PROMPT, **options: Any) -> list[list[int]]:
    words = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(tokens), **options}
    with torch.inference_mode():
        found: list[list[int]] = model.generate(tokens, past_key_values=cache, **words).tolist()
    return found


WAYS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "greedy": lambda model: {},
    "sampled": lambda model: {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": lambda model: {"num_beams": 3},
    "returned beams": lambda model: {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 5},
    "assisted": lambda model: {"assistant_model": tiny(num_hidden_layers=1)},
    "chunked prompt": lambda model: {"prefill_chunk_size": 32},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_gives_the_tokens_of_the_same_cache_in_torch(way: str) -> None:
    def run(model: PreTrainedModel, cache: Any) -> list[list[int]]:
        torch.manual_seed(5)
        return generate(model, cache, **WAYS[way](model))

    plain, ours = tiny(), tiny()
    expected = run(plain, rounded_cache(plain))
    assert run(ours, int8_cache(ours)) == expected
    held = tiny()  # its attention knows no blocks, and gets what they hold
    assert run(held, KVCache(held.config)) == expected


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tiny(Qwen2Config), id="qwen2"),
        pytest.param(lambda: tiny(MistralConfig, sliding_window=None), id="mistral"),
        pytest.param(lambda: tiny(GPTNeoXConfig), id="gpt-neox"),
        pytest.param(lambda: tiny(Gemma3TextConfig, sliding_window=24, num_hidden_layers=6), id="gemma3, hybrid"),
    ],
)
def test_families(model: Callable[[], PreTrainedModel]) -> None:
    plain, ours = model(), model()
    assert generate(ours, int8_cache(ours)) == generate(plain, rounded_cache(plain))


def test_layers_of_other_kinds_stay_what_they_are() -> None:
    model = tiny(Gemma3TextConfig, sliding_window=24, num_hidden_layers=6)
    kinds = [type(layer) for layer in int8_cache(model).layers]
    assert kinds == [DynamicSlidingWindowLayer] * 5 + [Int8Layer]


def test_left_padding() -> None:
    tokens = torch.cat([PROMPT, PROMPT.flip(1)])
    tokens[0, :37] = 0
    plain, ours = tiny(), tiny()
    mask = (tokens != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 30}
    expected = generate(plain, rounded_cache(plain), tokens, **options)
    assert generate(ours, int8_cache(ours), tokens, **options) == expected
    alone = generate(ours, int8_cache(ours), tokens[:1, 37:], max_new_tokens=30)
    assert alone[0] == expected[0][37:]


def test_turns_go_on_from_the_cache_and_a_reset_one_is_new() -> None:
    model = tiny()
    cache = int8_cache(model)
    first = torch.tensor(generate(model, cache))
    assert cache.get_seq_length() == first.shape[1] - 1
    more = torch.cat([first, PROMPT.flip(1)], dim=1)
    again = generate(model, cache, more)
    assert again == generate(model, int8_cache(model), more)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert generate(model, cache, more) == again


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_prompts_cache_goes_its_own_way(copied: Callable[[KVCache], KVCache]) -> None:
    model = tiny()
    cache = int8_cache(model)
    generate(model, cache, max_new_tokens=1)
    one, other = torch.cat([PROMPT, PROMPT[:, :9]], dim=1), torch.cat([PROMPT, PROMPT[:, 40:49]], dim=1)
    expected = [generate(model, int8_cache(model), tokens) for tokens in (one, other)]
    second = copied(cache)
    assert [generate(model, cache, one), generate(model, second, other)] == expected
    more = torch.tensor([[*expected[0][0], *PROMPT[0, :5].tolist()]])
    assert generate(model, cache, more) == generate(model, int8_cache(model), more)


@pytest.mark.parametrize("left", [BLOCK_TOKENS + 1, BLOCK_TOKENS, 20])
def test_a_cropped_cache_is_that_of_the_shorter_text(left: int) -> None:
    model = tiny()
    cache = int8_cache(model)
    with torch.inference_mode():
        model(PROMPT, past_key_values=cache)
        cache.crop(left - PROMPT.shape[1])
        shorter = int8_cache(model)
        model(PROMPT[:, :left], past_key_values=shorter)
        next_tokens = PROMPT[:, 10:20]
        found, expected = (model(next_tokens, past_key_values=each).logits for each in (cache, shorter))
    assert torch.equal(found, expected)
    assert cache.nbytes == shorter.nbytes


def test_what_cannot_be_cropped_is_refused() -> None:
    layer = Int8Layer()
    layer.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    for count in (1, -4):
        with pytest.raises(
            ValueError, match=rf"crop\({count}\): expected the negative number of tokens to forget, of 3"
        ):
            layer.crop(count)


def test_the_bytes_do_not_depend_on_how_a_text_was_cut() -> None:
    key, value = torch.randn(2, 3, 200, 16), torch.randn(2, 3, 200, 24)
    whole, cut = Int8Layer(), Int8Layer()
    whole.update(key, value)
    for part in (slice(0, 1), slice(1, 64), slice(64, 130), slice(130, 200)):
        cut.update(key[:, :, part], value[:, :, part])
    for one, other in zip(whole.update(key, value), cut.update(key, value), strict=True):
        assert torch.equal(one, other)


def test_bytes_per_token_with_everything_counted() -> None:
    tokens, heads, dim = 4096, 8, 128
    layer = Int8Layer()
    layer.update(torch.randn(1, heads, tokens, dim), torch.randn(1, heads, tokens, dim))
    assert layer.nbytes / tokens <= 0.53 * 2 * 2 * heads * dim


def test_an_offset_goes_to_the_device_of_the_keys() -> None:
    """Kernels of a GPU read no tensor of the host. The meta device stands in for it: it has no memory, but a name."""
    layer = Int8Layer(torch.randn(2, 16))
    layer.lazy_initialization(*torch.empty(2, 1, 2, 5, 16, device="meta"))
    layer.make_room(5)
    assert layer.key_offset is not None
    devices = {layer.key_offset.device.type, *(block.memory.device.type for block in layer.blocks)}
    assert devices == {"meta"}


def test_an_offset_of_the_keys_saves_the_bits_that_a_strong_bias_costs() -> None:
    """Of pairs that turn slowly a constant in the bias stays one after rotation; a code of one scale is spent on it."""
    plain, symmetric, calibrated = (tiny(Qwen2Config, rope_parameters=SLOW) for _ in range(3))
    offsets = {}
    for index in range(3):
        offsets[index] = 60 * torch.randn(2, 16, generator=torch.Generator().manual_seed(index))
        for model in (plain, symmetric, calibrated):
            model.model.layers[index].self_attn.k_proj.bias.data += offsets[index].flatten()
    assert use_int8_attention(calibrated)
    with torch.inference_mode():
        expected = plain(PROMPT).logits.log_softmax(-1)
        lossy = symmetric(PROMPT, past_key_values=int8_cache(symmetric)).logits.log_softmax(-1)
        kept = calibrated(PROMPT, past_key_values=KVCache(calibrated.config, offsets)).logits.log_softmax(-1)
    assert (kept - expected).abs().mean() < 0.1 * (lossy - expected).abs().mean()


def test_a_model_whose_scores_are_capped_keeps_its_attention() -> None:
    model = tiny(Gemma2Config, sliding_window=1024, query_pre_attn_scalar=16)
    before = model.config._attn_implementation
    assert not use_int8_attention(model)
    assert model.config._attn_implementation == before != INT8_ATTENTION


def test_what_int8_attention_cannot_do_is_refused() -> None:
    layer = Int8Layer(direct=True)
    query = torch.randn(1, 4, 1, 16)
    key, value = layer.update(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
    module = torch.nn.Identity()
    assert key.shape == value.shape == (1, 2, 9, 16)
    assert key.isnan().all()
    with pytest.raises(UsageError, match="Identity changes keys after they are cached: int8 keys cannot be used"):
        int8_attention(module, query, key[:, :, 1:], value, None)
    with pytest.raises(UsageError, match="Identity: int8 attention knows no softcap"):
        int8_attention(module, query, key, value, None, softcap=30.0)
    with pytest.raises(UsageError, match="takes masks, not biases"):
        int8_attention(module, query, key, value, torch.full((1, 1, 1, 9), -0.5))
    mask = torch.zeros(1, 1, 1, 9)
    mask[..., :4] = torch.finfo(torch.float32).min
    masked, _ = int8_attention(module, query, key, value, mask)
    assert torch.equal(masked, int8_attention(module, query, key, value, mask == 0)[0])
    assert masked.shape == (1, 1, 4, 16)
