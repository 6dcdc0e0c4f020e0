"""Experts in a few slots: read when they are routed to, kept while they are used more often than others.

The experts that a layer routes to are all queued as soon as they are known, before anything that is read ahead, and
come in order: while one is multiplied the next are read. A slot that is needed is taken from the expert with the fewest
uses, among equals from the one used last, for layers are used in circles and what was used longest ago comes next. (Its
opposite, LRU, keeps nothing of use once the experts of a token outnumber the slots.) Counts are halved from time to
time, so that a text may change its subject.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from offload.checkpoint import LayerBlob
from offload.layer_view import LayerView
from offload.memory import Arena
from offload.read_queue import ReadQueue
from offload.transfer_queue import Transfer

_USES_BETWEEN_HALVINGS = 16
"""Of an expert, on average."""

_AHEAD = 2
"""Reads that are kept under way, though all slots hold what is still wanted: one to come next, one behind it."""


@dataclass(slots=True, eq=False)
class _Slot:
    """Memory for one expert. expert: the one it holds or is to hold, -1 for none. view: set while it is attached."""

    arena: Arena
    expert: int = -1
    read: Transfer | None = None
    view: LayerView | None = None
    used: int = 0


class ExpertCache:
    """Lends experts out of `slots` slots of the largest one's size.

    blobs: of all experts; they are known by their places in it. view_of: where in the model the tensors of one belong,
    as it lies in an arena. poison: a slot that is taken from an expert is filled with NaN.
    """

    def __init__(
        self,
        blobs: Sequence[LayerBlob],
        slots: int,
        queue: ReadQueue,
        view_of: Callable[[LayerBlob, Arena], LayerView],
        poison: bool = False,
    ) -> None:
        self._blobs, self._queue, self._view_of, self._poison = blobs, queue, view_of, poison
        size = max(blob.nbytes for blob in blobs)
        self._slots = [_Slot(Arena(size)) for _ in range(slots)]
        self._where: dict[int, _Slot] = {}  # the slot that an expert had last; it says itself whether it still has it
        self._unread: list[_Slot] = []
        self._uses = [0] * len(blobs)
        self._clock = self._uses_since_halving = 0

    def lend(self, first: int, wanted: Sequence[int]) -> Generator[int]:
        """Yield each of `wanted`, in order, while its weights are in the model; they differ, and count from `first`.

        Raises what its read raised. To be closed if it is left before its end.
        """
        experts = deque(first + index for index in wanted)
        self._count(experts)
        try:
            while experts:
                with self._queue.change:
                    self._queue_all(experts)
                    slot = self._where[experts[0]]
                    if slot.read is not None:
                        self._queue.wait(slot.read, [other.read for other in self._unread if other.read is not None])
                if slot.view is None:
                    view = self._view_of(self._blobs[slot.expert], slot.arena)
                    view.attach()
                    slot.view = view
                yield experts.popleft() - first
                self._clock += 1
                slot.used = self._clock
        finally:
            self._forget_unread()

    def _count(self, experts: Sequence[int]) -> None:
        """Begin a round: count uses, and see that nothing of an abandoned one is left."""
        self._forget_unread()
        for expert in experts:
            self._uses[expert] += 1
        self._uses_since_halving += len(experts)
        if self._uses_since_halving > _USES_BETWEEN_HALVINGS * len(self._uses):
            self._uses, self._uses_since_halving = [uses // 2 for uses in self._uses], 0

    def _holder(self, expert: int) -> _Slot | None:
        slot = self._where.get(expert)
        return slot if slot is not None and slot.expert == expert else None

    def _queue_all(self, experts: Sequence[int]) -> None:
        """Queue the experts that are in no slot, as far as there are slots to give. The lock is held."""
        missing = [expert for expert in experts if self._holder(expert) is None]
        if not missing:
            return
        order = {expert: place for place, expert in enumerate(experts)}
        spare = deque(
            heapq.nsmallest(
                len(missing),
                (slot for slot in self._slots if slot.expert not in order),
                key=lambda slot: (slot.expert >= 0 and 1 + self._uses[slot.expert], -slot.used),
            )
        )
        for expert in missing:
            if spare:
                self._give(spare.popleft(), expert)
                continue
            later = [s for s in self._slots if s not in self._unread and order[s.expert] > order[expert]]
            if len(self._unread) >= _AHEAD or not later:
                return
            self._give(max(later, key=lambda slot: order[slot.expert]), expert)

    def _give(self, slot: _Slot, expert: int) -> None:
        """Take a slot from the expert in it, and queue another. The lock is held."""
        slot.expert = -1
        if slot.view is not None:
            slot.view.detach()
            slot.view = None
        if self._poison:
            slot.arena.poison()
        self._unread.append(slot)
        slot.read = self._queue.put(self._blobs[expert], slot.arena, self, urgent=True)
        self._where[expert] = slot
        slot.expert = expert

    def _forget_unread(self) -> None:
        """Leave slots empty whose reads have not ended well, and let none go on."""
        with self._queue.change:
            self._queue.withdraw(self)
            for slot in self._unread:
                if slot.read is None or not slot.read.done:
                    slot.expert = -1
            self._unread.clear()
