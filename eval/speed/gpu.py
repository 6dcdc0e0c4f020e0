"""Everything that waits for a GPU, in one command: tests, the sanitizer, speed of every part, a profile, a trace.

    python -m eval.speed gpu --output gpu-run

Each step is a process group of its own with a limit of time, and none minds what became of the others. What it says
goes to a log, its rows to a results file, both in the output directory. `--dry-run` takes the same steps without a GPU,
at tiny shapes, so that the only thing left to fail on one is the device.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch

from eval.speed.report import Rows
from offload.command import Progress, say
from offload.errors import UsageError

Status = Literal["passed", "failed", "over its limit", "left out"]

_NCU_METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
_LONGEST_FIGURE = 100
_CUDA_PROGRAMS = "/usr/local/cuda/bin"
_TEST_PROCESSES = 8


@dataclass(frozen=True, slots=True)
class Step:
    """One process. tool: a program that it needs beside Python, None for none; seconds: its limit.

    figure: a regular expression; the last line of its output that it is found in stands for the step in the table.
    shards: processes that take a part each, told by `--shard I/N`; 1 for a single one, told nothing.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    figure: str
    tool: str | None = None
    shards: int = 1

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """What to start, a command a process."""
        if self.shards == 1:
            return [self.command]
        return [(*self.command, "--shard", f"{index}/{self.shards}") for index in range(self.shards)]


