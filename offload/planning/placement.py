"""Where everything lives, what that takes, and how it is said; `choice` decides.

Without a GPU a decoder layer is either on the `host`, in memory for good, or on `disk`, read into a ring of slots for
each pass; so is each block of the head where that is apart, and experts that are apart are fetched into slots of their
own. With a GPU a layer is `resident` there, `staged` (copied from pinned memory into a ring on the device), `mapped`
(read across the bus by the kernel), computed on the `host`, or on `disk` and then one of the last three. Embeddings,
norms and head are on the device if any layer is. A budget is one for the whole process, Python and the libraries in it.
"""

from dataclasses import dataclass

from offload.command import format_bytes
from offload.planning.needs import Needs
from offload.planning.predict import Costs, Tier, Way, walk


@dataclass(frozen=True, slots=True)
class Placement:
    """The tier of every decoder layer, the depth of the ring for those on disk, and what all of it takes.

    needs: of what is in memory, so without the embeddings if they are on disk, without a head or experts that are
    apart. device_depth: slots on the GPU for what is copied there. way: what becomes of a layer that was read from
    disk. head_tiers: of the blocks of the head; none if it is one whole, in memory. experts_apart: layers whose experts
    are fetched when they are routed to, into expert_slots slots, which all of them share.
    """

    tiers: tuple[Tier, ...]
    depth: int
    needs: Needs
    budget_bytes: int | None
    device_depth: int = 0
    device_budget_bytes: int | None = None
    way: Way = "host"
    embedding_on_disk: bool = False
    head_tiers: tuple[Tier, ...] = ()
    experts_apart: tuple[int, ...] = ()
    expert_slots: int = 0

    @property
    def uses_device(self) -> bool:
        """Whether any layer is computed on a GPU."""
        return any(how != "host" for how in self.hows)

    @property
    def hows(self) -> tuple[Tier, ...]:
        """How every layer is computed: its tier, or for those on disk what becomes of them."""
        return tuple(self.way if tier == "disk" else tier for tier in self.tiers)

    def bytes_in(self, *tiers: Tier) -> int:
        """Return the bytes of the layers, and of the head's blocks, in these tiers."""
        return sum(nbytes for nbytes, tier in zip(self.units_bytes, self.units_tiers, strict=True) if tier in tiers)

    @property
    def units_tiers(self) -> tuple[Tier, ...]:
        """Tiers of all that a pass goes through: the layers, and the blocks of the head if it is apart."""
        return self.tiers + self.head_tiers

    @property
    def units_bytes(self) -> tuple[int, ...]:
        """Bytes of the same."""
        return self.needs.layers_bytes + (self.needs.head_blocks_bytes if self.head_tiers else ())

    @property
    def disk_bytes(self) -> int:
        """Bytes that one token reads from disk; of experts, those it misses where each is routed to as often."""
        experts = self.needs.experts
        if experts is None:
            return self.bytes_in("disk")
        touched = sum(experts.touched(1)[layer] for layer in self.experts_apart)
        return self.bytes_in("disk") + int(self.missed_share * touched * experts.expert_bytes)

    @property
    def missed_share(self) -> float:
        """Of the experts that are routed to, those that are not in a slot, where each is routed to as often."""
        experts = self.needs.experts
        total = 0 if experts is None else sum(experts.counts[layer] for layer in self.experts_apart)
        return max(0.0, 1 - self.expert_slots / total) if total else 0.0

    @property
    def slots_bytes(self) -> int:
        """Bytes of the ring in host memory."""
        return self.depth * max(self.units_bytes) if "disk" in self.units_tiers else 0

    @property
    def expert_slots_bytes(self) -> int:
        """Bytes of the experts' slots in host memory."""
        return 0 if self.needs.experts is None else self.expert_slots * self.needs.experts.expert_bytes

    @property
    def host_cache_bytes(self) -> int:
        """Keys and values of the layers that are computed on the host, and what of the others' is not on the GPU."""
        needs, on_host = self.needs, self.hows.count("host")
        if not self.uses_device:
            return needs.cache_bytes
        return needs.shelf_bytes + needs.cache_bytes * on_host // len(self.tiers)

    @property
    def device_cache_bytes(self) -> int:
        """Keys and values on the GPU. A budget that it was given for them is used whole, however many layers it has."""
        needs = self.needs
        if not self.uses_device:
            return 0
        return needs.cache_bytes - (0 if needs.shelf_bytes else self.host_cache_bytes)

    @property
    def expected_bytes(self) -> int:
        """The process's peak, as planned."""
        needs = self.needs
        fixed = 0 if self.uses_device else needs.fixed_bytes
        apart = self.bounce_bytes + self.host_loading_bytes
        return needs.runtime_bytes + fixed + self.host_cache_bytes + needs.working_bytes + self.held_bytes + apart

    @property
    def held_bytes(self) -> int:
        """What layers and blocks of the head take in host memory, the rings with them."""
        return self.bytes_in("host", "staged", "mapped") + self.slots_bytes + self.expert_slots_bytes

    @property
    def bounce_bytes(self) -> int:
        """Buffers that copies go through if the system does not let memory be pinned, which only loading shows."""
        return self.needs.device.bounce_bytes if "staged" in self.hows else 0

    @property
    def host_loading_bytes(self) -> int:
        """What shards on their way to a GPU take, one at a time, more than computing does later.

        Layers that stay there come before any is kept in host memory, what lies around the layers comes last.
        """
        if not self.uses_device:
            return 0
        layers = zip(self.needs.layers_bytes, self.tiers, strict=True)
        layer = max((nbytes for nbytes, tier in layers if tier == "resident"), default=0)
        kept = self.bytes_in("host", "staged", "mapped")
        return max(0, max(self.needs.device.shard_bytes, layer - kept) - self.needs.working_bytes)

    @property
    def device_bytes(self) -> int:
        """The peak on the GPU, as planned."""
        if not self.uses_device:
            return 0
        needs = self.needs
        around = needs.device_runtime_bytes + needs.fixed_bytes + self.device_cache_bytes
        scratch = self.device_copies_bytes + needs.device.dequantized_bytes + self.device_loading_bytes
        return around + needs.working_bytes + self.layers_device_bytes + scratch

    @property
    def device_copies_bytes(self) -> int:
        """Copies on the GPU of what layers cannot use there as it lies: norms and biases, mostly."""
        return self.needs.device.copies_bytes(self.hows)

    @property
    def device_loading_bytes(self) -> int:
        """What a shard that is converted on the GPU takes there more than computing does later."""
        needs = self.needs
        later = self.device_cache_bytes + needs.working_bytes + needs.device.dequantized_bytes
        return max(0, needs.device.raw_bytes - later) if self.uses_device else 0

    @property
    def layers_device_bytes(self) -> int:
        """What layers take on the GPU: those that are there, slots for others, and one for prompts of mapped ones."""
        slots = self.device_depth + ("mapped" in self.hows)
        return self.bytes_in("resident") + slots * max(self.needs.layers_bytes)

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
        return self.disk_bytes + self.bytes_in("staged", "mapped")

    def seconds(self, costs: Costs) -> float:
        """Return what a pass takes.

        Keys and values that are not at hand are brought back ahead of their use, so they cost what their link lacks.
        """
        if self.experts_apart:
            costs = costs.with_experts_apart(self.experts_apart, self.missed_share)
        if self.head_tiers:
            costs = costs.with_head_apart()
        passed = walk(self.units_tiers, costs, self.depth, self.device_depth, self.way).seconds
        if not costs.cache_read_seconds:
            return passed
        if self.uses_device:
            share = sum(how != "host" for how in self.hows) / len(self.hows)
            copied = sum(s for s, how in zip(costs.copy_seconds, self.hows, strict=True) if how == "staged")
            return max(passed, share * costs.cache_copy_seconds + copied)
        read = sum(s for s, tier in zip(costs.read_seconds, self.units_tiers, strict=True) if tier == "disk")
        return max(passed, costs.cache_read_seconds + read)


