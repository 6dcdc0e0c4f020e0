"""When the tokens of a generation came."""

import time
from collections.abc import Callable
from typing import Any


class Clock:
    """A streamer that notes when each new token came, and hands it on.

    streamer: of transformers, or None. on_token: called after each of them. started: when the prompt was handed on.
    """

    def __init__(self, streamer: Any = None, on_token: Callable[["Clock"], None] | None = None) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._streamer, self._on_token = streamer, on_token
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token after the other."""
        new, self._prompt_seen = self._prompt_seen, True
        if new:
            self.times.append(time.perf_counter())
            self.tokens += value.flatten().tolist()
        else:
            self.started = time.perf_counter()
        if self._streamer is not None:
            self._streamer.put(value)
        if new and self._on_token is not None:
            self._on_token(self)

    def end(self) -> None:
        """Flush what is left."""
        if self._streamer is not None:
            self._streamer.end()

    @property
    def prompt_seconds(self) -> float:
        """What the first token took, 0 if there was none."""
        return self.times[0] - self.started if self.times else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: of what came after the first token."""
        seconds = self.times[-1] - self.times[0] if self.times else 0.0
        return (len(self.times) - 1) / seconds if seconds else 0.0
