"""The ring of slots never shows one layer's bytes as another's, and reads from disk give exactly the file's."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.checkpoint import LayerBlob
from offload.errors import CheckpointError
from offload.memory import PAGE_BYTES, Arena, FileReader
from offload.read_queue import ReadQueue, read_blob
from offload.transfer import Slots

SIZES = (5000, 1, 4096, 12_345, 8192, 4097)

pytestmark = pytest.mark.timeout(60)


class Recorder(FileReader):
    """A reader that notes which files are read, and fails or waits where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.failing: set[str] = set()
        self.may_read = threading.Event()
        self.may_read.set()

    def read_into(self, path: Path, offset: int, nbytes: int, target: memoryview) -> None:
        self.names.append(path.name)
        assert self.may_read.wait(20)
        if path.name in self.failing:
            raise CheckpointError(f"{path}: told to fail")
        super().read_into(path, offset, nbytes, target)


def payload(position: int) -> bytes:
    return random.Random(position).randbytes(SIZES[position])


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerBlob, ...]:
    """Six files named 0 to 5, each a page of something else and then its payload."""
    directory = tmp_path_factory.mktemp("blobs")
    for position in range(len(SIZES)):
        (directory / str(position)).write_bytes(b"#" * PAGE_BYTES + payload(position))
    return tuple(
        LayerBlob(directory / str(position), f"layers.{position}", PAGE_BYTES, size, {}, {"all": "of it"})
        for position, size in enumerate(SIZES)
    )


def accept(blob: LayerBlob, arena: Arena) -> None:
    """The check of a test that is about something else."""


@contextmanager
def ring(
    blobs: Sequence[LayerBlob],
    depth: int,
    reader: FileReader | None = None,
    check: Callable[[LayerBlob, Arena], None] = accept,
    poison: bool = True,
) -> Iterator[Slots]:
    reader = reader or FileReader()
    queue = ReadQueue(reader, check)
    slots = Slots(blobs, depth, queue, poison)
    try:
        yield slots
    finally:
        queue.close()
        reader.close()


def found(slots: Slots, position: int) -> bytes:
    """Wait for a blob and return what its slot holds."""
    return bytes(slots.arenas[slots.wait(position)].view(0, SIZES[position]))


