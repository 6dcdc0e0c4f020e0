"""A plan as a picture: a box for every layer in its tier's colour, and bars whose parts are the plan's own."""

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from offload.planning import picture
from offload.planning.forecast import Prediction
from offload.planning.needs import Needs
from offload.planning.picture import draw_plan
from offload.planning.placement import Placement
from offload.planning.words import parts_in_memory, parts_on_device

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20
NEEDS = Needs(400 * MIB, 50 * MIB, 40 * MIB, 30 * MIB, (20 * MIB,) * 45, device_runtime_bytes=300 * MIB)
PREDICTION = Prediction(12.34, 11.0, 300.0, "reading from disk", 0.9, {})
PLACEMENTS = {
    "without a GPU": Placement(("host", "disk", "disk") * 15, 2, NEEDS, 1000 * MIB),
    "with one": Placement(
        ("resident", "staged", "mapped", "host", "disk") * 9, 2, NEEDS, 2000 * MIB, 2, None, "staged"
    ),
}


def boxes(svg: str) -> list[tuple[str, str, float]]:
    """What every box says, its colour and its width."""
    found = []
    for item in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if (title := item.find(f"{SVG}title")) is not None:
            found.append((title.text or "", item.attrib["fill"], float(item.attrib["width"])))
    return found


@pytest.mark.parametrize("name", list(PLACEMENTS))
def test_every_layer_has_a_box_in_the_colour_of_its_tier(name: str) -> None:
    placement = PLACEMENTS[name]
    drawn = [(title, fill) for title, fill, _ in boxes(draw_plan("a <b>", placement, PREDICTION))]
    layers = [(title, fill) for title, fill in drawn if title.startswith("layer ")]
    assert [fill for _, fill in layers] == [picture._COLOURS[tier] for tier in placement.tiers]
    words = [f"layer {at}: 20.0 MiB, {picture._WORDS[tier]}" for at, tier in enumerate(placement.tiers)]
    assert [title for title, _ in layers] == words
    for tier, count in Counter(placement.tiers).items():
        assert (f"{count} {picture._WORDS[tier]}, {count * 20 / (1 if count * 20 < 1024 else 1024):.1f} MiB") in dict(
            drawn
        )


@pytest.mark.parametrize("name", list(PLACEMENTS))
def test_the_parts_of_the_bars_are_those_of_the_plan_and_in_proportion(name: str) -> None:
    placement = PLACEMENTS[name]
    svg = draw_plan("a <b>", placement, PREDICTION)
    bars = [(parts_in_memory(placement), placement.expected_bytes, placement.budget_bytes)]
    if placement.uses_device:
        bars.append((parts_on_device(placement), placement.device_bytes, None))
    widths = Counter((title, round(width, 2)) for title, _, width in boxes(svg))
    for parts, total, budget in bars:
        assert sum(part.nbytes for part in parts) == total
        scale = (picture._RIGHT - picture._LEFT) / max(total, budget or 0)
        for part in parts:
            title = f"{part.what}: {part.nbytes / MIB:.1f} MiB"
            assert not part.nbytes or widths[title, round(part.nbytes * scale, 2)] == 1, title
    texts = [item.text or "" for item in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert texts[0].startswith("a <b> within ")
    assert texts[1] == "predicted 12.3 tokens/s, bound by reading from disk"
    assert ("memory of the GPU" in svg) == placement.uses_device


def test_nothing_is_drawn_outside() -> None:
    for placement in PLACEMENTS.values():
        svg = draw_plan("model", placement, PREDICTION)
        width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
        for item in ElementTree.fromstring(svg).iter():
            if item.tag in (f"{SVG}rect", f"{SVG}text") and "x" in item.attrib:
                right = float(item.attrib["x"]) + float(item.attrib.get("width", 6 * len(item.text or "")))
                right = float(item.attrib["x"]) if item.attrib.get("text-anchor") == "middle" else right
                assert right <= width
                assert float(item.attrib["y"]) + float(item.attrib.get("height", 0)) <= height
