"""The queue to the disk and the cache of experts on it: who is read first, who is forgotten, and who keeps a slot."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.checkpoint import LayerBlob
from offload.errors import CheckpointError
from offload.expert_cache import ExpertCache
from offload.memory import Arena
from offload.read_queue import ReadQueue

COUNT = 6
BLOBS = [LayerBlob(Path(str(index)), f"experts.{index}", 0, 4096, {}, {}) for index in range(COUNT)]

pytestmark = pytest.mark.timeout(60)


class Disk:
    """A reader whose files hold their own number; each read waits for a permit, and fails where it is told to."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.begun = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.failing: set[int] = set()

    def read_into(self, path: Path, offset: int, nbytes: int, target: memoryview) -> None:
        index = int(path.name)
        self.begun.release()
        assert self.permits.acquire(timeout=20)
        if index in self.failing:
            raise CheckpointError(f"{path}: told to fail")
        self.read.append(index)
        target[:nbytes] = bytes([index]) * nbytes


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def queue(disk: Disk) -> Iterator[ReadQueue]:
    reader: Any = disk
    queue = ReadQueue(reader, lambda blob, arena: None)
    yield queue
    disk.permits.release(1000)
    queue.close()


def put(queue: ReadQueue, index: int, owner: object, urgent: bool = False) -> Any:
    with queue.change:
        return queue.put(BLOBS[index], Arena(4096), owner, urgent)


def wait(queue: ReadQueue, read: Any) -> None:
    with queue.change:
        queue.wait(read)


def test_what_is_waited_for_is_read_before_what_will_be_needed(disk: Disk, queue: ReadQueue) -> None:
    put(queue, 0, "ring")
    assert disk.begun.acquire(timeout=20)
    last = [put(queue, 1, "ring"), put(queue, 2, "ring")][-1]
    put(queue, 3, "experts", urgent=True)
    put(queue, 4, "experts", urgent=True)
    disk.permits.release(5)
    wait(queue, last)
    assert disk.read == [0, 3, 4, 1, 2]


def test_what_was_withdrawn_is_not_read_and_others_are(disk: Disk, queue: ReadQueue) -> None:
    first = put(queue, 0, "ring")
    assert disk.begun.acquire(timeout=20)
    put(queue, 1, "ring")
    put(queue, 2, "ring", urgent=True)
    last = put(queue, 3, "experts")
    ended = threading.Event()

    def withdraw() -> None:
        with queue.change:
            queue.withdraw("ring")
        ended.set()

    threading.Thread(target=withdraw).start()
    assert not ended.wait(0.1)  # its memory is being written
    disk.permits.release(10)
    assert ended.wait(20)
    assert first.done
    wait(queue, last)
    assert disk.read == [0, 3]


def test_a_read_that_fails_takes_those_behind_it_along(disk: Disk, queue: ReadQueue) -> None:
    disk.failing = {0}
    reads = [put(queue, index, "ring") for index in range(3)]
    other = put(queue, 4, "experts")
    disk.permits.release(10)
    wait(queue, other)
    with pytest.raises(CheckpointError, match="told to fail"), queue.change:
        queue.wait(reads[1], [reads[0]])
    assert disk.read == [4]


class View:
    """Stands for the tensors of one expert in the model."""

    def __init__(self, blob: LayerBlob, arena: Arena, attached: list["View"]) -> None:
        self.index, self.arena, self._attached = int(blob.path.name), arena, attached

    def attach(self) -> None:
        self._attached.append(self)

    def detach(self) -> None:
        self._attached.remove(self)


@pytest.fixture
def lend(queue: ReadQueue) -> Callable[[int], Any]:
    """Return a function that makes a cache of so many slots; what it lends is checked to be there."""

    def make(slots: int) -> Any:
        attached: list[View] = []

        def view_of(blob: LayerBlob, arena: Arena) -> Any:
            return View(blob, arena, attached)

        cache = ExpertCache(BLOBS, slots, queue, view_of, poison=True)

        def lent(*experts: int) -> Iterator[int]:
            for index in cache.lend(0, experts):
                assert bytes(next(view for view in attached if view.index == index).arena.view(0, 4096)) == (
                    bytes([index]) * 4096
                )
                assert len(attached) <= slots
                yield index

        return lent

    return make


def test_experts_come_in_order_and_those_used_most_stay(disk: Disk, lend: Callable[[int], Any]) -> None:
    disk.permits.release(100)
    lent = lend(2)
    for experts in ((0,), (0,), (0,), (1,), (1,), (2,), (0,)):
        assert list(lent(*experts)) == list(experts)
    assert disk.read == [0, 1, 2]
    assert list(lent(4, 1, 3, 5)) == [4, 1, 3, 5]


def test_among_equals_the_one_used_last_goes(disk: Disk, lend: Callable[[int], Any]) -> None:
    disk.permits.release(100)
    lent = lend(2)
    assert [list(lent(expert)) for expert in (0, 1, 2, 0)] == [[0], [1], [2], [0]]
    assert disk.read == [0, 1, 2]


def test_a_round_that_was_left_holds_nothing_unread(disk: Disk, lend: Callable[[int], Any]) -> None:
    lent = lend(3)
    round_ = lent(0, 1, 2)
    disk.permits.release(1)
    assert next(round_) == 0
    assert disk.begun.acquire(timeout=20)
    assert disk.begun.acquire(timeout=20)  # the second is under way, the third in the queue
    threading.Timer(0.1, disk.permits.release).start()
    round_.close()
    assert disk.read == [0, 1]
    disk.permits.release(100)
    assert list(lent(0, 1, 2)) == [0, 1, 2]
    assert disk.read == [0, 1, 2]


def test_a_blob_is_checked_at_its_first_read_and_never_without_a_check(disk: Disk) -> None:
    checked: list[str] = []
    reader: Any = disk
    blob = LayerBlob(Path("1"), "experts.1", 0, 4096, {}, {"weight": "0" * 16})
    for check, expected in ((lambda blob, arena: checked.append(blob.module), ["experts.1"]), (None, [])):
        checked.clear()
        queue = ReadQueue(reader, check)
        disk.permits.release(2)
        for _ in range(2):
            with queue.change:
                queue.wait(queue.put(blob, Arena(4096), "ring"))
        queue.close()
        assert checked == expected
