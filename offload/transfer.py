"""The ring of slots that is streamed through, ahead of use: layers or parts of them, and blocks of the head.

A slot has an owner from the moment a transfer is queued until the unit in it is released: there is no arithmetic that
could give it to two. After an interrupted forward everything is reset. Transfers run in the order of their deadlines,
around the end of the model into the next token: the order in which the first whole pass has waited for the units.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from offload.checkpoint import LayerBlob
from offload.gpu.device import Fence
from offload.memory import Arena, Memory
from offload.transfer_queue import Transfer, TransferQueue


@dataclass(frozen=True, slots=True)
class _Held:
    slot: int
    transfer: Transfer


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """The use of a unit by so many sequences, one after the other; told from every other use by what it is."""

    unit: int
    sequences: int


class Gate(Protocol):
    """Who lets several sequences use a unit before its slot is free again, see `offload.serving.rounds`."""

    def arrive(self, position: int) -> None:
        """Return when the unit may be used."""

    def turn(self, position: int) -> Turn | None:
        """Return the turn that the unit is kept for, None if it is free with its release."""


class Slots:
    """Streams `blobs` in circles through slots of the largest one's size, ahead of use, over the link of `queue`.

    arenas: the slots, or how many of them to make in host memory. poison: freed slots become NaN. fence: makes one
    behind everything that a device still does with a slot, where one does. gate: asked before each wait and at each
    release, if there is one.
    """

    def __init__(
        self,
        blobs: Sequence[LayerBlob],
        arenas: Sequence[Memory] | int,
        queue: TransferQueue,
        poison: bool = False,
        fence: Callable[[], Fence] | None = None,
    ) -> None:
        self.queue, self.blobs, self._poison, self._fence = queue, blobs, poison, fence
        size = max(blob.nbytes for blob in blobs)
        self.arenas: list[Any] = [Arena(size) for _ in range(arenas)] if isinstance(arenas, int) else list(arenas)
        self.gate: Gate | None = None
        self._held: dict[int, _Held] = {}  # by the position of a blob
        self._free = deque(range(len(self.arenas)))
        self._after: list[Fence | None] = [None] * len(self.arenas)
        self._next = [(position + 1) % len(blobs) for position in range(len(blobs))]
        self._waited_for: dict[int, None] = {}  # since a pass began, in order

    def wait(self, position: int) -> int:
        """Return the slot that holds blob `position`, queueing it and those after it. Raises what its transfer raised.

        In a device's memory it holds it for what is computed from now on.
        """
        if self.gate is not None:
            self.gate.arrive(position)
        with self.queue.change:
            self._learn_order(position)
            if position not in self._held and not self._free:
                self._reset()  # an earlier forward was abandoned and left its layers behind
            try:
                self._fill(position)
                self.queue.wait(self._held[position].transfer, [held.transfer for held in self._held.values()])
            except BaseException:
                if not self.queue.closed:
                    self._reset()
                raise
            return self._held[position].slot

    def release(self, position: int) -> None:
        """Give the slot of blob `position` back and queue the next blobs."""
        if self.gate is not None and self.gate.turn(position) is not None:
            return
        with self.queue.change:
            held = self._held.pop(position, None)
            if held is None:
                return
            self._put_back(held.slot)
            self._fill(self._next[position])

    def reset(self) -> None:
        """Forget everything that is queued or there: all slots are free again once what is under way has ended."""
        with self.queue.change:
            self._reset()

    def _fill(self, position: int) -> None:
        """Queue blob `position` and its successors as far as there are free slots. The lock is held."""
        wanted = position
        for _ in self.blobs:
            if wanted not in self._held:
                if not self._free:
                    break
                slot = self._free.popleft()
                after, self._after[slot] = self._after[slot], None
                transfer = self.queue.put(self.blobs[wanted], self.arenas[slot], self, after=after)
                self._held[wanted] = _Held(slot, transfer)
            wanted = self._next[wanted]

    def _learn_order(self, position: int) -> None:
        """Note what is waited for; after a whole pass, go on in its order: attention may list its parts in another."""
        if next(reversed(self._waited_for), None) == position:  # another sequence of a round
            return
        if position in self._waited_for:  # another pass
            self._waited_for.clear()
        self._waited_for[position] = None
        if len(self._waited_for) == len(self.blobs):
            order = list(self._waited_for)
            for one, following in zip(order, order[1:] + order[:1], strict=True):
                self._next[one] = following

    def _reset(self) -> None:
        """Free every slot, after the transfer under way has ended. The lock is held."""
        self.queue.withdraw(self)
        self._held.clear()
        self._free.clear()
        for slot in range(len(self.arenas)):
            self._put_back(slot)

    def _put_back(self, slot: int) -> None:
        if self._poison:
            if self._fence is not None:
                self._fence().synchronize()
            self.arenas[slot].poison()
        self._after[slot] = None if self._fence is None else self._fence()
        self._free.append(slot)