def too_small(placement: Placement) -> str:
    """Say what the smallest placement that was found would need; rounded up, as it is to be tried."""
    needs = placement.needs
    if placement.device_shortage_bytes:
        assert placement.device_budget_bytes is not None, "without a budget there is no shortage"
        parts = [
            (needs.device_runtime_bytes, "for the driver"),
            (needs.fixed_bytes, "for embeddings and head"),
            (placement.device_cache_bytes, "for keys and values"),
            (needs.working_bytes, "for activations and reserve"),
            *((nbytes, f"for {what}") for what, nbytes in _device_scratch(placement)),
            (placement.layers_device_bytes, "for layers"),
        ]
        return _refusal("--gpu-memory", placement.device_budget_bytes, placement.device_bytes, parts)
    assert placement.budget_bytes is not None, "without a budget there is no shortage"
    parts = _host_parts(placement)
    held = placement.expected_bytes - placement.slots_bytes - placement.expert_slots_bytes - sum(n for n, _ in parts)
    parts += [(held, "for layers that the map keeps")] if held else []
    parts += [(placement.slots_bytes, "for one layer" if placement.depth == 1 else f"for {placement.depth} layers")]
    experts = "for one expert" if placement.expert_slots == 1 else f"for {placement.expert_slots} experts"
    parts += [(placement.expert_slots_bytes, experts)] if placement.expert_slots else []
    return _refusal("--cpu-memory", placement.budget_bytes, placement.expected_bytes, parts)


def _host_parts(placement: Placement) -> list[tuple[int, str]]:
    needs = placement.needs
    return [
        (needs.runtime_bytes, "for Python, torch and transformers"),
        (
            0 if placement.uses_device else needs.fixed_bytes,
            "for embeddings and norms" if placement.head_tiers else "for embeddings and head",
        ),
        (placement.host_cache_bytes, "for keys and values"),
        (needs.working_bytes, "for activations and reserve"),
        *((nbytes, f"for {what}") for what, nbytes in _host_scratch(placement)),
    ]


