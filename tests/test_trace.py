"""A trace holds every layer of every pass and every read, in order, in the format that viewers open."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device import placed
from test_kv_device import TEXT, checkpoint, logits

from offload.errors import ResourceError
from offload.executor import executor_of, load, new_cache
from offload.generate import main
from offload.trace import Trace, _Event

TOKENS = torch.tensor([[5, 77, 130]])
__all__ = ["checkpoint"]


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


@pytest.mark.parametrize(
    "name",
    [
        *("staged, 2 slots", "disk into staged, 2 slots", "disk and memory into staged"),
        *("staged in parts, 2 slots", "disk and memory into staged in parts"),
    ],
)
def test_every_copy_to_a_device_is_there_and_nothing_waits_for_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    passes = 4
    with placed(monkeypatch, tiny_checkpoint, name, poison=False) as (model, device):
        trace, parts = Trace(executor_of(model)), ("",)
        if executor_of(model).placement.split:
            parts = (".self_attn", ".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")
        device.copies, device.waited_in = 0, []
        with torch.inference_mode():
            model.generate(TOKENS, max_new_tokens=passes, min_new_tokens=passes, do_sample=False)
        copies = device.copies
        assert threading.current_thread().name not in device.waited_in
        trace.write(tmp_path / "trace.json")
        described = trace.describe_links()
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    copied = [event for event in events if event["tid"] == 3]
    assert len(copied) == copies >= passes * 3 * len(parts) - 2  # two may have been queued before the trace began
    assert {event["name"] for event in copied} == {
        f"model.layers.{index}{part}" for index in range(3) for part in parts
    }
    assert [event["name"] for event in events if event["tid"] == 1][:4] == [
        *(f"model.layers.{index}" for index in range(3)),
        "head",
    ]
    assert any(event["tid"] == 2 for event in events) == ("disk" in name)
    assert "copies to the device busy" in described


@pytest.mark.parametrize("words", [{}, {"device_map": "disk", "slots": 2}], ids=["in memory", "on disk"])
def test_reads_of_keys_and_values_are_there_whether_weights_are_read_or_not(
    words: dict[str, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load(checkpoint, kv="int8", kv_memory=0, context_tokens=5000, **words)
    executor = executor_of(model)
    trace, before = Trace(executor), executor.kv_queue.reads
    logits(model, new_cache(model), *TEXT)
    with executor.kv_queue.change:
        executor.kv_queue.change.wait_for(lambda: executor.kv_queue._under_way is None)
        reads = executor.kv_queue.reads - before
        trace.close()
        assert executor.stats.bytes_read == executor.kv_queue.bytes_read > 0
        assert executor.stats.wait_seconds == executor.kv_queue.wait_seconds > 0
    trace.write(tmp_path / "trace.json")
    executor.close()
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    names = Counter(event["name"] for event in events if event["tid"] == 2)
    of_cache = [name for name in names if name.startswith("keys and values ")]
    assert len(of_cache) >= 2 * len(executor.layers)
    assert bool(set(names) - set(of_cache)) == bool(words)
    assert names.total() == reads
    assert "disk busy" in trace.describe_links()


def test_nothing_is_noted_once_it_is_closed(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with placed(monkeypatch, tiny_checkpoint, "disk into staged, 2 slots", poison=False) as (model, _), torch.no_grad():
        trace = Trace(executor_of(model))
        model(TOKENS)
        noted = {event.line for event in trace._events}
        trace.close()
        model(TOKENS)  # takes what was read and copied ahead, and asks for more
        before = len(trace._events)
        for _ in range(2):
            model(TOKENS)
    assert noted == {1, 2, 3}
    assert len(trace._events) == before


def test_the_share_of_decoding_in_which_a_link_is_busy(tiny_checkpoint: Path) -> None:
    """Between the ends of two heads, 10 seconds apart: 1 to 3, 2 to 4 and 9 to 12 are 4 of them."""
    trace = Trace(executor_of(load(tiny_checkpoint)))
    assert trace.describe_links() == "no weights moved"
    blob = executor_of(load(tiny_checkpoint)).blobs[0]
    began = trace._began
    for ended in (0.0, 10.0):
        trace._events.append(_Event("head", 1, began + ended - 1, began + ended))
    for started, ended in ((1.0, 3.0), (2.0, 4.0), (9.0, 12.0), (-5.0, -1.0)):
        trace._moved(2, blob, began + started, began + ended)
    assert trace.busy(2) == pytest.approx(0.4)
    assert trace.describe_links() == "disk busy 40% of decoding"
