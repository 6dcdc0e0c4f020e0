"""The one queue to the disk: what a computation waits for is read before what will be needed later.

A read belongs to whoever asked for it, the ring of slots or the cache of experts. Its memory is not to be touched until
it has ended or was withdrawn. One thread reads; everything else happens under one lock, `ReadQueue.change`, which
those who ask share.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from threading import Condition, Thread

from offload.checkpoint import LayerBlob
from offload.errors import CheckpointError
from offload.memory import Arena, FileReader, whole_pages

_CHUNK_BYTES = 4 << 20


class Read:
    """One read of a blob into an arena. done: it has ended well; error: what it raised instead."""

    __slots__ = ("arena", "blob", "done", "error", "owner")

    def __init__(self, blob: LayerBlob, arena: Arena, owner: object) -> None:
        self.blob, self.arena, self.owner = blob, arena, owner
        self.done = False
        self.error: BaseException | None = None


class ReadQueue:
    """Reads blobs in a thread of its own, urgent ones first, else in the order in which they were asked for.

    check(blob, arena): called in that thread after the first read of each blob that has checksums; may raise
    CheckpointError.
    bytes_read, reads, wait_seconds: counted since the beginning. on_read(blob, started, ended), if set, is told of
    every read, in the reader's thread, in the seconds of `time.perf_counter`. closed: nothing is read any more.
    """

    def __init__(self, reader: FileReader, check: Callable[[LayerBlob, Arena], None]) -> None:
        self.change = Condition()
        self.bytes_read, self.reads, self.wait_seconds = 0, 0, 0.0
        self.on_read: Callable[[LayerBlob, float, float], None] | None = None
        self._reader, self._check = reader, check
        self._urgent: deque[Read] = deque()
        self._ahead: deque[Read] = deque()
        self._reading: Read | None = None
        self._checked: dict[int, LayerBlob] = {}  # by identity; holding them keeps it theirs
        self.closed = False
        self._thread = Thread(target=self._work, name="read-ahead", daemon=True)
        self._thread.start()

    def put(self, blob: LayerBlob, arena: Arena, owner: object, urgent: bool = False) -> Read:
        """Ask for a blob. The lock is held."""
        read = Read(blob, arena, owner)
        (self._urgent if urgent else self._ahead).append(read)
        self.change.notify_all()
        return read

    def wait(self, read: Read, siblings: Iterable[Read] = ()) -> None:
        """Return when `read` is done. Raises what it or one of its siblings raised. The lock is held, but not here."""
        started = time.perf_counter()
        reads = [read, *siblings]
        self.change.wait_for(lambda: read.done or any(r.error for r in reads) or self.closed)
        self.wait_seconds += time.perf_counter() - started
        for one in reads:
            if one.error is not None:
                raise one.error
        if self.closed:
            raise CheckpointError("the model was closed while it was running")

    def withdraw(self, owner: object) -> None:
        """Forget what `owner` asked for; returns once none of it is being read. The lock is held, but not here."""
        self._drop(owner)
        self.change.wait_for(lambda: self._reading is None or self._reading.owner is not owner)

    def close(self) -> None:
        """Stop reading; a wait in another thread raises."""
        with self.change:
            self.closed = True
            self.change.notify_all()
        self._thread.join()

    def _drop(self, owner: object) -> None:
        self._urgent = deque(read for read in self._urgent if read.owner is not owner)
        self._ahead = deque(read for read in self._ahead if read.owner is not owner)

    def _work(self) -> None:
        while True:
            with self.change:
                self.change.wait_for(lambda: self._urgent or self._ahead or self.closed)
                if self.closed:
                    return
                read = self._reading = (self._urgent or self._ahead).popleft()
            error = self._read(read)
            with self.change:
                self._reading = None
                read.done, read.error = error is None, error
                if error is not None:
                    self._drop(read.owner)  # it is to hear of this before anything else is read for it
                self.change.notify_all()

    def _read(self, read: Read) -> BaseException | None:
        try:
            started = time.perf_counter()
            read_blob(self._reader, read.blob, read.arena)
            if self.on_read is not None:
                self.on_read(read.blob, started, time.perf_counter())
            self.bytes_read += read.blob.nbytes
            self.reads += 1
            if read.blob.checksums and id(read.blob) not in self._checked:
                self._check(read.blob, read.arena)
                self._checked[id(read.blob)] = read.blob
        except BaseException as error:  # whatever it is belongs to the thread that waits for this blob
            return error
        return None


def read_blob(reader: FileReader, blob: LayerBlob, arena: Arena, offset: int = 0) -> None:
    """Read a blob's ranges into an arena from `offset`, a multiple of 4096, each on a page of its own."""
    for place, nbytes in blob.ranges or ((blob.offset, blob.nbytes),):
        for start in range(0, nbytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, nbytes - start)
            target = arena.view(offset + start, arena.nbytes - offset - start)
            reader.read_into(blob.path, place + start, count, target)
        offset += whole_pages(nbytes)
