"""Re-laying a checkpoint in AWQ's layout, against the disk: the same bytes read, and as many written, the same minute.

A round reads the files past the page cache by a loop that does nothing else, converts them by `quant.convert` in a
process of its own with nothing of them cached, and writes as many bytes as that wrote, and syncs them. The two loops
together are the bound of a conversion that neither computes nor overlaps; the read alone, of any.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from eval.speed.random_model import MODELS, SHAPES, write_checkpoint
from eval.speed.report import Rows
from offload.checkpoint import Checkpoint
from offload.command import Progress
from offload.durable_file import write_pieces
from offload.errors import ResourceError
from offload.memory import Arena, FileReader, whole_pages

_PIECE_BYTES = 8 << 20


class ConvertReport(Rows):
    """What one run measured, one row."""

    __slots__ = ()

    def table(self) -> str:
        """Return it as lines."""
        (row,) = self.measured
        return (
            f"{row['shape']}, AWQ, {row['read_bytes'] / 1e9:.2f} GB read, {row['written_bytes'] / 1e9:.2f} GB written\n"
            f"converted          {row['convert_s']:7.2f} s, with its process {row['process_s']:.2f} s\n"
            f"read alone         {row['read_s']:7.2f} s, {row['x_read']:.2f} times it to convert\n"
            f"written and synced {row['write_s']:7.2f} s, {row['x_read_and_write']:.2f} times both to convert"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="1b", help="of the model")
    add("--models", type=Path, default=MODELS, help="where the random models are, or are written")
    add("--rounds", type=int, default=3, help="rounds of all three")


def measure(options: argparse.Namespace) -> ConvertReport:
    """Time all three in turn. Raises ResourceError if the export or a conversion fails."""
    source = options.models / f"{options.shape}.awq"
    if not source.exists():
        ours = options.models / f"{options.shape}.int4-plain-head"
        write_checkpoint(SHAPES[options.shape], ours, wide_head=False)
        _run("quant.export", "--format", "awq", "--model", str(ours), "--output", str(source))
    files = sorted(source.glob("*.safetensors"))
    samples = []
    progress = Progress("round", options.rounds)
    for _ in range(options.rounds):
        samples.append(_round(source, files))
        progress.advance()
    middle = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    ratios = [(s["convert_s"] / s["read_s"], s["convert_s"] / (s["read_s"] + s["write_s"])) for s in samples]
    row = {"shape": options.shape, "format": "awq", "rounds": options.rounds}
    row |= {name: int(value) if name.endswith("_bytes") else round(value, 3) for name, value in middle.items()}
    row["x_read"] = round(statistics.median(read for read, _ in ratios), 3)
    row["x_read_and_write"] = round(statistics.median(both for _, both in ratios), 3)
    return ConvertReport((row,))


def _round(source: Path, files: list[Path]) -> dict[str, float]:
    _evict(files)
    read_bytes = sum(path.stat().st_size for path in files)
    read_s = _read(files)
    with TemporaryDirectory(dir=source.parent) as directory:
        started = time.perf_counter()
        convert_s = _convert(source, Path(directory) / "ours")
        process_s = time.perf_counter() - started
        made = Checkpoint.open(Path(directory) / "ours").blobs
        written_bytes = sum(path.stat().st_size for path in {blob.path for blob in made})
        shutil.rmtree(Path(directory) / "ours")
        write_s = _write(Path(directory) / "bytes", written_bytes)
    return {
        **{"read_bytes": read_bytes, "written_bytes": written_bytes},
        **{"convert_s": convert_s, "process_s": process_s, "read_s": read_s, "write_s": write_s},
    }


def _evict(files: list[Path]) -> None:
    """Put files out of the page cache, which only those lie in that are on disk already."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(files: list[Path]) -> float:
    """Return the seconds of reading whole files, past the page cache where the file system allows it."""
    reader, arena = FileReader(), Arena(_PIECE_BYTES)
    started = time.perf_counter()
    for path in files:
        size = path.stat().st_size
        for offset in range(0, size, _PIECE_BYTES):
            count = min(_PIECE_BYTES, size - offset)
            reader.read_into(path, offset, count, arena.view(0, whole_pages(count)))
    seconds = time.perf_counter() - started
    reader.close()
    return seconds


def _convert(source: Path, output: Path) -> float:
    """Return the seconds that `quant.convert` says it took."""
    seconds: float = json.loads(_run("quant.convert", "--json", "--model", str(source), "--output", str(output)))[
        "seconds"
    ]
    return seconds


def _run(module: str, *flags: str) -> str:
    """Return what a command prints. Raises ResourceError with its last line if it fails."""
    result = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ResourceError(f"{module} failed: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def _write(path: Path, nbytes: int) -> float:
    """Return the seconds of writing and syncing a file of random bytes, past the page cache where it is allowed."""
    piece = os.urandom(_PIECE_BYTES)
    started = time.perf_counter()
    write_pieces(path, (piece[: nbytes - offset] for offset in range(0, nbytes, _PIECE_BYTES)), nbytes)
    return time.perf_counter() - started
