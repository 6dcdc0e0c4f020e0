"""The load on the server: what it counts, on a tiny model of random weights."""

import csv
from pathlib import Path

import pytest

from eval.speed.__main__ import main


def test_one_and_many_are_timed_compared_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "serve.csv"
    flags = ["--shape", "tiny", "--cpu-memory", "8GiB", "--clients", "4", "--tokens", "5", "--rounds", "2"]
    assert main(["serve", *flags, "--models", str(tmp_path), "--record", "--results", str(results)]) == 0
    shown = capsys.readouterr().out
    assert "0 of 10 requests failed; 2 of 2 answers equal those of the same client alone" in shown
    with results.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["many_x_one"]) == pytest.approx(
        float(row["many_tokens_per_s"]) / float(row["one_tokens_per_s"]), rel=1e-2
    )
    assert 0 < int(row["peak_bytes"]) < 8 << 30
    assert row["disk_bytes_per_pass"] == "0"


def test_a_server_that_cannot_start_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--shape", "tiny", "--cpu-memory", "1MiB", "--models", str(tmp_path)]
    assert main(["serve", *flags]) == 4
    assert "error: the server ended: error: --cpu-memory 1.0 MiB: too small for this model" in capsys.readouterr().err
