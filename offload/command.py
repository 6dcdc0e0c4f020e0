"""What every command shares: exit statuses, one-line errors, progress with rate and ETA, sizes in words.

Results go to stdout, everything else to stderr.
"""

import argparse
import difflib
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from offload.errors import ResourceError, ToolkitError, UsageError
from offload.lean_import import import_lean
from offload.namesake import CURE, what_is_wrong

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, refuses abbreviations, knows `--debug` and guesses misspelt flags."""

    def __init__(self, program: str, description: str) -> None:
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """End with status 2; a flag that nobody knows with the one that it is most like."""
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        if message.startswith("unrecognized") and unknown.startswith("-"):
            alike = difflib.get_close_matches(unknown, self._option_string_actions, 1)
            message += f"; did you mean {alike[0]}?" if alike else ""
        super().error(message)


def run(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `command(argv)` and return its exit status: 0, the error's own, 130/143 on a signal, 1 on our bug.

    What it imports of transformers is lean: a command has its process to itself.
    """
    import_lean()
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        command(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except _Terminated:
        say("terminated")
        return 143
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # either may be the closed one, and Python flushes both at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        if (told := _for_the_user(error)) is not None:
            say(f"error: {told}")
            return told.exit_code
        if not debug:
            say(f"bug: {type(error).__name__}: {error}\n     run again with --debug and report it")
        return 1
    return 0


def _for_the_user(error: Exception) -> ToolkitError | None:
    """Return what the user can mend, None for a bug of ours. torch has no class of its own for memory of the host."""
    if isinstance(error, ToolkitError):
        return error
    if isinstance(error, ImportError) and (wrong := what_is_wrong()) is not None:
        return ResourceError(f"{wrong}, so transformers imports no model; {CURE}")
    refused = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if refused or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return ResourceError(
            "the system gives this process no more memory; `ulimit -v` shows a limit that may be in the way, and a "
            "smaller --cpu-memory asks for less"
        )
    return None


class _Terminated(BaseException):
    """SIGTERM, raised in the main thread so that `finally` blocks run."""


def _raise_terminated(signum: int, frame: object) -> None:
    raise _Terminated


def say(message: str) -> None:
    """Print a line for the person who watches, on stderr."""
    print(message, file=sys.stderr, flush=True)


def parse_bytes(text: str, flag: str) -> int:
    """Turn "540MiB", "8GiB", "10GB" or a plain count into bytes. Raises UsageError naming `flag`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f'{flag} {text!r}: expected a size such as "540MiB", "8GiB" or "10GB" (powers of 1000)')
    size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise UsageError(f"{flag} {text!r}: expected a size above zero")
    return size


def format_bytes(count: float) -> str:
    """Return 1536 as "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(abs(size), 1) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Return 3700 as "1:01:40"."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Steps done of a known total on stderr: one line rewritten on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done, self._skipped = label, total, done, done
        self._started = time.monotonic()
        self._last_line = self._started
        self._terminal = sys.stderr.isatty()

    def advance(self, note: str = "") -> None:
        """Count one step and show `note` beside the remaining time."""
        self._done += 1
        now = time.monotonic()
        finished = self._done == self._total
        if not (self._terminal or finished or now - self._last_line >= 10):
            return
        self._last_line = now
        elapsed = now - self._started
        left = elapsed / (self._done - self._skipped) * (self._total - self._done)
        text = (
            f"{self._label} {self._done}/{self._total}  {format_seconds(elapsed)} elapsed, {format_seconds(left)} left"
        )
        text = f"{text}  {note}" if note else text
        if self._terminal:
            print(f"\r\x1b[K{text}", end="\n" if finished else "", file=sys.stderr, flush=True)
        else:
            say(text)
