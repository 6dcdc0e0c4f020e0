"""What a person types into a chat: lines that can be edited and are remembered, and messages of several lines."""

import atexit
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from offload.command import say

_QUOTES = '"""'
_HISTORY_LINES = 1000


class MessageReader:
    """Reads messages from stdin; prompts, edits and remembers lines where that is a terminal.

    history: the file to keep lines in between sessions. completions: words that the tab key completes.
    """

    def __init__(self, history: Path, completions: Sequence[str]) -> None:
        self._terminal = sys.stdin.isatty()
        if self._terminal:
            _use_readline(history, completions)

    def read(self) -> str | None:
        """Return the next message, None at the end of the input.

        A line that ends in a backslash goes on in the next; three quotes begin and end a message of several lines.
        Ctrl-C on a terminal begins the message anew; elsewhere it is raised.
        """
        while True:
            try:
                return self._message()
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                say("\n/exit or Ctrl-D leaves")

    def _message(self) -> str | None:
        text = self._line(">>> ")
        while text is not None and _goes_on(text):
            more = self._line("... ")
            if more is None:
                break
            text = f"{text}\n{more}"
        if text is not None and text.startswith(_QUOTES):
            return text.rstrip().removeprefix(_QUOTES).removesuffix(_QUOTES).strip()
        return text if text is None else text.replace("\\\n", "\n").strip()

    def _line(self, prompt: str) -> str | None:
        if self._terminal:
            try:
                return input(prompt)
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None


def _goes_on(text: str) -> bool:
    if text.startswith(_QUOTES):
        return len(text.rstrip()) < 2 * len(_QUOTES) or not text.rstrip().endswith(_QUOTES)
    return text.endswith("\\")


def _use_readline(history: Path, completions: Sequence[str]) -> None:
    try:
        import readline
    except ImportError:  # Python can be built without it; lines are then edited by the terminal alone
        return
    with suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(history)

    def complete(text: str, state: int) -> str | None:
        fitting = [word for word in completions if word.startswith(text)]
        return fitting[state] if state < len(fitting) else None

    def write() -> None:
        with suppress(OSError):
            readline.write_history_file(history)

    readline.set_history_length(_HISTORY_LINES)
    readline.set_completer_delims("")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    atexit.register(write)
