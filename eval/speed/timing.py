"""Timing that holds on a machine that is shared: everything that is compared runs in turn, round after round.

A round runs each contender once, for some milliseconds; rounds go forwards and backwards in turn, so that a drift of
the machine's speed meets all alike. What is quoted is the median, and ratios are taken round by round.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Step = Callable[[int], object]
"""A contender's i-th call. Rotating through copies of its operands by i keeps them out of the caches."""

Bind = Callable[[Tensor], Step | None]
"""What a contender makes of activations float32 [M, K]: the call to time, or None where it cannot take so many."""

_MOST_COPIES = 2000


def copies_in(pool_bytes: int, nbytes: int) -> int:
    """Return how many copies of `nbytes` rotate through at least `pool_bytes`: 2000 at most, one at least."""
    return min(max(1, -(-pool_bytes // nbytes)), _MOST_COPIES)


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of one call, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    def percentile(self, share: float) -> float:
        """Return the value below which `share` of the rounds lie, in seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def speedup_over(self, other: "Samples") -> float:
        """Return how many times faster than `other` this is: the median of the ratios of each round."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def paired(
    contenders: Mapping[str, Step], rounds: int, sample_seconds: float, finish: Callable[[], None] = lambda: None
) -> dict[str, Samples]:
    """Time the contenders in turn. finish: waits until what has been queued is done, on a GPU.

    Each is called twice first, which warms it up and decides how many calls make a sample of `sample_seconds`.
    """
    repeats = {}
    for name, step in contenders.items():
        step(0)
        finish()
        started = time.perf_counter()
        step(1)
        finish()
        repeats[name] = max(1, round(sample_seconds / (time.perf_counter() - started)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = dict.fromkeys(contenders, 2)
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            step, first, count = contenders[name], calls[name], repeats[name]
            started = time.perf_counter()
            for index in range(first, first + count):
                step(index)
            finish()
            seconds[name].append((time.perf_counter() - started) / count)
            calls[name] += count
    return {name: Samples(tuple(values)) for name, values in seconds.items()}
