"""Results files: one CSV a subject in eval/results/, one row a figure, each with machine, versions, commit and command.

Rows are only ever appended; a figure in README or in a comment has its row here, and so have those that disappointed.
"""

import csv
import io
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.cpu_matmul import cpu_backend
from offload.errors import UsageError
from offload.version import VERSION

RESULTS = Path(__file__).parent / "results"


def circumstances(command: str) -> dict[str, Any]:
    """Return what a figure depends on besides the code under test: date, commit, machine, threads, versions."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "backend": cpu_backend(),
        "versions": f"{VERSION}, torch {torch.__version__}, python {platform.python_version()}",
        "command": command,
    }


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, writing its header first if it is new.

    Columns that the file lacks are added at its end, empty in the rows that are there. Raises UsageError if it has one
    that the rows lack.
    """
    rows = list(rows)
    columns = list(rows[0])
    earlier: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or ())
            earlier = list(reader)
        if not set(found) <= set(columns):
            raise UsageError(f"{path}: has the columns {', '.join(found)}; move it away or name another file")
        columns = [*found, *(name for name in columns if name not in found)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows([*earlier, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_text(text.getvalue(), newline="")
    whole.replace(path)


def command_line(module: str, argv: list[str]) -> str:
    """Return the command as a person would type it; of absolute paths, which name a machine, the last part alone."""
    return " ".join(["python", "-m", module, *(Path(word).name if word.startswith("/") else word for word in argv)])


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
