"""Rounds: sequences that run at once share every pass over the streamed weights.

Each sequence is an ordinary `generate()` in a thread of its own, of which one alone runs at any moment: a thread stands
still before each pass, before each unit of a ring, and where it wants what is cheaper for all at once (see `Joint`),
until every other one of the round has come there too. So a unit is read, or copied to a GPU, once for all of them; each
gets what it would compute alone, bit for bit, and one that fails or is cancelled leaves the others as they were. Who
comes during a round takes part in the next.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Condition, Semaphore, Thread, current_thread
from typing import Any

import torch
from transformers import PreTrainedModel

from offload.executor import executor_of
from offload.fused import fused_layers
from offload.gpu.copy_queue import Ring
from offload.head import StreamedHead
from offload.joint import Joint
from offload.linear import JointProduct, PackedLinear
from offload.streaming import Executor
from offload.transfer import Turn

_BEFORE_A_PASS = -1
_BETWEEN_PASSES = -2
"""As before a pass, and to go on before any other begins one: what all of them use is to be changed."""

_WINDOW_ROUNDS = 32


@dataclass(slots=True)
class Wish:
    """What a sequence stands still for. error: why it could not be done."""

    joint: Joint
    job: Any
    error: BaseException | None = None


class Cancelled(BaseException):
    """Raised inside a sequence that was cancelled, where it stands still."""


class Sequence:
    """What is to run: `run()`, and `ended(error)`, called once after it, in any thread.

    error: what `run` raised, Cancelled if the sequence was cancelled, None if all went well.
    """

    def __init__(self, run: Callable[[], None], ended: Callable[[BaseException | None], None]) -> None:
        self._run, self._ended = run, ended
        self._go, self._back = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._work, name="sequence", daemon=True)
        self._computing: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.at: int | None = _BEFORE_A_PASS
        self.wants: Wish | None = None
        self.cancelled = False

    def start(self, computing: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Run until the first pass; return then. computing: in which the thread computes, see `Device.computing`."""
        if self.cancelled:
            self.drop()
            return
        self._computing = computing
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no thread left
            self.at = None
            self._ended(error)
            return
        self._back.acquire()

    def resume(self) -> None:
        """Go on until the next unit or the next pass; return then. `at` is the unit, None after the end."""
        self._go.release()
        self._back.acquire()

    def pause(self, at: int) -> None:
        """Stand still, in the sequence's own thread, until resumed. Raises Cancelled."""
        self.at = at
        self._back.release()
        self._go.acquire()
        if self.cancelled:
            raise Cancelled

    def want(self, joint: Joint, job: Any) -> None:
        """Stand still, in the sequence's own thread, until a job was done. Raises Cancelled, or what it failed with."""
        wish = self.wants = Wish(joint, job)
        assert self.at is not None, "it runs"
        try:
            self.pause(self.at)
        finally:
            self.wants = None
        if wish.error is not None:
            raise wish.error

    def drop(self) -> None:
        """End what was never started."""
        self.at = None
        self._ended(Cancelled())

    def is_current(self) -> bool:
        """Whether this is the thread that asks."""
        return current_thread() is self._thread

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            with self._computing():
                self._run()
        except BaseException as raised:  # whatever it is, it is this sequence's alone
            error = raised
        self.at = None
        try:
            self._ended(error)
        finally:
            self._back.release()


@dataclass(frozen=True, slots=True)
class Round:
    """One pass for all. sequences: how many took part; bytes_read: from disk meanwhile; bytes_copied: to a GPU."""

    seconds: float
    sequences: int
    bytes_read: int
    bytes_copied: int


@dataclass(frozen=True, slots=True)
class _RingGate:
    """Stands before one ring of several. first: what its first unit is numbered as among those of all of them."""

    rounds: "Rounds"
    first: int

    def arrive(self, position: int) -> None:
        """Let a sequence stand still before unit `position` of the ring."""
        self.rounds.arrive(self.first + position)

    def turn(self, position: int) -> Turn | None:
        """Return the turn that unit `position` of the ring is kept for."""
        return self.rounds.turn(self.first + position)


