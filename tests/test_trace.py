"""A trace holds every layer of every pass and every read, in order, in the format that viewers open."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from offload.errors import ResourceError
from offload.executor import executor_of, load
from offload.generate import main
from offload.trace import Trace

TOKENS = torch.tensor([[5, 77, 130]])


def test_every_layer_and_every_read_is_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint, device_map="disk", slots=2)
    executor = executor_of(model)
    trace = Trace(executor)
    reads = executor.stats.layer_reads
    with torch.inference_mode():
        model.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    executor.close()
    trace.write(tmp_path / "trace.json")
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    computed = [event for event in events if event["tid"] == 1]
    layers = [f"model.layers.{index}" for index in range(3)]
    assert [event["name"] for event in computed] == [*layers, "head"] * 4
    ends = [event["ts"] + event["dur"] for event in computed]
    assert all(end <= after["ts"] + 0.2 for end, after in zip(ends, computed[1:], strict=False))  # rounded to 0.1 us
    read = [event for event in events if event["tid"] == 2]
    assert set(Counter(event["name"] for event in read)) == set(layers)
    assert len(read) >= executor.stats.layer_reads - reads - 2  # up to two were on their way when the trace began
    assert all(event["args"]["bytes"] == blob.nbytes for event in read for blob in executor.blobs[:1])


def test_the_command_writes_one(tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(tiny_checkpoint), "--prompt", "The fox", "--max-new-tokens", "3"]
    assert main([*flags, "--trace", str(tmp_path / "trace.json")]) == 0
    assert "to be opened in ui.perfetto.dev" in capfd.readouterr().err
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"model.layers.0", "head", "thread_name"} <= names


def test_a_file_that_cannot_be_written_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trace = Trace(executor_of(load(tiny_checkpoint)))
    with pytest.raises(ResourceError, match=r"--trace .*: cannot be written"):
        trace.write(tmp_path / "missing" / "trace.json")
