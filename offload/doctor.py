"""What this machine has, what will be used of it, what is wrong and how to mend it. `python -m offload.doctor`"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from offload.command import Parser, format_bytes, run
from offload.errors import CheckpointError, ResourceError
from offload.namesake import CURE, installed_version, what_is_wrong

_RANGES = {
    "torch": ((2, 11), (3,)),
    "transformers": ((5, 17), (5, 25)),
    "accelerate": ((1, 10), (2,)),
    "safetensors": ((0, 6), (1,)),
    "numpy": ((2,), (3,)),
    "xxhash": ((3, 5), (5,)),
}
"""From the first version on, below the second: those of pyproject.toml."""

_LEAST_FREE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. cure: what to do, None where nothing is wrong. wrong: whether something will fail or be slow for it."""

    subject: str
    found: str
    cure: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether there is something to mend."""
        return self.cure is not None


def examine(directory: Path) -> Iterator[Finding]:
    """Look at everything that a run depends on. directory: where checkpoints lie or will."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        *(lambda name=name: _package(name) for name in _RANGES),
        _models,
        _processor,
        _kernels,
        _memory,
        _gpu,
        _pinning,
        lambda: _disk(directory),
        lambda: _direct_reads(directory),
        _cache,
    )
    for check in checks:
        yield check()


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", found, None if sys.platform == "linux" else "only Linux is tried: expect to be the first")


def _package(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "not installed", f"pip install {name}")
    parts = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    least, below = _RANGES[name]
    if least <= parts < below:
        return Finding(name, found)
    wanted = f"{name}>={'.'.join(map(str, least))},<{'.'.join(map(str, below))}"
    return Finding(name, found, f"pip install '{wanted}': others were never tried")


def _models() -> Finding:
    """Import a model: transformers wants versions of its own, and Hugging Face's `kernels` where that is there."""
    theirs, wrong = installed_version(), what_is_wrong()
    beside = wrong or (f"Hugging Face's kernels {theirs} lies beside ours" if theirs else "")
    try:
        from transformers import LlamaForCausalLM  # noqa: F401
    except ImportError as error:
        cure = CURE if wrong else "pip install --upgrade transformers: it brings the versions that it asks for"
        return Finding("models", f"transformers imports none: {beside or _root(error)}", cure)
    return Finding("models", "transformers imports them" + (beside and f"; {beside}"), CURE if wrong else None)


def _root(error: BaseException) -> str:
    """Return the first line of what an error began with."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return str(error).strip().partition("\n")[0]


def _processor() -> Finding:
    import torch

    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith(("model name", "Model")):
            name = line.partition(":")[2].strip()
            break
    usable, used = len(os.sched_getaffinity(0)), torch.get_num_threads()
    cure = (
        None if used <= usable else f"export OMP_NUM_THREADS={usable}: more threads than processors wait for each other"
    )
    return Finding("processor", f"{name}, {usable} usable, {used} threads", cure)


def _kernels() -> Finding:
    from kernels.cpu_matmul import cpu_backend

    backend = cpu_backend()
    if backend == "torch":
        return Finding("cpu kernels", "torch's own operators", "install g++ 11 or newer: its kernels are faster")
    return Finding("cpu kernels", f"compiled, {backend.removeprefix('cpu-')}")


def _memory() -> Finding:
    facts = {line.split(":")[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()}
    total, free = facts["MemTotal"], facts["MemAvailable"]
    limit = _control_group_limit()
    found = f"{format_bytes(total)}, {format_bytes(free)} free"
    if limit is not None and limit < total:
        return Finding("memory", f"{found}; {format_bytes(limit)} for this control group")
    return Finding("memory", found)


def _control_group_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "none that torch sees: layers live in host memory and on disk")
    free, total = torch.cuda.mem_get_info()
    return Finding("gpu", f"{torch.cuda.get_device_name()}, {format_bytes(free)} of {format_bytes(total)} free")


def _pinning() -> Finding:
    import torch

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "no limit" if limit == resource.RLIM_INFINITY else f"at most {format_bytes(limit)}"
    short = torch.cuda.is_available() and limit != resource.RLIM_INFINITY and limit < 1 << 30
    return Finding(
        "locked memory", found, "ulimit -l unlimited: pinned memory is copied twice as fast" if short else None
    )


def _disk(directory: Path) -> Finding:
    existing = _existing(directory)
    free = shutil.disk_usage(existing).free
    cure = None if free >= _LEAST_FREE_BYTES else "free some space: a checkpoint of a 7B model takes 4 GiB"
    return Finding("disk", f"{format_bytes(free)} free at {existing}", cure)


def _existing(directory: Path) -> Path:
    """Return the directory, or what of its parents there is."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


def _direct_reads(directory: Path) -> Finding:
    from offload.memory import PAGE_BYTES, Arena, FileReader

    existing, reader = _existing(directory), FileReader()
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(bytes(PAGE_BYTES))
            file.flush()
            reader.read_into(Path(file.name), 0, PAGE_BYTES, Arena(PAGE_BYTES).view(0, PAGE_BYTES))
        direct = reader.direct
    except (OSError, CheckpointError) as error:
        return Finding("direct reads", f"not tried at {existing} ({error})", "name a --directory that can be written")
    finally:
        reader.close()
    if direct:
        return Finding("direct reads", "work: streamed layers go past the page cache")
    cure = "put checkpoints on another file system (ext4, xfs): streaming is slower through the page cache"
    return Finding("direct reads", f"refused at {existing}", cure)


def _cache() -> Finding:
    from offload.source import cache_directory

    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        cure = "point XDG_CACHE_HOME at a directory that can be written"
        return Finding("cache", f"{directory}: {error.strerror}", cure)
    return Finding("cache", str(directory))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    findings = list(examine(options.directory))
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{'!' if finding.wrong else ' '} {finding.subject:{width}}  {finding.found}")
            if finding.cure is not None:
                print(f"  {'':{width}}  -> {finding.cure}")
    wrong = [finding.subject for finding in findings if finding.wrong]
    if wrong:
        raise ResourceError(f"to be mended: {', '.join(wrong)}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("offload.doctor", "Say what this machine has, what will be used of it, and what is wrong.")
    parser.add_argument("--directory", type=Path, default=Path(), help="where checkpoints lie, or will")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
