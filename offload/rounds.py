"""Rounds: sequences that run at once share every pass over the streamed weights.

Each sequence is an ordinary `generate()` in a thread of its own, of which one alone runs at any moment: a thread stands
still before each pass, before each unit of the ring, and where it wants what is cheaper for all at once (see `Joint`),
until every other one of the round has come there too. So a unit is read once for all of them, each of them gets what it
would compute alone, bit for bit, and one that fails or is cancelled leaves the others as they were. Who comes during a
round takes part in the next.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Semaphore, Thread, current_thread
from typing import Any

import torch
from transformers import PreTrainedModel

from offload.errors import UsageError
from offload.executor import executor_of
from offload.joint import Joint

_BEFORE_A_PASS = -1
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
        self.at: int | None = _BEFORE_A_PASS
        self.wants: Wish | None = None
        self.cancelled = False

    def start(self) -> None:
        """Run until the first pass; return then."""
        if self.cancelled:
            self.drop()
            return
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
    """One pass for all. sequences: how many took part; bytes_read: from disk meanwhile."""

    seconds: float
    sequences: int
    bytes_read: int


class Rounds:
    """Runs sequences on a loaded model, at most `most` at a time; the others wait in line. To be closed.

    Raises UsageError for a model with layers on a GPU: their slots know no gate yet.
    """

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        self._executor, self._most = executor_of(model), most
        if self._executor.device_side is not None:
            raise UsageError("requests share passes over layers on the host only: leave the GPU out, or generate alone")
        self._change = Condition()
        self._waiting: deque[Sequence] = deque()
        self._members: list[Sequence] = []
        self._running: Sequence | None = None
        self._shared: int | None = None
        self._closed = False
        self.rounds = 0
        self.recent: deque[Round] = deque(maxlen=_WINDOW_ROUNDS)
        self._passing = 0
        self._hook = model.register_forward_pre_hook(self._before_pass)
        for joint in self._executor.joints():
            joint.gather = self.gather
        if self._executor.slots is not None:
            self._executor.slots.gate = self
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
        for joint in self._executor.joints():
            joint.gather = None
        if self._executor.slots is not None:
            self._executor.slots.gate = None

    def arrive(self, position: int) -> None:
        """Let a sequence stand still before unit `position` of the ring."""
        running = self._running
        if running is not None and running.is_current():
            running.pause(position)

    def keeps(self, position: int) -> bool:
        """Whether unit `position` is still to serve others."""
        return position == self._shared

    def gather(self, joint: Joint, job: Any) -> None:
        """Have a job of a sequence done with those of the others; at once where there are no others."""
        running = self._running
        if self._passing > 1 and running is not None and running.is_current():
            running.want(joint, job)
        else:
            joint.compute([job])

    def _before_pass(self, model: Any, arguments: Any) -> None:
        self.arrive(_BEFORE_A_PASS)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._members or self._waiting or self._closed)
                if self._closed and not self._members and not self._waiting:
                    return
                joining = [self._waiting.popleft() for _ in range(min(self._most - self.running, self.waiting))]
                self._members += joining
            for sequence in joining:
                self._running = sequence
                sequence.start()
            self._pass()
            with self._change:
                self._members = [sequence for sequence in self._members if sequence.at is not None]

    def _pass(self) -> None:
        """Take every member once through the model: through one unit all of them, then through the next."""
        started, read = time.perf_counter(), self._executor.stats.bytes_read
        members = [sequence for sequence in self._members if sequence.at is not None]
        self._passing = len(members)
        self._advance(members)
        self._compute(members)
        while there := [sequence for sequence in members if sequence.at is not None and sequence.at >= 0]:
            position = min(sequence.at for sequence in there if sequence.at is not None)
            self._shared = position
            self._advance([sequence for sequence in there if sequence.at == position])
            self._compute_next(members)  # what they want of this unit, if anything: it is still there
            self._shared = None
            assert self._executor.slots is not None, "only units of the ring are waited for"
            self._executor.slots.release(position)
            self._compute(members)
        if members:
            self.rounds += 1
            nbytes = self._executor.stats.bytes_read - read
            self.recent.append(Round(time.perf_counter() - started, len(members), nbytes))

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
