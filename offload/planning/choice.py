"""The choice between placements: the fastest that keeps the budgets, decided before anything is loaded."""

from collections.abc import Iterator
from dataclasses import replace

from offload.command import format_bytes
from offload.errors import ResourceError
from offload.planning.needs import Needs
from offload.planning.placement import Placement
from offload.planning.predict import Costs, Tier, Way
from offload.planning.wishes import Wishes
from offload.planning.words import too_small

_DEPTH = 3
_DEVICE_DEPTH = 2
_MIXES = 8
"""Shares of the layers beside the device that are tried as staged, the others computed on the host."""

_SMALLER_BY = 4
"""The part of what layers take on a GPU that is given up when it runs out of memory."""

_EXPERT_ROUNDS = 2
"""Slots for experts, in those that a layer needs for a token: while some are multiplied, others are read."""


def plan(needs: Needs, wishes: Wishes | int | None, costs: Costs | None = None) -> Placement:
    """Return the placement that keeps the budgets and, as predicted from `costs`, is the fastest.

    wishes: or a budget for the process in bytes, None for no limit. Without costs the ring has as many slots as fit, at
    most three, and everything else is kept. Never streams what fits, and uses the whole GPU before it streams a byte.
    Layers go to the GPU in parts only where whole ones find no room at all. Raises ResourceError naming the smallest
    budget that would do.
    """
    if not isinstance(wishes, Wishes):
        wishes = Wishes(cpu_bytes=wishes)
    candidates: list[Placement] = []
    for ways in (_with_device, _with_device_in_parts) if wishes.gpu_word else (_without_device,):
        found = list(dict.fromkeys(ways(needs, wishes)))  # without layers on disk, rings of any depth are the same
        if (fastest := _fastest(found, costs)) is not None:
            return fastest
        candidates += found
    raise ResourceError(too_small(min(candidates, key=_shortage_bytes)))


