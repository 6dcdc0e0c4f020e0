"""What bounds decoding, measured on the loaded model: reading what is streamed, or all weights from memory."""

import time
from dataclasses import dataclass
from typing import Literal

from kernels.cpu_matmul import read_seconds
from offload.memory import Arena
from offload.read_queue import read_blob
from offload.streaming import Executor

_DISK_SECONDS = 0.5
_MEMORY_READS = 5


@dataclass(frozen=True, slots=True)
class Limit:
    """The link that bounds decoding, and how fast it is while nothing else runs."""

    link: Literal["disk", "memory"]
    bytes_per_second: float


def measure_limit(executor: Executor) -> Limit:
    """Measure what bounds decoding. Not while the model runs: what was read ahead is forgotten."""
    if executor.queue is None:
        head = executor.head_memory
        return Limit("memory", head.nbytes / min(read_seconds(head) for _ in range(_MEMORY_READS)))
    blobs = executor.streamed_blobs or executor.expert_blobs
    if executor.slots is None:
        arena = Arena(max(blob.nbytes for blob in blobs))
    else:
        executor.slots.reset()
        arena = executor.slots.arenas[0]
    started = time.perf_counter()
    total = 0
    while (elapsed := time.perf_counter() - started) < _DISK_SECONDS:
        for blob in blobs:
            read_blob(executor.reader, blob, arena)
            total += blob.nbytes
    return Limit("disk", total / elapsed)
