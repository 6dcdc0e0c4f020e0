"""What a process gives back of its libraries before a model is loaded, and what is counted for them."""

import _ctypes
import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload.executor import executor_of, load
from offload.memory import reread_libraries, trim_memory
from offload.planning.needs import CODE_BYTES, _read_libraries_anew, library_bytes, settle_libraries

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


def test_all_that_importing_mapped_is_given_back_and_all_goes_on() -> None:
    """Code and tables alike; what the loader relocated would be lost with its pages, and the process with it."""
    code = """
import torch
from offload.memory import _status_bytes, trim_memory
mapped = trim_memory()
left = _status_bytes("RssFile")
assert mapped > 40 << 20, mapped
assert left < mapped / 10, (left, mapped)
for _ in range(2):
    x = torch.randn(64, 64, dtype=torch.float64)
    inverse = torch.linalg.inv(x + 64 * torch.eye(64, dtype=torch.float64))
    assert torch.allclose(inverse @ (x + 64 * torch.eye(64, dtype=torch.float64)), torch.eye(64, dtype=torch.float64))
    trim_memory()
import sqlite3, ssl, json
assert json.loads("[1]") == [1]
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=200)


def cached_pages(path: Path) -> int:
    """Return how many pages of a file the page cache has."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view,
    ):
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(view)), pages) == 0
        return sum(page & 1 for page in pages)


def test_a_library_is_read_anew(tmp_path: Path) -> None:
    """What was just written is not even on the disk yet."""
    copied = Path(shutil.copy(_ctypes.__file__, tmp_path / "copied.so"))
    library = ctypes.CDLL(str(copied))
    library.PyInit__ctypes  # noqa: B018  looked up: its tables are in memory
    before = cached_pages(copied)
    trim_memory()
    reread_libraries()
    if (
        cached_pages(copied) == before
        and subprocess.run(["stat", "-fc%T", tmp_path], capture_output=True).stdout == b"tmpfs\n"
    ):
        pytest.skip("a file system in memory lets nothing go")
    assert before > 10
    assert cached_pages(copied) < before / 2


@pytest.mark.parametrize(("mapped_mib", "counted_mib"), [(0, 56), (28, 56), (40, 80), (90, 180), (91, 180)])
def test_libraries_are_counted_by_what_building_mapped(mapped_mib: int, counted_mib: int) -> None:
    assert library_bytes(mapped_mib * MIB) == counted_mib * MIB <= CODE_BYTES


@pytest.mark.parametrize(("mapped_mib", "times"), [(64, 0), (65, 1)])
def test_only_large_pieces_are_read_anew_and_once(mapped_mib: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("offload.planning.needs.trim_memory", lambda: mapped_mib * MIB)
    monkeypatch.setattr("offload.planning.needs.reread_libraries", lambda: calls.append(1))
    _read_libraries_anew.cache_clear()
    for _ in range(2):
        assert settle_libraries() == 2 * mapped_mib * MIB
    assert len(calls) == times


@pytest.mark.parametrize(("tokens", "most_mib"), [(32, 57), (32768, 180)])
def test_the_largest_pass_is_counted_once_more_up_to_what_libraries_were_counted_for(
    tokens: int, most_mib: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass freed is not always given back; a tiny one adds its own few KiB, a wide one not more than 180 MiB."""
    monkeypatch.setattr("offload.executor.settle_libraries", lambda: 56 * MIB)
    monkeypatch.setattr("offload.planning.needs.own_memory_bytes", lambda: 0)
    passes: dict[str, Any] = {"context_tokens": tokens, "prefill_chunk_tokens": tokens}
    assert executor_of(load(tiny_checkpoint, parallel=2, **passes)).placement.needs.runtime_bytes == CODE_BYTES
    needs = executor_of(load(tiny_checkpoint, **passes)).placement.needs
    assert needs.runtime_bytes == min(56 * MIB + needs.activation_bytes, CODE_BYTES) <= most_mib * MIB
