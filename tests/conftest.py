"""A tiny model with a tokenizer, made from a seed, and checkpoints of it; options and marks."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background would inherit an ignored one
torch.set_num_threads(1)  # tiny models: two threads that wait for each other are slower, by far on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and commands in processes of their own

CALIBRATION_TEXT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, lets it. " * 60


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run what measures the real model")
    parser.addoption("--shard", metavar="I/N", help="of the tests that are chosen, every N-th from the I-th, from 0")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shard"):
        index, count = map(int, config.getoption("--shard").split("/"))
        items[:] = items[index::count]
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="measures the real model: --run-slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """A collection of garbage then looks at what tests have made, not each time at every object that imports left."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries find their objects freed at the end, and do not complain."""
    gc.unfreeze()


def kernel_class() -> str:
    """Let triton's interpreter multiply exactly and round once, and tell whether it interprets here.

    Its own product is numpy's, whose sums depend on the processor and on where in a tile a row lies.
    """
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from kernels.triton_kernels import matmul_kernel

    def exact_dot(builder: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        product = numpy.matmul(a.data.astype(numpy.float64), b.data.astype(numpy.float64))
        return TensorHandle(product.astype(total.data.dtype) + total.data, total.dtype.scalar)

    InterpreterBuilder.create_dot = exact_dot
    return type(matmul_kernel).__name__


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets, which it decides when it is imported."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TRITON_INTERPRET", "1")
            kernel = pool.submit(kernel_class).result(timeout=120)
        assert kernel == "InterpretedFunction"
        yield pool


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama of three layers: hidden 64, 4 query and 2 key heads, tied embeddings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 4,800 bytes, which are as many tokens for the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(CALIBRATION_TEXT)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, rounded to nearest, symmetric, groups of 32. Not to be changed: copy it."""
    from quant.rtn import main

    directory = tmp_path_factory.mktemp("checkpoints") / "rtn"
    assert main(["--model", str(tiny_model), "--output", str(directory), "--group-size", "32"]) == 0
    return directory


@pytest.fixture(scope="session")
def tiny_asymmetric(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with zero points."""
    from quant.rtn import main

    directory = tmp_path_factory.mktemp("checkpoints") / "rtn-asymmetric"
    flags = ["--group-size", "32", "--asymmetric"]
    assert main(["--model", str(tiny_model), "--output", str(directory), *flags]) == 0
    return directory


@pytest.fixture(scope="session")
def tiny_8_bits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, in 8 bits."""
    from quant.rtn import main

    directory = tmp_path_factory.mktemp("checkpoints") / "rtn-8-bits"
    flags = ["--bits", "8", "--group-size", "32", "--asymmetric"]
    assert main(["--model", str(tiny_model), "--output", str(directory), *flags]) == 0
    return directory


@pytest.fixture
def head_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every second block of the head streamed, and small blocks."""
    from offload.planning.choice import plan

    def planned(needs: Any, *arguments: Any) -> Any:
        placement = plan(needs, *arguments)
        tiers: Any = ["disk" if at % 2 == 0 else "host" for at in range(len(needs.head_blocks_bytes))]
        lean = placement.needs.without_head()
        return replace(placement, needs=lean, head_tiers=tuple(tiers), depth=max(1, placement.depth))

    monkeypatch.setattr("offload.units._BLOCK_BYTES", 40_000)
    monkeypatch.setattr("offload.executor.plan", planned)
