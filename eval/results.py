"""Results files: one CSV a subject in eval/results/, one row a figure, each with machine, versions, commit and command.

Rows are only ever appended; a figure in README or in a comment has its row here, and so have those that disappointed.
"""

import csv
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import offload
from kernels.cpu_matmul import cpu_backend
from offload.errors import UsageError

RESULTS = Path(__file__).parent / "results"


def circumstances(command: str) -> dict[str, Any]:
    """Return what a figure depends on besides the code under test: date, commit, machine, threads, versions."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "backend": cpu_backend(),
        "versions": f"{offload.__version__}, torch {torch.__version__}, python {platform.python_version()}",
        "command": command,
    }


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, writing its header first if it is new. Raises UsageError if its columns differ."""
    rows = list(rows)
    columns = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise UsageError(f"{path}: has the columns {', '.join(found)}; move it away or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def command_line(module: str, argv: list[str]) -> str:
    """Return the command as a person would type it."""
    return " ".join(["python", "-m", module, *argv])


def _commit() -> str:
    """Return the short hash of the checkout, with a plus where it has changes; "" outside of one."""
    directory = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=directory, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=directory, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def _machine() -> str:
    """Return the processor's name and the number of processors this process may use."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} of {_processors()} cores{gpu}"


def _processors() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
