"""The queue to the disk: blobs are read into arenas, ahead of their use."""

import time
from collections.abc import Callable

from offload.checkpoint import LayerBlob
from offload.memory import Arena, FileReader, whole_pages
from offload.transfer_queue import Transfer, TransferQueue

_CHUNK_BYTES = 4 << 20


class ReadQueue(TransferQueue):
    """Reads blobs.

    check(blob, arena): called in the queue's thread after the first read of each blob that has checksums; may raise
    CheckpointError. None: nothing is checked, to measure what that costs.
    bytes_read, reads: counted since the beginning. on_read(blob, started, ended), if set, is told of every read, in the
    queue's thread, in the seconds of `time.perf_counter`.
    """

    def __init__(self, reader: FileReader, check: Callable[[LayerBlob, Arena], None] | None) -> None:
        self.bytes_read, self.reads = 0, 0
        self.on_read: Callable[[LayerBlob, float, float], None] | None = None
        self.check, self._reader = check, reader
        self._checked: dict[int, LayerBlob] = {}  # by identity; holding them keeps it theirs
        super().__init__("read-ahead")

    def _perform(self, transfer: Transfer) -> None:
        blob = transfer.blob
        if transfer.after is not None:
            transfer.after.synchronize()
        started = time.perf_counter()
        read_blob(self._reader, blob, transfer.arena)
        if self.on_read is not None:
            self.on_read(blob, started, time.perf_counter())
        self.bytes_read += blob.nbytes
        self.reads += 1
        if self.check is not None and blob.checksums and id(blob) not in self._checked:
            self.check(blob, transfer.arena)
            self._checked[id(blob)] = blob


def read_blob(reader: FileReader, blob: LayerBlob, arena: Arena, offset: int = 0) -> None:
    """Read a blob's ranges into an arena from `offset`, a multiple of 4096, each on a page of its own."""
    for place, nbytes in blob.ranges or ((blob.offset, blob.nbytes),):
        for start in range(0, nbytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, nbytes - start)
            target = arena.view(offset + start, arena.nbytes - offset - start)
            reader.read_into(blob.path, place + start, count, target)
        offset += whole_pages(nbytes)
