"""Copies of layers to a device, whole or in parts, ahead of their use, in a stream of their own.

Where the bytes lie in pinned memory a copy is queued at once, by whoever asks for it, and costs the host nothing more.
Those that come from disk first, or through a small pinned buffer where memory could not be pinned, are queued by a
thread. In either case what is computed waits for them on the device, and they for what was computed, not the host.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from offload.checkpoint import LayerBlob
from offload.gpu.device import Device, Fence, Stamp
from offload.memory import Memory
from offload.transfer import Gate, Slots
from offload.transfer_queue import Transfer, TransferQueue

BOUNCE_BYTES = 4 << 20
"""Of each of the BOUNCE_BUFFERS that stand in for memory that cannot be pinned."""

BOUNCE_BUFFERS = 3


class Lender(Protocol):
    """Lends arenas that hold blobs: the ring that disk is read into, or what is kept."""

    @property
    def arenas(self) -> Sequence[Any]:
        """What `wait` says the number of."""

    def wait(self, position: int) -> int:
        """Return the number of the arena that holds blob `position`. Raises what bringing it there raised."""

    def release(self, position: int) -> None:
        """Give it back."""


class Ring(Lender, Protocol):
    """Lends units that the sequences of a round use one after the other. gate: asked before each wait, if there is one.

    blobs: the units, by their positions.
    """

    gate: Gate | None
    blobs: Sequence[LayerBlob]


class Kept:
    """Lends arenas that stay what they are."""

    def __init__(self, arenas: Sequence[Memory]) -> None:
        self.arenas = arenas

    def wait(self, position: int) -> int:
        """Return the position."""
        return position

    def release(self, position: int) -> None:
        """Do nothing."""


class KeptInTurn(Kept):
    """A `Ring` of arenas that stay what they are."""

    def __init__(self, blobs: Sequence[LayerBlob], arenas: Sequence[Memory]) -> None:
        super().__init__(arenas)
        self.blobs = blobs
        self.gate: Gate | None = None

    def wait(self, position: int) -> int:
        """Return the position, when its turn has come."""
        if self.gate is not None:
            self.gate.arrive(position)
        return position


class Bounce:
    """Pinned buffers that bytes go through in turn, out of memory that could not be pinned. The host waits for them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers = [device.allocate_pinned(BOUNCE_BYTES) for _ in range(BOUNCE_BUFFERS)]
        self._busy: list[Fence | None] = [None] * BOUNCE_BUFFERS
        self._next = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of as many bytes; returns when the source may be changed."""
        for start in range(0, target.nbytes, BOUNCE_BYTES):
            buffer, busy = self._buffers[self._next], self._busy[self._next]
            if busy is not None:
                busy.synchronize()
            part = source[start : start + BOUNCE_BYTES]
            buffer[: part.nbytes] = part
            self._device.copy(target[start : start + part.nbytes], buffer[: part.nbytes])
            self._busy[self._next] = self._device.mark_copies()
            self._next = (self._next + 1) % BOUNCE_BUFFERS

    def close(self) -> None:
        """Give the buffers back, of which none is in use."""
        while self._buffers:
            self._device.free_pinned(self._buffers.pop())


class CopyLog:
    """Counts what of one kind crosses between host memory and a device, and tells whoever listens of each copy ahead.

    copied_bytes: since the beginning, with what a device reads across the bus while it computes. on_copy(blob, started,
    ended): who listens, or None.
    """

    def __init__(self, device: Device) -> None:
        self.copied_bytes = 0
        self.on_copy: Callable[[LayerBlob, Stamp, Stamp], None] | None = None
        self._device = device

    @contextmanager
    def copying(self, blob: LayerBlob) -> Iterator[None]:
        """Note a copy that is queued meanwhile. One thread at a time."""
        listener = self.on_copy
        if listener is None:
            yield
        else:
            started = self._device.stamp_copies()
            yield
            listener(blob, started, self._device.stamp_copies())
        self.copied_bytes += blob.nbytes


class CopyQueue(TransferQueue):
    """Copies blobs to the device. To be used from the thread that computes.

    sources: who lends each blob, and as which position, by the name of its module. bounce: the way out of arenas that
    are not pinned. log: where copies are noted.
    """

    def __init__(
        self, device: Device, sources: Mapping[str, tuple[Lender, int]], bounce: Bounce | None, log: CopyLog
    ) -> None:
        self._device, self._sources, self._bounce, self._log = device, sources, bounce, log
        self._threaded = bounce is not None or any(isinstance(lender, Slots) for lender, _ in sources.values())
        super().__init__("copy-ahead", self._threaded)

    def put(
        self, blob: LayerBlob, arena: Any, owner: object, urgent: bool = False, after: Fence | None = None
    ) -> Transfer:
        """Ask for a blob. The lock is held."""
        if self._threaded:
            return super().put(blob, arena, owner, urgent, after)
        transfer = Transfer(blob, arena, owner, after)
        self._perform(transfer)
        transfer.done = True
        return transfer

    def wait(self, transfer: Transfer, siblings: Any = ()) -> None:
        """Let what is computed from now on wait for a copy. Raises what it or a sibling raised. The lock is held."""
        super().wait(transfer, siblings)
        assert transfer.ready is not None, "it is done"
        self._device.compute_waits(transfer.ready)

    def withdraw(self, owner: object) -> None:
        """Forget what `owner` asked for; what is computed from now on finds none of it under way. The lock is held."""
        super().withdraw(owner)
        self._device.compute_waits(self._device.mark_copies())

    def _perform(self, transfer: Transfer) -> None:
        lender, position = self._sources[transfer.blob.module]
        arena = lender.arenas[lender.wait(position)]
        try:
            if transfer.after is not None:
                self._device.copies_wait(transfer.after)
            count = transfer.blob.nbytes
            copy = self._device.copy if self._bounce is None or arena.pinned else self._bounce.copy
            with self._log.copying(transfer.blob):
                copy(transfer.arena.bytes[:count], arena.bytes[:count])
                transfer.ready = self._device.mark_copies()
        finally:
            lender.release(position)
