"""Owns the memory of a model's weights, and moves them under its decoder layers.

Just before a layer runs its weights are attached, views of the memory they were read into, and just after they are
detached. What a device computes is arranged by `offload.gpu.device_side`, with the same hooks and the same ring.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kernels.cpu_matmul import compiled_library
from offload.checkpoint import Checkpoint, LayerBlob
from offload.checksums import verify
from offload.embedding import DiskEmbedding
from offload.expert_cache import ExpertCache
from offload.experts import Experts
from offload.fused import FusedLayer
from offload.gpu.copy_queue import Ring
from offload.gpu.device import Device
from offload.gpu.device_side import DeviceSide, Parts, move_buffers
from offload.head import StreamedHead, verify_head
from offload.layer_view import PACKED, SHAPE, LayerView, layer_view
from offload.lent_layers import LentLayers
from offload.linear import PackedLinear
from offload.memory import Arena, FileReader, Memory
from offload.planning.placement import Placement
from offload.planning.wishes import KVFormat
from offload.proved import fuse, unfuse
from offload.read_queue import ReadQueue, read_blob
from offload.streaming_stats import StreamingStats
from offload.transfer import Slots
from offload.units import Units, without


class Executor:
    """Owns the memory of a model's weights and moves them under its decoder layers.

    device: what a placement that uses one means. poison: fill freed slots with NaN, for tests. slots: the ring that
    disk is read into. arranged: whether every layer has its weights, or is lent them; not after a rearrangement that
    was interrupted. between_passes: calls what rearranges, when nobody else is amid a pass; None where nobody is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        units: Units,
        placement: Placement,
        *,
        poison: bool = False,
        device: Device | None = None,
    ) -> None:
        self.model, self.checkpoint, self.units, self.poison = model, checkpoint, units, poison
        self.blobs = list(units.layers)
        self.reader = FileReader()
        self.device_side = None if device is None else DeviceSide(device, poison)
        self._embedding: DiskEmbedding | None = None
        self._handles: list[RemovableHandle] = []
        self._kept: list[LayerView] = []
        self._earlier = StreamingStats(0, 0, 0.0, True)
        self.arranged = False
        self.between_passes: Callable[[Callable[[], None]], None] | None = None
        self.kv: KVFormat | None = None
        self.kv_bytes: int | None = None
        self._kv_queue: ReadQueue | None = None
        self._prepare(placement)

    def _prepare(self, placement: Placement) -> None:
        """Begin to read what is streamed, as a placement says."""
        self.placement = placement
        head_blocks = self.units.head.blocks() if self.units.head and placement.head_tiers else ()
        layers: list[tuple[LayerBlob, ...]] = [(blob,) for blob in self.units.placed(placement.experts_apart)]
        if placement.way == "staged":
            layers = [layer.parts for layer in self.units.staged(placement.split)]
        tiers = zip((*layers, *((block,) for block in head_blocks)), placement.units_tiers, strict=True)
        self.streamed_blobs = [blob for blobs, tier in tiers if tier == "disk" for blob in blobs]
        self.expert_blobs = [blob for layer in placement.experts_apart for blob in self.units.experts[layer]]
        self.queue = self._new_queue() if self.streamed_blobs or self.expert_blobs else None
        self.slots: Slots | None = None
        if self.queue is not None and self.streamed_blobs:
            self.slots = self._host_ring(self.queue)
        self._lent = None if self.slots is None else LentLayers(self.slots, self._streamed_view)

    def _new_queue(self) -> ReadQueue:
        queue = ReadQueue(self.reader, verify)
        weakref.finalize(self, queue.abandon).atexit = False  # a model may be dropped without being closed
        return queue

    def _host_ring(self, queue: ReadQueue) -> Slots:
        placement, fence = self.placement, None
        if self.device_side is not None:
            device = self.device_side.device
            fence = {"staged": device.mark_copies, "mapped": device.mark_compute}.get(placement.way)
        return Slots(self.streamed_blobs, placement.depth, queue, self.poison, fence)

    @property
    def rings(self) -> tuple[Ring, ...]:
        """The slots that disk is read into, and what else the sequences of a round go through together."""
        on_host = () if self.slots is None else (self.slots,)
        return on_host if self.device_side is None else (*on_host, *self.device_side.rings)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return [self.model.get_submodule(blob.module) for blob in self.blobs]

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens and leaves its logits."""
        return torch.device("cpu") if self.device_side is None else self.device_side.device.torch_device

    @property
    def device_map(self) -> dict[str, str | int]:
        """Where the weights of every decoder layer lie, and under "" those of what is around them."""
        around: str | int = "cpu" if self.device_side is None else 0
        places: dict[str, str | int] = {"resident": 0, "disk": "disk"}
        tiers = zip(self.blobs, self.placement.tiers, strict=True)
        return {"": around} | {blob.module: places.get(tier, "cpu") for blob, tier in tiers}

    @property
    def kv_queue(self) -> ReadQueue:
        """Reads keys and values back: the queue of the weights, where some are streamed."""
        if self._kv_queue is None:
            self._kv_queue = self.queue or self._new_queue()
        return self._kv_queue

    @property
    def stats(self) -> StreamingStats:
        """Counters since loading."""
        earlier, side = self._earlier, self.device_side
        copies = () if side is None or side.copies is None else (side.copies,)
        reading = {queue for queue in (self.queue, self._kv_queue) if queue is not None}
        return StreamingStats(
            earlier.bytes_read + sum(queue.bytes_read for queue in reading),
            earlier.layer_reads + (0 if self.queue is None else self.queue.reads),
            earlier.wait_seconds + sum(queue.wait_seconds for queue in (*reading, *copies)),
            self.reader.direct,
            0 if side is None else side.cache_copies.copied_bytes + side.cache_copies_back.copied_bytes,
            0 if side is None else side.layer_copies.copied_bytes,
        )

    @property
    def head_memory(self) -> Tensor:
        """The weight of the output embeddings as it lies in memory, or a block of it, uint8 [bytes]."""
        head = self.model.get_output_embeddings()
        if isinstance(head, StreamedHead):
            return head.memory
        weight = head.packed.codes if isinstance(head, PackedLinear) and head.packed else head.weight.detach()
        return weight.reshape(-1).view(torch.uint8)

    @property
    def host_memory(self) -> list[Tensor]:
        """What layers take of the host's memory, and the head if it is there, uint8 [bytes] each."""
        kept = [memory for view in self._kept for memory in view.memory]
        slots = [] if self.slots is None else [arena.bytes for arena in self.slots.arenas]
        return kept + slots + ([] if self.head_memory.device.type != "cpu" else [self.head_memory])

    @property
    def layer_token_bytes(self) -> tuple[int, ...]:
        """Weights that one token is multiplied by in each decoder layer: of experts, those that it is sent to."""
        experts = self.placement.needs.experts
        if experts is None:
            return tuple(blob.nbytes for blob in self.units.layers)
        around = zip(self.units.around, experts.touched(1), strict=True)
        return tuple(blob.nbytes + touched * experts.expert_bytes for blob, touched in around)

    @property
    def head_bytes(self) -> int:
        """Weights of the head, all of its blocks."""
        head = self.units.head
        return (self.head_memory if head is None else head.blob.tensors[head.module + PACKED]).nbytes

    @property
    def bytes_per_token(self) -> int:
        """Weights that decoding one token reads, wherever they lie, the head with them."""
        return sum(self.layer_token_bytes) + self.head_bytes

    def attach(self) -> None:
        """Read everything that is to stay in memory, and hook what is streamed.

        Raises CheckpointError, and torch.OutOfMemoryError if the device's memory does not do.
        """
        self.attach_layers()
        apart = self._attach_apart()
        for blob in (blob for blob in self.checkpoint.blobs if not blob.module):
            if (rest := without(blob, apart)) is not None:
                self.keep(rest)
        self.model.tie_weights()
        self.fuse()

    def rearrange(self, placement: Placement) -> None:
        """Bring every decoder layer to the tier of another placement; what lies around them stays where it is.

        For a model with a device, none of whose experts or blocks of the head are apart, while no forward runs. Raises
        what `attach` raises; `arranged` is False then.
        """
        self.arranged, self._earlier = False, self.stats
        self._drop_layers()
        self._prepare(placement)
        self.attach_layers()
        self.fuse()

    def fuse(self) -> None:
        """Let single tokens take a way of their own through the layers that are proved, but for those in parts."""
        unfuse(self.layers)
        on_host = {at: layer for at, layer in enumerate(self.layers) if self.placement.hows[at] == "host"}
        if compiled_library() is not None:
            fuse(self.model, on_host, self._in_memory, FusedLayer, torch.device("cpu"))
        if self.device_side is not None:
            self.device_side.fuse(self.model, self._parts, self.placement)

    def attach_layers(self) -> None:
        """Read the layers that stay in memory, and hook what is streamed. Raises what `attach` raises."""
        if self.queue is not None and self.expert_blobs:
            self._fetch_experts(self.queue)
        placement, placed = self.placement, self.units.placed(self.placement.experts_apart)
        if self.device_side is not None:
            self.device_side.arrange(self._parts, placement)
            on_host = [layer for layer, how in zip(self.layers, placement.hows, strict=True) if how == "host"]
            move_buffers(self.model, on_host, self.device)
        for blob, tier, how in zip(placed, placement.tiers, placement.hows, strict=True):
            if tier == "host":
                self._kept.append(self._keep_on_host(blob))
            elif tier == "disk" and how == "host" and self._lent is not None:
                layer, position = self.model.get_submodule(blob.module), self.streamed_blobs.index(blob)
                self._handles += self._lent.hook(layer, position)
        self.arranged = True

    def _drop_layers(self) -> None:
        """Leave no decoder layer with weights, and give their memory back. To be called again if it was interrupted."""
        unfuse(self.layers)
        for handle in self._handles:
            handle.remove()
        for view in self._kept:
            view.detach()
        if self.queue is not None:
            self.queue.close()
        if self.device_side is not None:
            self.device_side.close()
        self._handles, self._kept, self.queue, self.slots, self._lent = [], [], None, None, None

    def _in_memory(self, index: int) -> AbstractContextManager[None]:
        """Return a context in which the weights of decoder layer `index` are attached."""
        modules, blob = [blob.module for blob in self.streamed_blobs], self.blobs[index]
        if self._lent is None or blob.module not in modules:
            return nullcontext()
        return self._lent.lent(modules.index(blob.module), self.layers[index])

    def _attach_apart(self) -> set[str]:
        """Leave embeddings in their shard and the head in blocks, as planned; return the tensors that are so apart."""
        apart: set[str] = set()
        if self.placement.embedding_on_disk and self.units.embedding is not None:
            blob, name = self.units.embedding
            self._embedding = DiskEmbedding(blob, name, self.model.dtype)
            self.model.set_submodule(name.removesuffix(".weight"), self._embedding)
            apart.add(name)
        if self.placement.head_tiers and self.units.head is not None:
            head = self.units.head
            verify_head(head, self.reader)
            linear = self.model.get_submodule(head.module)
            assert isinstance(linear, PackedLinear), "a head in blocks is packed"
            streamed = StreamedHead(linear, head, self.checkpoint.recipe.group_size, len(self.blobs))
            position = self.placement.tiers.count("disk")
            for index, tier in enumerate(self.placement.head_tiers):
                if tier == "disk" and self.slots is not None:
                    streamed.stream(index, self.slots, position)
                    position += 1
                else:
                    streamed.keep(index, self.reader)
            self.model.set_submodule(head.module, streamed)
            apart |= {*head.names, head.module + SHAPE}
        return apart

    def _fetch_experts(self, queue: ReadQueue) -> None:
        """Let the lists of experts that are apart ask for those they route to."""
        cache = ExpertCache(self.expert_blobs, self.placement.expert_slots, queue, self._view_of, self.poison)
        for first, blob in enumerate(self.expert_blobs):
            module, _, index = blob.module.rpartition(".")
            if index == "0":
                experts = self.model.get_submodule(module)
                assert isinstance(experts, Experts), "only these are apart"
                experts.lend = partial(cache.lend, first)

    def keep(self, blob: LayerBlob) -> None:
        """Read a shard or a part of one, to stay where the model is. Raises CheckpointError."""
        if self.device_side is None:
            self._keep_on_host(blob)
        else:
            self.device_side.keep(blob, self._parts)

    def close(self) -> None:
        """Stop reading and close the files; the model cannot run afterwards."""
        for queue in {self.queue, self._kv_queue}:
            if queue is not None:
                queue.close()
        if self.device_side is not None:
            self.device_side.close()
        self.reader.close()
        if self._embedding is not None:
            self._embedding.close()

    @property
    def _parts(self) -> Parts:
        return Parts(
            blobs=self.blobs,
            staged=self.units.staged(self.placement.split),
            module_of=self.model.get_submodule,
            dtype=self.model.dtype,
            read=self._read,
            view_of=self._view_of,
            on_disk=self.streamed_blobs,
            host_ring=self.slots,
        )

    def _read(self, blob: LayerBlob) -> Arena:
        arena = Arena(blob.nbytes)
        read_blob(self.reader, blob, arena)
        verify(blob, arena)
        return arena

    def _keep_on_host(self, blob: LayerBlob) -> LayerView:
        view = self._view_of(blob, self._read(blob))
        view.attach()
        return view

    def _view_of(self, blob: LayerBlob, memory: Memory, allocate: Callable[[int], Memory] | None = None) -> LayerView:
        return layer_view(self.model, blob, memory, self.checkpoint.recipe.group_size, allocate)

    def _streamed_view(self, position: int, memory: Memory) -> LayerView:
        return self._view_of(self.streamed_blobs[position], memory)
