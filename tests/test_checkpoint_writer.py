"""Whatever stops a run and wherever: the directory is resumable or complete, and a rerun writes the same bytes."""

import errno
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.checkpoint import Checkpoint, Recipe
from offload.checkpoint_writer import open_writer
from offload.durable_file import write_durably
from offload.errors import BusyError, CheckpointError, ResourceError, UsageError

ROOT = Path(__file__).parent.parent
RECIPE = Recipe("rtn", 4, 32, True, ("lm_head",), "tiny", "0123456789abcdef", 0, versions={"toolkit": "0"})
OTHER = replace(RECIPE, group_size=64, seed=7)
MODULES = ("", "model.layers.0", "")
SHARDS = tuple(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
EXTRA_FILES = {"README.md": b"# tiny\n", "merges.txt": b""}

pytestmark = pytest.mark.timeout(120)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the writer may know it."""


def shard(index: int) -> dict[str, Tensor]:
    return {f"{index}.weight": torch.arange(40 + index, dtype=torch.int32), f"{index}.bias": torch.ones(3)}


def write(directory: Path, recipe: Recipe = RECIPE, overwrite: bool = False) -> list[int]:
    """Do what a command does; return which shards had to be made."""
    made: list[int] = []
    with open_writer(directory, recipe, len(MODULES), overwrite) as writer:
        if writer.complete:
            return made
        for index, module in enumerate(MODULES):
            if writer.done(index) is None:
                writer.write_shard(index, module, shard(index), {"error": 0.5} if module else {})
                made.append(index)
        writer.finish({"model_type": "tiny"}, EXTRA_FILES)
    return made


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its bytes; None for directories."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def interrupt(*, at: int) -> Callable[..., Any]:
    """A `write_shard` whose `at`-th call dies before it does anything."""
    from offload.checkpoint_writer import CheckpointWriter

    original = CheckpointWriter.write_shard

    def write_shard(self: CheckpointWriter, index: int, *arguments: Any) -> None:
        if index == at:
            raise Killed
        original(self, index, *arguments)

    return write_shard


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is left of a run that died with two of its three shards written."""
    with monkeypatch.context() as patch:
        patch.setattr("offload.checkpoint_writer.CheckpointWriter.write_shard", interrupt(at=2))
        with pytest.raises(Killed):
            write(tmp_path / "out")
    return tmp_path / "out"


class Calls:
    """Counts what changes the disk, and raises `error` instead of doing the `at`-th such call."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self._at, self._error = at, error
        self.count = 0
        for name in ("write", "fsync", "rename", "unlink"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # the lock goes last and with the process; a failing cleanup of a temporary file is no other case
            if not (name == "unlink" and str(arguments[0]).endswith((".lock", ".tmp"))):
                self.count += 1
                if self.count == self._at:
                    raise self._error
            return real(*arguments, **options)

        return call


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_runs(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, run: Callable[[int], Any]
) -> Iterator[tuple[int, BaseException | None]]:
    """Call run(k) with the k-th call failing, k from 1 until a run makes fewer calls; yield k and what was raised."""
    for at in itertools.count(1):
        outcome = None
        with monkeypatch.context() as patch:
            calls = Calls(patch, at, error)
            try:
                run(at)
            except (ResourceError, Killed) as caught:
                outcome = caught
        if calls.count < at:
            assert outcome is None
            return
        yield at, outcome


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of syncs would only wait for the disk: what matters is when they are called."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes | None]:
    """The files of a run that nothing interrupted."""
    assert write(tmp_path / "whole") == [0, 1, 2]
    return contents(tmp_path / "whole")


def test_an_uninterrupted_run(tmp_path: Path, whole: dict[str, bytes | None]) -> None:
    names = {*SHARDS, *EXTRA_FILES, "config.json", "model.safetensors.index.json", "manifest.json"}
    assert set(whole) == names
    checkpoint = Checkpoint.open(tmp_path / "whole")
    assert checkpoint.recipe == RECIPE
    assert checkpoint.layer_errors == {"model.layers.0": {"error": 0.5}}
    assert write(tmp_path / "whole") == []
    assert contents(tmp_path / "whole") == whole


def check_state(directory: Path) -> None:
    """Absent, resumable or complete: what can be opened is whole."""
    if (directory / "manifest.json").exists():
        Checkpoint.open(directory)
    else:
        with pytest.raises(CheckpointError, match=r"no such directory|has not finished|no manifest"):
            Checkpoint.open(directory)


def test_the_disk_is_full_at_every_call_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | None]
) -> None:
    last = 0
    for at, outcome in failing_runs(monkeypatch, no_space(), lambda at: write(tmp_path / str(at))):
        directory = tmp_path / str(at)
        if outcome is None:
            assert (directory / "manifest.json").exists(), "only dropping the partial records may fail unheard"
        else:
            assert "cannot be written (No space left on device)" in str(outcome)
            assert "run the same command again to resume" in str(outcome)
        assert not list(directory.rglob("*.tmp"))
        assert not (directory / ".lock").exists()
        check_state(directory)
        write(directory)
        assert contents(directory) == whole
        last = at
    assert last >= 50


def test_killed_at_every_call_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | None]
) -> None:
    remade = set()
    for at, _ in failing_runs(monkeypatch, Killed(), lambda at: write(tmp_path / str(at))):
        directory, other = tmp_path / str(at), tmp_path / f"{at}-other"
        check_state(directory)
        shutil.copytree(directory, other)
        remade.add(tuple(write(directory)))
        assert contents(directory) == whole
        write(other, OTHER, overwrite=True)
        assert set(contents(other)) == set(whole)
        assert Checkpoint.open(other).recipe == OTHER
    assert remade == {(0, 1, 2), (1, 2), (2,), ()}


def test_killed_at_every_call_of_an_overwriting_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | None]
) -> None:
    write(tmp_path / "other", OTHER)

    def replace_another(at: int) -> None:
        write(shutil.copytree(tmp_path / "other", tmp_path / str(at)), RECIPE, overwrite=True)

    last = 0
    for at, _ in failing_runs(monkeypatch, Killed(), replace_another):
        directory = tmp_path / str(at)
        if (directory / "manifest.json").exists():
            assert Checkpoint.open(directory).recipe in (RECIPE, OTHER)
        check_state(directory)
        write(directory, RECIPE, overwrite=True)
        assert contents(directory) == whole
        last = at
    assert last > 60


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 0),
        Path.unlink,
        lambda path: path.write_bytes((path.parent / SHARDS[0]).read_bytes()),
    ],
)
def test_a_damaged_finished_shard_is_made_again(
    unfinished: Path, whole: dict[str, bytes | None], damage: Callable[[Path], None]
) -> None:
    damage(unfinished / SHARDS[1])
    assert write(unfinished) == [1, 2]
    assert contents(unfinished) == whole


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"file": "model-00002-of-00003.safetensors"}'])
def test_a_damaged_record_is_not_trusted(unfinished: Path, whole: dict[str, bytes | None], content: bytes) -> None:
    (unfinished / "partial" / "00001.json").write_bytes(content)
    assert write(unfinished) == [1, 2]
    assert contents(unfinished) == whole


def test_a_shard_without_its_record_is_made_again(unfinished: Path, whole: dict[str, bytes | None]) -> None:
    (unfinished / "partial" / "00000.json").unlink()
    assert write(unfinished) == [0, 2]
    assert contents(unfinished) == whole


def test_an_error_says_what_is_needed_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_some(descriptor: int, data: memoryview) -> int:
        raise no_space()

    monkeypatch.setattr(os, "write", write_some)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 877, 123))
    path = tmp_path / "a.safetensors"
    with pytest.raises(ResourceError) as caught:
        write_durably(path, b"12345", b"678")
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"{path}: cannot be written (No space left on device); 8 bytes needed, 123 free. "
        "What is finished is kept: run the same command again to resume"
    )
    assert not list(tmp_path.iterdir())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    parts = (bytes(range(200)), b"", memoryview(bytes(100)), b"end")
    write_durably(tmp_path / "a", *parts)
    assert (tmp_path / "a").read_bytes() == b"".join(parts)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(no_space()))
        with pytest.raises(ResourceError):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "mkdir"])
def test_the_disk_is_full_before_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise no_space()

    directory = tmp_path / "out"
    directory.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ResourceError, match=r"--output .*out: cannot be written \(No space left on device\)"):
            write(directory)
    assert len(os.listdir("/proc/self/fd")) == before
    assert write(directory) == [0, 1, 2]


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_refused_and_stay(tmp_path: Path, overwrite: bool) -> None:
    for name in ("notes.txt", "model.bin"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UsageError) as caught:
        write(tmp_path, overwrite=overwrite)
    assert str(caught.value) == (
        f"--output {tmp_path}: not empty (folder, model.bin, notes.txt); choose another directory or empty this one"
    )
    assert contents(tmp_path) == before


def test_a_plain_model_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    before = contents(directory)
    with pytest.raises(UsageError, match="not empty"):
        write(directory, overwrite=True)
    assert contents(directory) == before


def test_overwriting_beside_foreign_files_deletes_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"not empty \(notes\.txt\)"):
        write(tmp_path, OTHER, overwrite=True)
    assert contents(tmp_path) == before


def test_a_file_or_nothing_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a file is in the way; name a directory"):
        write(tmp_path / "file")
    with pytest.raises(ResourceError, match=r"--output .*file/below: cannot be written \("):
        write(tmp_path / "file" / "below")
    assert write(tmp_path / "new" / "and" / "deep") == [0, 1, 2]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_another_recipe_is_refused_by_its_fields(tmp_path: Path, unfinished: Path, state: str) -> None:
    directory = unfinished
    if state == "finished":
        directory = tmp_path / "finished"
        write(directory)
    before = contents(directory)
    with pytest.raises(UsageError) as caught:
        write(directory, OTHER)
    what = "a finished checkpoint" if state == "finished" else "an unfinished run"
    assert str(caught.value) == (
        f"--output {directory}: holds {what} of another recipe (group_size: 32 there, 64 asked; "
        "seed: 0 there, 7 asked); use --overwrite to replace it or another --output"
    )
    assert contents(directory) == before
    assert write(directory, OTHER, overwrite=True) == [0, 1, 2]
    assert Checkpoint.open(directory).recipe == OTHER


def test_fields_of_a_later_version_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 0, "colour": "red"'))
    with pytest.raises(UsageError, match=r"another recipe \(colour: 'red' there, None asked\)"):
        write(tmp_path)


def test_overwriting_replaces_the_files_that_only_the_old_run_wrote(tmp_path: Path) -> None:
    with open_writer(tmp_path, OTHER, 5, overwrite=False) as writer:
        for index in range(5):
            writer.write_shard(index, "", shard(index), {})
        writer.finish({}, {"old.txt": b"old"})
    assert write(tmp_path, overwrite=True) == [0, 1, 2]
    assert set(contents(tmp_path)) == {
        *SHARDS,
        *EXTRA_FILES,
        "config.json",
        "model.safetensors.index.json",
        "manifest.json",
    }


def test_a_manifest_cannot_make_overwriting_delete_outside(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    directory = tmp_path / "out"
    write(directory)
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"README.md"', '"README.md", "../precious.txt"'))
    write(directory, OTHER, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


HOLDER = """
import sys
from pathlib import Path
from offload.checkpoint import Recipe
from offload.checkpoint_writer import open_writer

recipe = Recipe("rtn", 4, 32, True, ("lm_head",), "tiny", "0123456789abcdef", 0, versions={"toolkit": "0"})
with open_writer(Path(sys.argv[1]), recipe, 3, False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_busy_until_the_first_is_killed(tmp_path: Path, whole: dict[str, bytes | None]) -> None:
    directory = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(directory)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(BusyError) as caught:
                write(directory)
            assert caught.value.exit_code == 75
            assert str(caught.value) == (
                f"{directory}: process {holder.pid} is writing here; wait for it or choose another --output"
            )
            assert len(os.listdir("/proc/self/fd")) == before
        finally:
            holder.send_signal(signal.SIGKILL)
    assert (directory / ".lock").read_text() == str(holder.pid)
    assert write(directory) == [0, 1, 2]
    assert contents(directory) == whole


def test_a_longer_pid_of_a_dead_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("9" * 30)
    with open_writer(tmp_path, RECIPE, 3, overwrite=False):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_the_umask_decides_the_modes(tmp_path: Path, mask: int, mode: int) -> None:
    old = os.umask(mask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(old)
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_each_rename_is_between_a_sync_of_the_file_and_one_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, Path]] = []
    real_write, real_fsync, real_rename = os.write, os.fsync, os.rename

    def recorded_write(descriptor: int, data: memoryview) -> int:
        events.append(("write", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        return real_write(descriptor, data)

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(source)))
        real_rename(source, target)
        names.append(Path(target).name)

    names: list[str] = []
    monkeypatch.setattr(os, "write", recorded_write)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    directory = (tmp_path / "out").resolve()
    write(directory)
    renames = [position for position, (call, _) in enumerate(events) if call == "rename"]
    assert len(renames) >= 12
    for position in renames:
        source = events[position][1]
        assert events[position - 1] == ("fsync", source)
        assert events[position + 1] == ("fsync", source.parent)
    assert names[-1] == "manifest.json"
    order = [name for name in names if name in SHARDS or name[0].isdigit()]
    assert order == [n for i, name in enumerate(SHARDS) for n in (name, f"{i:05d}.json")]