def open_files() -> dict[int, str]:
    """This process's descriptors and what they are of."""
    files = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listed them
            files[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return files


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_blobs_come_in_circles_in_their_order(blobs: tuple[LayerBlob, ...], depth: int, count: int) -> None:
    reader = Recorder()
    with ring(blobs[:count], depth, reader) as slots:
        for _ in range(3):
            for position in range(count):
                assert found(slots, position) == payload(position)
                slots.release(position)
    order = [str(turn % count) for turn in range(len(reader.names))]
    if depth < count:
        assert reader.names == order
        assert 3 * count <= len(reader.names) <= 3 * count + depth
    else:
        assert reader.names[:count] == order[:count]


def test_a_slot_in_use_is_not_written_and_nothing_is_read_beyond_the_ring(blobs: tuple[LayerBlob, ...]) -> None:
    reader = Recorder()
    with ring(blobs, 3, reader) as slots:
        used = slots.arenas[slots.wait(0)]
        eventually(lambda: slots.queue.reads == 3)
        time.sleep(0.02)
        assert reader.names == ["0", "1", "2"]
        assert bytes(used.view(0, SIZES[0])) == payload(0)
        slots.release(0)
        eventually(lambda: slots.queue.reads == 4)
        assert reader.names == ["0", "1", "2", "3"]


def test_a_wait_that_is_repeated_reads_nothing(blobs: tuple[LayerBlob, ...]) -> None:
    with ring(blobs[:3], 3) as slots:
        assert slots.wait(1) == slots.wait(1)
        eventually(lambda: slots.queue.reads == 3)
        assert [found(slots, position) for position in range(3)] == [payload(position) for position in range(3)]
        assert slots.queue.reads == 3


def test_a_freed_slot_is_filled_with_nan(blobs: tuple[LayerBlob, ...]) -> None:
    reader = Recorder()
    with ring(blobs[:2], 1, reader) as slots:
        arena = slots.arenas[slots.wait(0)]
        reader.may_read.clear()
        slots.release(0)
        assert set(arena.view(0, arena.nbytes)) == {0xFF}
        reader.may_read.set()
        found(slots, 1)
        slots.reset()
        assert set(arena.view(0, arena.nbytes)) == {0xFF}
    with ring(blobs[:2], 1, poison=False) as slots:
        assert set(slots.arenas[slots.wait(0)].view(0, SIZES[0])) != {0xFF}
        slots.reset()
        assert bytes(slots.arenas[0].view(0, SIZES[0])) == payload(0)


def test_releasing_what_is_not_held_changes_nothing(blobs: tuple[LayerBlob, ...]) -> None:
    with ring(blobs, 2) as slots:
        slots.release(4)
        assert found(slots, 0) == payload(0)
        slots.release(0)
        slots.release(0)
        for position in (1, 2, 3):
            assert found(slots, position) == payload(position)
            slots.release(position)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_way_to_abandon_a_pass(blobs: tuple[LayerBlob, ...], depth: int) -> None:
    with ring(blobs, depth) as slots:
        for stopped_at in range(len(blobs)):
            for position in range(stopped_at):
                assert found(slots, position) == payload(position)
                slots.release(position)
            slots.wait(stopped_at)
            for position in range(len(blobs)):
                assert found(slots, position) == payload(position)
                slots.release(position)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.integers(1, 7)),
        st.tuples(st.just("abandon"), st.integers(0, 5)),
        st.tuples(st.just("jump"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("let read"), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.booleans(), STEPS)
def test_a_waited_slot_holds_its_blob_whatever_came_before(
    blobs: tuple[LayerBlob, ...], depth: int, count: int, poison: bool, steps: list[tuple[str, int]]
) -> None:
    reader = Recorder()
    position = 0
    with ring(blobs[:count], depth, reader, poison=poison) as slots:

        def use() -> bool:
            try:
                content = found(slots, position)
            except CheckpointError as error:
                if not any(str(error).endswith(f"{name}: told to fail") for name in reader.failing):
                    raise
                reader.failing.clear()
                return False
            assert content == payload(position)
            return True

        for step, number in steps:
            if step == "use":
                for _ in range(number):
                    if use():
                        slots.release(position)
                        position = (position + 1) % count
                    else:
                        position = 0
            elif step == "abandon":
                use()
                position = number % count
            elif step == "jump":
                position = number % count
            elif step == "fail":
                reader.failing.add(str(number % count))
            elif step == "reset":
                slots.reset()
            else:
                time.sleep(0.0005)
        reader.failing.clear()
        slots.reset()
        for position in range(count):
            assert use()
            slots.release(position)


def test_an_error_of_the_reader_reaches_the_waiting_thread_and_is_forgotten(blobs: tuple[LayerBlob, ...]) -> None:
    reader = Recorder()
    reader.failing = {"1"}
    with ring(blobs[:3], 1, reader) as slots:
        assert found(slots, 0) == payload(0)
        slots.release(0)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="1: told to fail"):
                slots.wait(1)
        reader.failing.clear()
        for position in (1, 2, 0, 1):
            assert found(slots, position) == payload(position)
            slots.release(position)


def test_nothing_is_read_after_an_error_until_it_was_heard(blobs: tuple[LayerBlob, ...]) -> None:
    reader = Recorder()
    reader.failing = {"3"}
    with ring(blobs, 3, reader) as slots:
        slots.wait(0)
        eventually(lambda: slots.queue.reads == 3)
        reader.may_read.clear()
        for position in range(3):
            slots.release(position)
        eventually(lambda: reader.names == ["0", "1", "2", "3"])
        reader.may_read.set()
        time.sleep(0.02)
        assert reader.names == ["0", "1", "2", "3"]
        reader.failing.clear()
        with pytest.raises(CheckpointError, match="3: told to fail"):
            slots.wait(4)
        assert found(slots, 4) == payload(4)


