"""What a run does and when, for Perfetto (ui.perfetto.dev) or chrome://tracing: reads on one line, computing on one.

The file is Chrome's trace event format: complete events ("X") with microseconds since the trace began.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from offload.checkpoint import LayerBlob
from offload.errors import ResourceError
from offload.streaming import Executor

_COMPUTE, _READ = 1, 2
_LINES = {_COMPUTE: "compute", _READ: "disk"}


class Trace:
    """Notes every pass through a decoder layer or the head, and every read of a layer, from now on."""

    def __init__(self, executor: Executor) -> None:
        self._began = time.perf_counter()
        self._events: list[dict[str, Any]] = []
        self._entered: dict[str, float] = {}
        names = [blob.module for blob in executor.blobs]
        for name, module in [
            *zip(names, executor.layers, strict=True),
            ("head", executor.model.get_output_embeddings()),
        ]:
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(partial(self._leave, name))
        if executor.queue is not None:
            executor.queue.on_read = self._read

    def write(self, path: Path) -> None:
        """Write what was noted. Raises ResourceError if that cannot be done."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": line, "args": {"name": name}}
            for line, name in _LINES.items()
        ]
        try:
            path.write_text(json.dumps({"traceEvents": names + self._events, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise ResourceError(f"--trace {path}: cannot be written ({error.strerror})") from None

    def _enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        self._entered[name] = time.perf_counter()

    def _leave(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        self._note(name, _COMPUTE, self._entered.pop(name), time.perf_counter(), {})

    def _read(self, blob: LayerBlob, started: float, ended: float) -> None:
        rate = blob.nbytes / (ended - started) / 1e9
        self._note(blob.module, _READ, started, ended, {"bytes": blob.nbytes, "GB/s": round(rate, 3)})

    def _note(self, name: str, line: int, started: float, ended: float, more: dict[str, Any]) -> None:
        event = {"name": name, "ph": "X", "pid": 1, "tid": line, "args": more}
        event |= {"ts": round((started - self._began) * 1e6, 1), "dur": round((ended - started) * 1e6, 1)}
        self._events.append(event)
