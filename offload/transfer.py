"""The ring of slots that is streamed through, ahead of use: layers, and blocks of the head, in the order of a pass.

A slot has an owner from the moment a read is queued until the unit in it is released: there is no arithmetic that could
give it to two. After an interrupted forward everything is reset. Reads run in the order of their deadlines, which is
that of the units, around the end of the model into the next token.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from offload.checkpoint import LayerBlob
from offload.memory import Arena
from offload.read_queue import Read, ReadQueue


@dataclass(frozen=True, slots=True)
class _Held:
    slot: int
    read: Read


class Gate(Protocol):
    """Who lets several sequences use a unit before its slot is free again, see `offload.rounds`."""

    def arrive(self, position: int) -> None:
        """Return when the unit may be used."""

    def keeps(self, position: int) -> bool:
        """Whether the unit that one of them has released is to stay for the others."""


class Slots:
    """Streams `blobs` in circles through `depth` arenas of the largest one's size. poison: freed slots become NaN.

    gate: asked before each wait and at each release, if there is one.
    """

    def __init__(self, blobs: Sequence[LayerBlob], depth: int, queue: ReadQueue, poison: bool = False) -> None:
        self.queue, self._blobs, self._poison = queue, blobs, poison
        size = max(blob.nbytes for blob in blobs)
        self.arenas = [Arena(size) for _ in range(depth)]
        self.gate: Gate | None = None
        self._held: dict[int, _Held] = {}  # by the position of a blob
        self._free = deque(range(depth))

    def wait(self, position: int) -> int:
        """Return the slot that holds blob `position`, queueing it and those after it. Raises what its read raised."""
        if self.gate is not None:
            self.gate.arrive(position)
        with self.queue.change:
            if position not in self._held and not self._free:
                self._reset()  # an earlier forward was abandoned and left its layers behind
            self._fill(position)
            try:
                self.queue.wait(self._held[position].read, [held.read for held in self._held.values()])
            except BaseException:
                if not self.queue.closed:
                    self._reset()
                raise
            return self._held[position].slot

    def release(self, position: int) -> None:
        """Give the slot of blob `position` back and queue the next blobs."""
        if self.gate is not None and self.gate.keeps(position):
            return
        with self.queue.change:
            held = self._held.pop(position, None)
            if held is None:
                return
            self._put_back(held.slot)
            self._fill((position + 1) % len(self._blobs))

    def reset(self) -> None:
        """Forget everything that is queued or read: all slots are free again once the read in flight has ended."""
        with self.queue.change:
            self._reset()

    def _fill(self, position: int) -> None:
        """Queue blob `position` and its successors as far as there are free slots. The lock is held."""
        for step in range(len(self._blobs)):
            wanted = (position + step) % len(self._blobs)
            if wanted in self._held:
                continue
            if not self._free:
                break
            slot = self._free.popleft()
            self._held[wanted] = _Held(slot, self.queue.put(self._blobs[wanted], self.arenas[slot], self))

    def _reset(self) -> None:
        """Free every slot, after the read in flight has ended. The lock is held."""
        self.queue.withdraw(self)
        self._held.clear()
        self._free.clear()
        for slot in range(len(self.arenas)):
            self._put_back(slot)

    def _put_back(self, slot: int) -> None:
        if self._poison:
            self.arenas[slot].poison()
        self._free.append(slot)
