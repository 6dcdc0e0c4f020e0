"""Host memory of an exact size, and reads from disk straight into it.

Weights that do not fit are never mapped from their file: a truncated file would kill the process, and the page cache
drops exactly what is needed next. They are read into memory of our own, past the page cache where the file system can.
"""

import ctypes
import mmap
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from offload.errors import CheckpointError

PAGE_BYTES = 4096
_OPEN_FILES = 16
_HUGE_PAGE_BYTES = 2 << 20
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Memory:
    """Bytes that tensors are views of, wherever they lie. bytes: uint8 [nbytes]."""

    def __init__(self, memory: Tensor) -> None:
        self.bytes, self.nbytes = memory, memory.nbytes

    def tensor(self, offset: int, nbytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that lies in the memory."""
        return self.bytes[offset : offset + nbytes].view(dtype).view(shape)

    def poison(self) -> None:
        """Fill with 0xFF, which is NaN in every float dtype: a read of memory that is not owned shows."""
        self.bytes.fill_(0xFF)


class Arena(Memory):
    """Page-aligned host memory of `nbytes` rounded up to a page. pinned: a device reads it where it lies.

    Large ones ask for huge pages, of which a product reads up to 1.2 times as fast (2 threads, Granite Rapids).
    """

    def __init__(self, nbytes: int) -> None:
        nbytes = whole_pages(max(nbytes, 1))
        self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared: no huge pages
        if nbytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        super().__init__(torch.frombuffer(self._memory, dtype=torch.uint8))
        self.pinned = False

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return a writable view of a range of bytes."""
        return memoryview(self._memory)[offset : offset + nbytes]


class FileReader:
    """Reads ranges of files into arenas, from any thread, with few files open at a time.

    direct: whether reads go past the page cache. Where the file system refuses that, they are buffered and their pages
    dropped afterwards. A reader that nobody holds any more closes its files.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, tuple[int, bool]] = OrderedDict()
        self._lock = Lock()
        self.direct = True
        weakref.finalize(self, _close_files, self._open)

    def read_into(self, path: Path, offset: int, nbytes: int, target: memoryview) -> None:
        """Read bytes [offset, offset + nbytes) of a file; offset is a multiple of 4096, target holds whole pages of it.

        Raises CheckpointError if the file ends before, or cannot be read.
        """
        rounded = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        done = 0
        try:
            with self._lent(path) as (descriptor, direct):
                while done < nbytes:
                    count = os.preadv(descriptor, [target[done:rounded]], offset + done)
                    end = done + count
                    if direct and end < nbytes:
                        end -= end % PAGE_BYTES  # a direct read continues on a page
                    if end == done:
                        raise CheckpointError(
                            f"{path}: ends at byte {offset + done + count}; it was truncated while in use"
                        )
                    done = end
                if not direct:
                    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from None

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            _close_files(self._open)

    @contextmanager
    def _lent(self, path: Path) -> Iterator[tuple[int, bool]]:
        """Lend a file's descriptor to one read: no other read can have it closed in the meantime."""
        with self._lock:
            lent = self._open.pop(path, None)
        lent = lent or self._open_file(path)
        try:
            yield lent
        except BaseException:
            os.close(lent[0])  # the next read opens what lies there by then
            raise
        with self._lock:
            surplus = [self._open.pop(path)] if path in self._open else []
            self._open[path] = lent
            if len(self._open) > _OPEN_FILES:
                surplus.append(self._open.popitem(last=False)[1])
        for descriptor, _ in surplus:
            os.close(descriptor)

    def _open_file(self, path: Path) -> tuple[int, bool]:
        """Open past the page cache if a first read shows that this works here."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.direct and hasattr(os, "O_DIRECT"):
            try:
                descriptor = os.open(path, flags | os.O_DIRECT)
                try:
                    os.preadv(descriptor, [mmap.mmap(-1, PAGE_BYTES)], 0)
                    return descriptor, True
                except OSError:
                    os.close(descriptor)
            except OSError:
                pass
        descriptor = os.open(path, flags)
        self.direct = False  # only now: a file that is missing says nothing about the file system
        return descriptor, False


def _close_files(opened: OrderedDict[Path, tuple[int, bool]]) -> None:
    while opened:
        os.close(opened.popitem()[1][0])


def whole_pages(nbytes: int) -> int:
    """Return `nbytes` rounded up to pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def trim_memory() -> int:
    """Give back to the system what imports and temporaries hold for nothing; return what was mapped of files, in bytes.

    That is free memory of the heap (29 MiB before loading), and the mapping of libraries' pages that importing touched
    (60 to 160 MiB): they stay in the page cache, and what is used again is mapped again.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's; other C libraries keep little
        library.malloc_trim(0)
    mapped_bytes = _status_bytes("RssFile")
    for start, end, _ in _unwritten():
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    return mapped_bytes


def reread_libraries() -> None:
    """Have the page cache let go of libraries' files, after `trim_memory`: what is used again is read anew.

    Written in one go, as an installation does, a file may lie there in pieces of 2 MiB, which are mapped whole around
    a page that is touched; read for a process, it lies in small ones. Pages that another process maps stay.
    """
    for name in {name for _, _, name in _unwritten()}:
        with suppress(OSError):  # deleted since, or not to be opened: it stays as it is
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)  # what is not on disk yet cannot be let go
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _unwritten() -> Iterator[tuple[int, int, str]]:
    """Yield address, end and file of what is mapped and can be had from its file again: no page was ever written.

    Written to and then protected are the relocated tables of libraries, in mappings of their own.
    """
    for text in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        first, _, fields = text.partition("\n")
        addresses, permissions, _, _, inode, *names = first.split(maxsplit=5)
        if inode != "0" and permissions in ("r-xp", "r--p") and re.search(r"^Anonymous: +0 kB$", fields, re.MULTILINE):
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end, names[0]


def give_memory_back_at_once() -> None:
    """Let the C library return every freed block of a MiB or more to the system, instead of keeping it for the next.

    It would raise that size, up to 32 MiB, with the first such block that is freed.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def own_memory_bytes() -> int:
    """Return the memory that is this process's alone: all but what is mapped from files, which the page cache holds."""
    return _status_bytes("RssAnon") + _status_bytes("RssShmem")


def peak_memory_bytes() -> int:
    """Return the most memory this process ever held, as the kernel counts it."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
