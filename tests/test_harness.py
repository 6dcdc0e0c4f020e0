"""lm-eval's tasks on a streamed model: local data, the original beside, what is refused. Where lm-eval is installed."""

import json
from pathlib import Path

import pytest

from eval.harness import Score, main

TASK = """
task: foxes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
PERPLEXITY = """
task: prose
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks, whose data is there too, and the caches of datasets."""
    pytest.importorskip("lm_eval.evaluator", reason="lm-eval is an extra")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": f"The quick {word} jumps", "choices": [" over", " under", " and"], "answer": number % 3}
        for number, word in enumerate(["brown", "fox", "lazy", "dog", "being", "lets", "it", "sky", "blue", "why"])
    ]
    data = tmp_path / "foxes.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "foxes.yaml").write_text(TASK.format(data=data))
    (tmp_path / "prose.yaml").write_text(PERPLEXITY.format(data=data))
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_local_tasks_run_streamed_with_the_original_beside(
    tasks: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_checkpoint), "--include-path", str(tasks), "--tasks", "foxes,prose"]
    assert main([*flags, "--context", "256", "--device-map", "disk", "--exact", "--baseline", "--json"]) == 0
    on_disk = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["task"], one["metric"]) for one in on_disk] == [("foxes", "acc"), ("prose", "bits_per_byte")]
    assert on_disk[0]["higher_is_better"]
    assert not on_disk[1]["higher_is_better"]
    for one in on_disk:
        assert one["original"] > 0
    assert on_disk[1]["recovery"] == on_disk[1]["original"] / on_disk[1]["score"]
    assert main([*flags, "--context", "256", "--exact", "--json"]) == 0
    in_memory = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["score"] for one in in_memory] == [one["score"] for one in on_disk]
    assert main([*flags, "--tasks", "nothing"]) == 3
    assert "error: --tasks nothing: not known to lm-eval, nor in --include-path" in capsys.readouterr().err


def test_recovery_is_by_what_is_better() -> None:
    assert Score("t", "acc", 0.45, 0.01, True, 0.5).recovery == pytest.approx(0.9)
    assert Score("t", "ppl", 12.5, None, False, 10.0).recovery == pytest.approx(0.8)
    assert Score("t", "acc", 0.45, None, True).recovery is None
    assert Score("t", "acc", 0.45, None, True, 0.0).recovery is None
    assert "0.4500 ± 0.0100   original 0.5000   recovery 90.0%" in Score("t", "acc", 0.45, 0.01, True, 0.5).line()
    assert Score("t", "acc", 0.45, None, True, 0.0).line().endswith("recovery not defined")


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--batch-size", "0"], 2, "--batch-size 0: expected at least 1"),
        (["--limit", "0"], 2, "--limit 0: expected at least 1"),
        (["--context", "0"], 2, "--context 0: expected at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(
    flags: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tasks", "foxes", *flags]) == status
    assert f"error: {message}" in capsys.readouterr().err
