"""Whole models, run by this toolkit and by what else is installed, at real shapes and within a memory limit.

Every engine runs in a process of its own, all of them loaded and taking turns, each in a control group with the budget
as its limit where the machine allows that. The limits are measured between their turns: reading this toolkit's
checkpoint past the page cache, and reading memory.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.speed.contender import ENGINES, PROMPT_TOKENS
from eval.speed.control_group import memory_limit
from eval.speed.random_model import MODELS, SHAPES, ModelShape, write_bfloat16, write_checkpoint, write_gguf
from eval.speed.report import Rows
from eval.speed.timing import Samples
from kernels.cpu_matmul import read_seconds
from offload.command import Progress, format_bytes, parse_bytes, say
from offload.errors import UsageError
from offload.memory import Arena

_READ_BYTES = 512 << 20
_SHARES = ("of_disk", "of_read", "python_share")
_PACKAGES = {"ours": "offload", "llama.cpp": "llama_cpp", "accelerate": "accelerate"}
_DISTRIBUTIONS = {"llama.cpp": "llama-cpp-python", "accelerate": "accelerate"}
_SUFFIXES = {"ours": "int4", "llama.cpp": "gguf", "accelerate": "bf16"}
_WRITERS: dict[str, Callable[[ModelShape, Path], None]] = {
    "ours": write_checkpoint,
    "llama.cpp": write_gguf,
    "accelerate": write_bfloat16,
}


@dataclass(slots=True)
class Turns:
    """What one engine's turns gave: seconds of a token and of a prompt, one a round, and what it said of itself.

    disk: seconds that a byte takes from disk, of one that streams: right after decoding, over the bytes it streams.
    python: the share of a token outside kernels and waits, in tokens of their own after those; None if it cannot tell.
    """

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    python: list[float | None] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class ExecutorReport(Rows):
    """What one run measured, a row an engine, shape and budget."""

    __slots__ = ()

    def table(self) -> str:
        """Return a line for each."""
        lines = [
            f"{'shape':6} {'budget':>10} {'engine':11} {'tokens/s':>9} {'x ours':>7} {'of disk':>8} {'of read':>8} "
            f"{'python':>8} {'prompt':>9} {'x ours':>7} {'peak':>10}"
        ]
        for row in self.measured:
            budget = format_bytes(row["budget_bytes"]) if row["budget_bytes"] else "no limit"
            share = {key: f"{row[key]:.0%}" if row[key] != "" else "" for key in _SHARES}
            lines.append(
                f"{row['shape']:6} {budget:>10} {row['engine']:11} {row['tokens_per_s']:9.2f} "
                f"{row['decode_x_ours']:7.2f} {share['of_disk']:>8} {share['of_read']:>8} {share['python_share']:>8} "
                f"{row['prompt_s']:7.2f} s "
                f"{row['prompt_x_ours']:7.2f} {format_bytes(row['peak_bytes']):>10}"
            )
        return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--shapes", default="1b", help=f"{', '.join(SHAPES)}, separated by commas")
    add("--budgets", default="none", help='whole-process limits: "none", sizes such as "900MiB", separated by commas')
    add("--engines", default=",".join(ENGINES), help="separated by commas; those that are not installed are left out")
    add("--tokens", type=int, default=16, help="tokens to decode in a turn")
    add("--prompt-tokens", type=int, default=512, help="of the prompt whose time is taken; 0 for none")
    add("--rounds", type=int, default=5, help="turns of each engine")
    add("--models", type=Path, default=MODELS, help="where the random models are kept")


def measure(options: argparse.Namespace) -> ExecutorReport:
    """Run every engine at every shape and budget. Raises UsageError for flags that cannot be meant."""
    shapes, engines = options.shapes.split(","), _installed(options.engines.split(","))
    for name in shapes:
        if name not in SHAPES:
            raise UsageError(f"--shapes {name!r}: expected one of {', '.join(SHAPES)}")
    budgets = [None if b == "none" else parse_bytes(b, "--budgets") for b in options.budgets.split(",")]
    rows: list[dict[str, Any]] = []
    for name in shapes:
        models = {engine: options.models / f"{name}.{_SUFFIXES[engine]}" for engine in engines}
        for engine, path in models.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[engine](SHAPES[name], path)
        for budget in budgets:
            rows += _compare(name, models, budget, options)
    return ExecutorReport(tuple(rows))


def _installed(engines: list[str]) -> list[str]:
    for name in engines:
        if name not in ENGINES:
            raise UsageError(f"--engines {name!r}: expected some of {', '.join(ENGINES)}")
    missing = [name for name in engines if importlib.util.find_spec(_PACKAGES[name]) is None]
    if missing:
        say(f"left out, as not installed: {', '.join(missing)}")
    return [name for name in engines if name not in missing]


def _compare(
    shape: str, models: dict[str, Path], budget_bytes: int | None, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Let the engines take turns, the limits between them; return a row for each that finished."""
    memory: list[float] = []
    turns = {name: Turns() for name in models}
    for path in models.values():
        _forget(path)
    with ExitStack() as stack:
        asked = {
            name: stack.enter_context(_process(name, path, budget_bytes, options)) for name, path in models.items()
        }
        buffer = Arena(_READ_BYTES).bytes.fill_(1)
        progress = Progress(f"{shape}, {format_bytes(budget_bytes) if budget_bytes else 'no limit'}", options.rounds)
        for name in [name for name in asked if not _answers(name, asked[name], "load")]:
            del asked[name]
        for number in range(options.rounds):
            for name in list(asked) if number % 2 else list(reversed(asked)):
                try:
                    turns[name].decode.append(asked[name](f"decode {options.tokens}"))
                    if options.prompt_tokens:
                        turns[name].prefill.append(asked[name](f"prefill {options.prompt_tokens}"))
                    turns[name].python.append(asked[name](f"python_share {options.tokens}"))
                    turns[name].facts = asked[name]("facts")
                    turns[name].disk += turns[name].facts.get("disk_seconds_per_byte", [])
                except EngineError as error:
                    say(f"{name}: {error}; left out")
                    del asked[name]
            memory.append(read_seconds(buffer) / buffer.nbytes)
            progress.advance()
    return [_row(shape, name, budget_bytes, turns, Samples(tuple(memory)), options) for name in asked]


