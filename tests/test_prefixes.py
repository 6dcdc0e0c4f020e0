"""Prompts that begin alike: what is reused changes no bit, whole passes alone, the least used go first."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, Gemma3TextConfig
from transformers.cache_utils import DynamicLayer

from offload.gpu.recovery import move_layer
from offload.kv.cache import Int8Layer
from offload.sampling import Sampling
from offload.serving.prefixes import Prefixes
from offload.session import Prompts, Session

PASS_TOKENS = 64
SETTINGS = Sampling(0.8, seed=3)


@pytest.fixture(scope="module", params=[None, "int8"])
def session(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Any:
    session = Session(Prompts(tiny_checkpoint), 512, {"device_map": "disk", "kv": request.param})
    yield session
    session.close()


@pytest.fixture(autouse=True)
def _short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.session.PREFILL_CHUNK_TOKENS", PASS_TOKENS)


def tokens(seed: int, count: int) -> list[int]:
    return [random.Random(seed).randrange(1, 256) for _ in range(count)]


def held(cache: Cache) -> list[Tensor]:
    """All that a cache keeps of its tokens, bit for bit."""
    if isinstance(cache.layers[0], Int8Layer):
        full = [list(layer.blocks)[: layer.tokens // 64] for layer in cache.layers]
        return [block.memory for blocks in full for block in blocks]
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def run(session: Session, prompt: list[int], prefixes: Prefixes | None) -> tuple[int, list[int], list[Tensor]]:
    cache = session.new_cache()
    assert cache is not None
    reused = 0 if prefixes is None else prefixes.take(prompt, cache)
    answer = session.generate(prompt, 70, SETTINGS, None, cache)
    if prefixes is not None:
        prefixes.keep(prompt, cache)
    return reused, answer, held(cache)


@pytest.mark.parametrize(("context", "useful"), [(PASS_TOKENS + 1, 0), (PASS_TOKENS + 2, 2 * PASS_TOKENS)])
def test_tokens_are_kept_where_the_longest_prompt_finds_some(session: Session, context: int, useful: int) -> None:
    most = 3 * PASS_TOKENS - 1
    assert Prefixes.useful_tokens(most, context, PASS_TOKENS) == useful
    assert Prefixes.useful_tokens(PASS_TOKENS - 1, context, PASS_TOKENS) == 0
    prefixes, longest = Prefixes(most, PASS_TOKENS), tokens(9, context - 1)
    found = [run(session, longest, prefixes)[0] for _ in range(2)]
    assert found == [0, PASS_TOKENS if useful else 0]


def test_what_is_reused_changes_no_bit(session: Session) -> None:
    prefixes, first = Prefixes(1024, PASS_TOKENS), tokens(1, 200)
    prompts = [first, first, first[:192], first[:129] + tokens(2, 30), first[:100], first[:64], tokens(3, 150), first]
    expected_reuse = [0, 192, 128, 128, 64, 0, 0, 192]
    for prompt, expected in zip(prompts, expected_reuse, strict=True):
        reused, answer, kept = run(session, prompt, prefixes)
        _, plain_answer, plain_kept = run(session, prompt, None)
        assert reused == expected
        assert answer == plain_answer
        assert len(kept) == len(plain_kept) > 0
        assert all(torch.equal(one, other) for one, other in zip(kept, plain_kept, strict=True))
    assert prefixes.tokens == 3 * 64 + 2 * 64


def test_an_answer_writes_into_nothing_that_is_kept(session: Session) -> None:
    prefixes, prompt = Prefixes(1024, PASS_TOKENS), tokens(1, 65)
    _, answer, _ = run(session, prompt, prefixes)
    cache = session.new_cache()
    assert cache is not None
    assert prefixes.take(prompt, cache) == 64
    cache.crop(-32)
    for layer in cache.layers:  # other keys where those of the prompt were
        layer.update(*(torch.ones(1, 2, 40, 16, dtype=torch.bfloat16) for _ in range(2)))
    assert run(session, prompt, prefixes)[:2] == (64, answer)


def test_what_was_not_used_for_longest_goes_first_and_ends_before_beginnings(session: Session) -> None:
    prefixes = Prefixes(3 * 64 + 63, PASS_TOKENS)
    old, new = tokens(1, 140), tokens(2, 140)

    def found(prompt: list[int]) -> int:
        cache = session.new_cache()
        assert cache is not None
        return prefixes.take(prompt, cache)

    run(session, old, prefixes)
    run(session, new, prefixes)
    assert prefixes.tokens == 192
    assert (found(old), found(new)) == (64, 128)
    run(session, tokens(3, 70), prefixes)
    assert (found(new), found(old)) == (128, 0)
    run(session, tokens(4, 400), prefixes)  # longer than all that may be kept
    assert (prefixes.tokens, found(tokens(4, 400)), found(new)) == (192, 192, 0)


@pytest.mark.parametrize("kind", [DynamicLayer, Int8Layer])
def test_passes_that_were_kept_before_layers_changed_their_place_go_on_where_the_last_one_was(kind: Any) -> None:
    prefixes, prompt, there = Prefixes(1024, PASS_TOKENS), tokens(1, 129), torch.device("meta")
    for device, count in ((torch.device("cpu"), 64), (there, 128)):
        cache = DynamicCache()
        cache.layers.append(kind())
        cache.layers[0].update(*(torch.zeros(1, 2, count, 16) for _ in range(2)))
        move_layer(cache.layers[0], device)
        prefixes.keep(prompt[:count], cache)
    cache = DynamicCache()
    cache.layers.append(kind())
    assert prefixes.take(prompt, cache) == 128
    (layer,) = cache.layers
    found = [block.memory for block in layer.blocks] if isinstance(layer, Int8Layer) else [layer.keys, layer.values]
    assert layer.get_seq_length() == 128
    assert all(tensor.device == there for tensor in found)


def test_windows_do_not_keep_what_would_be_reused(tiny_checkpoint: Path) -> None:
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert not Prefixes.fit(DynamicCache(config=config))
    assert not Prefixes.fit(None)
