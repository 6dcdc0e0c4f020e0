"""Keys and values partly on disk give the bits of a cache whole in memory, within the memory they were given."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Cache, Gemma2Config, PreTrainedModel

from kernels.kv_block import CHUNK_TOKENS, BlockShape
from offload.errors import ResourceError, UsageError
from offload.executor import executor_of, load, new_cache
from offload.kv.cache import KVCache, use_int8_attention
from offload.kv.shelf import CHUNK_BLOCKS, SLOTS, SPARE, share_out
from offload.kv.shelved_layer import ShelvedLayer, shelved_cache
from offload.kv.store import FileStore
from offload.memory import FileReader, whole_pages
from offload.read_queue import ReadQueue
from tests.test_cache import generate, tiny

PAGES = whole_pages(CHUNK_BLOCKS * BlockShape(1, 2, 16, 16).nbytes)
LAYERS = 2
BESIDE = SLOTS + SPARE


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadQueue]:
    monkeypatch.setattr("offload.kv.store.cache_directory", lambda: tmp_path)
    reader = FileReader()
    queue = ReadQueue(reader, lambda blob, arena: None)
    yield queue
    queue.close()
    reader.close()


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny(num_hidden_layers=LAYERS, max_position_embeddings=8192, initializer_range=0.1)
    assert use_int8_attention(model)
    return model


def budget(chunks: int) -> int:
    """For so many chunks of every layer."""
    return (LAYERS * chunks + BESIDE) * PAGES


def tokens(count: int) -> Tensor:
    return torch.randint(1, 128, (1, count), generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def logits(model: PreTrainedModel, cache: Cache, *parts: Tensor) -> Tensor:
    """The last logits of each pass."""
    return torch.cat([model(part, past_key_values=cache, logits_to_keep=1).logits[0] for part in parts])


def held_bytes(cache: Cache) -> int:
    return sum(layer.nbytes for layer in cache.layers) + BESIDE * PAGES


@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_the_bits_are_those_of_a_cache_in_memory(model: PreTrainedModel, queue: ReadQueue, chunks: int) -> None:
    passes = [tokens(700), tokens(3 * CHUNK_TOKENS), tokens(5), *tokens(12).split(1, dim=1), tokens(900), tokens(1)]
    expected = logits(model, KVCache.of(model), *passes)
    cache = shelved_cache(model, FileStore(queue), budget(chunks))
    assert torch.equal(logits(model, cache, *passes), expected)
    assert held_bytes(cache) <= budget(chunks)
    assert (queue.bytes_read > 0) == (chunks < 9)


def test_generate_goes_on_from_what_is_on_disk(model: PreTrainedModel, queue: ReadQueue) -> None:
    prompt = tokens(2 * CHUNK_TOKENS + 100)
    cache, resident = shelved_cache(model, FileStore(queue), budget(1)), KVCache.of(model)
    for _ in range(2):
        found = generate(model, cache, prompt, prefill_chunk_size=512)
        assert found == generate(model, resident, prompt, prefill_chunk_size=512)
        prompt = torch.cat([torch.tensor(found), prompt[:, :60]], dim=1)
    assert cache.get_seq_length() == resident.get_seq_length() > 2 * CHUNK_TOKENS


@torch.inference_mode()
def batch_logits(model: PreTrainedModel, cache: Cache, steps: int) -> Tensor:
    """The logits of three texts that go on from each other: after each step, and after a crop into what was on disk."""
    texts, found = torch.cat([tokens(2 * CHUNK_TOKENS + 60 + seed)[:, seed:] for seed in range(3)]), []
    orders = ([2, 0, 0], [1, 1, 2], [0, 1, 2], [2, 1, 0])
    passes = [texts, *torch.cat([tokens(steps)] * 3).split(1, dim=1)]
    for number, part in enumerate(passes):
        found.append(model(part, past_key_values=cache, logits_to_keep=1).logits)
        cache.reorder_cache(torch.tensor(orders[number % 4]))
        if number == steps // 2:
            cache.crop(-CHUNK_TOKENS)
    return torch.stack(found)


@pytest.mark.parametrize("chunks", [1, 2])
def test_sequences_that_go_on_from_others_take_what_those_have_on_disk(
    model: PreTrainedModel, queue: ReadQueue, chunks: int
) -> None:
    expected = batch_logits(model, KVCache.of(model), 10)
    pages = whole_pages(CHUNK_BLOCKS * BlockShape(3, 2, 16, 16).nbytes)
    cache = shelved_cache(model, FileStore(queue), (LAYERS * chunks + BESIDE) * pages)
    assert torch.equal(batch_logits(model, cache, 10), expected)
    assert queue.bytes_read > 0


def test_beams_go_on_from_what_is_on_disk(model: PreTrainedModel, queue: ReadQueue) -> None:
    prompt, options = tokens(2 * CHUNK_TOKENS + 100), {"num_beams": 3, "max_new_tokens": 24}
    pages = whole_pages(CHUNK_BLOCKS * BlockShape(3, 2, 16, 16).nbytes)
    cache = shelved_cache(model, FileStore(queue), (LAYERS + BESIDE) * pages)
    found = generate(model, cache, prompt, **options)
    assert queue.bytes_read > 0
    assert found == generate(model, KVCache.of(model), prompt, **options)


@pytest.mark.parametrize("left", [3 * CHUNK_TOKENS, 2 * CHUNK_TOKENS + 1, CHUNK_TOKENS, 70, 0])
def test_what_is_cropped_into_is_written_again(model: PreTrainedModel, queue: ReadQueue, left: int) -> None:
    text, more = tokens(3 * CHUNK_TOKENS + 50), [tokens(1500), *tokens(4).split(1, dim=1)]
    cache, resident = shelved_cache(model, FileStore(queue), budget(1)), KVCache.of(model)
    for each in (cache, resident):
        logits(model, each, text)
        each.crop(left - text.shape[1])
    assert torch.equal(logits(model, cache, *more), logits(model, resident, *more))
    assert held_bytes(cache) <= budget(1)


def test_a_pass_that_was_abandoned_and_a_reset_leave_nothing_behind(model: PreTrainedModel, queue: ReadQueue) -> None:
    cache = shelved_cache(model, FileStore(queue), budget(1))
    expected = logits(model, KVCache.of(model), tokens(2500), tokens(1))
    logits(model, cache, tokens(3000))
    layer = cache.layers[0]
    assert isinstance(layer, ShelvedLayer)
    parts = layer.parts()
    next(parts)
    parts.close()
    list(cache.layers[1].parts())
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, cache, tokens(2500), tokens(1)), expected)
    path = layer._shelf.store.path
    assert path.exists()
    del cache, layer, parts
    gc.collect()
    assert not path.exists()


def test_the_next_chunk_is_always_read_while_one_is_attended_to(model: PreTrainedModel, queue: ReadQueue) -> None:
    cache = shelved_cache(model, FileStore(queue), budget(1))
    logits(model, cache, tokens(6 * CHUNK_TOKENS + 1))
    order = [(layer, number) for layer in range(LAYERS) for number in range(6)]
    shelf, walked = cache.layers[0]._shelf, []
    for _ in range(2):
        for layer in cache.layers:
            for start, _ in layer.parts():
                if start < 6 * CHUNK_TOKENS:  # the last chunk is in memory
                    walked.append((layer._index, start // CHUNK_TOKENS))
                    assert set(shelf._held) == {walked[-1], order[len(walked) % len(order)]}
    assert walked == order * 2


def test_what_cannot_be_is_refused(model: PreTrainedModel, queue: ReadQueue) -> None:
    with pytest.raises(
        ResourceError, match=r"--kv-memory .*: 2 layers take .* at least, 1024 tokens of each and 3 times"
    ):
        share_out(budget(1) - 1, LAYERS, PAGES)
    with pytest.raises(ResourceError, match="2 layers take"):
        logits(model, shelved_cache(model, FileStore(queue), budget(1) - 1), tokens(1))
    cache = shelved_cache(model, FileStore(queue), budget(1))
    logits(model, cache, tokens(9))
    cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(UsageError, match="--kv-memory: batches that grow or shrink need all keys"):
        cache.batch_repeat_interleave(2)
    capped = tiny(Gemma2Config, sliding_window=1024, query_pre_attn_scalar=16)
    use_int8_attention(capped)
    with pytest.raises(UsageError, match="--kv-memory: the attention of Gemma2ForCausalLM takes no int8 keys"):
        shelved_cache(capped, FileStore(queue), budget(1))


@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_a_model_is_loaded_with_it_and_the_plan_counts_what_is_in_memory(
    tmp_path: Path, tiny_model: Path, device_map: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights from disk and keys and values from disk share a queue."""
    from quant.rtn import main

    monkeypatch.setattr("offload.kv.store.cache_directory", lambda: tmp_path)
    copied = tmp_path / "model"
    shutil.copytree(tiny_model, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    assert main(["--model", str(copied), "--output", str(tmp_path / "int4"), "--group-size", "32"]) == 0
    words = {"context_tokens": 5000, "device_map": device_map, "mode": "exact"}
    prompt, answers, needs = tokens(3000), [], []
    for more in ({"kv": "int8"}, {"cache_implementation": "offloaded"}):
        model = load(tmp_path / "int4", **words, **more)
        answers.append(generate(model, new_cache(model), prompt, max_new_tokens=12, prefill_chunk_size=512))
        needs.append(executor_of(model).placement.needs.cache_bytes)
        executor_of(model).close()
    assert answers[0] == answers[1]
    assert (needs[0], needs[1]) == (3 * 79 * BlockShape(1, 2, 16, 16).nbytes, (3 + BESIDE) * PAGES)


def test_a_damaged_file_is_an_error_and_the_cache_can_be_reset(model: PreTrainedModel, queue: ReadQueue) -> None:
    cache = shelved_cache(model, FileStore(queue), budget(1))
    logits(model, cache, tokens(3000))
    path = cache.layers[0]._shelf.store.path
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(Exception, match=r"kv-.*: ends at byte"):
        logits(model, cache, tokens(1), tokens(1))
    cache.reset()
    expected = logits(model, KVCache.of(model), tokens(2500), tokens(1))
    assert torch.equal(logits(model, cache, tokens(2500), tokens(1)), expected)
