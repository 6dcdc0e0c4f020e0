"""One queue of transfers over one link: what a computation waits for comes before what will be needed later.

A transfer belongs to whoever asked for it, a ring of slots or the cache of experts. Its memory is not to be touched
until it has ended or was withdrawn. One thread works; everything else happens under one lock, `TransferQueue.change`,
which those who ask share.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from threading import Condition, Thread
from typing import Any

from offload.checkpoint import LayerBlob
from offload.errors import CheckpointError
from offload.gpu.device import Fence


class Transfer:
    """One blob's way into memory, an arena or a device's.

    done: it has ended well, or on a device is under way, see `ready`; error: what it raised instead. after: what a
    device has to have done before the memory may be written, None for nothing.
    """

    __slots__ = ("after", "arena", "blob", "done", "error", "owner", "ready")

    def __init__(self, blob: LayerBlob, arena: Any, owner: object, after: Fence | None = None) -> None:
        self.blob, self.arena, self.owner, self.after = blob, arena, owner, after
        self.done = False
        self.error: BaseException | None = None
        self.ready: Fence | None = None


class TransferQueue(ABC):
    """Works in a thread of its own, urgent transfers first, else in the order in which they were asked for.

    wait_seconds: counted since the beginning. closed: nothing is transferred any more. threaded: whether the thread is
    started.
    """

    def __init__(self, name: str, threaded: bool = True) -> None:
        self.change = Condition()
        self.wait_seconds = 0.0
        self._urgent: deque[Transfer] = deque()
        self._ahead: deque[Transfer] = deque()
        self._under_way: Transfer | None = None
        self.closed = False
        self._thread = Thread(target=self._work, name=name, daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def put(
        self, blob: LayerBlob, arena: Any, owner: object, urgent: bool = False, after: Fence | None = None
    ) -> Transfer:
        """Ask for a blob. The lock is held."""
        transfer = Transfer(blob, arena, owner, after)
        (self._urgent if urgent else self._ahead).append(transfer)
        self.change.notify_all()
        return transfer

    def wait(self, transfer: Transfer, siblings: Iterable[Transfer] = ()) -> None:
        """Return when `transfer` is done. Raises what it or a sibling before it raised. The lock is held, but not here.

        What went wrong with one that is needed later is heard when that one is needed.
        """
        started = time.perf_counter()
        transfers = [transfer, *siblings]
        self.change.wait_for(lambda: transfer.done or any(one.error for one in transfers) or self.closed)
        self.wait_seconds += time.perf_counter() - started
        for one in () if transfer.done else transfers:
            if one.error is not None:
                raise one.error
        if self.closed:
            raise CheckpointError("the model was closed while it was running")

    def withdraw(self, owner: object) -> None:
        """Forget what `owner` asked for; returns once none of it is under way. The lock is held, but not here."""
        self._drop(owner)
        self.change.wait_for(lambda: self._under_way is None or self._under_way.owner is not owner)

    def close(self) -> None:
        """Stop working; a wait in another thread raises."""
        self.abandon()
        if self._thread is not None:
            self._thread.join()

    def abandon(self) -> None:
        """Let the thread stop after what is under way, without waiting for it: also from the thread itself."""
        with self.change:
            self.closed = True
            self.change.notify_all()

    @abstractmethod
    def _perform(self, transfer: Transfer) -> None:
        """Do it. Whatever this raises belongs to the thread that waits for the blob."""

    def _drop(self, owner: object) -> None:
        self._urgent = deque(transfer for transfer in self._urgent if transfer.owner is not owner)
        self._ahead = deque(transfer for transfer in self._ahead if transfer.owner is not owner)

    def _work(self) -> None:
        while True:
            with self.change:
                self.change.wait_for(lambda: self._urgent or self._ahead or self.closed)
                if self.closed:
                    return
                transfer = self._under_way = (self._urgent or self._ahead).popleft()
            error: BaseException | None = None
            try:
                self._perform(transfer)
            except BaseException as raised:
                error = raised
            with self.change:
                self._under_way = None
                transfer.done, transfer.error = error is None, error
                if error is not None:
                    self._drop(transfer.owner)  # it is to hear of this before anything else is brought for it
                self.change.notify_all()
