"""The cost of the checksums: runs with and without them, each in a process of its own, on a tiny model."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval.speed.__main__ import main
from eval.speed.checksums import Turn, _row, add_flags
from eval.speed.random_model import SHAPES, write_checkpoint
from offload.command import Parser

TOKENS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many layers as no budget holds that was rounded up to a MiB."""
    directory = tmp_path_factory.mktemp("models")
    write_checkpoint(replace(SHAPES["tiny"], layers=16), directory / "tiny.int4")
    return directory


@pytest.fixture(scope="module")
def budget_mib(models: Path) -> int:
    """A little more than what the refusal of a budget that is too small says would do."""
    command = [sys.executable, "-m", "eval.speed.checksums", str(models / "tiny.int4"), "1", str(TOKENS)]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    return int(told.partition("at least ")[2].partition(" MiB")[0]) + 1


def test_both_ways_are_timed_and_recorded(
    models: Path, budget_mib: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "checksums.csv"
    flags = ["--shape", "tiny", "--cpu-memory", f"{budget_mib}MiB", "--tokens", str(TOKENS), "--rounds", "1"]
    assert main(["checksums", *flags, "--models", str(models), "--record", "--results", str(results)]) == 0
    assert "  3 tokens " in capsys.readouterr().out
    with results.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert int(row["disk_bytes_per_token"]) > 0
    assert 0 < float(row["first_pass_s"]) < float(row["decode_s"])
    assert 0 < float(row["first_pass_unverified_s"]) < float(row["decode_unverified_s"])


def test_the_cost_is_that_of_the_pairs() -> None:
    parser = Parser("test", "")
    add_flags(parser)
    verified = [Turn(1.1, 10.2, 7, 2e9), Turn(2.2, 20.2, 7, 2e9), Turn(9.0, 40.4, 7, 2e9)]
    unverified = [Turn(1.0, 10.0, 7, 2e9), Turn(2.0, 20.0, 7, 2e9), Turn(3.0, 40.0, 7, 2e9)]
    row = _row(parser.parse_args([]), 1, verified, unverified)
    assert (row["first_pass_cost"], row["decode_cost"]) == (0.1, 0.01)


def test_a_budget_that_holds_everything_measures_nothing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--shape", "tiny", "--cpu-memory", "8GiB", "--models", str(models)]
    assert main(["checksums", *flags]) == 2
    assert "--cpu-memory 8.0 GiB: nothing is left on disk; give a smaller one" in capsys.readouterr().err
