"""Files written past the page cache: every byte in its place whatever the file system does, and whole or absent."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.durable_file import write_durably, write_pieces
from offload.errors import CheckpointError

PAGE = 4096
CONTENT = os.urandom((9 << 20) + 123)
"""More than two stages, and no whole pages."""


def recorded(monkeypatch: pytest.MonkeyPatch, write: Callable[[int, memoryview], int]) -> list[tuple[bool, int]]:
    """Let `write` stand for os.write; return a list to which each call adds whether it was direct, and its bytes."""
    calls: list[tuple[bool, int]] = []

    def recording(descriptor: int, data: memoryview) -> int:
        calls.append((bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT), len(data)))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", recording)
    return calls


@pytest.mark.parametrize("cuts", [(), (1, 5, PAGE + 1, 4 << 20, 8 << 20), (len(CONTENT) - 1,)])
def test_whole_pages_go_past_the_page_cache(
    cuts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch, os.write)
    view = memoryview(CONTENT)
    write_durably(tmp_path / "a", *(view[a:b] for a, b in zip((0, *cuts), (*cuts, len(CONTENT)), strict=True)))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert sum(nbytes for direct, nbytes in calls if direct and nbytes % PAGE == 0) == len(CONTENT) - 123
    assert calls[-1][1] == 123


def test_a_small_file_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, os.write)
    write_durably(tmp_path / "a", b"{", b"}")
    assert (tmp_path / "a").read_bytes() == b"{}"
    assert calls == [(False, 2)]


def test_a_file_system_without_direct_writes_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_write = os.open, os.write

    def refusing_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def refusing_write(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    calls = recorded(monkeypatch, refusing_write)
    write_durably(tmp_path / "late", CONTENT)  # as with pages that are larger there
    assert [direct for direct, _ in calls] == [True] + [False] * (len(calls) - 1)
    monkeypatch.setattr(os, "open", refusing_open)
    write_durably(tmp_path / "early", CONTENT)
    assert (tmp_path / "late").read_bytes() == (tmp_path / "early").read_bytes() == CONTENT


def test_short_direct_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    calls = recorded(monkeypatch, lambda descriptor, data: real(descriptor, data[: max(PAGE, len(data) // 3)]))
    write_durably(tmp_path / "pages", CONTENT)
    assert any(direct for direct, _ in calls)
    odd = iter([2 * PAGE + 512])
    recorded(monkeypatch, lambda descriptor, data: real(descriptor, data[: next(odd, len(data))]))
    write_durably(tmp_path / "odd", CONTENT)
    assert (tmp_path / "pages").read_bytes() == (tmp_path / "odd").read_bytes() == CONTENT


def test_pieces_that_cannot_be_had_leave_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield CONTENT
        raise CheckpointError("the source was cut")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="the source was cut"):
        write_pieces(tmp_path / "a", pieces(), 2 * len(CONTENT))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