def plan_smaller(placement: Placement, wishes: Wishes, costs: Costs | None = None) -> Placement:
    """Return the fastest placement with a smaller share on the GPU than one that did not fit there after all.

    Smaller by a slot at least, and by a quarter of what the layers take there, as each attempt moves all of them; where
    that leaves no room for a slot, with layers in parts, as little smaller as can be. Raises ResourceError if there is
    none.
    """
    held, needs = placement.layers_device_bytes, placement.needs
    budget = placement.device_bytes - max(placement.device_slot_bytes, held // _SMALLER_BY)
    mapped = 0 if wishes.layers is None else wishes.layers.count("gpu")
    for device_layers in range(mapped, -1, -1):
        try:
            return plan(needs, wishes.with_less(budget, device_layers), costs)
        except ResourceError as error:
            refused = error
    in_parts = _with_device_in_parts(needs, wishes.with_less(placement.device_bytes - 1, 0))
    if (fastest := _fastest(list(in_parts), costs)) is not None:
        return fastest
    raise ResourceError(
        f"the GPU ran out of memory with {format_bytes(placement.device_bytes)} of it planned for, and a smaller share "
        f"of the model there cannot be had ({refused}); free memory of the GPU, give a shorter context, or leave the "
        "GPU out"
    )


def _fastest(candidates: list[Placement], costs: Costs | None) -> Placement | None:
    """Return the fastest that keeps its budgets, the first of them without costs; None if none does."""
    fitting = [placement for placement in candidates if placement.fits]
    first = fitting[0] if fitting else None
    if costs is None or first is None or (set(first.tiers) in ({"host"}, {"resident"}) and not first.disk_bytes):
        return first
    return min(fitting, key=lambda placement: (placement.seconds(costs), placement.streamed_bytes))


def _shortage_bytes(placement: Placement) -> int:
    return placement.host_shortage_bytes + placement.device_shortage_bytes


def _without_device(needs: Needs, wishes: Wishes) -> Iterator[Placement]:
    """Yield what host and disk can do: everything kept; all but the embeddings; then rings, deep ones first."""
    count, budget = len(needs.layers_bytes), wishes.cpu_bytes
    on_disk = needs.embedding_bytes > 0
    host: Tier = "host"
    disk: Tier = "disk"
    tiers = (host,) * count
    if wishes.layers is not None:
        tiers = tuple(disk if device == "disk" else host for device in wishes.layers)
    whole = Placement(tiers, 0, needs, budget)
    lean = replace(whole, needs=needs.without_embedding(), embedding_on_disk=on_disk)
    if "disk" not in tiers:
        for placement in (whole, lean):
            yield placement
            if placement.fits:
                return
    if wishes.layers is not None:
        for placement in dict.fromkeys((whole, lean, _head_apart(lean))):
            for depth in _depths(wishes, placement.units_tiers.count("disk")):
                yield from _with_experts(replace(placement, depth=depth), wishes)
        return
    streamed = replace(lean, tiers=(disk,) * count)
    for depth in _depths(wishes, count):
        for placement in dict.fromkeys((streamed, _head_apart(streamed))):
            yield from _with_experts(replace(placement, depth=depth), wishes)


def _with_experts(placement: Placement, wishes: Wishes) -> Iterator[Placement]:
    """Yield the placement with more kept of what it has on disk, and the experts of layers that are there apart.

    Experts have few slots while other things are not kept, as those are read for every token, and then all that fit.
    """
    experts, layers = placement.needs.experts, []
    if experts is not None:
        layers = [at for at, tier in enumerate(placement.tiers) if tier == "disk" and experts.counts[at]]
    if experts is None or not layers:
        yield _most_kept(placement, wishes)
        return
    total = sum(experts.counts[at] for at in layers)
    placement = replace(placement, needs=placement.needs.without_experts(layers), experts_apart=tuple(layers))
    for slots in (_EXPERT_ROUNDS * experts.per_token, experts.per_token, 1):
        found = _most_kept(replace(placement, expert_slots=min(slots, total)), wishes)
        if found.budget_bytes is not None:
            more = max(0, found.budget_bytes - found.expected_bytes) // experts.expert_bytes
            found = replace(found, expert_slots=min(total, found.expert_slots + more))
        yield found


def _most_kept(placement: Placement, wishes: Wishes) -> Placement:
    """Return a placement of layers on disk, as deep a ring and as many layers and blocks kept as fit, spread evenly."""
    if wishes.layers is not None:
        return placement
    assert placement.budget_bytes is not None, "without one everything fits"
    count, layers = len(placement.units_tiers), len(placement.tiers)
    most = count if placement.experts_apart else count - 1  # if all of them could be, they would be

    def keeping(kept: int) -> Placement:
        tiers = _arranged(count, 0, count - kept, 0, "host", wishes)
        depth = min(placement.depth, count - kept)
        return replace(placement, tiers=tiers[:layers], head_tiers=tiers[layers:], depth=depth)

    room = placement.budget_bytes - keeping(0).expected_bytes
    kept = max(0, min(room // max(placement.units_bytes), most))
    while kept < most and keeping(kept + 1).fits:
        kept += 1
    return keeping(kept)


def _head_apart(placement: Placement) -> Placement:
    """Return the placement with every block of the head on disk, if it can be."""
    blocks: list[Tier] = ["disk"] * len(placement.needs.head_blocks_bytes)
    return replace(placement, needs=placement.needs.without_head(), head_tiers=tuple(blocks)) if blocks else placement


def _with_device(needs: Needs, wishes: Wishes) -> Iterator[Placement]:
    """Yield placements that fill the GPU, and differ in what becomes of the other layers.

    Layers are copied there into two slots, one while the other is computed from. One slot, without that overlap, comes
    last: it leaves room for a layer more, and may be all that there is room for.
    """
    yield from _with_device_slots(needs, wishes, _DEVICE_DEPTH)
    yield from (placement for placement in _with_device_slots(needs, wishes, 1) if placement.device_depth)


def _with_device_in_parts(needs: Needs, wishes: Wishes) -> Iterator[Placement]:
    """Yield those that copy layers to the GPU, in parts; none if the model has none."""
    for depth in (_DEVICE_DEPTH, 1) if needs.split is not None else ():
        found = _with_device_slots(needs, wishes, depth, split=True)
        yield from (placement for placement in found if placement.device_depth)


def _with_device_slots(needs: Needs, wishes: Wishes, device_depth: int, split: bool = False) -> Iterator[Placement]:
    ways: list[tuple[Way, float]] = [("host", 0.0), ("mapped", 0.0), ("staged", 1.0)]
    ways += [("host", share / _MIXES) for share in range(1, _MIXES)]
    for way, staged_share in ways:
        for depth in _depths(wishes, len(needs.layers_bytes)):
            placement = _filled(needs, wishes, way, staged_share, depth, device_depth, split)
            if placement.uses_device and (placement.device_depth or not staged_share):  # else it is no mix at all
                yield placement


def _filled(
    needs: Needs, wishes: Wishes, way: Way, staged_share: float, depth: int, device_depth: int, split: bool
) -> Placement:
    """Return the placement with the most layers on the GPU, then the fewest on disk, whether it fits or not."""
    count = len(needs.layers_bytes)

    def with_layers(resident: int, on_disk: int) -> Placement:
        staged = round(staged_share * (count - resident - on_disk))
        tiers = _arranged(count, resident, on_disk, staged, way, wishes)
        copied = tiers.count("staged") + (tiers.count("disk") if way == "staged" else 0)
        slots, device_slots = min(depth, tiers.count("disk")), min(device_depth, copied)
        return Placement(tiers, slots, needs, wishes.cpu_bytes, device_slots, wishes.gpu_bytes, way, split=split)

    def fewest_on_disk(resident: int) -> int:
        if wishes.layers is not None:
            return 0  # the map says which
        others = count - resident
        return next(
            (number for number in range(others) if not with_layers(resident, number).host_shortage_bytes), others
        )

    wished = _wished_resident(needs, wishes)
    if wished is not None:
        return with_layers(wished, fewest_on_disk(wished))
    fitting = (number for number in range(count, -1, -1) if not with_layers(number, 0).device_shortage_bytes)
    resident = next(fitting, 0)
    found = with_layers(resident, fewest_on_disk(resident))
    while resident < count:  # what went to disk may have made room on the GPU
        resident += 1
        larger = with_layers(resident, fewest_on_disk(resident))
        if not larger.fits:
            break
        found = larger
    return found


def _wished_resident(needs: Needs, wishes: Wishes) -> int | None:
    """Return how many layers are to be on the GPU, None to choose."""
    count = len(needs.layers_bytes)
    if wishes.layers is not None:
        return wishes.layers.count("gpu")
    if wishes.gpu_layers is not None:
        return count if wishes.gpu_layers < 0 else min(wishes.gpu_layers, count)
    if wishes.gpu_percent is not None:
        return int(count * wishes.gpu_percent / 100)
    if wishes.cpu_offload_bytes is not None:
        return max(0, count - -(-wishes.cpu_offload_bytes // max(needs.layers_bytes)))
    return None


def _depths(wishes: Wishes, count: int) -> range:
    """Return the depths of the ring that are to be tried, deepest first."""
    most = min(wishes.slots or _DEPTH, count)
    return range(most, most - 1 if wishes.slots or not count else 0, -1)


def _arranged(count: int, resident: int, on_disk: int, staged: int, way: Way, wishes: Wishes) -> tuple[Tier, ...]:
    """Return tiers with `resident` layers on the GPU, `on_disk` there, `staged`, and the others computed by `way`.

    Each kind is spread evenly between the slower ones, so that links have the time of the layers between for every
    transfer, or comes before them if that is wished. A device map is followed to the letter.
    """
    tiers: list[Tier] = ["disk"] * count

    def put(tier: Tier, places: list[int]) -> None:
        for place in places:
            tiers[place] = tier

    if wishes.layers is None:
        on_device = _some(list(range(count)), resident, wishes.sequential)
        others = [place for place in range(count) if place not in set(on_device)]
        kept = _some(others, len(others) - on_disk, wishes.sequential)
    else:
        on_device = [place for place, device in enumerate(wishes.layers) if device == "gpu"]
        kept = [place for place, device in enumerate(wishes.layers) if device == "cpu"]
    put("resident", on_device)
    put(way, kept)
    put("staged", _some(kept, min(staged, len(kept)), wishes.sequential))
    return tuple(tiers)


def _some(places: list[int], number: int, first: bool) -> list[int]:
    """Return `number` of the places: the first, or evenly spread."""
    return places[:number] if first else [places[index * len(places) // number] for index in range(number)]
