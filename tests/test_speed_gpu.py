"""The command for a GPU: steps that fail, hang or lack a tool leave the others alone; and all of it, without a GPU."""

import csv
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.speed import gpu
from eval.speed.__main__ import main
from eval.speed.gpu import Step, steps_of, take

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
LIMIT_SECONDS = 540


def step(name: str, code: str, seconds: int = 60, figure: str = "figure", tool: str | None = None) -> Step:
    return Step(name, (sys.executable, "-c", code), seconds, figure, tool)


STEPS = [
    step("breaks", "print('before'); raise SystemExit('no such luck')"),
    step("hangs", "import time; print('started', flush=True); time.sleep(600)", seconds=2),
    step("lacks", "", tool="no-such-profiler"),
    step("works", "print('figure 1'); print('figure 2'); print('the end')"),
    step("silent", ""),
]


def test_every_step_survives_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "steps_of", lambda *_: iter(STEPS))
    results = tmp_path / "gpu.csv"
    flags = ["gpu", "--dry-run", "--output", str(tmp_path / "run"), "--record", "--results", str(results)]
    assert main(flags) == 4
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "did not pass: breaks, hangs; their logs say why"
    assert "error: did not pass: breaks, hangs; their logs say why" in said.err
    with results.open(newline="") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert {name: (row["status"], row["figure"]) for name, row in rows.items()} == {
        "breaks": ("failed", "no such luck"),
        "hangs": ("over its limit", "started"),
        "lacks": ("left out", "no no-such-profiler here"),
        "works": ("passed", "figure 2"),
        "silent": ("passed", "it said nothing"),
    }
    assert 2 <= float(rows["hangs"]["seconds"]) < 20
    assert (tmp_path / "run" / "works.log").read_text() == "figure 1\nfigure 2\nthe end\n"
    assert main([*flags, "--steps", "works"]) == 0
    assert "every step that was taken passed" in capsys.readouterr().out
    assert main([*flags, "--steps", "works,dances"]) == 2
    assert "--steps: no step dances; there are breaks, hangs" in capsys.readouterr().err


def test_a_step_in_several_processes_fails_with_any_of_them(tmp_path: Path) -> None:
    for failing, status in (("1/3", "failed"), ("3/3", "passed")):
        code = f"import sys; print('figure', sys.argv[2]); sys.exit(sys.argv[2] == {failing!r})"
        several = replace(step(f"several {status}", code), shards=3)
        outcome = take(several, tmp_path)
        assert outcome.status == status
        log = (tmp_path / f"several {status}.log").read_text()
        assert sorted(log.split()) == ["0/3", "1/3", "2/3", "figure", "figure", "figure"]


def test_a_step_over_its_limit_takes_its_children_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    assert take(step("parent", child, seconds=2), tmp_path).status == "over its limit"
    number = int((tmp_path / "parent.log").read_text())
    ends = time.monotonic() + 20
    while Path(f"/proc/{number}/stat").exists() and time.monotonic() < ends:
        if Path(f"/proc/{number}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_the_limits_of_all_steps_fit_the_time_that_a_gpu_is_lent_for(tmp_path: Path) -> None:
    steps = list(steps_of(tmp_path, dry_run=False))
    assert sum(one.seconds for one in steps) <= LIMIT_SECONDS
    dry = list(steps_of(tmp_path, dry_run=True))
    assert [one.name for one in dry] == [one.name for one in steps]
    assert not any("cuda" in part for one in dry for part in one.command)


@without_gpu
def test_without_a_gpu_there_is_the_dry_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "torch finds no CUDA device here; --dry-run takes the same steps" in capsys.readouterr().err


@pytest.mark.slow
@without_gpu
def test_the_dry_run_takes_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(["gpu", "--dry-run", "--output", str(output), "--json"]) == 0
    rows = {row["step"]: row for row in json.loads(capsys.readouterr().out)}
    logs = {name: (output / f"{name}.log").read_text()[-2000:] for name in rows if (output / f"{name}.log").exists()}
    expected = {name: "passed" for name in ("doctor", "tests", "kernels", "tiers", "kv", "verify")}
    assert {name: rows[name]["status"] for name in expected} == expected, logs
    for name in ("kernels", "tiers", "kv"):
        assert (output / f"{name}.csv").read_text().count("\n") > 1
    assert {event["name"] for event in json.loads((output / "trace.json").read_text())["traceEvents"]} >= {"head"}
