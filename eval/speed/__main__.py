"""Speed beside the physical limit and beside what else is installed. `python -m eval.speed SUBJECT`

A subject is a module that adds its flags to a parser and measures by them; what all subjects share is here: processes
that keep a core busy meanwhile, the table or JSON, the results file, the picture.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eval.results import RESULTS, append, circumstances, command_line
from eval.speed import checksums, convert, executor, gpu, kernels, kv, kv_disk, serve, tiers
from offload.command import Parser, run, say
from offload.errors import ResourceError


class Report(Protocol):
    """What was measured: rows of the results file, a table for the terminal, a picture; what failed, or None."""

    @property
    def failure(self) -> str | None:
        """What went wrong although there are rows, None if nothing did."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures as columns of the results file, without the circumstances."""

    def table(self) -> str:
        """Return the figures as lines of a terminal."""

    def draw(self, path: Path) -> None:
        """Draw them. Raises ResourceError without matplotlib."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What can be measured, in words; its own flags, and the function that measures by the parsed ones."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Report]


SUBJECTS: Mapping[str, Subject] = {
    "kernels": Subject(
        "the product with packed weights, at the shapes of real models", kernels.add_flags, kernels.measure
    ),
    "executor": Subject(
        "whole models within a memory limit, against other engines", executor.add_flags, executor.measure
    ),
    "tiers": Subject("one model from tier to tier, GPU, memory and disk", tiers.add_flags, tiers.measure),
    "kv": Subject("a layer's cache and attention over the context, against transformers'", kv.add_flags, kv.measure),
    "kv-disk": Subject(
        "attention over keys and values on disk, or in host memory for a GPU", kv_disk.add_flags, kv_disk.measure
    ),
    "serve": Subject("the server, one client against many at once", serve.add_flags, serve.measure),
    "gpu": Subject("everything that waits for a GPU, step by step", gpu.add_flags, gpu.measure),
    "convert": Subject("re-laying a checkpoint of AWQ's, against the disk", convert.add_flags, convert.measure),
    "checksums": Subject("what verifying checksums costs a streamed run", checksums.add_flags, checksums.measure),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    with _busy(options.busy):
        report = SUBJECTS[options.subject].measure(options)
    around = circumstances(command_line("eval.speed", argv)) | {"busy": options.busy}
    rows = [around | row for row in report.rows()]
    print(json.dumps(rows) if options.json else report.table())
    if options.record:
        append(options.results, rows)
        say(f"{len(rows)} rows appended to {options.results}")
    if options.picture is not None:
        report.draw(options.picture)
        say(f"drawn in {options.picture}")
    if report.failure is not None:
        raise ResourceError(report.failure)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("eval.speed", "Measure speed against the physical limit.")
    subjects = parser.add_subparsers(dest="subject", required=True, parser_class=argparse.ArgumentParser)
    for name, subject in SUBJECTS.items():
        of_subject = subjects.add_parser(
            name,
            help=subject.help,
            description=f"Measure {subject.help}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        subject.add_flags(of_subject)
        _add_shared_flags(of_subject, RESULTS / f"{name}.csv")
    return parser


def _add_shared_flags(parser: argparse.ArgumentParser, results: Path) -> None:
    add = parser.add_argument
    add("--busy", type=int, default=0, metavar="N", help="processes that keep a core busy meanwhile")
    add("--picture", type=Path, metavar="FILE", help="draw what was measured")
    add("--record", action="store_true", help="append the rows to the results file")
    add("--results", type=Path, default=results, help="results file")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--debug", action="store_true", help="show the traceback of an error")


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Keep `count` other processes computing while the context lasts."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    sys.exit(main())
