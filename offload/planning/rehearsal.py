"""Trials of a model: what the links do not explain is measured on the model itself, once, and predicted from then.

Three short trials tell what no link's figure does. With every layer on disk and one slot nothing overlaps, so computing
and reading show as they are alone. With more slots they run beside each other, and show what each costs the other. And
layers that are kept show what being streamed costs a layer beside waiting.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from offload.errors import ResourceError
from offload.planning.costs import Overheads, Shape, decode_costs, read_seconds
from offload.planning.forecast import PREFILL_TOKENS, START_TOKENS
from offload.planning.machine import Machine
from offload.planning.predict import Pass, walk
from offload.planning.trial import Timing, Trial, run_trial
from offload.planning.wishes import WishWords

_BISECTIONS = 24


def rehearse(directory: Path, shape: Shape, machine: Machine, words: WishWords, context_tokens: int) -> Overheads:
    """Try the checkpoint three times for some seconds, within the budgets of `words`, and return what was found.

    Raises ResourceError if the budget is too small for the model.
    """
    count = len(shape.layers_bytes)
    overheads = _alone(_streamed(directory, words, 1, context_tokens).timings[0], shape, machine)
    for slots in (3, 2):
        try:
            ring = _streamed(directory, words, slots, context_tokens)
        except ResourceError:  # the budget has no room for them, and nothing will be read beside computing
            continue
        overheads = _beside(ring, overheads, shape, machine)
        break
    trial = run_trial(directory, words, (START_TOKENS, PREFILL_TOKENS), context_tokens=context_tokens)
    short, long = trial.timings
    more_tokens = max(1, long.context_tokens - short.context_tokens)
    context = (long.computing_seconds - short.computing_seconds) / count / more_tokens
    prefill = (long.prefill_seconds - long.prefill_wait_seconds - short.outside_seconds) / count / long.prompt_tokens
    operations = 2 * sum(shape.layers_weights) / count / machine.kernel_operations_per_second
    return replace(
        _kept(trial, overheads, shape, machine),
        context_seconds=max(0.0, context),
        prefill_seconds=max(0.0, prefill - operations),
    )


def _streamed(directory: Path, words: WishWords, slots: int, context_tokens: int) -> Trial:
    """Try with every layer on disk."""
    budget: WishWords = {"cpu_memory": words.get("cpu_memory"), "max_memory": words.get("max_memory")}
    return run_trial(
        directory, {**budget, "device_map": "disk", "slots": slots}, (START_TOKENS,), context_tokens=context_tokens
    )


def _alone(timing: Timing, shape: Shape, machine: Machine) -> Overheads:
    """Take a run without overlap apart: computing, reading and the rest, each beyond what its link explains."""
    count = len(shape.layers_bytes)
    kernel = sum(shape.layers_bytes) / machine.kernel_bytes_per_second
    reading = sum(read_seconds(machine, nbytes) for nbytes in shape.layers_bytes)
    return Overheads(
        layer_seconds=(timing.computing_seconds - kernel) / count,
        outside_seconds=timing.outside_seconds - shape.head_bytes / machine.read_bytes_per_second,
        read_seconds=(timing.wait_seconds - reading) / count,
        context_seconds=0.0,
        computing_beside=1.0,
    )


def _beside(trial: Trial, alone: Overheads, shape: Shape, machine: Machine) -> Overheads:
    """Find what computing and reading keep of their speed beside each other: what makes the walk take as long."""
    timing = trial.timings[0]

    def walked(computing: float, reading: float) -> Pass:
        tried = replace(alone, computing_beside=computing, reading_beside=reading)
        return walk(trial.tiers, decode_costs(shape, machine, tried, 0), trial.depth)

    def busy(reading: float, computing: float) -> float:
        result = walked(computing, reading)
        return result.seconds - result.wait_seconds

    def whole(computing: float, reading: float) -> float:
        return walked(computing, reading).seconds

    computing = reading = 1.0
    for _ in range(4):  # each of the two moves the other a little
        computing = _fitted(partial(busy, reading), timing.step_seconds - timing.wait_seconds)
        reading = _fitted(partial(whole, computing), timing.step_seconds)
    return replace(alone, computing_beside=computing, reading_beside=reading)


def _fitted(seconds_at: Callable[[float], float], wanted: float) -> float:
    """Return the largest share from a half to 1 at which something that shrinks with it takes the wanted seconds.

    With less than a half for each, the two would be slower side by side than in turn: that is noise.
    """
    low, high = 0.5, 1.0
    if seconds_at(high) >= wanted:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if seconds_at(middle) < wanted else (middle, high)
    return high


def _kept(trial: Trial, overheads: Overheads, shape: Shape, machine: Machine) -> Overheads:
    """Tell layers that are kept from those that are streamed, by what a run with some kept takes less."""
    count, kept, timing = len(trial.tiers), trial.tiers.count("host"), trial.timings[0]
    if not kept:
        return overheads
    expected = walk(trial.tiers, decode_costs(shape, machine, overheads, 0), trial.depth)
    computing = timing.step_seconds - timing.wait_seconds
    streamed = (expected.seconds - expected.wait_seconds - computing) / kept
    mean_kernel = sum(shape.layers_bytes) / count / machine.kernel_bytes_per_second
    streamed = min(max(0.0, streamed), overheads.layer_seconds + mean_kernel)
    return replace(overheads, layer_seconds=overheads.layer_seconds - streamed, streamed_seconds=streamed, kept=kept)
