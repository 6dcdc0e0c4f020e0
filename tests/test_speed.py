"""Timing in turn, the results file, and `python -m eval.speed` on a small product."""

import csv
import json
import time
from pathlib import Path

import pytest

from eval.results import append
from eval.speed import main
from eval.speed_kernels import Case, Measurement
from eval.timing import Samples, paired
from kernels.cpu_matmul import LEVELS, cpu_level
from offload.errors import UsageError

SMALL = ["kernels", "--shapes", "64x256", "--batches", "1,9", "--rounds", "2", "--group-size", "64"]


def test_contenders_run_in_turn_and_rotate_their_copies() -> None:
    calls: list[tuple[str, int]] = []

    def step(name: str, seconds: float) -> None:
        calls.append((name, len(calls)))
        time.sleep(seconds)

    seen: dict[str, list[int]] = {"slow": [], "fast": []}
    times = paired(
        {
            "slow": lambda i: (seen["slow"].append(i), step("slow", 0.004)),
            "fast": lambda i: (seen["fast"].append(i), step("fast", 0.001)),
        },
        rounds=4,
        sample_seconds=0.004,
    )
    assert 0.004 <= times["slow"].median < 0.04
    assert times["fast"].speedup_over(times["slow"]) > 1
    assert len(times["slow"].seconds) == len(times["fast"].seconds) == 4
    assert seen["fast"] == list(range(len(seen["fast"]))), "every call has the next index"
    after_warm_up = [name for name, _ in calls[4:]]
    order = [name for i, name in enumerate(after_warm_up) if i == 0 or after_warm_up[i - 1] != name]
    assert order == ["fast", "slow", "fast", "slow", "fast"], "forwards and backwards in turn"


def test_ratios_are_taken_round_by_round() -> None:
    ours, other = Samples((1.0, 4.0, 2.0)), Samples((2.0, 8.0, 10.0))
    assert ours.median == 2
    assert ours.speedup_over(other) == 2
    assert (ours.percentile(0.2), ours.percentile(0.8)) == (1.0, 4.0)


def test_a_row_says_bytes_operations_and_the_share_of_the_limit() -> None:
    case = Case(n=4096, k=4096, group_size=128, m=2)
    item = Measurement(case, "ours", Samples((1e-3,)), Samples((5e-4,)), {"torch fp32": Samples((3e-3,))})
    row = item.row()
    assert case.packed_bytes == 4096 * 2048 + 2 * 4096 * 32
    assert row["packed_gb_per_s"] == pytest.approx(8.65, abs=0.01)
    assert row["gop_per_s"] == pytest.approx(67.1, abs=0.1)
    assert (row["of_read"], row["x_torch_fp32"]) == (0.5, 3.0)


def test_the_command_prints_a_table_records_rows_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, picture = tmp_path / "kernels.csv", tmp_path / "speed.png"
    flags = ["--record", "--results", str(results), "--picture", str(picture)]
    for _ in range(2):
        assert main([*SMALL, *flags]) == 0
    printed = capsys.readouterr()
    contenders = [*LEVELS[1 : cpu_level() + 1], "torch fp32", "torch bf16", "torch int4"]
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert [row["contender"] for row in rows] == 4 * contenders
    assert {row["m"] for row in rows} == {"1", "9"}
    assert all(float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) for row in rows)
    assert all((row["of_read"] != "") == (row["m"] == "1") for row in rows)
    assert rows[0]["command"].startswith("python -m eval.speed kernels --shapes 64x256")
    assert "over" in printed.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json_with_another_process_busy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "--busy", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["busy"] for row in rows} == {1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "64by256"], "--shapes '64by256': expected llama-3-8b"),
        (["--batches", "1,0"], "--batches '1,0': expected numbers above zero"),
        (["--shapes", "64x200"], "--group-size 128: does not divide K=200"),
    ],
)
def test_flags_that_cannot_be_meant(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_results_file_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append(path, [{"a": 1, "b": 2}])
    append(path, [{"a": 3, "b": 4}])
    with pytest.raises(UsageError, match="has the columns a, b; move it away or name another file"):
        append(path, [{"a": 1, "c": 2}])
    assert path.read_text() == "a,b\n1,2\n3,4\n"
