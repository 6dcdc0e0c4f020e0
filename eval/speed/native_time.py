"""How long the compiled CPU kernels run, seen from Python: all that a token takes beside them and waits is Python's."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from kernels.cpu_matmul import compiled_library

_CALLERS = ("kernels.cpu_matmul", "kernels.cpu_attention", "kernels.decoder")


class TimedLibrary:
    """Stands in for a ctypes library. seconds: that its functions ran, counted since the beginning."""

    def __init__(self, library: Any) -> None:
        self._library, self.seconds = library, 0.0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(self, name, timed)
        return timed


@contextmanager
def timed_kernels() -> Iterator[TimedLibrary | None]:
    """Time the compiled kernels for a while; None where products run through torch, whose time is not told apart."""
    library = compiled_library()
    if library is None:
        yield None
        return
    timed = TimedLibrary(library)
    patches = [patch.object(sys.modules[name], "compiled_library", lambda: timed) for name in _CALLERS]
    for each in patches:
        each.start()
    try:
        yield timed
    finally:
        for each in patches:
            each.stop()