class GpuReport(Rows):
    """What one run did, a row a step."""

    __slots__ = ()

    @classmethod
    def of(cls, outcomes: Iterable["Outcome"]) -> "GpuReport":
        """Return the report of what became of steps."""
        return cls(tuple({**asdict(one), "seconds": round(one.seconds, 1)} for one in outcomes))

    def table(self) -> str:
        """Return a line for each, and whether all passed."""
        lines = [f"{'step':12} {'':14} {'seconds':>8}  what it said"]
        lines += [
            f"{one['step']:12} {one['status']:14} {one['seconds']:8.1f}  {one['figure']}" for one in self.measured
        ]
        return "\n".join([*lines, self.failure or "every step that was taken passed"])

    @property
    def failure(self) -> str | None:
        """The steps that did not pass, in words."""
        bad = [one["step"] for one in self.measured if one["status"] in ("failed", "over its limit")]
        return f"did not pass: {', '.join(bad)}; their logs say why" if bad else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step."""

    step: str
    status: Status
    seconds: float
    figure: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu-run"), help="directory for logs, results, pictures and the trace")
    add("--steps", help="only these, separated by commas")
    add("--dry-run", action="store_true", help="the same steps without a GPU, at tiny shapes")


def measure(options: argparse.Namespace) -> GpuReport:
    """Take the steps. Raises UsageError without a GPU, but for a dry run, and for steps that do not exist."""
    if not options.dry_run and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here; --dry-run takes the same steps without one")
    steps = list(steps_of(options.output, options.dry_run))
    if options.steps is not None:
        wanted = options.steps.split(",")
        if unknown := set(wanted) - {step.name for step in steps}:
            names = ", ".join(step.name for step in steps)
            raise UsageError(f"--steps: no step {', '.join(sorted(unknown))}; there are {names}")
        steps = [step for step in steps if step.name in wanted]
    options.output.mkdir(parents=True, exist_ok=True)
    say(f"{len(steps)} steps, {sum(step.seconds for step in steps)} s at most, into {options.output}")
    progress, outcomes = Progress("step", len(steps)), []
    for step in steps:
        outcomes.append(take(step, options.output))
        progress.advance(f"{step.name}: {outcomes[-1].status}")
    return GpuReport.of(outcomes)


def steps_of(output: Path, dry_run: bool) -> Iterator[Step]:
    """Yield the steps, in the order in which a run that is cut off would miss them least."""
    device = "cpu" if dry_run else "cuda"
    models = str(output / "models")
    yield Step("doctor", _python("offload.doctor"), 20, r"GPU|kernels")
    tests = _python("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    shards = 2 if dry_run else _TEST_PROCESSES  # most of their time is Triton compiling
    yield Step("tests", tests, 110, r"passed|skipped|failed", shards=shards)
    kernels = ("--shapes", "64x256", "--batches", "1,17") if dry_run else ("--batches", "1,4,16,64,512,2048")
    yield _measured(
        "kernels", output, 90, "--device", device, "--rounds", "2" if dry_run else "7", *kernels, figure=" 1 +triton"
    )
    tiers = ("--shape", "tiny", "--tiers", "host,disk to host", "--tokens", "2", "--prompt-tokens", "20")
    trace = str(output / "trace.json")
    yield _measured(
        "tiers",
        output,
        130,
        *(tiers if dry_run else ()),
        "--models",
        models,
        "--trace",
        trace,
        figure="staged +1 |host",
    )
    contexts = ("--contexts", "70", "--rounds", "2") if dry_run else ("--contexts", "2000,8000,32000", "--rounds", "7")
    yield _measured("kv", output, 35, "--device", device, *contexts, figure="int8")
    away = ("--context", "1100", "--layers", "3") if dry_run else ("--context", "32800", "--layers", "16")
    yield _measured("kv-disk", output, 30, "--device", device, *away, "--rounds", "3", figure="from there")
    model = str(output / "models" / ("tiny.int4" if dry_run else "8b.int4"))
    verify = _python("offload.verify", "--model", model, "--new-tokens", "3")
    yield Step("verify", verify, 60, r"logits|other")
    one = _python(
        "eval.speed", "kernels", "--device", device, "--shapes", "4096x4096", "--batches", "1", "--rounds", "1"
    )
    sanitized = ("compute-sanitizer", "--error-exitcode", "9", *_python("pytest", "-q", "-m", "gpu", "-k", "sanitized"))
    yield Step("sanitizer", sanitized, 45, r"ERROR SUMMARY", tool="compute-sanitizer")
    profiled = ("ncu", "-k", "matmul_kernel", "-c", "3", "--metrics", ",".join(_NCU_METRICS), *one)
    yield Step("profile", profiled, 20, r"dram__throughput", tool="ncu")


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _measured(name: str, output: Path, seconds: int, *arguments: str, figure: str) -> Step:
    """Return a step that measures another subject and records its rows."""
    results = ("--record", "--results", str(output / f"{name}.csv"))
    return Step(name, _python("eval.speed", name, *arguments, *results), seconds, figure)


def take(step: Step, output: Path) -> Outcome:
    """Run a step to its end or to its limit; nothing that it started is left behind."""
    if step.tool is not None and _found(step.tool) is None:
        return Outcome(step.name, "left out", 0.0, f"no {step.tool} here")
    log, started = output / f"{step.name}.log", time.perf_counter()
    with log.open("w") as file:
        processes = [
            subprocess.Popen([_found(command[0]) or command[0], *command[1:]], **_apart(file))
            for command in step.commands
        ]
        try:
            codes = [process.wait(max(0.0, started + step.seconds - time.perf_counter())) for process in processes]
        except subprocess.TimeoutExpired:
            codes = None
        finally:
            for process in processes:
                _end(process)
    status: Status = "over its limit" if codes is None else "failed" if any(codes) else "passed"
    text = log.read_text(errors="replace")
    return Outcome(step.name, status, time.perf_counter() - started, _figure(text, step.figure, status))


def _apart(log: IO[str]) -> dict[str, Any]:
    return {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}


def _found(program: str) -> str | None:
    """Return where a program is: on the path, or in CUDA's own directory, which often is not."""
    return shutil.which(program) or shutil.which(program, path=_CUDA_PROGRAMS)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figure(text: str, pattern: str, status: Status) -> str:
    """Return the line that stands for an output: of one that did not pass the last, which says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if re.search(pattern, line)] if status == "passed" else []
    line = (found or lines or ["it said nothing"])[-1]
    return line[:_LONGEST_FIGURE]
