"""A process that runs one model with one engine and is told what to do, so that several can be timed in turn.

    python -m eval.speed.contender ENGINE MODEL [--cpu-memory BYTES] [--context TOKENS]

reads one command a line from stdin (`load`, `prefill TOKENS`, `decode TOKENS`, `python_share TOKENS`, `facts`) and
answers each with one JSON object on stdout. Nothing is imported before `load`, so that the process can be put into a
control group first.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.clock import Clock

PROMPT_TOKENS = 16
"""Of the prompt that decoding starts from."""


def _unknown(tokens: int) -> None:
    """Tell nothing."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What a loaded model can be asked for.

    run(tokens, fresh): take tokens behind what came before, or on a fresh context; returns the likeliest next one.
    facts(): what else is to be known, such as the bytes read for a token. generate(prompt, count): the moments at which
    `count` tokens came, where the engine has a loop of its own. python_share(tokens): of a token, the mean of so many,
    what is spent outside kernels and waits for reads; None where the engine cannot tell.
    """

    run: Callable[[list[int], bool], int]
    facts: Callable[[], dict[str, Any]]
    generate: Callable[[list[int], int], list[float]] | None = None
    python_share: Callable[[int], float | None] = _unknown

    def prefill(self, tokens: int) -> float:
        """Return the seconds that a prompt of so many tokens takes, to the logits of its last one."""
        started = time.perf_counter()
        self.run(list(range(1, tokens + 1)), True)
        return time.perf_counter() - started

    def decode(self, tokens: int) -> float:
        """Return the seconds that one token takes, the mean of so many, after a short prompt."""
        prompt = list(range(1, PROMPT_TOKENS + 1))
        if self.generate is not None:
            times = self.generate(prompt, tokens + 1)
        else:
            token, times = self.run(prompt, True), [time.perf_counter()]
            for _ in range(tokens):
                token = self.run([token], False)
                times.append(time.perf_counter())
        return (times[-1] - times[0]) / tokens


def clocked(model: Any, prompt: list[int], count: int, on_token: "Callable[[Clock], None] | None" = None) -> "Clock":
    """Let a model of transformers generate `count` tokens, the likeliest each; return when they came."""
    import torch

    from offload.clock import Clock

    clock, ids = Clock(on_token=on_token), torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=clock,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    return clock


def _ours(model: Path, cpu_memory: int | None, context_tokens: int) -> Engine:
    """This toolkit, through transformers' own `generate()`."""
    import torch

    from eval.speed import native_time
    from offload.executor import executor_of, load
    from offload.limit import measure_links

    loaded = load(model, cpu_memory=cpu_memory, context_tokens=context_tokens)
    executor = executor_of(loaded)

    @torch.inference_mode()
    def run(tokens: list[int], fresh: bool) -> int:
        assert fresh, "the tokens after a prompt come from generate()"
        return int(loaded(torch.tensor([tokens]), logits_to_keep=1).logits.argmax())

    def generate(prompt: list[int], count: int) -> list[float]:
        return clocked(loaded, prompt, count).times

    def python_share(tokens: int) -> float | None:
        native: list[float] = []
        with native_time.timed_kernels() as timed:
            if timed is None:
                return None
            prompt = list(range(1, PROMPT_TOKENS + 1))
            times = clocked(
                loaded, prompt, tokens + 1, lambda _: native.append(timed.seconds + executor.stats.wait_seconds)
            ).times
        return 1 - (native[-1] - native[0]) / (times[-1] - times[0])

    def facts() -> dict[str, Any]:
        disk = [1 / link.bytes_per_second for link in measure_links(executor) if link.link == "disk"]
        return {
            "bytes_per_token": executor.bytes_per_token,
            "disk_bytes_per_token": executor.placement.disk_bytes,
            "disk_seconds_per_byte": disk,
            **_memory(),
        }

    return Engine(run, facts, generate, python_share)


def _llama_cpp(model: Path, cpu_memory: int | None, context_tokens: int) -> Engine:
    """llama.cpp through the functions of its library, with its own defaults.

    Within a limit its weights stay mapped from the file: laid out anew in memory, which is faster, they need all of it.
    """
    import os

    import llama_cpp
    import numpy as np

    if cpu_memory is not None and cpu_memory < model.stat().st_size:
        defaults = llama_cpp.llama_model_default_params
        llama_cpp.llama_cpp.llama_model_default_params = lambda: _without_own_layout(defaults())
    threads = len(os.sched_getaffinity(0))
    settings: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "n_batch": 512, "verbose": False}
    llama = llama_cpp.Llama(str(model), n_ctx=context_tokens, **settings)
    vocabulary = llama.n_vocab()

    def run(tokens: list[int], fresh: bool) -> int:
        if fresh:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        held = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(held, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(llama.ctx), (vocabulary,)).argmax())

    return Engine(run, _memory)


def _without_own_layout(parameters: Any) -> Any:
    parameters.use_extra_bufts = False
    return parameters


def _accelerate(model: Path, cpu_memory: int | None, context_tokens: int) -> Engine:
    """transformers in bfloat16 under accelerate: all on disk, a tensor read whenever a module needs it."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    from offload.kv.cache import CACHE_NAME

    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    places = dict.fromkeys(("model.embed_tokens", "model.layers", "lm_head"), "disk")
    places |= dict.fromkeys(("model.norm", "model.rotary_emb"), "cpu")
    loaded = load_checkpoint_and_dispatch(
        skeleton, str(model), device_map=places, offload_folder=str(model / "offload"), dtype=torch.bfloat16
    ).eval()
    context: list[Any] = []

    @torch.inference_mode()
    def run(tokens: list[int], fresh: bool) -> int:
        if fresh:
            context[:] = [DynamicCache(config=loaded.config)]
        return int(loaded(torch.tensor([tokens]), logits_to_keep=1, **{CACHE_NAME: context[0]}).logits.argmax())

    return Engine(run, _memory)


ENGINES: dict[str, Callable[[Path, int | None, int], Engine]] = {
    "ours": _ours,
    "llama.cpp": _llama_cpp,
    "accelerate": _accelerate,
}


def _memory() -> dict[str, Any]:
    from offload.memory import peak_memory_bytes

    return {"peak_bytes": peak_memory_bytes()}


def main(argv: list[str] | None = None) -> int:
    """Answer commands until stdin ends."""
    parser = argparse.ArgumentParser("python -m eval.speed.contender")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cpu-memory", type=int)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args(argv)
    engine: Engine | None = None
    for line in sys.stdin:
        command, *arguments = line.split()
        try:
            if command == "load":
                engine = ENGINES[options.engine](options.model, options.cpu_memory, options.context)
                answer: Any = {}
            else:
                assert engine is not None, "load comes first"
                answer = getattr(engine, command)(*map(int, arguments))
        except Exception as error:  # the one that asked says what it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
