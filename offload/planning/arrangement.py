"""Placements of one kind, by name: what is tried tier by tier, to be timed or to be compared."""

from dataclasses import replace

from offload.planning.placement import Placement
from offload.planning.predict import Tier, Way

_SLOTS = 2

IN_PARTS = " in parts"
"""What the names of arrangements end in whose layers go to the device in parts."""

ARRANGEMENTS: dict[str, tuple[tuple[Tier, ...], Way]] = {
    "resident": (("resident",), "host"),
    "half staged": (("resident", "staged"), "host"),
    "staged": (("staged",), "host"),
    "staged in parts": (("staged",), "host"),
    "mapped": (("mapped",), "mapped"),
    "host": (("host",), "host"),
    "disk to host": (("disk",), "host"),
    "disk to staged": (("disk",), "staged"),
    "disk to staged in parts": (("disk",), "staged"),
    "disk to mapped": (("disk",), "mapped"),
}
"""The tiers that the layers take in turn, and what becomes of those that come from disk."""

WITHOUT_A_DEVICE = ("host", "disk to host")


def arranged(placement: Placement, name: str, slots: int = _SLOTS) -> Placement:
    """Return a placement whose layers take the tiers of a name in ARRANGEMENTS, through rings of `slots`.

    What surrounds the layers stays where it is, and budgets are not looked at. Layers that have no parts go whole.
    """
    pattern, way = ARRANGEMENTS[name]
    tiers = tuple(pattern[at % len(pattern)] for at in range(len(placement.tiers)))
    depth, from_disk = min(slots, len(tiers)), "disk" in tiers
    staged = "staged" in tiers or (from_disk and way == "staged")
    return replace(
        placement,
        tiers=tiers,
        way=way,
        depth=depth if from_disk else 0,
        device_depth=depth if staged else 0,
        split=name.endswith(IN_PARTS) and placement.needs.split is not None,
    )
