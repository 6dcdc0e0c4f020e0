"""Where every layer lives: decided from sizes, budgets and the speed of the links before anything is loaded.

Without a GPU a decoder layer is either on the `host`, in memory for good, or on `disk`, read into a ring of slots for
each pass. With one it is `resident` there, `staged` (copied from pinned memory into a ring on the device), `mapped`
(read across the bus by the kernel), computed on the `host`, or on `disk` and then one of the last three. Embeddings,
norms and head are on the device if any layer is. A budget is one for the whole process, Python and the libraries in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from offload.command import format_bytes
from offload.errors import ResourceError
from offload.planning.needs import Needs
from offload.planning.predict import Costs, Tier, Way, walk
from offload.planning.wishes import Wishes

_DEPTH = 3
_DEVICE_DEPTH = 2
_MIXES = 8
"""Shares of the layers beside the device that are tried as staged, the others computed on the host."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The tier of every decoder layer, the depth of the ring for those on disk, and what all of it takes.

    needs: of what is in memory, so without the embeddings if they are on disk. device_depth: slots on the GPU for what
    is copied there. way: what becomes of a layer that was read from disk.
    """

    tiers: tuple[Tier, ...]
    depth: int
    needs: Needs
    budget_bytes: int | None
    device_depth: int = 0
    device_budget_bytes: int | None = None
    way: Way = "host"
    embedding_on_disk: bool = False

    @property
    def uses_device(self) -> bool:
        """Whether any layer is computed on a GPU."""
        return any(how != "host" for how in self.hows)

    @property
    def hows(self) -> tuple[Tier, ...]:
        """How every layer is computed: its tier, or for those on disk what becomes of them."""
        return tuple(self.way if tier == "disk" else tier for tier in self.tiers)

    def bytes_in(self, *tiers: Tier) -> int:
        """Return the bytes of the layers in these tiers."""
        return sum(n for n, tier in zip(self.needs.layers_bytes, self.tiers, strict=True) if tier in tiers)

    @property
    def disk_bytes(self) -> int:
        """Bytes that one pass over the model reads from disk."""
        return self.bytes_in("disk")

    @property
    def slots_bytes(self) -> int:
        """Bytes of the ring in host memory."""
        return self.depth * max(self.needs.layers_bytes) if self.disk_bytes else 0

    @property
    def host_cache_bytes(self) -> int:
        """Keys and values of the layers that are computed on the host."""
        return self.needs.cache_bytes * self.hows.count("host") // len(self.tiers)

    @property
    def expected_bytes(self) -> int:
        """The process's peak, as planned."""
        needs = self.needs
        fixed = 0 if self.uses_device else needs.fixed_bytes
        layers = self.bytes_in("host", "staged", "mapped")
        return needs.runtime_bytes + fixed + self.host_cache_bytes + needs.working_bytes + layers + self.slots_bytes

    @property
    def device_bytes(self) -> int:
        """The peak on the GPU, as planned."""
        if not self.uses_device:
            return 0
        needs = self.needs
        around = needs.device_runtime_bytes + needs.fixed_bytes + needs.cache_bytes - self.host_cache_bytes
        ring = self.device_depth * max(needs.layers_bytes)
        return around + needs.working_bytes + self.bytes_in("resident") + ring

    @property
    def device_shortage_bytes(self) -> int:
        """What its budget on the GPU lacks."""
        return 0 if self.device_budget_bytes is None else max(0, self.device_bytes - self.device_budget_bytes)

    @property
    def host_shortage_bytes(self) -> int:
        """What its budget for the process lacks."""
        return 0 if self.budget_bytes is None else max(0, self.expected_bytes - self.budget_bytes)

    @property
    def fits(self) -> bool:
        """Whether it keeps its budgets."""
        return not (self.host_shortage_bytes or self.device_shortage_bytes)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross a link in every pass."""
        return self.bytes_in("disk", "staged", "mapped")

    def seconds(self, costs: Costs) -> float:
        """Return what a pass takes."""
        return walk(self.tiers, costs, self.depth, self.device_depth, self.way).seconds


def plan(needs: Needs, wishes: Wishes | int | None, costs: Costs | None = None) -> Placement:
    """Return the placement that keeps the budgets and, as predicted from `costs`, is the fastest.

    wishes: or a budget for the process in bytes, None for no limit. Without costs the ring has as many slots as fit, at
    most three, and everything else is kept. Never streams what fits, and uses the whole GPU before it streams a byte.
    Raises ResourceError naming the smallest budget that would do.
    """
    if not isinstance(wishes, Wishes):
        wishes = Wishes(cpu_bytes=wishes)
    found = _with_device(needs, wishes) if wishes.gpu_word else _without_device(needs, wishes)
    candidates = list(dict.fromkeys(found))  # without layers on disk, rings of any depth are the same
    fitting = [placement for placement in candidates if placement.fits]
    if not fitting:
        raise ResourceError(_too_small(min(candidates, key=_shortage_bytes)))
    if costs is None or set(fitting[0].tiers) in ({"host"}, {"resident"}):
        return fitting[0]
    return min(fitting, key=lambda placement: (placement.seconds(costs), placement.streamed_bytes))


def _shortage_bytes(placement: Placement) -> int:
    return placement.host_shortage_bytes + placement.device_shortage_bytes


def _without_device(needs: Needs, wishes: Wishes) -> Iterator[Placement]:
    """Yield what host and disk can do: everything kept; all but the embeddings; then rings, deep ones first."""
    count, largest, budget = len(needs.layers_bytes), max(needs.layers_bytes), wishes.cpu_bytes
    lean, on_disk = needs.without_embedding(), needs.embedding_bytes > 0
    if wishes.layers is not None:
        tiers: tuple[Tier, ...] = tuple("disk" if device == "disk" else "host" for device in wishes.layers)
        for depth in _depths(wishes, tiers.count("disk")):
            yield Placement(tiers, depth, needs, budget)
        for depth in _depths(wishes, tiers.count("disk")):
            yield Placement(tiers, depth, lean, budget, embedding_on_disk=on_disk)
        return
    host: Tier = "host"
    kept_whole = (host,) * count
    for placement in (
        Placement(kept_whole, 0, needs, budget),
        Placement(kept_whole, 0, lean, budget, embedding_on_disk=on_disk),
    ):
        yield placement
        if placement.fits:
            return
    assert budget is not None, "without one everything fits"
    for depth in _depths(wishes, count):
        kept = max(0, min((budget - lean.around_bytes - depth * largest) // largest, count - 1))
        tiers = _arranged(count, 0, count - kept, 0, "host", wishes)
        yield Placement(tiers, min(depth, count - kept), lean, budget, embedding_on_disk=on_disk)


def _with_device(needs: Needs, wishes: Wishes) -> Iterator[Placement]:
    """Yield placements that fill the GPU, and differ in what becomes of the other layers."""
    ways: list[tuple[Way, float]] = [("host", 0.0), ("mapped", 0.0), ("staged", 1.0)]
    ways += [("host", share / _MIXES) for share in range(1, _MIXES)]
    for way, staged_share in ways:
        for depth in _depths(wishes, len(needs.layers_bytes)):
            placement = _filled(needs, wishes, way, staged_share, depth)
            if placement.uses_device and (placement.device_depth or not staged_share):  # else it is no mix at all
                yield placement


def _filled(needs: Needs, wishes: Wishes, way: Way, staged_share: float, depth: int) -> Placement:
    """Return the placement with the most layers on the GPU, then the fewest on disk, whether it fits or not."""
    count = len(needs.layers_bytes)

    def with_layers(resident: int, on_disk: int) -> Placement:
        staged = round(staged_share * (count - resident - on_disk))
        tiers = _arranged(count, resident, on_disk, staged, way, wishes)
        copied = tiers.count("staged") + (tiers.count("disk") if way == "staged" else 0)
        slots, device_slots = min(depth, tiers.count("disk")), min(_DEVICE_DEPTH, copied)
        return Placement(tiers, slots, needs, wishes.cpu_bytes, device_slots, wishes.gpu_bytes, way)

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


def _too_small(placement: Placement) -> str:
    """Say what the smallest placement that was found would need; rounded up, as it is to be tried."""
    needs, one = placement.needs, max(placement.needs.layers_bytes)
    if placement.device_shortage_bytes:
        assert placement.device_budget_bytes is not None, "without a budget there is no shortage"
        parts = [
            (needs.device_runtime_bytes, "for the driver"),
            (needs.fixed_bytes, "for embeddings and head"),
            (needs.cache_bytes - placement.host_cache_bytes, "for keys and values"),
            (needs.working_bytes, "for activations and reserve"),
            (placement.bytes_in("resident") + placement.device_depth * one, "for layers"),
        ]
        return _refusal("--gpu-memory", placement.device_budget_bytes, placement.device_bytes, parts)
    assert placement.budget_bytes is not None, "without a budget there is no shortage"
    held = placement.expected_bytes - placement.slots_bytes - sum(n for n, _ in _host_parts(placement))
    parts = _host_parts(placement)
    parts += [(held, "for layers that the map keeps")] if held else []
    parts += [(placement.slots_bytes, "for one layer" if placement.depth == 1 else f"for {placement.depth} layers")]
    return _refusal("--cpu-memory", placement.budget_bytes, placement.expected_bytes, parts)


def _host_parts(placement: Placement) -> list[tuple[int, str]]:
    needs = placement.needs
    return [
        (needs.runtime_bytes, "for Python, torch and transformers"),
        (0 if placement.uses_device else needs.fixed_bytes, "for embeddings and head"),
        (placement.host_cache_bytes, "for keys and values"),
        (needs.working_bytes, "for activations and reserve"),
    ]


def _refusal(budget_flag: str, budget: int, smallest: int, parts: list[tuple[int, str]]) -> str:
    what = ", ".join(f"{format_bytes(size)} {purpose}" for size, purpose in parts)
    return (
        f"{budget_flag} {format_bytes(budget)}: too small for this model; at least {-(-smallest // (1 << 20))} MiB is "
        f"needed: {what}"
    )


def describe(placement: Placement) -> str:
    """Return the plan as lines for a person."""
    needs = placement.needs
    around = "norms, head; embeddings on disk" if placement.embedding_on_disk else "embeddings, norms, head"
    lines = [
        ("Python, torch, transformers", needs.runtime_bytes),
        *([] if placement.uses_device else [(around, needs.fixed_bytes)]),
        ("keys and values", placement.host_cache_bytes),
        ("activations and reserve", needs.working_bytes),
        *_layer_lines(
            placement, {"host": "kept in memory", "staged": "copied to the GPU", "mapped": "read by the GPU"}
        ),
    ]
    if placement.disk_bytes:
        number = placement.tiers.count("disk")
        lines.append((f"ring of {placement.depth} slots for the other {number}, on disk", placement.slots_bytes))
    text = _sum(lines, placement.expected_bytes, placement.budget_bytes)
    if placement.uses_device:
        on_device = [
            ("driver", needs.device_runtime_bytes),
            ("embeddings, norms, head", needs.fixed_bytes),
            ("keys and values", needs.cache_bytes - placement.host_cache_bytes),
            ("activations and reserve", needs.working_bytes),
            *_layer_lines(placement, {"resident": "on the GPU"}),
            (f"ring of {placement.device_depth} slots", placement.device_depth * max(needs.layers_bytes)),
        ]
        text += f"\non the GPU\n{_sum(on_device, placement.device_bytes, placement.device_budget_bytes)}"
    return f"plan\n{text}\n  {format_bytes(placement.disk_bytes):>10}  read from disk for every pass over the model"


def _layer_lines(placement: Placement, words: dict[Tier, str]) -> list[tuple[str, int]]:
    count, tiers = len(placement.tiers), placement.tiers
    return [
        (f"{tiers.count(tier)} of {count} layers, {what}", placement.bytes_in(tier))
        for tier, what in words.items()
        if tier in tiers or (tier == "host" and not placement.uses_device)
    ]


def _sum(lines: list[tuple[str, int]], total: int, budget: int | None) -> str:
    what = f"together, of a budget of {format_bytes(budget)}" if budget else "together"
    return "\n".join(f"  {format_bytes(size):>10}  {name}" for name, size in [*lines, (what, total)] if name)
