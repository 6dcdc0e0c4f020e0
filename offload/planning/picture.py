"""A plan as a picture: where every layer lives, and what fills the memory that it was given."""

from collections.abc import Sequence

from offload.command import format_bytes
from offload.drawing import FAINT, INK, WIDTH, box, document, heading, line, text
from offload.planning.forecast import Prediction
from offload.planning.placement import Placement
from offload.planning.predict import Tier
from offload.planning.words import Part, parts_in_memory, parts_on_device

_LEFT, _RIGHT = 20, WIDTH - 20
_COLOURS: dict[Tier, str] = {
    "resident": "#1a365d",
    "staged": "#2b6cb0",
    "mapped": "#6b46c1",
    "host": "#2f855a",
    "disk": "#c05621",
}
_GREYS = ("#8a94a0", "#a5aeb8", "#bdc5cd", "#d3d9df")
_WORDS: dict[Tier, str] = {
    "resident": "on the GPU",
    "staged": "copied to the GPU for each pass",
    "mapped": "read by the GPU across the bus",
    "host": "in memory",
    "disk": "read from disk for each pass",
}


def draw_plan(name: str, placement: Placement, prediction: Prediction) -> str:
    """Return the plan for the checkpoint of that name as an SVG file."""
    within = "" if placement.budget_bytes is None else f" within {format_bytes(placement.budget_bytes)} of memory"
    speed = f"predicted {prediction.decode_tokens_per_second:.1f} tokens/s, bound by {prediction.bound}"
    drawn = [heading(30, f"{name}{within}", speed)]
    y = _draw_layers(drawn, placement, 84)
    y = _draw_memory(
        drawn, "memory of the process", parts_in_memory(placement), placement.expected_bytes, placement.budget_bytes, y
    )
    if placement.uses_device:
        parts = parts_on_device(placement)
        y = _draw_memory(drawn, "memory of the GPU", parts, placement.device_bytes, placement.device_budget_bytes, y)
    return document(y - 12, drawn)


def _draw_layers(drawn: list[str], placement: Placement, y: float) -> float:
    """Draw a box for every layer, forty in a row, and a key; return where the next begins."""
    tiers, sizes = placement.tiers, placement.layers_bytes
    columns = min(len(tiers), 40)
    step = (_RIGHT - _LEFT) / columns
    drawn.append(text(_LEFT, y, f"{len(tiers)} layers"))
    y += 10
    for at, (tier, nbytes) in enumerate(zip(tiers, sizes, strict=True)):
        x, top = _LEFT + at % columns * step, y + at // columns * 30
        title = f"layer {at}: {format_bytes(nbytes)}, {_WORDS[tier]}"
        drawn.append(box(x + 1, top, step - 2, 26, _COLOURS[tier], title))
        drawn.append(text(x + step / 2, top + 17, str(at), anchor="middle", size=11, colour="#ffffff"))
    y += -(-len(tiers) // columns) * 30 + 14
    x = float(_LEFT)
    for tier, colour in _COLOURS.items():
        if tier not in tiers:
            continue
        nbytes = sum(n for n, t in zip(sizes, tiers, strict=True) if t == tier)
        words = f"{tiers.count(tier)} {_WORDS[tier]}, {format_bytes(nbytes)}"
        width = 40 + 6.7 * len(words)
        if x + width > _RIGHT:
            x, y = float(_LEFT), y + 20
        drawn += [box(x, y - 10, 11, 11, colour, words), text(x + 17, y, words)]
        x += width
    return y + 40


def _draw_memory(
    drawn: list[str], name: str, parts: Sequence[Part], total_bytes: int, budget_bytes: int | None, y: float
) -> float:
    """Draw a bar of what fills a memory, the budget as a line across it, and a key; return where the next begins."""
    of = "" if budget_bytes is None else f" of {format_bytes(budget_bytes)}"
    drawn.append(text(_LEFT, y, f"{name}: {format_bytes(total_bytes)}{of}"))
    y += 10
    scale = (_RIGHT - _LEFT) / max(total_bytes, budget_bytes or 0)
    drawn.append(box(_LEFT, y, _RIGHT - _LEFT, 30, FAINT, "free"))
    greys, x, keys = iter(_GREYS * 2), float(_LEFT), []
    for part in (part for part in parts if part.nbytes):
        colour = next(greys) if part.tier is None else _COLOURS[part.tier]
        words = f"{part.what}: {format_bytes(part.nbytes)}"
        drawn.append(box(x, y, part.nbytes * scale, 30, colour, words))
        keys.append((colour, words))
        x += part.nbytes * scale
    if budget_bytes is not None:
        drawn.append(line(_LEFT + budget_bytes * scale, y - 4, y + 34, INK, dashed=True))
    y += 52
    rows = -(-len(keys) // 2)
    for at, (colour, words) in enumerate(keys):
        left, top = _LEFT + at // rows * (WIDTH / 2), y + at % rows * 20
        drawn += [box(left, top - 10, 11, 11, colour, words), text(left + 17, top, words)]
    return y + rows * 20 + 22
