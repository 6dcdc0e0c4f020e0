"""What verifying the checksums costs a run whose layers are read from disk.

Runs with and without the check that layers pass at their first read take turns, each in a process of its own, and
decode the same tokens. The first pass over the model is timed apart: it is the one that pays.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from eval.speed.contender import PROMPT_TOKENS, clocked
from eval.speed.random_model import MODELS, SHAPES, write_checkpoint
from eval.speed.report import Rows
from offload.command import Parser, Progress, format_bytes, parse_bytes, run
from offload.errors import UsageError
from offload.executor import executor_of, load
from offload.limit import measure_links

_HASHED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Turn:
    """What one run took, to the first token and to the last; what a token reads from disk, and the disk's rate."""

    first_seconds: float
    all_seconds: float
    disk_bytes_per_token: int
    disk_bytes_per_second: float


class ChecksumReport(Rows):
    """What one run measured, one row."""

    __slots__ = ()

    def table(self) -> str:
        """Return it as lines."""
        (row,) = self.measured
        return (
            f"{row['shape']} within {format_bytes(row['budget_bytes'])}, {format_bytes(row['disk_bytes_per_token'])} "
            f"from disk a token, at {row['disk_gb_per_s']:.2f} GB/s; checksums at {row['checksum_gb_per_s']:.1f} GB/s\n"
            f"{'':16} {'verified':>10} {'not':>10} {'cost':>8}\n"
            f"{'first pass':16} {row['first_pass_s']:8.3f} s {row['first_pass_unverified_s']:8.3f} s "
            f"{row['first_pass_cost']:8.1%}\n"
            f"{row['tokens']:3} tokens       {row['decode_s']:8.3f} s {row['decode_unverified_s']:8.3f} s "
            f"{row['decode_cost']:8.1%}"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--shape", default="3b", choices=SHAPES, help="of the random model")
    add("--cpu-memory", default="860MiB", help="budget of the process; some layers have to be read from disk")
    add("--tokens", type=int, default=32, help="tokens to decode in a turn")
    add("--rounds", type=int, default=5, help="turns with and without the check")
    add("--models", type=Path, default=MODELS, help="where the random models are kept")


def measure(options: argparse.Namespace) -> ChecksumReport:
    """Let runs with and without the check take turns. Raises UsageError if the budget leaves nothing on disk."""
    budget_bytes = parse_bytes(options.cpu_memory, "--cpu-memory")
    model = options.models / f"{options.shape}.int4"
    write_checkpoint(SHAPES[options.shape], model)
    turns: dict[bool, list[Turn]] = {True: [], False: []}
    progress = Progress("turns", options.rounds)
    for number in range(options.rounds):
        for verified in (True, False) if number % 2 else (False, True):
            turns[verified].append(_turn_elsewhere(model, budget_bytes, options.tokens, verified))
        progress.advance()
    return ChecksumReport((_row(options, budget_bytes, turns[True], turns[False]),))


def _turn_elsewhere(model: Path, budget_bytes: int, tokens: int, verified: bool) -> Turn:
    """Take a turn in a process of its own, whose memory the turns before have not touched."""
    command = [sys.executable, "-m", "eval.speed.checksums", str(model), str(budget_bytes), str(tokens)]
    command += [] if verified else ["--unverified"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return Turn(**json.loads(done.stdout))


def take_turn(model: Path, budget_bytes: int, tokens: int, verified: bool) -> Turn:
    """Load the model and decode `tokens` tokens. Raises UsageError if no layer has to be read from disk."""
    loaded = load(model, cpu_memory=budget_bytes, context_tokens=PROMPT_TOKENS + tokens)
    executor = executor_of(loaded)
    try:
        if executor.queue is None or not executor.streamed_blobs:
            raise UsageError(f"--cpu-memory {format_bytes(budget_bytes)}: nothing is left on disk; give a smaller one")
        if not verified:
            executor.queue.check = None
        clock = clocked(loaded, list(range(1, PROMPT_TOKENS + 1)), tokens)
        first, whole = clock.prompt_seconds, clock.times[-1] - clock.started
        (disk,) = (link for link in measure_links(executor) if link.link == "disk")
        return Turn(first, whole, disk.bytes_per_token, disk.bytes_per_second)
    finally:
        executor.close()


def _row(
    options: argparse.Namespace,
    budget_bytes: int,
    verified: list[Turn],
    unverified: list[Turn],
) -> dict[str, Any]:
    pairs = list(zip(verified, unverified, strict=True))
    first = [with_check.first_seconds / without.first_seconds - 1 for with_check, without in pairs]
    decode = [with_check.all_seconds / without.all_seconds - 1 for with_check, without in pairs]
    return {
        "shape": options.shape,
        "budget_bytes": budget_bytes,
        "disk_bytes_per_token": verified[0].disk_bytes_per_token,
        "disk_gb_per_s": round(statistics.median(turn.disk_bytes_per_second for turn in verified) / 1e9, 3),
        "checksum_gb_per_s": round(_checksum_bytes_per_second() / 1e9, 2),
        "tokens": options.tokens,
        "rounds": options.rounds,
        "first_pass_s": round(statistics.median(turn.first_seconds for turn in verified), 4),
        "first_pass_unverified_s": round(statistics.median(turn.first_seconds for turn in unverified), 4),
        "first_pass_cost": round(statistics.median(first), 4),
        "decode_s": round(statistics.median(turn.all_seconds for turn in verified), 4),
        "decode_unverified_s": round(statistics.median(turn.all_seconds for turn in unverified), 4),
        "decode_cost": round(statistics.median(decode), 4),
    }


def _checksum_bytes_per_second() -> float:
    """Return how fast a checksum passes over bytes that come from memory."""
    data = b"\1" * _HASHED_BYTES
    started = time.perf_counter()
    xxhash.xxh3_64_hexdigest(data)
    return _HASHED_BYTES / (time.perf_counter() - started)


def main(argv: list[str] | None = None) -> int:
    """Take one turn and print it as JSON: the process that `measure` starts."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    parser = Parser("eval.speed.checksums", "Take one turn of `eval.speed checksums`.")
    parser.add_argument("model", type=Path)
    parser.add_argument("budget_bytes", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--unverified", action="store_true", help="leave the check out")
    options = parser.parse_args(argv)
    print(json.dumps(asdict(take_turn(options.model, options.budget_bytes, options.tokens, not options.unverified))))


if __name__ == "__main__":
    sys.exit(main())
