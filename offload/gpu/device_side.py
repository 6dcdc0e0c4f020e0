"""What of a model is on a device, and how the rest of it gets there: arranged as a placement says."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from offload.checkpoint import LayerBlob
from offload.gpu.captured import CapturedLayer, StepRooms
from offload.gpu.copy_queue import BOUNCE_BYTES, Bounce, CopyLog, CopyQueue, Kept, KeptInTurn, Lender, Ring
from offload.gpu.device import Device
from offload.layer_view import LayerView, copied_bytes
from offload.lent_layers import Crossing, LentLayers, MappedLayers
from offload.memory import Arena, Memory
from offload.planning.placement import Placement
from offload.proved import fuse
from offload.transfer import Slots
from offload.units import SplitLayer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the device's side takes from the executor.

    blobs: the shards of the decoder layers, in order. staged: what of each is copied to the device ahead of use where
    that is its tier, in parts or as one. module_of: the module that goes by a name. dtype: of what is not packed, where
    it is computed with. read: reads a shard into an arena of its own, checked. view_of: where in the model a shard in
    some memory belongs, with what gives memory for copies, see `layer_view`. on_disk: what is read from there in every
    pass; host_ring: what it is read into, or None.
    """

    blobs: list[LayerBlob]
    staged: tuple[SplitLayer, ...]
    module_of: Callable[[str], nn.Module]
    dtype: torch.dtype
    read: Callable[[LayerBlob], Arena]
    view_of: Callable[[LayerBlob, Memory, Callable[[int], Memory]], LayerView]
    on_disk: list[LayerBlob]
    host_ring: Slots | None


