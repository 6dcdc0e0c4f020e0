"""Conversion against the disk: a tiny random model in AWQ's layout is converted, and what bounds it timed beside it."""

import csv
from pathlib import Path

import pytest

from eval.speed.__main__ import main


def test_a_conversion_is_timed_beside_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "convert.csv"
    flags = ["--shape", "tiny", "--models", str(tmp_path), "--rounds", "1", "--record", "--results", str(results)]
    assert main(["convert", *flags]) == 0
    assert "times it to convert" in capsys.readouterr().out
    with results.open(newline="") as file:
        (row,) = csv.DictReader(file)
    stored = sum(path.stat().st_size for path in (tmp_path / "tiny.awq").glob("*.safetensors"))
    assert int(row["read_bytes"]) == stored
    assert 0.9 * stored < int(row["written_bytes"]) < 1.2 * stored
    assert 0 < float(row["read_s"]) < float(row["convert_s"]) < float(row["process_s"])
    assert float(row["x_read_and_write"]) < float(row["x_read"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert.csv", "tiny.awq", "tiny.int4-plain-head"]


def test_a_conversion_that_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.awq").mkdir()
    (tmp_path / "tiny.awq" / "config.json").write_text("{")
    (tmp_path / "tiny.awq" / "model.safetensors").write_bytes(b"no header")
    assert main(["convert", "--shape", "tiny", "--models", str(tmp_path), "--rounds", "1"]) == 4
    assert "quant.convert failed: error: " in capsys.readouterr().err
