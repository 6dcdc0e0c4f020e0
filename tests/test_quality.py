"""The table of every way of quantizing: a row a run, with what it was made of and what it cost."""

import csv
import json
import re
from pathlib import Path

import pytest

from eval import ppl, quality
from offload.checkpoint import Checkpoint
from quant import awq, rtn
from tests.test_walk import awq_flags

Capture = pytest.CaptureFixture[str]
COLUMNS = (
    "date,commit,method,settings,group_size,symmetric,num_samples,seq_len,text,windows,nll_rise,nll_rise_stderr,"
    "calibration_seconds,cpu_seconds,peak_bytes,bits_per_weight,evaluation_text,window"
)


def test_every_run_has_its_row(tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: Capture) -> None:
    rounded, scaled = tmp_path / "rtn", tmp_path / "awq"
    assert rtn.main(["--model", str(tiny_model), "--output", str(rounded), "--group-size", "row", "--json"]) == 0
    assert awq.main(awq_flags(tiny_model, calibration_text, scaled, "--asymmetric", "--json")) == 0
    runs, results = tmp_path / "runs.jsonl", tmp_path / "quality.csv"
    runs.write_text(capsys.readouterr().out)
    protocol = ["--text", str(calibration_text), "--window", "128", "--limit-windows", "4"]
    for _ in range(2):
        assert quality.main([str(runs), *protocol, "--record", "--results", str(results)]) == 0
    printed = capsys.readouterr()
    assert f"2 rows appended to {results}" in printed.err
    assert results.read_text().splitlines()[0] == COLUMNS
    assert str(tmp_path) not in results.read_text()
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert rows[:2] == rows[2:]
    costs = [json.loads(line) for line in runs.read_text().splitlines()]
    for row, cost, directory in zip(rows, costs, (rounded, scaled), strict=False):
        assert ppl.main(["--model", str(directory), *protocol, "--baseline", "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert float(row["nll_rise"]) == pytest.approx(measured["nll_rise"], abs=1e-5)
        assert float(row["nll_rise_stderr"]) == pytest.approx(measured["nll_rise_stderr"], abs=1e-5)
        assert float(row["calibration_seconds"]) == cost["seconds"]
        assert float(row["cpu_seconds"]) == cost["cpu_seconds"] > 0
        assert int(row["peak_bytes"]) == cost["peak_memory_bytes"] > 1 << 20
        assert float(row["bits_per_weight"]) == cost["bits_per_weight"]
        assert json.loads(row["settings"]) == Checkpoint.open(directory).recipe.settings
        assert (row["evaluation_text"], row["windows"], row["window"]) == (calibration_text.name, "4", "128")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
    first, second = rows[:2]
    assert [first[key] for key in ("method", "group_size", "symmetric", "num_samples", "seq_len", "text")] == [
        *("rtn", "row", "True", "", "", "")
    ]
    assert [second[key] for key in ("method", "group_size", "symmetric", "num_samples", "seq_len", "text")] == [
        *("awq", "32", "False", "8", "32", calibration_text.name)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": no runs"),
        ("{", ": line 1 is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ('{"output": "here"}', ": line 1 is not what a quant command prints with --json"),
    ],
)
def test_what_is_no_list_of_runs_is_refused(tmp_path: Path, capsys: Capture, content: str, message: str) -> None:
    runs = tmp_path / "runs.jsonl"
    runs.write_text(content)
    assert quality.main([str(runs)]) == 3
    assert f"error: {runs}{message}" in capsys.readouterr().err
    assert quality.main([str(tmp_path / "none")]) == 3
    assert f"error: {tmp_path / 'none'}: cannot be read" in capsys.readouterr().err
