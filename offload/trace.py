"""What a run does and when, for Perfetto (ui.perfetto.dev) or chrome://tracing: a line for each of what works at once.

The file is Chrome's trace event format: complete events ("X") with microseconds since the trace began. On a device the
moments are those of its own streams, which are asked for them only when the trace is written.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from offload.checkpoint import LayerBlob
from offload.errors import ResourceError
from offload.gpu.device import Stamp
from offload.streaming import Executor

_COMPUTE, _READ, _COPY, _COPY_BACK = 1, 2, 3, 4
_LINES = {_COMPUTE: "compute", _READ: "disk", _COPY: "copies to the device", _COPY_BACK: "copies from the device"}
_HEAD = "head"

Moment = float | Stamp
"""In the seconds of `time.perf_counter`, or in a stream of the device."""


@dataclass(frozen=True, slots=True)
class _Event:
    name: str
    line: int
    started: Moment
    ended: Moment
    nbytes: int = 0


class Trace:
    """Notes every pass through a decoder layer or the head, every read and every copy, until closed.

    Reads are those of layers, and of keys and values on disk; copies those of layers to a device, and of keys and
    values there and back. Keys and values have names of their own.
    """

    def __init__(self, executor: Executor) -> None:
        self._device = None if executor.device_side is None else executor.device_side.device
        self._events: list[_Event] = []
        self._entered: dict[str, Moment] = {}
        self._executor = executor
        self._handles: list[RemovableHandle] = []
        names = [blob.module for blob in executor.blobs]
        for name, module in [
            *zip(names, executor.layers, strict=True),
            (_HEAD, executor.model.get_output_embeddings()),
        ]:
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self._handles.append(module.register_forward_hook(partial(self._leave, name)))
        self._listen(*(partial(self._moved, line) for line in (_READ, _COPY, _COPY_BACK)))
        if self._device is not None:
            self._device.settle()
        self._began = time.perf_counter()
        self._origin = None if self._device is None else self._device.stamp_compute()

    def write(self, path: Path) -> None:
        """Write what was noted. Raises ResourceError if that cannot be done."""
        self._settle()
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": line, "args": {"name": name}}
            for line, name in _LINES.items()
        ]
        events = [self._complete(event) for event in self._events]
        try:
            path.write_text(json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise ResourceError(f"--trace {path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Note nothing more."""
        self._listen(None, None, None)
        while self._handles:
            self._handles.pop().remove()

    def _listen(self, on_read: Any, on_copy: Any, on_copy_back: Any) -> None:
        executor, side = self._executor, self._executor.device_side
        on_disk = executor.kv_bytes is not None and side is None
        queue = executor.kv_queue if on_disk else executor.queue  # the same, where weights are streamed
        if queue is not None:
            queue.on_read = on_read
        if side is not None:
            side.layer_copies.on_copy = side.cache_copies.on_copy = on_copy
            side.cache_copies_back.on_copy = on_copy_back

    def busy(self, line: int) -> float | None:
        """Return the share of decoding, all after the first pass, in which something happened on a line.

        None if nothing was decoded.
        """
        self._settle()
        heads = sorted(self._seconds(event.ended) for event in self._events if event.name == _HEAD)
        if len(heads) < 2:
            return None
        first, last = heads[0], heads[-1]
        spans = sorted(
            (max(first, self._seconds(event.started)), min(last, self._seconds(event.ended)))
            for event in self._events
            if event.line == line
        )
        total, reached = 0.0, first
        for started, ended in spans:
            total += max(0.0, ended - max(started, reached))
            reached = max(reached, ended)
        return total / (last - first)

    def describe_links(self) -> str:
        """Return how busy the links were while tokens were decoded, in words."""
        used = [line for line in (_READ, _COPY, _COPY_BACK) if any(event.line == line for event in self._events)]
        shares = [(line, self.busy(line)) for line in used]
        parts = [f"{_LINES[line]} busy {share:.0%} of decoding" for line, share in shares if share is not None]
        return ", ".join(parts) or "no weights moved"

    def _settle(self) -> None:
        if self._device is not None:
            self._device.settle()

    def _moment(self) -> Moment:
        return time.perf_counter() if self._device is None else self._device.stamp_compute()

    def _enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        self._entered[name] = self._moment()

    def _leave(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        self._events.append(_Event(name, _COMPUTE, self._entered.pop(name), self._moment()))

    def _moved(self, line: int, blob: LayerBlob, started: Moment, ended: Moment) -> None:
        self._events.append(_Event(blob.module, line, started, ended, blob.nbytes))

    def _seconds(self, moment: Moment) -> float:
        """Return a moment in seconds since the trace began."""
        return moment - self._began if isinstance(moment, float) else moment.seconds_after(self._origin)

    def _complete(self, event: _Event) -> dict[str, Any]:
        started, seconds = self._seconds(event.started), self._seconds(event.ended) - self._seconds(event.started)
        more = (
            {"bytes": event.nbytes, "GB/s": round(event.nbytes / seconds / 1e9, 3)} if event.nbytes and seconds else {}
        )
        return {
            **{"name": event.name, "ph": "X", "pid": 1, "tid": event.line, "args": more},
            **{"ts": round(started * 1e6, 1), "dur": round(seconds * 1e6, 1)},
        }
