"""A placement in words: what fills each memory, as a plan says it, as a picture draws it, and as a refusal lists it."""

from dataclasses import dataclass

from offload.command import format_bytes
from offload.planning.placement import Placement
from offload.planning.predict import Tier


@dataclass(frozen=True, slots=True)
class Part:
    """Some of what fills a memory. tier: whose layers it is for, None if it is for no layers."""

    what: str
    nbytes: int
    tier: Tier | None = None


def too_small(placement: Placement) -> str:
    """Say what the smallest placement that was found would need; rounded up, as it is to be tried."""
    needs = placement.needs
    if placement.device_shortage_bytes:
        assert placement.device_budget_bytes is not None, "without a budget there is no shortage"
        parts = [
            (needs.device_runtime_bytes, "for the driver"),
            (needs.fixed_bytes, "for embeddings and head"),
            (placement.device_cache_bytes, "for keys and values"),
            (placement.device_working_bytes, "for activations and reserve"),
            *((part.nbytes, f"for {part.what}") for part in _device_scratch(placement)),
            (placement.layers_device_bytes, "for layers, copied in parts" if placement.split else "for layers"),
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
        *((part.nbytes, f"for {part.what}") for part in _host_scratch(placement)),
    ]


def _host_scratch(placement: Placement) -> list[Part]:
    """Say what a GPU takes of host memory beside layers, where it takes any."""
    parts = [
        Part("buffers for copies, should memory not be pinned", placement.bounce_bytes),
        Part("shards on their way to the GPU, beyond activations", placement.host_loading_bytes),
    ]
    return [part for part in parts if part.nbytes]


def _device_scratch(placement: Placement) -> list[Part]:
    """Say what computing takes on the GPU beside weights as they lie, where it takes any."""
    parts = [
        Part("copies of norms and biases", placement.device_copies_bytes),
        Part("a weight dequantized, or sums of its splits", placement.needs.device.product_bytes),
        Part("decode steps that are replayed", placement.device_steps_bytes),
        Part("a shard while it is converted", placement.device_loading_bytes),
    ]
    return [part for part in parts if part.nbytes]


def _refusal(budget_flag: str, budget: int, smallest: int, parts: list[tuple[int, str]]) -> str:
    what = ", ".join(f"{format_bytes(size)} {purpose}" for size, purpose in parts)
    return (
        f"{budget_flag} {format_bytes(budget)}: too small for this model; at least {-(-smallest // (1 << 20))} MiB is "
        f"needed: {what}"
    )


def parts_in_memory(placement: Placement) -> list[Part]:
    """Return what the process's memory is for; together it is what the plan expects."""
    needs = placement.needs
    return [
        Part("Python, torch, transformers", needs.runtime_bytes),
        *([] if placement.uses_device else [Part(_around(placement), needs.fixed_bytes)]),
        Part("keys and values", placement.host_cache_bytes),
        Part("activations and reserve", needs.working_bytes),
        *_host_scratch(placement),
        *_layer_parts(
            placement, {"host": "kept in memory", "staged": "copied to the GPU", "mapped": "read by the GPU"}
        ),
        *_apart_parts(placement),
    ]


def parts_on_device(placement: Placement) -> list[Part]:
    """Return what the GPU's memory is for, where one is used."""
    needs = placement.needs
    rest = [Part("norms and the like of layers that are copied in parts", placement.rest_bytes)]
    parts = [
        Part("driver", needs.device_runtime_bytes),
        Part("embeddings, norms, head", needs.fixed_bytes),
        Part("keys and values", placement.device_cache_bytes),
        Part("activations and reserve", placement.device_working_bytes),
        *_device_scratch(placement),
        *_layer_parts(placement, {"resident": "on the GPU"}),
        *(rest if placement.split else []),
        Part(_device_ring(placement), placement.device_depth * placement.device_slot_bytes, "staged"),
    ]
    if "mapped" in placement.hows:
        prompts = "one more, for prompts of layers read across the bus"
        parts.append(Part(prompts, max(needs.layers_bytes), "mapped"))
    return parts


def describe(placement: Placement) -> str:
    """Return the plan as lines for a person."""
    text = _sum(parts_in_memory(placement), placement.expected_bytes, placement.budget_bytes)
    if placement.uses_device:
        on_device = _sum(parts_on_device(placement), placement.device_bytes, placement.device_budget_bytes)
        text += f"\non the GPU\n{on_device}"
    return f"plan\n{text}\n  {format_bytes(placement.disk_bytes):>10}  read from disk for every pass over the model"


def _device_ring(placement: Placement) -> str:
    split = placement.needs.split if placement.split else None
    if placement.device_depth == 1:
        return f"one slot: no {'layer' if split is None else 'part of a layer'} is copied while another is computed"
    ring = f"ring of {placement.device_depth} slots"
    return ring if split is None else f"{ring} for layers in {max(map(len, split.parts_bytes))} parts"


def _around(placement: Placement) -> str:
    """Say what lies around the layers in memory."""
    if placement.head_tiers:
        return "norms; embeddings on disk" if placement.embedding_on_disk else "embeddings, norms"
    return "norms, head; embeddings on disk" if placement.embedding_on_disk else "embeddings, norms, head"


def _apart_parts(placement: Placement) -> list[Part]:
    """Say what of the head and of experts is kept apart from what surrounds it, and what the ring is for."""
    needs, blocks, parts = placement.needs, len(placement.head_tiers), []
    if kept := placement.head_tiers.count("host"):
        nbytes = sum(n for n, tier in zip(needs.head_blocks_bytes, placement.head_tiers, strict=True) if tier == "host")
        parts.append(Part(f"{kept} of {blocks} blocks of the head, kept in memory", nbytes, "host"))
    if placement.slots_bytes:
        layers, streamed = placement.tiers.count("disk"), placement.head_tiers.count("disk")
        others = [f"the other {layers}"] if layers else []
        others += [f"{streamed} of {blocks} blocks of the head"] if streamed else []
        what = f"ring of {placement.depth} slots for {' and '.join(others)}, on disk"
        parts.append(Part(what, placement.slots_bytes, "disk"))
    if needs.experts is not None and placement.expert_slots:
        count = sum(needs.experts.counts[layer] for layer in placement.experts_apart)
        what = f"slots for {placement.expert_slots} of {count} experts, read when they are routed to"
        parts.append(Part(what, placement.expert_slots_bytes, "disk"))
    return parts


def _layer_parts(placement: Placement, words: dict[Tier, str]) -> list[Part]:
    count, tiers = len(placement.tiers), placement.tiers
    bytes_of = placement.layers_bytes
    return [
        Part(
            f"{tiers.count(tier)} of {count} layers, {what}",
            sum(n for n, t in zip(bytes_of, tiers, strict=True) if t == tier),
            tier,
        )
        for tier, what in words.items()
        if tier in tiers or (tier == "host" and not placement.uses_device)
    ]


def _sum(parts: list[Part], total_bytes: int, budget_bytes: int | None) -> str:
    what = f"together, of a budget of {format_bytes(budget_bytes)}" if budget_bytes else "together"
    lines = [*parts, Part(what, total_bytes)]
    return "\n".join(f"  {format_bytes(part.nbytes):>10}  {part.what}" for part in lines)
