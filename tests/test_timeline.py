"""A trace as a picture: what is drawn lies where it happened, and as long."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from eval import timeline
from eval.timeline import Event, draw, main, read_trace

SVG = "{http://www.w3.org/2000/svg}"


def x_event(name: str, line: int, started_ms: float, ended_ms: float, **more: Any) -> dict[str, Any]:
    times = {"ts": started_ms * 1e3, "dur": (ended_ms - started_ms) * 1e3}
    return {"name": name, "ph": "X", "pid": 1, "tid": line, "args": more, **times}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three passes of 10 ms: layer 0 is kept, layer 1 is read in the 4 ms before its turn."""
    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": line, "args": {"name": name}}
        for line, name in ((1, "compute"), (2, "disk"))
    ]
    events = []
    for start in (0.0, 10.0, 20.0):
        events += [
            x_event("model.layers.0", 1, start, start + 2),
            x_event("model.layers.1", 2, start + 1, start + 5, bytes=8_000_000),
            x_event("model.layers.1", 1, start + 5, start + 7),
            x_event("head", 1, start + 7, start + 10),
        ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": names + events}))
    return path


def boxes(svg: str) -> dict[str, list[tuple[float, float]]]:
    """What every rectangle says, and where each of them begins and how wide it is."""
    found: dict[str, list[tuple[float, float]]] = {}
    for item in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if (title := item.find(f"{SVG}title")) is not None:
            found.setdefault(title.text or "", []).append((float(item.attrib["x"]), float(item.attrib["width"])))
    return found


def test_everything_lies_where_it_happened(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trace), "--output", str(tmp_path / "trace.svg"), "--passes", "1"]) == 0
    assert f"{tmp_path / 'trace.svg'} written" in capsys.readouterr().err
    svg = (tmp_path / "trace.svg").read_text()
    scale = (timeline._RIGHT - timeline._LEFT) / 10  # pixels a millisecond
    found = boxes(svg)
    for title, (started, took) in {
        "model.layers.0: compute, 2.000 ms": (0, 2),
        "model.layers.1: disk, 4.000 ms, 8.00 MB at 2.00 GB/s": (1, 4),
        "model.layers.1: compute, 2.000 ms": (5, 2),
        "head: compute, 3.000 ms": (7, 3),
    }.items():
        assert found[title] == [pytest.approx((timeline._LEFT + started * scale, took * scale), abs=0.01)]
    texts = [item.text for item in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "one token in 10.0 ms" in texts
    assert "compute busy 70% of it; disk busy 40% of it, 0.80 GB/s" in texts
    assert {"compute", "disk", "0 ms", "10 ms"} <= set(texts)


def test_what_moves_has_another_colour_than_what_stays_and_two_passes_are_two(trace: Path) -> None:
    svg = draw(read_trace(trace), 2, "trace")
    assert "2 tokens in 20.0 ms, 100.0 tokens/s" in svg
    assert len(boxes(svg)["head: compute, 3.000 ms"]) == 2
    colours = {
        (item.find(f"{SVG}title").text or "").partition(",")[0]: item.attrib["fill"]  # type: ignore[union-attr]
        for item in ElementTree.fromstring(svg).iter(f"{SVG}rect")
        if item.find(f"{SVG}title") is not None
    }
    assert colours["model.layers.0: compute"] in timeline._KEPT
    assert colours["model.layers.1: compute"] == colours["model.layers.1: disk"]
    assert colours["model.layers.1: compute"] in timeline._MOVED


def test_a_layer_that_moves_in_parts_has_the_colour_of_what_moves() -> None:
    events = [
        Event("compute", "head", 0, 1),
        Event("bus", "model.layers.1.mlp.up_proj", 1, 2, 1_000_000),
        Event("compute", "model.layers.1", 2, 3),
        Event("compute", "model.layers.10", 3, 4),
        Event("compute", "head", 4, 5),
    ]
    svg = draw(events, 1, "trace")
    colours = {
        (title.text or "").partition(":")[0]: item.attrib["fill"]
        for item in ElementTree.fromstring(svg).iter(f"{SVG}rect")
        if (title := item.find(f"{SVG}title")) is not None
    }
    assert colours["model.layers.1"] in timeline._MOVED
    assert colours["model.layers.10"] in timeline._KEPT


def test_what_began_before_the_first_pass_that_is_drawn_is_cut() -> None:
    events = [
        Event("compute", "head", 0, 10),
        Event("disk", "model.layers.0", 5, 15, 10_000_000),
        Event("compute", "head", 15, 20),
    ]
    svg = draw(events, 1, "trace")
    width = timeline._RIGHT - timeline._LEFT
    assert boxes(svg)["model.layers.0: disk, 10.000 ms, 10.00 MB at 1.00 GB/s"] == [(timeline._LEFT, width / 2)]
    assert "disk busy 50% of it, 0.50 GB/s" in svg


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"traceEvents": [{"ph": "X"}]}'])
def test_what_is_no_trace_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    assert main([str(path), "--output", str(tmp_path / "trace.svg")]) == 3
    said = capsys.readouterr().err
    assert said == f"error: {path}: no trace; `python -m offload.generate --trace FILE` writes one\n"
    assert not (tmp_path / "trace.svg").exists()


def test_files_and_passes_that_are_not_there_are_said(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "trace.svg")]
    assert main([str(tmp_path / "none"), *output]) == 3
    assert f"error: {tmp_path / 'none'}: cannot be read" in capsys.readouterr().err
    assert main([str(trace), *output, "--passes", "3"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: --passes 3: {trace} holds 2 after the first; generate more tokens\n"
    assert main([str(trace), "--output", str(tmp_path / "missing" / "trace.svg")]) == 4
    assert "trace.svg: cannot be written (No such file or directory)" in capsys.readouterr().err
