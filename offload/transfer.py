"""The ring of slots that streamed layers are read into, ahead of their use.

A slot has an owner from the moment a read is queued until the layer is released: there is no arithmetic that could give
it to two. After an interrupted forward everything is reset. Reads run in the order of their deadlines, which is the
order of the layers, around the end of the model into the next token.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Thread

from offload.checkpoint import LayerBlob
from offload.errors import CheckpointError
from offload.memory import Arena, FileReader

_CHUNK_BYTES = 4 << 20


class Slots:
    """Streams `blobs` in circles through `depth` arenas of the largest one's size.

    check(blob, arena): called in the reader's thread after the first read of each blob; may raise CheckpointError.
    bytes_read, reads, wait_seconds: counted since the beginning. on_read(blob, started, ended), if set, is told of
    every read, in the reader's thread, in the seconds of `time.perf_counter`.
    """

    def __init__(
        self,
        blobs: Sequence[LayerBlob],
        depth: int,
        reader: FileReader,
        check: Callable[[LayerBlob, Arena], None],
        poison: bool = False,
    ) -> None:
        self._blobs, self._reader, self._check, self._poison = blobs, reader, check, poison
        size = max(blob.nbytes for blob in blobs)
        self.arenas = [Arena(size) for _ in range(depth)]
        self._owner: dict[int, int] = {}  # position of a blob -> its slot
        self._free = deque(range(depth))
        self._ready: set[int] = set()
        self._queue: deque[int] = deque()
        self._reading: int | None = None
        self._error: BaseException | None = None
        self._checked: set[int] = set()
        self._closed = False
        self._change = Condition()
        self.bytes_read, self.reads, self.wait_seconds = 0, 0, 0.0
        self.on_read: Callable[[LayerBlob, float, float], None] | None = None
        self._thread = Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        self._thread.start()

    def wait(self, position: int) -> int:
        """Return the slot that holds blob `position`, queueing it and those after it. Raises what its read raised."""
        started = time.perf_counter()
        with self._change:
            if position not in self._owner and not self._free:
                self._reset()  # an earlier forward was abandoned and left its layers behind
            self._fill(position)
            self._change.wait_for(lambda: position in self._ready or self._error is not None or self._closed)
            self.wait_seconds += time.perf_counter() - started
            if self._error is not None:
                error, self._error = self._error, None
                self._reset()
                raise error
            if self._closed:
                raise CheckpointError("the model was closed while it was running")
            return self._owner[position]

    def release(self, position: int) -> None:
        """Give the slot of blob `position` back and queue the next blobs."""
        with self._change:
            slot = self._owner.pop(position, None)
            if slot is None:
                return
            self._ready.discard(position)
            self._put_back(slot)
            self._fill((position + 1) % len(self._blobs))

    def reset(self) -> None:
        """Forget everything that is queued or read: all slots are free again once the read in flight has ended."""
        with self._change:
            self._reset()

    def close(self) -> None:
        """Stop the reader; a wait in another thread raises."""
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        self._thread.join()

    def _fill(self, position: int) -> None:
        """Queue blob `position` and its successors as far as there are free slots. The lock is held."""
        for step in range(len(self._blobs)):
            wanted = (position + step) % len(self._blobs)
            if wanted in self._owner:
                continue
            if not self._free:
                break
            self._owner[wanted] = self._free.popleft()
            self._queue.append(wanted)
        self._change.notify_all()

    def _reset(self) -> None:
        """Free every slot, after the read in flight has ended. The lock is held."""
        self._queue.clear()
        self._change.wait_for(lambda: self._reading is None)
        self._error = None
        self._ready.clear()
        self._owner.clear()
        self._free = deque()
        for slot in range(len(self.arenas)):
            self._put_back(slot)

    def _put_back(self, slot: int) -> None:
        if self._poison:
            self.arenas[slot].poison()
        self._free.append(slot)

    def _read_ahead(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                position = self._reading = self._queue.popleft()
                arena = self.arenas[self._owner[position]]
            error = self._read(position, arena)
            with self._change:
                self._reading = None
                if error is None:
                    self._ready.add(position)
                else:
                    self._error = error
                    self._queue.clear()
                self._change.notify_all()

    def _read(self, position: int, arena: Arena) -> BaseException | None:
        blob = self._blobs[position]
        try:
            started = time.perf_counter()
            read_blob(self._reader, blob, arena)
            if self.on_read is not None:
                self.on_read(blob, started, time.perf_counter())
            self.bytes_read += blob.nbytes
            self.reads += 1
            if position not in self._checked:
                self._check(blob, arena)
                self._checked.add(position)
        except BaseException as error:  # whatever it is belongs to the thread that waits for this layer
            return error
        return None


def read_blob(reader: FileReader, blob: LayerBlob, arena: Arena, offset: int = 0) -> None:
    """Read a shard's payload into an arena at `offset`, a multiple of 4096."""
    for start in range(0, blob.nbytes, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, blob.nbytes - start)
        target = arena.view(offset + start, arena.nbytes - offset - start)
        reader.read_into(blob.path, blob.offset + start, count, target)
