"""How long the compiled CPU kernels run, seen from Python: all that a token takes beside them and waits is Python's."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from kernels import cpu_attention, cpu_matmul, decoder

_DOORS = (
    (cpu_matmul, "compiled_library"),
    (cpu_attention, "_library"),
    (decoder, "_library"),
)
"""Where callers of the library get it from. The last two remember it, with the types of their functions."""


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
    library = cpu_matmul.compiled_library()
    if library is None:
        yield None
        return
    timed = TimedLibrary(library)
    with ExitStack() as doors:
        for module, name in _DOORS:
            getattr(module, name)()  # the types of its functions are told the library itself
            doors.enter_context(patch.object(module, name, lambda: timed))
        yield timed
