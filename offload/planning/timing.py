"""Decoding timed on a loaded model: its steps, what its layers compute in them, what they wait for and what is read."""

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from offload.clock import Clock
from offload.executor import executor_of
from offload.planning.predict import Tier
from offload.streaming import Executor


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of decoded tokens, in seconds: whole steps, what of them lies between embedding and head, and waits.

    prefill_seconds, prefill_wait_seconds: of the pass over the prompt of prompt_tokens. context_tokens: before the
    token in the middle of those that were decoded. kept_seconds, streamed_seconds: what a layer on the host and one out
    of the ring computes there, on average, 0 if there was none; what a GPU computes is not seen layer by layer.
    bytes_read_per_second: of what was read meanwhile, over the time in which something was being read.
    """

    prompt_tokens: int
    context_tokens: int
    step_seconds: float
    inside_seconds: float
    wait_seconds: float
    prefill_seconds: float
    prefill_wait_seconds: float
    kept_seconds: float = 0.0
    streamed_seconds: float = 0.0
    bytes_read_per_second: float = 0.0

    @property
    def computing_seconds(self) -> float:
        """What the layers compute for a token."""
        return self.inside_seconds - self.wait_seconds

    @property
    def outside_seconds(self) -> float:
        """What lies outside the layers: head, sampling, the loop."""
        return self.step_seconds - self.inside_seconds


def time_decode(model: PreTrainedModel, prompt_tokens: int, steps: int, batch_size: int = 1) -> Timing:
    """Generate `steps` tokens after a prompt of `prompt_tokens`, of each sequence, and time them after the first."""
    clock, stopwatch = Clock(), _Stopwatch(executor_of(model))
    device = executor_of(model).device
    tokens = (torch.arange(prompt_tokens, device=device) % 100 + 100).repeat(batch_size, 1)
    with torch.inference_mode(), stopwatch:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=steps + 1,
            max_new_tokens=steps + 1,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            streamer=clock,
        )
    passes = stopwatch.passes
    return Timing(
        prompt_tokens=prompt_tokens,
        context_tokens=prompt_tokens + steps // 2,
        step_seconds=statistics.median(after - before for before, after in pairwise(clock.times)),
        inside_seconds=statistics.median(inside for inside, _ in passes[1:]),
        wait_seconds=statistics.median(wait for _, wait in passes[1:]),
        prefill_seconds=clock.prompt_seconds,
        prefill_wait_seconds=passes[0][1],
        kept_seconds=stopwatch.layer_seconds("host"),
        streamed_seconds=stopwatch.layer_seconds("disk"),
        bytes_read_per_second=stopwatch.bytes_read_per_second(after=clock.times[0]),
    )


class _Stopwatch:
    """Times, while it is entered, the passes of a model, what its layers compute in them, and the reads meanwhile."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._stamps: list[tuple[float, float]] = []
        self._layers: dict[Tier, list[list[float]]] = {
            tier: [[] for one in executor.placement.tiers if one == tier] for tier in set(executor.placement.tiers)
        }
        self._reads: list[tuple[int, float, float]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        executor, model = self._executor, self._executor.model

        def stamp(*_: Any) -> None:
            self._stamps.append(self._now())

        self._attach(model.get_input_embeddings().register_forward_hook(stamp))
        self._attach(model.get_output_embeddings().register_forward_pre_hook(stamp))
        rows = {tier: iter(rows) for tier, rows in self._layers.items()}
        for layer, tier in zip(executor.layers, executor.placement.tiers, strict=True):
            self._time_layer(layer, next(rows[tier]))
        if executor.queue is not None:
            executor.queue.on_read = lambda blob, began, ended: self._reads.append((blob.nbytes, began, ended))

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        if self._executor.queue is not None:
            self._executor.queue.on_read = None

    @property
    def passes(self) -> list[tuple[float, float]]:
        """Seconds of each pass between embedding and head, and of them those waited."""
        pairs = zip(self._stamps[::2], self._stamps[1::2], strict=True)
        return [(end[0] - begin[0], end[1] - begin[1]) for begin, end in pairs]

    def layer_seconds(self, tier: Tier) -> float:
        """Return what layers of a tier compute in a pass after the first, on average; 0 if there are none."""
        rows = self._layers.get(tier, [])
        return sum(statistics.median(row[1:]) for row in rows) / len(rows) if rows else 0.0

    def bytes_read_per_second(self, after: float) -> float:
        """Return the rate of the reads that began after some time, while they lasted; 0 if there were none."""
        reads = [(nbytes, ended - began) for nbytes, began, ended in self._reads if began > after]
        return sum(nbytes for nbytes, _ in reads) / sum(seconds for _, seconds in reads) if reads else 0.0

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), self._executor.stats.wait_seconds

    def _time_layer(self, layer: nn.Module, row: list[float]) -> None:
        begun: list[tuple[float, float]] = []

        def begin(*_: Any) -> None:
            begun.append(self._now())

        def end(*_: Any) -> None:
            (began, waited), (ended, waited_then) = begun.pop(), self._now()
            row.append(ended - began - (waited_then - waited))

        self._attach(layer.register_forward_pre_hook(begin))  # after the executor's own, which waits for the weights
        self._attach(layer.register_forward_hook(end, prepend=True))

    def _attach(self, handle: RemovableHandle) -> None:
        self._hooks.callback(handle.remove)
