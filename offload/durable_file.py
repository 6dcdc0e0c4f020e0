"""Files that are whole or absent after any crash, written past the page cache where the file system allows it.

Written through the page cache, a checkpoint takes three times as long, all of it the processor's: every page is found,
cleared and copied into, and other files' pages are pushed out for bytes that nobody reads again soon.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from offload.ahead import ahead
from offload.errors import ResourceError
from offload.memory import PAGE_BYTES, Arena

_STAGE_BYTES = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that after any crash it is whole or absent. Raises ResourceError, leaving no temporary file."""
    write_pieces(path, parts, sum(memoryview(part).nbytes for part in parts))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], nbytes: int) -> None:
    """Write a file of `nbytes` as `write_durably` does, of pieces that are asked for as it is written, some MiB ahead.

    Of a large file they are asked for in another thread. A piece may be overwritten when the next is asked for.
    What `pieces` raises is raised on, and no temporary file is left of that either.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = _create(temporary, direct=nbytes >= PAGE_BYTES)
        try:
            stages = _staged(pieces, nbytes)
            for stage in ahead(stages) if nbytes > _STAGE_BYTES else stages:
                _write(descriptor, stage)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        _remove(temporary)
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}); {nbytes} bytes needed, {free} free. "
            "What is finished is kept: run the same command again to resume"
        ) from None
    except BaseException:
        _remove(temporary)
        raise


def sync_directory(directory: Path) -> None:
    """Let the names in a directory outlive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path, direct: bool) -> int:
    """Open a new file, past the page cache if that is asked for and the file system has it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    if direct:
        with suppress(OSError):  # what else is wrong shows again below
            return os.open(path, flags | _DIRECT, 0o666)
    return os.open(path, flags, 0o666)


def _staged(pieces: Iterable[bytes | memoryview], nbytes: int) -> Iterator[memoryview]:
    """Yield pieces as whole pages in page-aligned memory, one stage after another; the last as long as it is.

    A stage is overwritten by the next but one.
    """
    size = min(_STAGE_BYTES, max(nbytes, 1))
    arena, other, filled = Arena(size), Arena(size), 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while view:
            count = min(arena.nbytes - filled, len(view))
            arena.view(filled, count)[:] = view[:count]
            view, filled = view[count:], filled + count
            if filled == arena.nbytes:
                yield arena.view(0, filled)
                arena, other, filled = other, arena, 0
    if filled:
        yield arena.view(0, filled)


def _write(descriptor: int, view: memoryview) -> None:
    """Write all of `view`, whole pages first; from where the file system refuses to, through the page cache."""
    while view:
        whole = len(view) - len(view) % PAGE_BYTES
        try:
            written = os.write(descriptor, view[: whole or len(view)])
        except OSError as error:
            if error.errno == errno.EINVAL and _leave_direct(descriptor):
                continue  # a part of a page, or a file system that has other pages
            raise
        view = view[written:]


def _leave_direct(descriptor: int) -> bool:
    """Write through the page cache from here on; return whether it was passed by until now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & _DIRECT:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