def _forget(model: Path) -> None:
    """Drop a model's files from the page cache: pages that are there already count against no control group."""
    for path in model.iterdir() if model.is_dir() else [model]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class EngineError(Exception):
    """An engine that cannot go on, in its own words."""


def _answers(name: str, ask: Callable[[str], Any], command: str) -> bool:
    try:
        ask(command)
    except EngineError as error:
        say(f"{name}: {error}; left out")
        return False
    return True


@contextmanager
def _process(
    engine: str, model: Path, budget_bytes: int | None, options: argparse.Namespace
) -> Iterator[Callable[[str], Any]]:
    """Start an engine's process, under its limit, and yield the function that asks it."""
    context_tokens = max(options.prompt_tokens, PROMPT_TOKENS + options.tokens + 1)
    command = [sys.executable, "-m", "eval.speed.contender", engine, str(model), "--context", str(context_tokens)]
    if budget_bytes is not None:
        command += ["--cpu-memory", str(budget_bytes)]
    with ExitStack() as stack:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if engine == "ours" else subprocess.DEVNULL,  # others draw progress
            text=True,
            bufsize=1,
        )
        stack.callback(_end, process)
        if budget_bytes is not None:
            enter = stack.enter_context(memory_limit(budget_bytes, engine))
            if enter is None:
                say(f"{engine}: no control group can be made here; it is trusted with its own limit")
            else:
                enter(process.pid)
        yield partial(_ask, process)


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with suppress(BrokenPipeError):  # what it did not read, as it had died
        process.communicate()


def _ask(process: "subprocess.Popen[str]", command: str) -> Any:
    assert process.stdin is not None, "it was opened as a pipe"
    assert process.stdout is not None, "it was opened as a pipe"
    try:
        process.stdin.write(f"{command}\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # what it died of is its exit status, below
    line = process.stdout.readline()
    if not line:
        raise EngineError(f"ended with status {process.wait()} at {command!r}")
    answer = json.loads(line)
    if isinstance(answer, dict) and "error" in answer:
        raise EngineError(answer["error"])
    return answer


def _row(
    shape: str,
    engine: str,
    budget_bytes: int | None,
    turns: dict[str, Turns],
    memory: Samples,
    options: argparse.Namespace,
) -> dict[str, Any]:
    mine, facts = turns[engine], turns[engine].facts
    decode, disk = Samples(tuple(mine.decode)), Samples(tuple(mine.disk))
    row: dict[str, Any] = {
        "shape": shape,
        "engine": engine,
        "engine_version": version(_DISTRIBUTIONS[engine]) if engine in _DISTRIBUTIONS else "",
        "budget_bytes": budget_bytes or "",
        "tokens_per_s": round(1 / decode.median, 3),
        "p20_ms": round(decode.percentile(0.2) * 1e3, 2),
        "p50_ms": round(decode.median * 1e3, 2),
        "p80_ms": round(decode.percentile(0.8) * 1e3, 2),
        "decode_x_ours": _ratio(turns["ours"].decode, mine.decode) if "ours" in turns else "",
        "prompt_tokens": options.prompt_tokens,
        "prompt_s": round(statistics.median(mine.prefill), 3) if mine.prefill else 0.0,
        "prompt_x_ours": _ratio(turns["ours"].prefill, mine.prefill) if "ours" in turns and mine.prefill else 0.0,
        "peak_bytes": facts.get("peak_bytes", ""),
        "bytes_per_token": facts.get("bytes_per_token", ""),
        "disk_bytes_per_token": facts.get("disk_bytes_per_token", ""),
        "disk_gb_per_s": round(1e-9 / disk.median, 2) if disk.seconds else "",
        "read_gb_per_s": round(1e-9 / memory.median, 2),
        "of_disk": "",
        "of_read": "",
        "python_share": "",
    }
    if told := [share for share in mine.python if share is not None]:
        row["python_share"] = round(statistics.median(told), 3)
    if facts.get("disk_bytes_per_token"):
        row["of_disk"] = _share(facts["disk_bytes_per_token"], disk, decode)
    elif facts.get("bytes_per_token"):
        row["of_read"] = _share(facts["bytes_per_token"], memory, decode)
    return row


def _ratio(ours: list[float], other: list[float]) -> float:
    """Return how many times as fast as ours another is: the median of the ratios of each round."""
    return round(Samples(tuple(other)).speedup_over(Samples(tuple(ours))), 3)


def _share(nbytes: int, limit: Samples, decode: Samples) -> float:
    """Return the share of a limit that is reached: the median of the ratios of each round."""
    return round(statistics.median(nbytes * a / b for a, b in zip(limit.seconds, decode.seconds, strict=True)), 3)
