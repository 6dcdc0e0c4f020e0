"""A limit on the memory of other processes, page cache included, where this machine lets us set one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_LIMITS = (("memory", "memory.limit_in_bytes"), (".", "memory.max"))  # of the first and the second version


@contextmanager
def memory_limit(nbytes: int, name: str) -> Iterator[Callable[[int], None] | None]:
    """Yield a function that puts a process, by its number, under a limit of its own; None where that is not allowed."""
    group = _make_group(nbytes, f"int4-offload-{os.getpid()}-{name}")
    if group is None:
        yield None
        return
    try:
        yield lambda process: _write(group / "cgroup.procs", process)
    finally:
        for process in (group / "cgroup.procs").read_text().split():  # a group is removed when it is empty
            _write(group.parent / "cgroup.procs", int(process))
        group.rmdir()


def _make_group(nbytes: int, name: str) -> Path | None:
    for folder, limit in _LIMITS:
        group = _MOUNT / folder / name
        try:
            if not (_MOUNT / folder / "cgroup.procs").exists():
                continue
            group.mkdir()
        except OSError:
            continue
        try:
            _write(group / limit, nbytes)
            return group
        except OSError:
            group.rmdir()
    return None


def _write(path: Path, value: int) -> None:
    path.write_text(str(value))