class DeviceSide:
    """Owns the memory on the device, the pinned memory beside it, and the hooks of the layers that need them.

    copies, ring: what copies layers ahead, and the slots on the device, None if none are copied. mapped: layers in host
    memory that the device reads where they lie, None if there are none. spare: memory of a
    layer on the device that holds nothing between passes, of a ring that was reset; None where all layers stay.
    layer_copies, cache_copies, cache_copies_back: what crossed the bus since loading, the latter two of keys and values
    that are in host memory. Raises torch.OutOfMemoryError if the device's memory does not do; then it is to be closed.
    """

    def __init__(self, device: Device, poison: bool) -> None:
        self.device, self._poison = device, poison
        self.layer_copies, self.cache_copies, self.cache_copies_back = (CopyLog(device) for _ in range(3))
        self.copies: CopyQueue | None = None
        self.ring: Slots | None = None
        self.mapped: KeptInTurn | None = None
        self.spare: Memory | None = None
        self._views: list[LayerView] = []
        self._pinned: list[Arena] = []
        self._bounce: Bounce | None = None
        self._handles: list[RemovableHandle] = []
        self._lent: dict[str, Callable[[], AbstractContextManager[None]]] = {}

    def keep(self, blob: LayerBlob, parts: Parts) -> LayerView:
        """Bring a shard into the device's memory and attach it for good."""
        arena = parts.read(blob)
        memory = self.device.allocate(blob.nbytes)
        memory.bytes.copy_(arena.bytes[: blob.nbytes])
        view = parts.view_of(blob, memory, self.device.allocate)
        view.attach()
        return view

    def arrange(self, parts: Parts, placement: Placement) -> None:
        """Bring every layer to its tier; those that the host computes have their weights already, or are lent them."""
        staged: list[LayerBlob] = []
        mapped: list[LayerBlob] = []
        in_memory: list[LayerBlob] = []
        tiers = zip(placement.tiers, placement.hows, strict=True)
        for blob, layer, (tier, how) in zip(parts.blobs, parts.staged, tiers, strict=True):
            stays = blob if how == "resident" else layer.rest if how == "staged" else None
            if stays is not None:
                self._views.append(self.keep(stays, parts))  # one by one: what came before the end of memory is known
            lent = layer.parts if how == "staged" else (blob,) if how == "mapped" else ()
            staged += lent if how == "staged" else ()
            mapped += lent if how == "mapped" else ()
            in_memory += lent if tier != "disk" else ()
        size = max(blob.nbytes for layer in parts.staged for blob in layer.parts)
        slots = [self.device.allocate(size) for _ in range(placement.device_depth)]
        scratch = self.device.allocate(max(blob.nbytes for blob in parts.blobs)) if mapped else None
        self.spare = slots[0] if slots else scratch
        copies = self._room_for_copies(parts, staged, mapped)
        kept = {blob.module: parts.read(blob) for blob in in_memory}
        ring_arenas = parts.host_ring.arenas if parts.host_ring is not None and placement.way != "host" else []
        self._pin([*kept.values(), *(arena for arena in ring_arenas if isinstance(arena, Arena))])
        if staged and len(self._pinned) < len(kept) + len(ring_arenas):
            self._bounce = Bounce(self.device)
        lenders = self._lenders(kept, parts, mapped)
        if staged:
            self._stage(parts, staged, slots, lenders, copies)
        if scratch is not None:
            self._map(parts, mapped, scratch, copies)
        crossing = Crossing(self.device.torch_device)
        for blob, how in zip(parts.blobs, placement.hows, strict=True):
            self._handles += crossing.hook(parts.module_of(blob.module)) if how == "host" else ()

    def fuse(self, model: PreTrainedModel, parts: Parts, placement: Placement) -> None:
        """Let single tokens be replayed through the layers that the device computes, but for those in parts."""
        apart = {"host", "staged"} if placement.split else {"host"}
        names = {at: blob.module for at, blob in enumerate(parts.blobs) if placement.hows[at] not in apart}
        fuse(
            model,
            {at: parts.module_of(name) for at, name in names.items()},
            lambda at: self._lent.get(names[at], nullcontext)(),
            partial(CapturedLayer, StepRooms(self.device)),
            self.device.torch_device,
        )

    @property
    def rings(self) -> tuple[Ring, ...]:
        """What the sequences of a round go through together: the slots on the device, and layers that are mapped."""
        return tuple(ring for ring in (self.ring, self.mapped) if ring is not None)

    @property
    def memory(self) -> list[Tensor]:
        """What layers take of the device's memory, uint8 [bytes] each: those that stay there, and the slots."""
        resident = [memory for view in self._views for memory in view.memory]
        slots = [self.spare] if self.ring is None else self.ring.arenas
        return resident + [slot.bytes for slot in slots if slot is not None]

    def close(self) -> None:
        """Leave nothing on the device, and nothing pinned. The host's ring is closed before."""
        for handle in self._handles:
            handle.remove()
        if self.copies is not None:
            self.copies.close()
        for view in self._views:
            view.detach()
        self._handles, self._views, self.copies, self.ring, self.mapped, self.spare = [], [], None, None, None, None
        self._lent = {}
        self.device.settle()
        while self._pinned:
            arena = self._pinned.pop()
            self.device.unpin(arena)
            arena.pinned = False
        if self._bounce is not None:
            self._bounce.close()
        self._bounce = None

    def _room_for_copies(
        self, parts: Parts, staged: list[LayerBlob], mapped: list[LayerBlob]
    ) -> Callable[[int], Memory]:
        """Return what gives all that are lent the same memory, as each needs its copies only while it runs."""
        needed = [copied_bytes(blob, parts.dtype) for blob in staged]
        needed += [copied_bytes(blob, parts.dtype, moved=True) for blob in mapped]
        most = max(needed, default=0)
        room = self.device.allocate(most) if most else None

        def shared(nbytes: int) -> Memory:
            assert room is not None, "one of the layers needs copies"
            assert nbytes <= room.nbytes, "none needs more"
            return room

        return shared

    def _pin(self, arenas: list[Arena]) -> None:
        """Pin as many arenas as the system lets, and say so where others are left."""
        for arena in arenas:
            arena.pinned = self.device.pin(arena)
            if not arena.pinned:
                break
            self._pinned.append(arena)
        if len(self._pinned) < len(arenas):
            left = sum(arena.nbytes for arena in arenas if not arena.pinned)
            _log.warning(
                "%d MiB of memory cannot be pinned (`ulimit -l`): layers there are copied through buffers of %d MiB "
                "each, at %.1f GB/s at most",
                left >> 20,
                BOUNCE_BYTES >> 20,
                _copied_per_second(arenas[-1].bytes) / 1e9,
            )

    def _lenders(self, kept: dict[str, Arena], parts: Parts, mapped: list[LayerBlob]) -> dict[str, tuple[Lender, int]]:
        """Return who lends what is in memory or on disk, and as which position, by the names of modules."""
        memory = Kept(list(kept.values()))
        lenders: dict[str, tuple[Lender, int]] = {name: (memory, position) for position, name in enumerate(kept)}
        if in_turn := [blob for blob in mapped if blob.module in kept]:
            self.mapped = KeptInTurn(in_turn, [kept[blob.module] for blob in in_turn])
            lenders |= {blob.module: (self.mapped, position) for position, blob in enumerate(in_turn)}
        if parts.host_ring is not None:
            lenders |= {blob.module: (parts.host_ring, position) for position, blob in enumerate(parts.on_disk)}
        return lenders

    def _stage(
        self,
        parts: Parts,
        blobs: list[LayerBlob],
        slots: list[Memory],
        lenders: dict[str, tuple[Lender, int]],
        copies: Callable[[int], Memory],
    ) -> None:
        sources = {blob.module: lenders[blob.module] for blob in blobs}
        self.copies = CopyQueue(self.device, sources, self._bounce, self.layer_copies)
        self.ring = Slots(blobs, slots, self.copies, self._poison, self.device.mark_compute)
        lent = LentLayers(self.ring, lambda position, memory: parts.view_of(blobs[position], memory, copies))
        for position, blob in enumerate(blobs):
            self._lend(parts.module_of(blob.module), blob.module, lent, position)

    def _map(
        self,
        parts: Parts,
        blobs: list[LayerBlob],
        scratch: Memory,
        copies: Callable[[int], Memory],
    ) -> None:
        names = {blob.module for blob in blobs}
        for ring in (self.mapped, parts.host_ring):
            mine = {} if ring is None else {at: blob for at, blob in enumerate(ring.blobs) if blob.module in names}
            if ring is None or not mine:
                continue

            def view_of(position: int, memory: Memory, mine: dict[int, LayerBlob] = mine) -> LayerView:
                return parts.view_of(mine[position], memory, copies)

            lent = MappedLayers(ring, view_of, self.device, scratch, self.layer_copies)
            for position, blob in mine.items():
                self._lend(parts.module_of(blob.module), blob.module, lent, position)

    def _lend(self, module: nn.Module, name: str, lent: LentLayers, position: int) -> None:
        self._handles += lent.hook(module, position)
        self._lent[name] = partial(lent.lent, position, module)


def move_buffers(model: nn.Module, host_layers: list[nn.Module], device: torch.device) -> None:
    """Move the buffers that no checkpoint brings to the device, but for those of layers that the host computes."""
    on_host = {id(module) for layer in host_layers for module in layer.modules()}
    for module in model.modules():
        target = torch.device("cpu") if id(module) in on_host else device
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Tensor) and not buffer.is_meta:
                module._buffers[name] = buffer.to(target)


def _copied_per_second(source: Tensor) -> float:
    """Return what one thread copies out of memory that is there, uint8 [bytes], into a buffer."""
    target = torch.empty(min(BOUNCE_BYTES, source.nbytes), dtype=torch.uint8)
    started = time.perf_counter()
    for start in range(0, source.nbytes, target.nbytes):
        part = source[start : start + target.nbytes]
        target[: part.nbytes] = part
    return source.nbytes / (time.perf_counter() - started)