class Rounds:
    """Runs sequences on a loaded model, at most `most` at a time; the others wait in line. To be closed.

    On a GPU they compute in the stream in which whoever makes this computes.
    """

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        self._executor, self._most = executor_of(model), most
        side = self._executor.device_side
        self._computing = nullcontext if side is None else side.device.computing()
        self._change = Condition()
        self._waiting: deque[Sequence] = deque()
        self._members: list[Sequence] = []
        self._running: Sequence | None = None
        self._turn: Turn | None = None
        self._closed = False
        self.rounds = 0
        self.recent: deque[Round] = deque(maxlen=_WINDOW_ROUNDS)
        self._passing = 0
        self._hook = model.register_forward_pre_hook(self._before_pass)
        self._units: list[tuple[Ring, int]] = []  # of all rings, with their positions there
        self._executor.between_passes = self._between_passes
        self._thread = Thread(target=self._work, name="rounds", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether sequences are still taken up."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many sequences wait in line."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many take part in the rounds."""
        return len(self._members)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line; it begins with one of the next rounds."""
        with self._change:
            if not self._closed:
                self._waiting.append(sequence)
                self._change.notify_all()
                return
        sequence.drop()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before the next unit that it would compute; it may have ended."""
        with self._change:
            sequence.cancelled = True
            if sequence not in self._waiting:
                return
            self._waiting.remove(sequence)
        sequence.drop()

    def close(self) -> None:
        """Cancel every sequence and give the model back. Returns when nothing of them runs any more."""
        with self._change:
            self._closed = True
            for sequence in (*self._waiting, *self._members):
                sequence.cancelled = True
            self._change.notify_all()
        self._thread.join()
        self._hook.remove()
        self._executor.between_passes = None
        for joint in _joints(self._executor):
            joint.gather = None
        for ring in self._executor.rings:
            ring.gate = None

    def arrive(self, unit: int) -> None:
        """Let a sequence stand still before a unit of the rings."""
        running = self._running
        if running is not None and running.is_current():
            running.pause(unit)

    def turn(self, unit: int) -> Turn | None:
        """Return the turn of those who use a unit now, None if nobody does."""
        return self._turn if self._turn is not None and self._turn.unit == unit else None

    def gather(self, joint: Joint, job: Any) -> None:
        """Have a job of a sequence done with those of the others; at once where there are no others."""
        running = self._running
        if self._passing > 1 and running is not None and running.is_current():
            running.want(joint, job)
        else:
            joint.compute([job])

    def _before_pass(self, model: Any, arguments: Any) -> None:
        self.arrive(_BEFORE_A_PASS)

    def _between_passes(self, act: Callable[[], None]) -> None:
        """Let a sequence do what changes the rings, when no other one is amid a pass."""
        self.arrive(_BETWEEN_PASSES)
        act()
        self.arrive(_BEFORE_A_PASS)

    def _prepare(self) -> None:
        """Stand at each ring and joint; where layers left a GPU since the last pass, they are other ones."""
        self._units = []
        for joint in _joints(self._executor):
            joint.gather = self.gather
        for ring in self._executor.rings:
            ring.gate = _RingGate(self, len(self._units))
            self._units += [(ring, position) for position in range(len(ring.blobs))]

    def _work(self) -> None:
        with self._computing():
            self._take_turns()

    def _take_turns(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._members or self._waiting or self._closed)
                if self._closed and not self._members and not self._waiting:
                    return
                joining = [self._waiting.popleft() for _ in range(min(self._most - self.running, self.waiting))]
                self._members += joining
            for sequence in joining:
                self._running = sequence
                sequence.start(self._computing)
            self._pass()
            with self._change:
                self._members = [sequence for sequence in self._members if sequence.at is not None]

    def _pass(self) -> None:
        """Take every member once through the model: through one unit all of them, then through the next."""
        started, before = time.perf_counter(), self._executor.stats
        members = [sequence for sequence in self._members if sequence.at is not None]
        self._passing = len(members)
        self._advance([sequence for sequence in members if sequence.at == _BETWEEN_PASSES])
        self._prepare()
        self._advance([sequence for sequence in members if sequence.at == _BEFORE_A_PASS])
        self._compute(members)
        while there := [sequence for sequence in members if sequence.at is not None and sequence.at >= 0]:
            unit = min(sequence.at for sequence in there if sequence.at is not None)
            here = [sequence for sequence in there if sequence.at == unit]
            self._turn = Turn(unit, len(here))
            self._advance(here)
            self._compute_next(members)  # what they want of this unit, if anything: it is still there
            self._turn = None
            ring, position = self._units[unit]
            ring.release(position)
            self._compute(members)
        if members:
            self.rounds += 1
            after, seconds = self._executor.stats, time.perf_counter() - started
            copied = after.layer_bytes_copied - before.layer_bytes_copied
            self.recent.append(Round(seconds, len(members), after.bytes_read - before.bytes_read, copied))

    def _compute(self, members: list[Sequence]) -> None:
        while self._compute_next(members):
            pass

    def _compute_next(self, members: list[Sequence]) -> bool:
        """Do what comes first in a pass of what members want, for all who want it; return whether there was any."""
        wanting = [(sequence, sequence.wants) for sequence in members if sequence.wants is not None]
        if not wanting:
            return False
        joint = min((wish.joint for _, wish in wanting), key=lambda joint: joint.order)
        served = [(sequence, wish) for sequence, wish in wanting if wish.joint is joint]
        try:
            with torch.inference_mode():  # as they are, or what they wait for could not be written
                joint.compute([wish.job for _, wish in served])
        except Exception as error:
            for _, wish in served:
                wish.error = error
        self._advance([sequence for sequence, _ in served])
        return True

    def _advance(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._running = sequence
            sequence.resume()
        self._running = None


def _joints(executor: Executor) -> list[Joint]:
    """Return what computes for several sequences at once in a model: fused layers, and a head that is packed."""
    head, joints = executor.model.get_output_embeddings(), list[Joint](fused_layers(executor.layers))
    if isinstance(head, StreamedHead):
        joints += head.joints
    elif isinstance(head, PackedLinear):
        head.joint = head.joint or JointProduct(len(executor.layers))
        joints.append(head.joint)
    return joints
