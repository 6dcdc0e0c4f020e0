"""Runs commands with `faults.c` loaded, each job in a fork of this process: what is imported once serves them all.

A job is a line of JSON on stdin: {"seconds", "here", "steps": [{"module", "argv", "fault", "signal", "limit"}]}. Its
steps run one after another in one process, in this very one if `here`. The answer is a line on stdout: the results of
the steps that ended, and the status of the process, "hang" if it was not through in time. `fault` is null or
[directory, calls, at, how, argument], see `faults.c`; `signal` null or [which, seconds]: one that the process sends
itself so much later; `limit` null or [name, value]: one of the system's, in bytes, beyond what is in use for "AS" and
as it is for "FSIZE"; or, for "DAC", that the modes of files hold for root as well.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
COMMANDS = ("quant.rtn", "quant.awq", "quant.pipeline", "offload.generate", "offload.session")


def main() -> None:
    """Answer jobs until stdin ends."""
    faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
    faults.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_long]
    faults.fault_count.restype = ctypes.c_long
    import torch

    torch.set_num_threads(1)
    for name in (*COMMANDS, "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    limit = importlib.import_module("offload.limit")
    limit._DISK_SECONDS = limit._TIMED_SECONDS = 0.05  # of a second that a run would otherwise measure for
    limit._MEMORY_BYTES = 16 << 20
    answers = os.fdopen(os.dup(1), "w")  # a step that runs here has the descriptor 1 for itself
    for line in sys.stdin:
        job = json.loads(line)
        if job["here"]:
            found: dict[str, Any] = {"steps": [run_step(step, faults) for step in job["steps"]], "status": 0}
            gc.freeze()  # a collection in a fork then looks at what is new in it
        else:
            found = answer(job, faults)
        print(json.dumps(found), file=answers, flush=True)


def answer(job: dict[str, Any], faults: Any) -> dict[str, Any]:
    """Run a job in a fork and return what is known of it afterwards."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        os._exit(run_steps(job["steps"], sending, faults))
    os.close(sending)
    deadline, received = time.monotonic() + job["seconds"], b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([receiving], [], [], left)
        piece = os.read(receiving, 1 << 20) if ready else b""
        received += piece
        if ready and not piece:
            break
    hangs = left <= 0
    if hangs:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(receiving)
    results = [json.loads(line) for line in received.splitlines()]
    return {"steps": results, "status": "hang" if hangs else os.waitstatus_to_exitcode(status)}


def run_steps(steps: list[dict[str, Any]], sending: int, faults: Any) -> int:
    """Run the steps of a job, send a line for each, and return the status of the process."""
    told = os.dup(2)
    try:
        for step in steps:
            os.write(sending, (json.dumps(run_step(step, faults)) + "\n").encode())
    except BaseException:
        os.write(told, traceback.format_exc().encode())
        return 1
    return 0


def run_step(step: dict[str, Any], faults: Any) -> dict[str, Any]:
    """Run one command with a fault armed; return its exit status, what it printed and what it left behind."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        before, started = open_files(), time.monotonic()
        if step["signal"] is not None:
            which, after = step["signal"]
            Timer(after, os.kill, (os.getpid(), which)).start()
        if step["fault"] is not None:
            directory, *numbers = step["fault"]
            faults.fault_arm(directory.encode(), *numbers)
        with limited(step["limit"]):
            code = importlib.import_module(step["module"]).main(step["argv"])
        calls = faults.fault_count()
        faults.fault_arm(b"", 0, 0, 0, 0)
        seconds = time.monotonic() - started
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        out.seek(0)
        err.seek(0)
        return {
            "code": code,
            "calls": calls,
            "seconds": seconds,
            "out": out.read(),
            "err": err.read(),
            "left_open": sorted(open_files() - before),
            "memory_bytes": own_memory_bytes(),
        }


@contextmanager
def limited(limit: list[Any] | None) -> Iterator[None]:
    """Hold the process to a limit meanwhile; "DAC" is for good."""
    name, value = limit or [None, 0]
    if name == "DAC":
        obey_modes()
    if name in (None, "DAC"):
        yield
        return
    kind = getattr(resource, f"RLIMIT_{name}")
    soft, hard = resource.getrlimit(kind)
    if name == "AS":
        value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def obey_modes() -> None:
    """Give up what lets root write where modes forbid it: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    version, both = 0x20080522, 0b110
    header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    for index in range(3):  # of the first 32 capabilities: effective, permitted, inheritable
        sets[index] &= ~both
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def open_files() -> set[str]:
    """Return what this process has open, by number and name."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{entry} {os.readlink(f'/proc/self/fd/{entry}')}")
        except OSError:
            continue  # the descriptor of this very listing
    return found


def own_memory_bytes() -> int:
    """Return the memory that is this process's alone, its free heap given back."""
    from offload.memory import own_memory_bytes

    ctypes.CDLL(None).malloc_trim(0)
    return own_memory_bytes()


if __name__ == "__main__":
    main()
