"""How fast a model runs, told while it runs: a line at the foot of the terminal, below the text that streams.

Where answer and line share a terminal, its last row is taken out of what scrolls (the scrolling region of ECMA-48's
successors, DECSTBM), as package managers do; where the answer goes elsewhere, the line is rewritten in place.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from offload.clock import Clock
from offload.command import format_bytes
from offload.limit import Limit, bounding
from offload.streaming import Executor

_WINDOW_TOKENS = 32
_REFRESH_SECONDS = 0.1
_LEAST_ROWS = 4


class StatusLine:
    """A line on stderr that is rewritten; nothing where stderr is no terminal. To be closed: `with` does."""

    def __init__(self) -> None:
        self.active = sys.stderr.isatty()
        self._shared = self.active and sys.stdout.isatty()
        self._rows = 0
        self._shown = 0.0

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def show(self, text: str) -> None:
        """Show `text`, if the last one was shown a while ago."""
        now = time.monotonic()
        if not self.active or now - self._shown < _REFRESH_SECONDS:
            return
        self._shown = now
        size = _terminal_size()
        text = text[: size.columns - 1]
        if not self._shared or size.lines < _LEAST_ROWS:
            self._write(f"\r\x1b[K{text}")
            return
        sys.stdout.flush()
        if size.lines != self._rows:
            self._reserve(size.lines)
        self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[2m{text}\x1b[0m\x1b8")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if not self.active or not self._shown:
            return
        sys.stdout.flush()
        if self._rows:
            self._write(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8")
        else:
            self._write("\r\x1b[K")
        self._rows, self._shown = 0, 0.0

    def _reserve(self, rows: int) -> None:
        """Take the last row out of what scrolls; the line feed moves the text up if the cursor stood there."""
        self._rows = rows
        self._write(f"\n\x1b7\x1b[1;{rows - 1}r\x1b8\x1b[1A")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _terminal_size() -> os.terminal_size:
    with suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno())
    return os.terminal_size((80, 24))


class Meter:
    """Says how fast the last tokens came, what each of them read, and how much of the link that bounds them that is.

    links: as measured, all that a token takes. executor: of the model that the tokens come from.
    """

    def __init__(self, line: StatusLine, links: Sequence[Limit], executor: Executor) -> None:
        self._line, self._links, self._executor = line, links, executor
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW_TOKENS)

    def __call__(self, clock: Clock) -> None:
        """Show the line; what a `Clock` calls after a token."""
        stats = self._executor.stats
        self._recent.append((clock.times[-1], stats.bytes_read, stats.cache_bytes_copied))
        seconds = self._recent[-1][0] - self._recent[0][0]
        if seconds:
            self._line.show(self.describe(len(clock.times), (len(self._recent) - 1) / seconds))

    def describe(self, tokens: int, tokens_per_second: float) -> str:
        """Return the line for one sequence at so many tokens a second."""
        links, disk = list(self._links), ""
        read, copied = self._per_pass(1), self._per_pass(2)
        for at, link in enumerate(links):
            if link.link == "disk":
                links[at], disk = replace(link, bytes_per_token=read), f", {format_bytes(read)} from disk"
            elif link.link in ("bus", "memory"):
                links[at] = replace(link, bytes_per_token=link.bytes_per_token + copied)
        cache = f", {format_bytes(copied)} of keys and values copied" if copied else ""
        limit, weights = bounding(links), self._executor.bytes_per_token
        return (
            f"{tokens} tokens  {tokens_per_second:.1f}/s  {format_bytes(weights)} a token{disk}{cache}  "
            f"{limit.seconds_per_token * tokens_per_second:.0%} of {limit.link}"
        )

    def _per_pass(self, counter: int) -> int:
        """Return what one of the counters has grown by for each of the last tokens."""
        passes = max(1, len(self._recent) - 1)
        return int(self._recent[-1][counter] - self._recent[0][counter]) // passes if self._recent else 0