def test_whatever_the_check_raises_reaches_the_waiting_thread(blobs: tuple[LayerBlob, ...]) -> None:
    def check(blob: LayerBlob, arena: Arena) -> None:
        if blob.path.name == "1":
            raise KeyboardInterrupt("in the reader's thread")

    with ring(blobs[:2], 1, check=check) as slots:
        slots.wait(0)
        slots.release(0)
        with pytest.raises(KeyboardInterrupt, match="in the reader's thread"):
            slots.wait(1)
        assert found(slots, 0) == payload(0)


def test_a_blob_is_checked_once_it_has_passed(blobs: tuple[LayerBlob, ...]) -> None:
    checked: list[str] = []
    damaged = True

    def check(blob: LayerBlob, arena: Arena) -> None:
        checked.append(blob.path.name)
        assert bytes(arena.view(0, blob.nbytes)) == payload(int(blob.path.name))
        if damaged and blob.path.name == "1":
            raise CheckpointError("damaged")

    with ring(blobs[:2], 1, check=check) as slots:
        slots.wait(0)
        slots.release(0)
        with pytest.raises(CheckpointError, match="damaged"):
            slots.wait(1)
        damaged = False
        for position in (1, 0, 1, 0, 1):
            slots.wait(position)
            slots.release(position)
    assert checked == ["0", "1", "1"]


def test_counters(blobs: tuple[LayerBlob, ...]) -> None:
    reader = Recorder()
    with ring(blobs[:3], 1, reader) as slots:
        assert (slots.queue.reads, slots.queue.bytes_read, slots.queue.wait_seconds) == (0, 0, 0.0)
        reader.may_read.clear()
        timer = threading.Timer(0.2, reader.may_read.set)
        timer.start()
        for position in range(3):
            slots.wait(position)
            if position < 2:
                slots.release(position)
        timer.join()
        assert (slots.queue.reads, slots.queue.bytes_read) == (3, sum(SIZES[:3]))
        assert 0.02 < slots.queue.wait_seconds < 20


def test_closing_ends_a_wait_in_another_thread(blobs: tuple[LayerBlob, ...]) -> None:
    reader = Recorder()
    reader.may_read.clear()
    before = set(threading.enumerate())
    slots = Slots(blobs, 2, ReadQueue(reader, accept))
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            slots.wait(0)
        except CheckpointError as error:
            raised.append(error)

    waiter, closer = threading.Thread(target=wait), threading.Thread(target=slots.queue.close)
    waiter.start()
    eventually(lambda: reader.names == ["0"])
    closer.start()
    waiter.join(20)
    assert [str(error) for error in raised] == ["the model was closed while it was running"]
    assert closer.is_alive(), "the read in flight writes into an arena that must not go away yet"
    reader.may_read.set()
    closer.join(20)
    assert not closer.is_alive()
    assert set(threading.enumerate()) <= before
    with pytest.raises(CheckpointError, match="closed while it was running"):
        slots.wait(3)
    slots.queue.close()
    reader.close()


def test_a_reset_waits_for_the_read_in_flight(blobs: tuple[LayerBlob, ...]) -> None:
    reader = Recorder()
    with ring(blobs, 1, reader) as slots:
        found(slots, 0)
        reader.may_read.clear()
        slots.release(0)
        eventually(lambda: reader.names == ["0", "1"])
        timer = threading.Timer(0.05, reader.may_read.set)
        timer.start()
        slots.reset()
        timer.join()
        assert set(slots.arenas[0].view(0, SIZES[1])) == {0xFF}, "read into after it was freed"
        assert found(slots, 2) == payload(2)


