"""Every call on a file fails once: what a run leaves is absent, resumable or complete, and never a wrong byte or token.

The calls are those of a short calibration and of a short streamed run, failed in the C library by `faults.c`: an error,
a disk that stays full, half of what was asked for, the process killed on the spot. The default suite tries some of the
calls, the slow one every single one.
"""

import errno
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from directories import contents

from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError

HERE = Path(__file__).parent
OPEN, READ, WRITE, FSYNC, RENAME, UNLINK, MKDIR = (1 << number for number in range(7))
CHANGE = WRITE | FSYNC | RENAME | UNLINK | MKDIR
COUNT, FAIL, SHORT, KILL, DELAY = range(5)
SAMPLES = ("--num-samples", "8", "--seq-len", "32")
HANG_SECONDS = 60.0
MOST_CALLS = 150
"""Of a streamed run, whose last half second times the disk by thousands of reads like those before."""

MORE_THAN_ASKED_STRIDE = 5
"""Between the calls of the slow suite where the first fails and all later ones do, too."""

every_call = pytest.mark.parametrize(
    "stride", [29, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["some", "every"]
)

Step = dict[str, Any]
Answer = dict[str, Any]


class Driver:
    """A process that has imported everything and forks for each job, see `fault_driver.py`."""

    def __init__(self, library: Path) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "fault_driver.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def run(self, steps: list[Step], here: bool = False) -> Answer:
        """Return the results of the steps that ended and the status of the process they ran in."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"seconds": HANG_SECONDS * len(steps), "here": here, "steps": steps}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: Answer = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Drivers:
    """Two of them, for two cores."""

    def __init__(self, library: Path, warm: list[Step]) -> None:
        self._free: queue.Queue[Driver] = queue.Queue()
        self._all = [Driver(library) for _ in range(2)]
        for driver in self._all:
            assert driver.run(warm, here=True)["steps"][0]["code"] == 0
            self._free.put(driver)

    def run(self, steps: list[Step]) -> Answer:
        """Run a job in a fork of whichever is free."""
        driver = self._free.get()
        try:
            return driver.run(steps)
        finally:
            self._free.put(driver)

    def map(self, work: Callable[[Any], Any], items: Any) -> list[Any]:
        """Return the results of `work`, done on two cores."""
        with ThreadPoolExecutor(len(self._all)) as pool:
            return list(pool.map(work, items))

    def close(self) -> None:
        """End both."""
        for driver in self._all:
            driver.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        assert "CI" not in os.environ, "no C compiler"
        pytest.skip("no C compiler to make the shim with")
    path = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(HERE / "faults.c"), "-ldl"], check=True)
    return path


@pytest.fixture(scope="module")
def short_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model cut to its first layer."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = shutil.copytree(tiny_model, tmp_path_factory.mktemp("short") / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, num_hidden_layers=1, dtype=torch.bfloat16)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def drivers(library: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    outputs = tmp_path_factory.mktemp("warm")
    drivers = Drivers(library, [quantize("quant.rtn", tiny_model, outputs / "out", more=("--overwrite",))])
    yield drivers
    drivers.close()


def step(
    module: str, argv: list[str], fault: tuple[Path, int, int, int, int] | None, sent: tuple[int, float] | None
) -> Step:
    armed = None if fault is None else [str(fault[0].resolve()), *fault[1:]]
    return {"module": module, "argv": argv, "fault": armed, "signal": sent, "limit": None}


def quantize(
    module: str,
    model: Path,
    output: Path,
    fault: tuple[Path, int, int, int, int] | None = None,
    sent: tuple[int, float] | None = None,
    more: tuple[str, ...] = (),
) -> Step:
    argv = ["--model", str(model), "--output", str(output), "--group-size", "32", *more]
    return step(module, argv, fault, sent)


def is_left_well(output: Path, expected: dict[str, bytes]) -> bool:
    """Whether a run has left its directory absent, resumable, or complete with what was expected in it."""
    try:
        Checkpoint.open(output)
    except CheckpointError as error:
        allowed = ("no such directory", "calibration has not finished", "no manifest.json")
        return any(reason in str(error) for reason in allowed)
    found = contents(output)
    return all(found.get(name) == data for name, data in expected.items())


QUANTIZING = {
    "full disk": ("output", CHANGE, FAIL, errno.ENOSPC),
    "disk that stays full": ("output", CHANGE, FAIL, -errno.ENOSPC),
    "output that cannot be opened": ("output", OPEN, FAIL, errno.EACCES),
    "output that cannot be read": ("output", READ, FAIL, errno.EIO),
    "model that cannot be opened": ("model", OPEN, FAIL, errno.EIO),
    "model that cannot be read": ("model", READ, FAIL, errno.EIO),
    "too many open files": ("model", OPEN, FAIL, errno.EMFILE),
    "short reads of the model": ("model", READ, SHORT, 0),
    "short reads and writes of the output": ("output", READ | WRITE, SHORT, 0),
}


@every_call
@pytest.mark.parametrize("kind", QUANTIZING)
def test_a_calibration_whose_call_fails_is_resumed(
    drivers: Drivers, short_model: Path, tmp_path: Path, kind: str, stride: int
) -> None:
    where, calls, how, argument = QUANTIZING[kind]

    def run(number: int, at: int, how: int) -> Step:
        output = tmp_path / str(number) / "out"
        place = output if where == "output" else short_model
        return quantize("quant.rtn", short_model, output, (place, calls, at, how, argument))

    whole = drivers.run([run(0, 0, COUNT)])["steps"][0]
    assert whole["code"] == 0
    expected = contents(tmp_path / "0" / "out")

    def check(numbers: range) -> list[int]:
        codes = []
        for number in numbers:
            output = tmp_path / str(number) / "out"
            answer = drivers.run([run(number, number, how)])
            assert answer["status"] == 0, f"call {number}: {answer['status']}"
            failed = answer["steps"][0]
            left_well = is_left_well(output, expected)
            (again,) = drivers.run([quantize("quant.rtn", short_model, output)])["steps"]
            told = f"call {number}: {failed['err'][-500:]}"
            assert failed["code"] in ((0,) if how == SHORT else (0, 3, 4)), told
            assert left_well, told
            assert failed["left_open"] == [], told
            if failed["code"]:
                assert str(output if where == "output" else short_model) in failed["err"].splitlines()[-1], told
            assert again["code"] == 0, f"call {number}: {again['err'][-500:]}"
            assert contents(output) == expected, told
            shutil.rmtree(output.parent)
            codes.append(failed["code"])
        return codes

    if argument < 0:
        stride = max(stride, MORE_THAN_ASKED_STRIDE)
    numbers = range(1, whole["calls"] + 1, stride)
    halves = drivers.map(check, [numbers[::2], numbers[1::2]])
    assert len(halves[0]) + len(halves[1]) == len(numbers) > 0
    if how == FAIL:
        assert any(code for half in halves for code in half), "no call was failed"


@every_call
@pytest.mark.parametrize(
    ("module", "calls"), [("quant.rtn", CHANGE), ("quant.awq", FSYNC | RENAME)], ids=["every change", "awq, every sync"]
)
def test_a_calibration_killed_at_any_call_is_resumed(
    drivers: Drivers,
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    module: str,
    calls: int,
    stride: int,
) -> None:
    more = ("--calibration", str(calibration_text), *SAMPLES) if module == "quant.awq" else ()

    def run(number: int, how: int) -> Answer:
        output = tmp_path / str(number) / "out"
        return drivers.run([quantize(module, tiny_model, output, (output, calls, number, how, 0), more=more)])

    whole = run(0, COUNT)["steps"][0]
    assert whole["code"] == 0
    expected = contents(tmp_path / "0" / "out")

    def check(number: int) -> None:
        output = tmp_path / str(number) / "out"
        assert run(number, KILL) == {"steps": [], "status": -signal.SIGKILL}
        assert is_left_well(output, expected), f"call {number}"
        (again,) = drivers.run([quantize(module, tiny_model, output, more=more)])["steps"]
        assert again["code"] == 0, f"call {number}: {again['err'][-500:]}"
        assert contents(output) == expected, f"call {number}"
        shutil.rmtree(output.parent)

    kills = range(1, whole["calls"] + 1, stride)
    drivers.map(check, kills)
    record_property("kills", len(kills))


@pytest.mark.parametrize(
    "kills", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["some", "many"]
)
def test_a_calibration_killed_again_and_again_at_random_ends_as_if_nothing_had_been(
    drivers: Drivers,
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    kills: int,
) -> None:
    more = ("--calibration", str(calibration_text), *SAMPLES)
    (whole,) = drivers.run([quantize("quant.awq", tiny_model, tmp_path / "whole" / "out", more=more)])["steps"]
    expected = contents(tmp_path / "whole" / "out")

    def check(seed: int) -> int:
        chance, died = random.Random(seed), 0
        while died < kills // 2:
            output = tmp_path / f"{seed}-{died}" / "out"
            status = -signal.SIGKILL
            while status == -signal.SIGKILL:
                kill = (signal.SIGKILL, chance.uniform(0.1, 1.2) * whole["seconds"])
                answer = drivers.run([quantize("quant.awq", tiny_model, output, sent=kill, more=more)])
                status = answer["status"]
                died += status == -signal.SIGKILL
                assert is_left_well(output, expected)
            assert answer["steps"][0]["code"] == 0, answer["steps"][0]["err"][-500:]
            assert contents(output) == expected
        return died

    record_property("kills", sum(drivers.map(check, [1, 2])))


def stream(checkpoint: Path, fault: tuple[Path, int, int, int, int] | None = None, *more: str) -> Step:
    """Return a step that generates with every layer on disk."""
    flags = ["--prompt", "The quick brown fox", "--no-chat", "--max-new-tokens", "4", "--device-map", "disk"]
    return step("offload.generate", ["--model", str(checkpoint), *flags, *more], fault, None)


STREAMING = {
    "read": (READ, FAIL, errno.EIO),
    "disk that stays broken": (READ, FAIL, -errno.EIO),
    "open": (OPEN, FAIL, errno.EIO),
    "too many open files": (OPEN, FAIL, -errno.EMFILE),
    "short read": (READ, SHORT, 0),
}


@every_call
@pytest.mark.parametrize("kind", STREAMING)
def test_streaming_with_a_call_that_fails_gives_right_tokens_or_none(
    drivers: Drivers, tiny_checkpoint: Path, kind: str, stride: int
) -> None:
    """What is printed before it fails is the start of the right text; the same process gives all of it next time."""
    calls, how, argument = STREAMING[kind]
    (whole,) = drivers.run([stream(tiny_checkpoint, (tiny_checkpoint, calls, 0, COUNT, 0))])["steps"]
    assert whole["code"] == 0
    text = whole["out"].rstrip("\n")

    if argument < 0:
        stride = max(stride, MORE_THAN_ASKED_STRIDE)
    healthy = [] if how == SHORT else [stream(tiny_checkpoint)]

    def check(numbers: range) -> list[Answer]:
        steps = []
        for number in numbers:
            steps += [stream(tiny_checkpoint, (tiny_checkpoint, calls, number, how, argument)), *healthy]
        answer = drivers.run(steps)
        assert answer["status"] == 0
        failing, again = answer["steps"][:: 1 + len(healthy)], answer["steps"][1::2] if healthy else []
        for number, failed in zip(numbers, failing, strict=True):
            told = f"call {number}: {failed['out']!r} {failed['err'][-500:]}"
            assert failed["code"] in ((0,) if how == SHORT else (0, 3)), told
            assert text.startswith(failed["out"].rstrip("\n")), told
            assert failed["code"] or failed["out"] == whole["out"], told
            assert not failed["code"] or str(tiny_checkpoint) in failed["err"].splitlines()[-1], told
        assert all((result["code"], result["out"]) == (0, whole["out"]) for result in again)
        assert all(result["left_open"] == [] for result in answer["steps"])
        memory = [result["memory_bytes"] for result in answer["steps"]]
        grown = max(memory) - min(memory[:8])
        assert grown < 24 << 20, f"{grown >> 20} MiB more after {len(steps)} runs"
        return failing

    numbers = range(1, min(whole["calls"], MOST_CALLS) + 1, stride)
    found = [result for half in drivers.map(check, [numbers[::2], numbers[1::2]]) for result in half]
    assert len(found) == len(numbers) > 0
    if how == FAIL:
        assert any(result["code"] for result in found), "no call was failed"
    if (kind, stride) == ("read", 1):  # so the calls that were failed are all of loading and generating
        assert any(result["code"] and result["out"].rstrip("\n") == text for result in found)


NO_MORE_MEMORY = "error: the system gives this process no more memory; `ulimit -v` shows a limit"
MEBIBYTES = (*range(0, 64, 8), *range(64, 320, 32))


def test_streaming_under_a_limit_of_address_space_gives_the_text_or_says_so(
    drivers: Drivers, tiny_checkpoint: Path
) -> None:
    (whole,) = drivers.run([stream(tiny_checkpoint)])["steps"]

    def check(mebibytes: int) -> int:
        limited = {**stream(tiny_checkpoint), "limit": ["AS", mebibytes << 20]}
        answer = drivers.run([limited, stream(tiny_checkpoint)])
        assert answer["status"] == 0
        found, again = answer["steps"]
        told = f"{mebibytes} MiB: {found['err'][-500:]}"
        assert found["code"] in (0, 4), told
        assert found["code"] == 0 or found["err"].splitlines()[-1].startswith(NO_MORE_MEMORY), told
        assert whole["out"].startswith(found["out"].rstrip("\n")), told
        assert (again["code"], again["out"]) == (0, whole["out"])
        assert found["left_open"] == []
        code: int = found["code"]
        return code

    assert set(drivers.map(check, MEBIBYTES)) == {0, 4}


@pytest.mark.parametrize(
    ("name", "values"),
    [("AS", [mebibytes << 20 for mebibytes in MEBIBYTES[:12]]), ("FSIZE", [4096, 8192, 20_000, 40_000, 1 << 20])],
    ids=["address space", "size of a file"],
)
def test_a_calibration_under_a_limit_of_the_system_is_resumed_without_it(
    drivers: Drivers, tiny_model: Path, tmp_path: Path, name: str, values: list[int]
) -> None:
    drivers.run([quantize("quant.rtn", tiny_model, tmp_path / "whole" / "out")])
    expected = contents(tmp_path / "whole" / "out")

    def check(value: int) -> int:
        run = quantize("quant.rtn", tiny_model, tmp_path / str(value) / "out")
        answer = drivers.run([{**run, "limit": [name, value]}])
        assert answer["status"] == 0
        (found,) = answer["steps"]
        told = f"{value}: {found['err'][-500:]}"
        assert found["code"] in (0, 4), told
        assert found["err"].splitlines()[-1].startswith("error: ") == (found["code"] == 4), told
        assert is_left_well(tmp_path / str(value) / "out", expected), told
        (again,) = drivers.run([run])["steps"]
        assert again["code"] == 0, again["err"][-500:]
        assert contents(tmp_path / str(value) / "out") == expected
        code: int = found["code"]
        return code

    assert set(drivers.map(check, values)) == {0, 4}


@pytest.mark.parametrize("there", [True, False], ids=["inside", "beside"])
def test_a_directory_that_modes_forbid_is_refused_before_any_work(
    drivers: Drivers, tiny_model: Path, tmp_path: Path, there: bool
) -> None:
    output = tmp_path / "closed" / "out"
    output.mkdir(parents=True) if there else output.parent.mkdir()
    closed = output if there else output.parent
    closed.chmod(0o555)
    run = {**quantize("quant.rtn", tiny_model, output), "limit": ["DAC", 0]}
    (found,) = drivers.run([run])["steps"]
    assert found["code"] == 4, found["err"]
    assert str(output) in found["err"].splitlines()[-1]
    assert "layer 1/3" not in found["err"]
    assert not list(closed.iterdir())
    closed.chmod(0o755)
    (again,) = drivers.run([run])["steps"]
    assert again["code"] == 0


def test_a_disk_that_stalls_gives_the_same_text_and_lets_itself_be_interrupted(
    drivers: Drivers, tiny_checkpoint: Path
) -> None:
    tokens = ("--max-new-tokens", "100", "--temperature", "3")  # likely to go on for so long
    stalls = (tiny_checkpoint, READ, 50, DELAY, 200)
    (whole,) = drivers.run([stream(tiny_checkpoint, None, *tokens)])["steps"]
    (stalled,) = drivers.run([stream(tiny_checkpoint, stalls, *tokens)])["steps"]
    assert stalled["calls"] >= 200
    assert stalled["seconds"] > stalled["calls"] // 50 * 0.2
    assert (stalled["code"], stalled["out"]) == (0, whole["out"])
    after = stalled["seconds"] / 2
    interrupt = {**stream(tiny_checkpoint, stalls, *tokens), "signal": (signal.SIGINT, after)}
    (interrupted,) = drivers.run([interrupt])["steps"]
    assert interrupted["code"] == 130
    assert interrupted["seconds"] < after + 1
    assert whole["out"].startswith(interrupted["out"].rstrip("\n"))
