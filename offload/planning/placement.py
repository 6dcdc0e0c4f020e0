"""Where everything lives, and what that takes; `choice` decides, `words` says it.

Without a GPU a decoder layer is either on the `host`, in memory for good, or on `disk`, read into a ring of slots for
each pass; so is each block of the head where that is apart, and experts that are apart are fetched into slots of their
own. With a GPU a layer is `resident` there, `staged` (copied from pinned memory into a ring on the device, in parts
where no whole one finds room), `mapped` (read across the bus by the kernel), computed on the `host`, or on `disk` and
then one of the last three. Embeddings, norms and head are on the device if any layer is. A budget is one for the whole
process, Python and the libraries in it.
"""

from dataclasses import dataclass

from offload.planning.device_needs import SplitNeeds
from offload.planning.needs import Needs
from offload.planning.predict import Costs, Tier, Way, walk


@dataclass(frozen=True, slots=True)
class Placement:
    """The tier of every decoder layer, the depth of the ring for those on disk, and what all of it takes.

    needs: of what is in memory, so without the embeddings if they are on disk, without a head or experts that are
    apart. device_depth: slots on the GPU for what is copied there. way: what becomes of a layer that was read from
    disk. head_tiers: of the blocks of the head; none if it is one whole, in memory. experts_apart: layers whose experts
    are fetched when they are routed to, into expert_slots slots, which all of them share. split: whether what is copied
    to the GPU goes there in parts of layers, through slots of the largest part's size.
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
    split: bool = False

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
        sizes = self.layers_bytes + self.units_bytes[len(self.tiers) :]
        return sum(nbytes for nbytes, tier in zip(sizes, self.units_tiers, strict=True) if tier in tiers)

    @property
    def layers_bytes(self) -> tuple[int, ...]:
        """Bytes of the layers as they lie in their tiers: of one that goes to the GPU in parts, those of its parts."""
        layers = list(self.needs.layers_bytes)
        for at in self._in_parts:
            layers[at] = sum(self._split.parts_bytes[at])
        return tuple(layers)

    @property
    def units_tiers(self) -> tuple[Tier, ...]:
        """Tiers of all that a pass goes through: the layers, and the blocks of the head if it is apart."""
        return self.tiers + self.head_tiers

    @property
    def units_bytes(self) -> tuple[int, ...]:
        """Bytes of the same, each as one."""
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
        if "disk" not in self.units_tiers:
            return 0
        return self.depth * (self.device_slot_bytes if self.split and self.way == "staged" else max(self.units_bytes))

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
        staying = [nbytes for nbytes, tier in layers if tier == "resident"]
        layer = max(staying + [self._split.rest_bytes[at] for at in self._in_parts], default=0)
        kept = self.bytes_in("host", "staged", "mapped")
        return max(0, max(self.needs.device.shard_bytes, layer - kept) - self.needs.working_bytes)

    @property
    def device_bytes(self) -> int:
        """The peak on the GPU, as planned."""
        if not self.uses_device:
            return 0
        needs = self.needs
        around = needs.device_runtime_bytes + needs.fixed_bytes + self.device_cache_bytes
        scratch = self.device_copies_bytes + needs.device.product_bytes + self.device_loading_bytes
        scratch += self.device_steps_bytes
        return around + self.device_working_bytes + self.layers_device_bytes + scratch

    @property
    def device_working_bytes(self) -> int:
        """Activations on the GPU, of sequences that stand amid a layer too where layers come in parts, and waste."""
        return self.needs.working_bytes + (self.needs.standing_in_parts_bytes if self.split else 0)

    @property
    def device_copies_bytes(self) -> int:
        """Copies on the GPU of what layers cannot use there as it lies: norms and biases, mostly."""
        return self.needs.device.copies_bytes(self.hows, self.needs.split if self.split else None)

    @property
    def device_steps_bytes(self) -> int:
        """What captured decode steps take on the GPU: one of each layer in each place where its weights may lie."""
        depths = {"resident": 1, "mapped": 1, "staged": 0 if self.split else self.device_depth}
        read_ahead = self.depth if self.way == "mapped" else 1
        tiers = zip(self.tiers, self.hows, strict=True)
        places = sum(
            depths.get(how, 0) * (read_ahead if tier == "disk" and how == "mapped" else 1) for tier, how in tiers
        )
        return self.needs.device.step_bytes + places * self.needs.device.graphs_bytes if places else 0

    @property
    def device_loading_bytes(self) -> int:
        """What a shard that is converted on the GPU takes there more than computing does later."""
        needs = self.needs
        later = self.device_cache_bytes + self.device_working_bytes + needs.device.product_bytes
        return max(0, needs.device.raw_bytes - later) if self.uses_device else 0

    @property
    def layers_device_bytes(self) -> int:
        """What layers take on the GPU: those that are there, slots for others, and one for prompts of mapped ones."""
        prompts = max(self.needs.layers_bytes) if "mapped" in self.hows else 0
        slots = self.device_depth * self.device_slot_bytes
        return self.bytes_in("resident") + self.rest_bytes + slots + prompts

    @property
    def device_slot_bytes(self) -> int:
        """Each of the slots on the GPU: the largest layer, or the largest part where they come in parts."""
        return self._split.slot_bytes if self.split else max(self.needs.layers_bytes)

    @property
    def rest_bytes(self) -> int:
        """What stays on the GPU of layers that come in parts."""
        return sum(self._split.rest_bytes[at] for at in self._in_parts)

    @property
    def _split(self) -> SplitNeeds:
        assert self.needs.split is not None, "only a model that has parts is split"
        return self.needs.split

    @property
    def _in_parts(self) -> list[int]:
        return [at for at, how in enumerate(self.hows) if how == "staged"] if self.split else []

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
        if self.split:
            whole, parts = (1.0,), self._in_parts
            shares = [share if at in parts else whole for at, share in enumerate(self._split.shares)]
            tiers = [tier for tier, each in zip(self.tiers, shares, strict=True) for _ in each]
            passed = walk(tiers, costs.in_parts(shares), self.depth, self.device_depth, self.way).seconds
        else:
            passed = walk(self.units_tiers, costs, self.depth, self.device_depth, self.way).seconds
        if not costs.cache_read_seconds:
            return passed
        if self.uses_device:
            share = sum(how != "host" for how in self.hows) / len(self.hows)
            copied = sum(s for s, how in zip(costs.copy_seconds, self.hows, strict=True) if how == "staged")
            return max(passed, share * costs.cache_copy_seconds + copied)
        read = sum(s for s, tier in zip(costs.read_seconds, self.units_tiers, strict=True) if tier == "disk")
        return max(passed, costs.cache_read_seconds + read)
