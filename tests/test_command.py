"""How every command ends: its exit status, one message without a traceback, and quiet lines off a terminal."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.command import Parser, Progress, run, say
from offload.errors import BusyError, CheckpointError, InputError, ResourceError, ToolkitError, UsageError

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def _same_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def raising(error: BaseException, argv: list[str] | None = None) -> int:
    def command(argv: list[str]) -> None:
        print("before")
        raise error

    return run(command, argv or [])


def test_a_command_that_ends_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    assert run(seen.append, ["--bits", "4"]) == 0
    monkeypatch.setattr(sys, "argv", ["program", "--seed", "1"])
    assert run(seen.append) == 0
    assert seen == [["--bits", "4"], ["--seed", "1"]]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ToolkitError, 1),
        (UsageError, 2),
        (InputError, 3),
        (CheckpointError, 3),
        (ResourceError, 4),
        (BusyError, 75),
    ],
)
def test_each_error_has_its_status(capsys: pytest.CaptureFixture[str], error: type[ToolkitError], status: int) -> None:
    assert raising(error("file: found, expected")) == status
    assert capsys.readouterr() == ("before\n", "error: file: found, expected\n")


def test_every_error_class_is_in_the_table() -> None:
    classes = {ToolkitError}
    while more := {inner for outer in classes for inner in outer.__subclasses__()} - classes:
        classes |= more
    assert classes == {ToolkitError, UsageError, InputError, CheckpointError, ResourceError, BusyError}


def test_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_of_ours_is_one_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ZeroDivisionError("division by zero")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "bug: ZeroDivisionError: division by zero",
        "     run again with --debug and report it",
    ]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ZeroDivisionError("division by zero"), ["--debug"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "in command" in shown
    assert shown.endswith("ZeroDivisionError: division by zero\n")
    assert raising(UsageError("--bits 3"), ["--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("\nerror: --bits 3\n")


def test_an_exit_of_the_parser_passes_through() -> None:
    with pytest.raises(SystemExit) as caught:
        raising(SystemExit(2))
    assert caught.value.code == 2


def start(script: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Run a script that buffers what it prints, as it does for every user."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, text=True)


WAITING = """
import sys, time
from offload.command import run, say

def command(argv):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        say("tidied up")

sys.exit(run(command, []))
"""


@pytest.mark.parametrize(
    ("sent", "status", "message"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_lets_the_command_tidy_up(sent: signal.Signals, status: int, message: str) -> None:
    with start(WAITING) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert errors == f"tidied up\n{message}\n"


PRINTING = """
import sys
from offload.command import run

def command(argv):
    for number in range(LINES):
        print("a line of some length, number", number)

sys.exit(run(command, []))
"""


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_went_away_is_no_error(lines: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with start(PRINTING.replace("LINES", str(lines)), stdout=writing) as process:
        os.close(writing)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == ""


def test_a_reader_that_goes_away_after_a_line_is_no_error() -> None:
    with start(PRINTING.replace("LINES", "1000000")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a line of some length, number 0\n"
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_reader_of_both_streams_that_went_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    script = PRINTING.replace(
        "    for number", "    print('result')\n    print('plan', file=sys.stderr)\n    for number"
    )
    with start(script.replace("LINES", "1"), stdout=writing, stderr=writing) as process:
        os.close(writing)
        assert process.wait(20) == 0


@pytest.fixture
def parser() -> Parser:
    parser = Parser("offload.something", "Do something.")
    parser.add_argument("--cpu-memory", default="8GiB", help="budget for the process")
    return parser


def test_the_parser_refuses_abbreviations(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.parse_args(["--cpu-memory", "1GiB", "--debug"]).cpu_memory == "1GiB"
    for argv in (["--cpu-mem", "1GiB"], ["--cpu-memory=1GiB", "--deb"], ["--gpu-memory", "1GiB"]):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(argv)
        assert caught.value.code == 2
        assert "error: unrecognized arguments: " in capsys.readouterr().err


def test_the_parser_shows_defaults_and_the_module(parser: Parser) -> None:
    text = parser.format_help()
    assert text.startswith("usage: python -m offload.something ")
    assert "budget for the process (default: 8GiB)" in text
    assert "--debug" in text


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("offload.command.time.monotonic", lambda: self.now)


def test_progress_off_a_terminal_is_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    progress = Progress("layers", 10)
    for _ in range(9):
        clock.now += 4
        progress.advance("error 0.01")
    assert capsys.readouterr() == (
        "",
        "layers 3/10  0:12 elapsed, 0:28 left  error 0.01\n"
        "layers 6/10  0:24 elapsed, 0:16 left  error 0.01\n"
        "layers 9/10  0:36 elapsed, 0:04 left  error 0.01\n",
    )
    progress.advance()
    assert capsys.readouterr().err == "layers 10/10  0:36 elapsed, 0:00 left\n"


def test_progress_of_a_resumed_run_counts_only_its_own_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    progress = Progress("layers", 32, done=30)
    clock.now += 60
    progress.advance()
    assert capsys.readouterr().err == "layers 31/32  1:00 elapsed, 1:00 left\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_rewrites_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, terminal = Clock(monkeypatch), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress("windows", 2)
    clock.now += 1
    progress.advance()
    clock.now += 1
    progress.advance("done")
    assert terminal.getvalue() == (
        "\r\x1b[Kwindows 1/2  0:01 elapsed, 0:01 left\r\x1b[Kwindows 2/2  0:02 elapsed, 0:00 left  done\n"
    )


def test_what_is_said_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("plan")
    assert capsys.readouterr() == ("", "plan\n")
