"""What bounds decoding, measured on the loaded model: reading streamed layers from disk, or all weights from memory."""

import time
from dataclasses import dataclass
from typing import Literal

from kernels.cpu_matmul import read_seconds
from offload.executor import Executor
from offload.read_queue import read_blob

_DISK_SECONDS = 0.5
_MEMORY_READS = 5


@dataclass(frozen=True, slots=True)
class Limit:
    """The link that bounds decoding, how fast it is while nothing else runs, and what one token moves across it."""

    link: Literal["disk", "memory"]
    bytes_per_second: float
    bytes_per_pass: int

    def fraction(self, passes_per_second: float) -> float:
        """Return the share of the link that so many passes over the model use."""
        return self.bytes_per_pass * passes_per_second / self.bytes_per_second if self.bytes_per_second else 0.0


def weight_bytes(executor: Executor) -> int:
    """Return the bytes of weights that a pass over the model reads, wherever they lie."""
    return executor.bytes_per_token


def measure_limit(executor: Executor) -> Limit:
    """Measure what bounds decoding. Not while the model runs: what was read ahead is forgotten."""
    if executor.slots is None:
        head = executor.head_memory
        rate = head.nbytes / min(read_seconds(head) for _ in range(_MEMORY_READS))
        return Limit("memory", rate, weight_bytes(executor))
    executor.slots.reset()
    arena, blobs = executor.slots.arenas[0], executor.streamed_blobs
    started = time.perf_counter()
    total = 0
    while (elapsed := time.perf_counter() - started) < _DISK_SECONDS:
        for blob in blobs:
            read_blob(executor.reader, blob, arena)
            total += blob.nbytes
    return Limit("disk", total / elapsed, sum(blob.nbytes for blob in blobs))
