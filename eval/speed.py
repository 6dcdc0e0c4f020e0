"""Speed beside the physical limit and beside what else is installed. `python -m eval.speed kernels`"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eval.results import RESULTS, append, circumstances, command_line
from eval.speed_kernels import MODEL_SHAPES, Case, Measurement, measure
from offload.command import Parser, run, say
from offload.errors import UsageError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    cases = [Case(n, k, options.group_size, m) for n, k in _shapes(options.shapes) for m in _batches(options.batches)]
    for case in cases:
        if case.k % case.group_size:
            raise UsageError(f"--group-size {case.group_size}: does not divide K={case.k}")
    with _busy(options.busy):
        measurements = list(measure(cases, options.rounds))
    around = circumstances(command_line("eval.speed", argv)) | {"busy": options.busy}
    rows = [around | measurement.row() for measurement in measurements]
    print(json.dumps(rows) if options.json else _table(measurements))
    if options.record:
        append(options.results, rows)
        say(f"{len(rows)} rows appended to {options.results}")
    if options.picture is not None:
        from eval.picture import draw_speedups

        draw_speedups(measurements, options.picture)
        say(f"drawn in {options.picture}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("eval.speed", "Measure speed against the physical limit.")
    add = parser.add_argument
    add("subject", choices=["kernels"], help="kernels: the int4 product at the shapes of real models")
    add("--shapes", default="llama-3-8b", help=f"{', '.join(MODEL_SHAPES)}, or NxK, separated by commas")
    add("--batches", default="1,4,16,32,64,128,512,2048", help="activations M, separated by commas")
    add("--group-size", type=int, choices=[32, 64, 128], default=128, help="weights that share a scale")
    add("--rounds", type=int, default=15, help="samples of each contender")
    add("--busy", type=int, default=0, metavar="N", help="processes that keep a core busy meanwhile")
    add("--picture", type=Path, metavar="FILE", help="draw the speed-up over the batch")
    add("--record", action="store_true", help="append the rows to the results file")
    add("--results", type=Path, default=RESULTS / "kernels.csv", help="results file")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


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


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", part)
        if part in MODEL_SHAPES:
            shapes += MODEL_SHAPES[part]
        elif match:
            shapes.append((int(match[1]), int(match[2])))
        else:
            raise UsageError(f"--shapes {part!r}: expected {', '.join(MODEL_SHAPES)} or NxK, such as 4096x4096")
    return shapes


def _batches(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batches {text!r}: expected numbers above zero, separated by commas")
    return [int(part) for part in parts]


def _table(measurements: list[Measurement]) -> str:
    header = f"{'N':>6} {'K':>6} {'M':>5}  {'contender':12} {'median':>10} {'packed':>11} {'':>12} {'of read':>8}  over"
    lines = [header]
    for item in measurements:
        row = item.row()
        of_read = f"{row['of_read']:.0%}" if row["of_read"] != "" else "-"
        peers = "  ".join(
            f"{name} {item.time.speedup_over(peer):.2f}x" for name, peer in item.peers.items() if name != item.contender
        )
        lines.append(
            f"{item.case.n:6} {item.case.k:6} {item.case.m:5}  {item.contender:12} {row['p50_us']:>7} us "
            f"{row['packed_gb_per_s']:6.1f} GB/s {row['gop_per_s']:6.0f} GOP/s {of_read:>8}  {peers}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