def test_a_blob_is_read_in_chunks_to_where_it_belongs(
    blobs: tuple[LayerBlob, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.read_queue._CHUNK_BYTES", PAGE_BYTES)
    reader, arena = Recorder(), Arena(5 * PAGE_BYTES)
    arena.poison()
    read_blob(reader, blobs[3], arena, PAGE_BYTES)
    reader.close()
    assert reader.names == ["3"] * 4
    assert bytes(arena.view(PAGE_BYTES, SIZES[3])) == payload(3)
    assert set(arena.view(0, PAGE_BYTES)) == {0xFF}


def test_an_arena_is_whole_pages_of_its_own(tmp_path: Path) -> None:
    for nbytes, expected in ((0, 4096), (1, 4096), (4096, 4096), (4097, 8192)):
        arena = Arena(nbytes)
        assert arena.nbytes == len(arena.bytes) == expected
        assert arena.bytes.data_ptr() % 4096 == 0
    arena.view(4096, 4)[:] = b"\x01\x02\x03\x04"
    import torch

    assert arena.tensor(4096, 4, (2, 1), torch.int16).tolist() == [[0x0201], [0x0403]]
    arena.poison()
    assert torch.isnan(arena.tensor(0, 4096, (1024,), torch.float32)).all()
    assert torch.isnan(arena.tensor(0, 4096, (2048,), torch.bfloat16)).all()


@pytest.fixture(params=["direct", "buffered"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileReader]:
    reader = FileReader()
    if request.param == "buffered":
        reader.direct = False
    else:
        (tmp_path / "probe").write_bytes(bytes(PAGE_BYTES))
        reader.read_into(tmp_path / "probe", 0, 1, Arena(1).view(0, PAGE_BYTES))
        if not reader.direct:
            pytest.skip("this file system has no direct reads")
    yield reader
    assert reader.direct == (request.param == "direct")
    reader.close()


def read(reader: FileReader, path: Path, offset: int, nbytes: int) -> bytes:
    arena = Arena(nbytes)
    reader.read_into(path, offset, nbytes, arena.view(0, arena.nbytes))
    return bytes(arena.view(0, nbytes))


@pytest.mark.parametrize("size", [1, 100, 4095, 4096, 4097, 8192, 50_001])
def test_a_reader_gives_the_bytes_of_the_file(reader: FileReader, tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "a").write_bytes(content)
    assert read(reader, tmp_path / "a", 0, size) == content
    for offset in range(0, size, 4096):
        assert read(reader, tmp_path / "a", offset, size - offset) == content[offset:]
        assert read(reader, tmp_path / "a", offset, min(10, size - offset)) == content[offset:][:10]


@pytest.mark.parametrize("seed", range(5))
def test_short_reads_are_continued(
    reader: FileReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    content = random.Random(seed).randbytes(60_001)
    (tmp_path / "a").write_bytes(content)
    real, lengths = os.preadv, random.Random(seed)

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = real(descriptor, buffers, offset)
        least = min(count, PAGE_BYTES) if reader.direct else 1
        told = lengths.randint(least, count) if count else 0
        buffers[0][told:count] = bytes(count - told)  # what was not read is not there
        return told

    read(reader, tmp_path / "a", 0, 1)
    monkeypatch.setattr(os, "preadv", short)
    assert read(reader, tmp_path / "a", 0, 60_001) == content
    assert read(reader, tmp_path / "a", 8192, 20_000) == content[8192:28_192]


@pytest.mark.parametrize("left", [0, 1, 4095, 4096, 4097, 8191, 8192, 10_000])
def test_an_end_inside_is_an_error(reader: FileReader, tmp_path: Path, left: int) -> None:
    (tmp_path / "a").write_bytes(bytes(4096 + 10_001))
    assert read(reader, tmp_path / "a", 4096, 10_001) == bytes(10_001)
    os.truncate(tmp_path / "a", 4096 + left)
    with pytest.raises(CheckpointError) as caught:
        read(reader, tmp_path / "a", 4096, 10_001)
    assert str(caught.value) == f"{tmp_path / 'a'}: ends at byte {4096 + left}; it was truncated while in use"


def test_after_an_error_the_file_is_opened_anew(reader: FileReader, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1" * 5000)
    assert read(reader, path, 0, 5000) == b"1" * 5000
    before = open_files().keys()
    os.truncate(path, 10)
    with pytest.raises(CheckpointError, match="truncated while in use"):
        read(reader, path, 0, 5000)
    (tmp_path / "new").write_bytes(b"2" * 5000)
    (tmp_path / "new").rename(path)
    assert read(reader, path, 0, 5000) == b"2" * 5000
    assert open_files().keys() == before


def test_an_io_error_names_file_and_byte(reader: FileReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(0).randbytes(20_000)
    (tmp_path / "a").write_bytes(content)
    read(reader, tmp_path / "a", 0, 1)
    real = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 12_288:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, [buffers[0][:PAGE_BYTES]], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError) as caught:
            read(reader, tmp_path / "a", 4096, 15_000)
    assert str(caught.value) == f"{tmp_path / 'a'}: cannot be read at byte 12288 (Input/output error)"
    assert read(reader, tmp_path / "a", 4096, 15_000) == content[4096:19_096]


def test_a_missing_file_is_an_error_and_leaves_direct_reads_on(reader: FileReader, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be read at byte 4096 \(No such file or directory\)"):
        read(reader, tmp_path / "nowhere", 4096, 10)


def test_a_file_system_without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_preadv = os.open, os.preadv
    direct: set[int] = set()

    def refuse_flag(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *arguments, **options)

    def allow_flag(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        descriptor = real_open(path, flags & ~os.O_DIRECT, *arguments, **options)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        else:
            direct.discard(descriptor)
        return descriptor

    def refuse_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_preadv(descriptor, buffers, offset)

    content = random.Random(1).randbytes(9999)
    (tmp_path / "a").write_bytes(content)
    for replaced in ({"open": refuse_flag}, {"open": allow_flag, "preadv": refuse_read}):
        before = open_files()
        with monkeypatch.context() as patch:
            for name, function in replaced.items():
                patch.setattr(os, name, function)
            reader = FileReader()
            assert read(reader, tmp_path / "a", 0, 9999) == content
            assert not reader.direct
            reader.close()
        assert open_files() == before


def test_few_files_are_open_and_none_after_close(reader: FileReader, tmp_path: Path) -> None:
    reader.close()
    before = open_files()
    for turn in range(2):
        for number in range(40):
            path = tmp_path / str(number)
            if turn == 0:
                path.write_bytes(f"{number:4}".encode() * 2000)
            assert read(reader, path, 4096, 3904) == (f"{number:4}".encode() * 976)
            assert len(open_files()) <= len(before) + 16
    opened = {name for descriptor, name in open_files().items() if descriptor not in before}
    assert opened == {str((tmp_path / str(number)).resolve()) for number in range(24, 40)}
    reader.close()
    assert open_files() == before
    assert read(reader, tmp_path / "0", 0, 4) == b"   0"
    reader.close()
    assert open_files() == before


def test_the_file_used_last_stays_open(reader: FileReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (tmp_path / str(number)).write_bytes(bytes(5000))
    opened: list[str] = []
    real = os.open

    def recorded(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", recorded)
    for number in range(30):
        read(reader, tmp_path / str(number), 0, 10)
        read(reader, tmp_path / "0", 0, 10)
    assert opened.count("0") == 1
    assert opened.count("1") == 1


def test_a_file_that_is_being_read_stays_open(
    reader: FileReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 5000)
    (tmp_path / "slow").write_bytes(b"s" * 5000)
    reader.close()
    before = len(open_files())
    read(reader, tmp_path / "slow", 0, 1)
    real, main = os.preadv, threading.current_thread()
    started, others_done = threading.Event(), threading.Event()
    results: list[bytes] = []

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if threading.current_thread() is not main:
            started.set()
            assert others_done.wait(20)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    thread = threading.Thread(target=lambda: results.append(read(reader, tmp_path / "slow", 0, 5000)))
    thread.start()
    assert started.wait(20)
    for number in range(20):
        assert read(reader, tmp_path / str(number), 0, 5000) == bytes([number]) * 5000
    assert read(reader, tmp_path / "slow", 0, 5000) == b"s" * 5000
    others_done.set()
    thread.join(20)
    assert results == [b"s" * 5000]
    assert len(open_files()) == before + 16


def test_reads_from_many_threads_never_mix_files(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 5000)
    reader = FileReader()
    wrong: list[str] = []

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(400):
            number = numbers.randrange(40)
            try:
                if read(reader, tmp_path / str(number), 0, 5000) != bytes([number]) * 5000:
                    wrong.append(f"{number} holds other bytes")
            except CheckpointError as error:
                wrong.append(str(error))

    before = open_files()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    reader.close()
    assert open_files() == before