def _host_scratch(placement: Placement) -> list[tuple[str, int]]:
    """Say what a GPU takes of host memory beside layers, where it takes any."""
    lines = [
        ("buffers for copies, should memory not be pinned", placement.bounce_bytes),
        ("shards on their way to the GPU, beyond activations", placement.host_loading_bytes),
    ]
    return [line for line in lines if line[1]]


def _device_scratch(placement: Placement) -> list[tuple[str, int]]:
    """Say what computing takes on the GPU beside weights as they lie, where it takes any."""
    lines = [
        ("copies of norms and biases", placement.device_copies_bytes),
        ("the largest weight dequantized, in prompts", placement.needs.device.dequantized_bytes),
        ("a shard while it is converted", placement.device_loading_bytes),
    ]
    return [line for line in lines if line[1]]


def _refusal(budget_flag: str, budget: int, smallest: int, parts: list[tuple[int, str]]) -> str:
    what = ", ".join(f"{format_bytes(size)} {purpose}" for size, purpose in parts)
    return (
        f"{budget_flag} {format_bytes(budget)}: too small for this model; at least {-(-smallest // (1 << 20))} MiB is "
        f"needed: {what}"
    )


def describe(placement: Placement) -> str:
    """Return the plan as lines for a person."""
    needs = placement.needs
    lines = [
        ("Python, torch, transformers", needs.runtime_bytes),
        *([] if placement.uses_device else [(_around(placement), needs.fixed_bytes)]),
        ("keys and values", placement.host_cache_bytes),
        ("activations and reserve", needs.working_bytes),
        *_host_scratch(placement),
        *_layer_lines(
            placement, {"host": "kept in memory", "staged": "copied to the GPU", "mapped": "read by the GPU"}
        ),
        *_apart_lines(placement),
    ]
    text = _sum(lines, placement.expected_bytes, placement.budget_bytes)
    if placement.uses_device:
        on_device = [
            ("driver", needs.device_runtime_bytes),
            ("embeddings, norms, head", needs.fixed_bytes),
            ("keys and values", placement.device_cache_bytes),
            ("activations and reserve", needs.working_bytes),
            *_device_scratch(placement),
            *_layer_lines(placement, {"resident": "on the GPU"}),
            (_device_ring(placement), placement.device_depth * max(needs.layers_bytes)),
        ]
        if "mapped" in placement.hows:
            on_device.append(("one more, for prompts of layers read across the bus", max(needs.layers_bytes)))
        text += f"\non the GPU\n{_sum(on_device, placement.device_bytes, placement.device_budget_bytes)}"
    return f"plan\n{text}\n  {format_bytes(placement.disk_bytes):>10}  read from disk for every pass over the model"


def _device_ring(placement: Placement) -> str:
    if placement.device_depth == 1:
        return "one slot: no layer is copied while another is computed"
    return f"ring of {placement.device_depth} slots"


def _around(placement: Placement) -> str:
    """Say what lies around the layers in memory."""
    if placement.head_tiers:
        return "norms; embeddings on disk" if placement.embedding_on_disk else "embeddings, norms"
    return "norms, head; embeddings on disk" if placement.embedding_on_disk else "embeddings, norms, head"


def _apart_lines(placement: Placement) -> list[tuple[str, int]]:
    """Say what of the head and of experts is kept apart from what surrounds it, and what the ring is for."""
    needs, blocks, lines = placement.needs, len(placement.head_tiers), []
    if kept := placement.head_tiers.count("host"):
        nbytes = sum(n for n, tier in zip(needs.head_blocks_bytes, placement.head_tiers, strict=True) if tier == "host")
        lines.append((f"{kept} of {blocks} blocks of the head, kept in memory", nbytes))
    if placement.slots_bytes:
        layers, streamed = placement.tiers.count("disk"), placement.head_tiers.count("disk")
        others = [f"the other {layers}"] if layers else []
        others += [f"{streamed} of {blocks} blocks of the head"] if streamed else []
        lines.append((f"ring of {placement.depth} slots for {' and '.join(others)}, on disk", placement.slots_bytes))
    if needs.experts is not None and placement.expert_slots:
        count = sum(needs.experts.counts[layer] for layer in placement.experts_apart)
        what = f"slots for {placement.expert_slots} of {count} experts, read when they are routed to"
        lines.append((what, placement.expert_slots_bytes))
    return lines


def _layer_lines(placement: Placement, words: dict[Tier, str]) -> list[tuple[str, int]]:
    count, tiers = len(placement.tiers), placement.tiers
    bytes_of = placement.needs.layers_bytes
    return [
        (
            f"{tiers.count(tier)} of {count} layers, {what}",
            sum(n for n, t in zip(bytes_of, tiers, strict=True) if t == tier),
        )
        for tier, what in words.items()
        if tier in tiers or (tier == "host" and not placement.uses_device)
    ]


def _sum(lines: list[tuple[str, int]], total: int, budget: int | None) -> str:
    what = f"together, of a budget of {format_bytes(budget)}" if budget else "together"
    return "\n".join(f"  {format_bytes(size):>10}  {name}" for name, size in [*lines, (what, total)] if name)
