"""One page for a checkpoint: its figures are those of the files, its pictures whole, and it loads nothing."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file

from eval import ppl, report
from eval.report_facts import cut_name
from eval.svg import Mark, bars, heat_map, parts
from offload.checkpoint import Checkpoint
from quant import awq
from tests.test_walk import awq_flags

Capture = pytest.CaptureFixture[str]
PROTOCOL = ["--window", "128", "--limit-windows", "4"]


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales, clipped ranges and two widths: all that there is to report."""
    output = tmp_path_factory.mktemp("mixed") / "a <b> & c"
    assert awq.main(awq_flags(tiny_model, calibration_text, output, "--asymmetric", "--target-bits", "6")) == 0
    return output


def test_the_figures_are_those_of_the_files(mixed: Path, tiny_model: Path, capsys: Capture) -> None:
    assert report.main([str(mixed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    checkpoint = Checkpoint.open(mixed)
    manifest, run = (json.loads((mixed / name).read_text()) for name in ("manifest.json", "run.json"))
    assert (found["recipe"], found["layers"]) == (manifest["recipe"], manifest["layer_errors"])
    assert (found["run"], found["accuracy"], found["name"]) == (run, None, "a <b> & c")
    assert run["source_bytes"] == sum(t.nbytes for t in load_file(tiny_model / "model.safetensors").values())
    assert run["layers"] == 3
    assert run["peak_memory_bytes"] > 1 << 20
    tensors = {name: t for blob in checkpoint.blobs for name, t in load_file(blob.path).items()}
    by_part = Counter[str]()
    for name, tensor in tensors.items():
        by_part[name.rpartition(".")[2]] += tensor.nbytes
    assert found["sizes"]["codes"] == by_part["weight_packed"]
    assert found["sizes"]["scales"] == by_part["weight_scale"]
    assert found["sizes"]["zero points"] == by_part["weight_zero_point"]
    assert sum(found["sizes"].values()) == checkpoint.nbytes
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert sum(linear["weights"] for linear in found["linears"]) == weights
    packed = sum(by_part[part] for part in ("weight_packed", "weight_scale", "weight_zero_point"))
    assert found["bits_per_weight"] == pytest.approx(8 * packed / weights)
    wide = {f"{linear['layer']}.{linear['name']}" for linear in found["linears"] if linear["bits"] == 8}
    assert wide == set(checkpoint.recipe.wide)
    assert len(found["sensitivity"]) == 4 * 3
    assert {name for one in found["sensitivity"] for name in one["linears"]} >= wide
    for layer in found["layers"].values():
        assert len(layer["chosen"]["ranges"]) == 7
        assert layer["chosen"]["scales"]


def test_the_page_shows_it_and_loads_nothing(mixed: Path, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "report.html"
    assert report.main([str(mixed), "--html", str(page)]) == 0
    assert f"{page} written" in capsys.readouterr().err
    text = page.read_text()
    assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|\bhref=|url\(|@import|https?:", text)
    assert text.count("<title>a &lt;b&gt; &amp; c</title>") == 1
    assert "<b>" not in text
    root = ElementTree.fromstring(text.partition("\n")[2].replace('<meta charset="utf-8">', "").replace(VIEWPORT, ""))
    titles = [element.text or "" for element in root.iter("h2")]
    assert titles == [
        "Error of every layer",
        "Bits",
        "Sensitivity",
        "Clipping",
        "Scales",
        "Bytes",
        "Recipe",
        "Layers",
    ]
    pictures = list(root.iter("svg"))
    marks = [
        [mark.findtext("title") for mark in picture.iter("rect") if mark.find("title") is not None]
        for picture in pictures
    ]
    assert [len(each) for each in marks] == [3, 21, 21, 21, 5]
    manifest = json.loads((mixed / "manifest.json").read_text())
    for index, said in enumerate(marks[0]):
        layer = manifest["layer_errors"][f"model.layers.{index}"]
        assert f"{layer['error'] / layer['rtn_error']:.3f} of round-to-nearest's" in str(said)
    assert sum("8 bits" in str(said) for said in marks[1]) == len(manifest["recipe"]["wide"])
    assert sum("8 bits" in str(said) for said in marks[2]) == len(manifest["recipe"]["wide"])
    assert len(list(pictures[2].iter("rect"))) == 21
    assert sum(mark.get("stroke") is not None for mark in pictures[2].iter("rect")) == len(manifest["recipe"]["wide"])


def test_the_picture_stands_alone_and_shows_the_same(mixed: Path, tmp_path: Path, capsys: Capture) -> None:
    picture = tmp_path / "report.svg"
    assert report.main([str(mixed), "--picture", str(picture)]) == 0
    assert f"{picture} written" in capsys.readouterr().err
    drawn = picture.read_text()
    assert "var(" not in drawn
    root = ElementTree.fromstring(drawn)
    said = [title.text or "" for title in root.iter(f"{SVG}title")]
    manifest = json.loads((mixed / "manifest.json").read_text())
    for index in range(3):
        layer = manifest["layer_errors"][f"model.layers.{index}"]
        assert f"model.layers.{index}: {layer['error'] / layer['rtn_error']:.3f} of round-to-nearest's" in said[index]
    assert sum("of the range kept" in one for one in said) == 21
    texts = [item.text or "" for item in root.iter(f"{SVG}text")]
    assert texts[:3] == ["a <b> & c", "4 bits, asymmetric, groups of 32", "method: AWQ"]
    height = float(root.get("height", ""))
    bottoms = [float(place) for place in re.findall(r"translate\(20\.0 ([\d.]+)\)", drawn)]
    assert len(bottoms) == 2
    assert max(bottoms) < height


def test_a_picture_without_records_is_of_the_figures_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert report.main([str(tiny_checkpoint), "--picture", str(tmp_path / "report.svg")]) == 0
    drawn = (tmp_path / "report.svg").read_text()
    assert ">bits: 4.500 a weight</text>" in drawn
    assert "error of every layer" not in drawn
    assert "translate(" not in drawn


SVG = "{http://www.w3.org/2000/svg}"
VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'


def test_measured_it_says_what_eval_ppl_says(
    mixed: Path, calibration_text: Path, tmp_path: Path, capsys: Capture
) -> None:
    page, text = tmp_path / "report.html", ["--text", str(calibration_text)]
    assert report.main([str(mixed), "--measure", *text, *PROTOCOL, "--html", str(page), "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert ppl.main(["--model", str(mixed), *text, *PROTOCOL, "--baseline", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert accuracy["rise"] == pytest.approx(expected["nll_rise"])
    assert accuracy["rise_stderr"] == pytest.approx(expected["nll_rise_stderr"])
    assert accuracy["checkpoint"]["kl"] > 0
    assert 0 < accuracy["checkpoint"]["top1"] < 1
    content = page.read_text()
    assert "Accuracy, window by window" in content
    assert f"{accuracy['rise']:.4f} ± {accuracy['rise_stderr']:.4f}" in content
    for before, after in zip(expected["baseline"]["window_nll"], expected["window_nll"], strict=True):
        assert f"nll {before:.4f} became {after:.4f}" in content


def test_a_checkpoint_without_records_has_a_report(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare)
    (bare / "run.json").unlink()
    assert report.main([str(bare), "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "method       RTN  4 bits, symmetric, groups of 32" in said
    assert "bits         4.500 a weight" in said
    assert "peak memory" not in said
    assert "Error of every layer" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", '{"seconds": 1}', "run.json: expected the numbers cpu_seconds, layers, peak_memory_bytes, "),
        ("run.json", "[", "run.json: not valid JSON"),
        ("sensitivity.json", "[{}]", "sensitivity.json: not a record of sensitivities ('linears')"),
    ],
)
def test_a_damaged_record_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture, name: str, content: str, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    (copy / name).write_text(content)
    assert report.main([str(copy)]) == 3
    assert message in capsys.readouterr().err


def test_a_page_that_cannot_be_written(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    assert report.main([str(tiny_checkpoint), "--html", str(tmp_path / "none" / "page.html")]) == 4
    assert "page.html: cannot be written (No such file or directory)" in capsys.readouterr().err
    assert report.main([str(tiny_checkpoint), "--picture", str(tmp_path / "none" / "picture.svg")]) == 4
    assert "--picture" in capsys.readouterr().err


def test_a_linear_is_cut_behind_its_layer() -> None:
    assert cut_name("model.layers.12.mlp.experts.3.up_proj") == ("model.layers.12", "mlp.experts.3.up_proj")
    assert cut_name("h.0.attn.c") == ("h.0", "attn.c")


def test_pictures_are_to_scale() -> None:
    marks = {"a": Mark(1.0, "one"), "b": Mark(2.0, "<two>", loud=True), "c": Mark(0.0, "none")}
    heights = [float(bar.get("height", "")) for bar in ElementTree.fromstring(bars(marks, 2.0).inline()).iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1)
    assert heights[2] == 0
    assert "&lt;two&gt;" in bars(marks).inline()
    assert ElementTree.fromstring(bars({}).inline()).tag == "svg"
    widths = [float(part.get("width", "")) for part in ElementTree.fromstring(parts(marks).inline()).iter("rect")]
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)
    cells = {("up", "0"): Mark(0.0, "low"), ("up", "1"): Mark(1.0, "high")}
    shades = [
        float(cell.get("fill-opacity", ""))
        for cell in ElementTree.fromstring(heat_map(["up", "down"], ["0", "1"], cells).inline()).iter("rect")
    ]
    assert shades == [pytest.approx(0.08), pytest.approx(1.0)]
