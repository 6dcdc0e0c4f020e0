"""A trace as a picture: reads and copies under what is computed. `python -m eval.timeline TRACE --output FILE.svg`"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from offload.command import Parser, run, say
from offload.drawing import WIDTH, box, document, heading, line, text
from offload.errors import InputError, ResourceError, UsageError

_LEFT, _RIGHT, _ROW = 100, WIDTH - 20, 34
_TOP = 64
_HEAD = "head"
_KEPT, _MOVED, _HEAD_COLOUR = ("#2f855a", "#6aa984"), ("#c05621", "#dd8a5c"), "#1a365d"
"""Two shades of each, in turn, so that neighbours can be told apart."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was done on one line of the trace, in milliseconds since it began. nbytes: moved, 0 if none."""

    line: str
    name: str
    started_ms: float
    ended_ms: float
    nbytes: int = 0

    @property
    def label(self) -> str:
        """The layer's number, or the name of what is no layer."""
        return self.name.rpartition(".")[2]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    parser = Parser("eval.timeline", "Draw the last passes of a trace: reads and copies under what is computed.")
    parser.add_argument("trace", type=Path, help="file that `python -m offload.generate --trace` wrote")
    parser.add_argument("--output", type=Path, metavar="FILE.svg", required=True, help="picture to write")
    parser.add_argument("--passes", type=_positive, default=2, help="passes over the model to draw, a token each")
    options = parser.parse_args(argv)
    drawn = draw(read_trace(options.trace), options.passes, str(options.trace))
    try:
        options.output.write_text(drawn, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"--output {options.output}: cannot be written ({error.strerror})") from None
    say(f"{options.output} written")


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: expected at least 1")
    return number


def read_trace(path: Path) -> list[Event]:
    """Return what a trace of `offload.trace` holds, in its order. Raises InputError for a file that is none."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        names = {item["tid"]: item["args"]["name"] for item in noted if item["ph"] == "M"}
        return [_event(item, names) for item in noted if item["ph"] == "X"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no trace; `python -m offload.generate --trace FILE` writes one") from None


def _event(item: dict[str, Any], names: dict[int, str]) -> Event:
    started_ms = item["ts"] / 1e3
    nbytes = item["args"].get("bytes", 0)
    return Event(names[item["tid"]], item["name"], started_ms, started_ms + item["dur"] / 1e3, nbytes)


def draw(events: Sequence[Event], passes: int, name: str) -> str:
    """Return the last passes as an SVG file, a row for each line of the trace. Raises UsageError if there are fewer."""
    ends_ms = sorted(event.ended_ms for event in events if event.name == _HEAD)
    if len(ends_ms) <= passes:
        raise UsageError(
            f"--passes {passes}: {name} holds {max(0, len(ends_ms) - 1)} after the first; generate more tokens"
        )
    first_ms, last_ms = ends_ms[-passes - 1], ends_ms[-1]
    scale = (_RIGHT - _LEFT) / (last_ms - first_ms)
    inside = [event for event in events if event.ended_ms > first_ms and event.started_ms < last_ms]
    rows = list(dict.fromkeys(event.line for event in [*events]))
    moved = {whole for event in inside if event.nbytes for whole in _wholes(event.name)}
    bottom = _TOP + _ROW * len(rows)
    drawn = [heading(30, _title(passes, last_ms - first_ms), _busy(inside, rows, first_ms, last_ms))]
    drawn += _axis(last_ms - first_ms, scale, bottom)
    for event in inside:
        left, right = max(event.started_ms, first_ms), min(event.ended_ms, last_ms)
        x, width = _LEFT + (left - first_ms) * scale, (right - left) * scale
        y = _TOP + _ROW * rows.index(event.line) + 4
        drawn.append(box(x, y, width, _ROW - 8, _colour(event, moved), _words(event)))
        if width > 7.5 * len(event.label) + 2:
            drawn.append(text(x + width / 2, y + 17, event.label, anchor="middle", size=11, colour="#ffffff"))
    drawn += [text(_LEFT - 10, _TOP + _ROW * at + 21, row, anchor="end") for at, row in enumerate(rows)]
    drawn += [line(_LEFT + (end - first_ms) * scale, _TOP - 2, bottom + 4, "#1d232b") for end in ends_ms[-passes - 1 :]]
    return document(bottom + 66, drawn + _key(bottom + 48))


def _title(passes: int, milliseconds: float) -> str:
    if passes == 1:
        return f"one token in {milliseconds:.1f} ms"
    return f"{passes} tokens in {milliseconds:.1f} ms, {1e3 * passes / milliseconds:.1f} tokens/s"


def _busy(inside: Sequence[Event], rows: Sequence[str], first_ms: float, last_ms: float) -> str:
    """Say of how much of the time each row was in use, and at which rate it moved bytes."""
    said = []
    for row in rows:
        spans = [(max(e.started_ms, first_ms), min(e.ended_ms, last_ms), e) for e in inside if e.line == row]
        share = _covered((started, ended) for started, ended, _ in spans) / (last_ms - first_ms)
        nbytes = sum(
            e.nbytes * (ended - started) / (e.ended_ms - e.started_ms) for started, ended, e in spans if e.nbytes
        )
        rate = f", {nbytes / (last_ms - first_ms) / 1e6:.2f} GB/s" if nbytes else ""
        said.append(f"{row} busy {share:.0%} of it{rate}")
    return "; ".join(said)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much the spans cover together, what several of them cover counted once."""
    total, reached = 0.0, -math.inf
    for started, ended in sorted(spans):
        total += max(0.0, ended - max(started, reached))
        reached = max(reached, ended)
    return total


def _wholes(name: str) -> Iterable[str]:
    """Return the modules that one lies in, and itself: a layer may have been moved in parts."""
    return accumulate(name.split("."), "{}.{}".format)


def _colour(event: Event, moved: set[str]) -> str:
    if event.name == _HEAD:
        return _HEAD_COLOUR
    shades = _MOVED if event.name in moved else _KEPT
    return shades[int(event.label) % 2 if event.label.isdecimal() else 0]


def _words(event: Event) -> str:
    took = event.ended_ms - event.started_ms
    rate = f", {event.nbytes / 1e6:.2f} MB at {event.nbytes / took / 1e6:.2f} GB/s" if event.nbytes and took else ""
    return f"{event.name}: {event.line}, {took:.3f} ms{rate}"


def _axis(milliseconds: float, scale: float, bottom: float) -> list[str]:
    step = 10.0 ** math.floor(math.log10(milliseconds / 4))
    step *= next(times for times in (1, 2, 5, 10) if milliseconds / (step * times) <= 10)
    drawn = []
    for at in range(int(milliseconds / step) + 1):
        x = _LEFT + at * step * scale
        drawn += [line(x, _TOP, bottom + 6), text(x, bottom + 20, f"{at * step:g} ms", anchor="middle", size=11)]
    return drawn


def _key(y: float) -> list[str]:
    entries = [
        (_KEPT[0], "a layer kept in memory"),
        (_MOVED[0], "a layer that is moved for each pass"),
        (_HEAD_COLOUR, "the head"),
    ]
    drawn, x = [], float(_LEFT)
    for colour, words in entries:
        drawn += [box(x, y - 10, 11, 11, colour, words), text(x + 17, y, words)]
        x += 40 + 6.7 * len(words)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
