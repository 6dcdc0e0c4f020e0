"""Where chunks of keys and values are that attention does not have at hand: in a file, or for a GPU in host memory."""

import logging
import os
import tempfile
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from offload.checkpoint import LayerBlob
from offload.command import format_bytes
from offload.errors import ResourceError
from offload.gpu.copy_queue import CopyLog, CopyQueue, Kept
from offload.gpu.device import Device, Fence
from offload.kv.shelf import Chunk
from offload.memory import Arena, Memory, whole_pages
from offload.read_queue import ReadQueue
from offload.source import cache_directory

_log = logging.getLogger(__name__)


class FileStore:
    """A temporary file, for attention on the host. queue: reads; that of the weights, where some are streamed."""

    def __init__(self, queue: ReadQueue) -> None:
        self.queue = queue
        cache_directory().mkdir(parents=True, exist_ok=True)
        self._descriptor, name = tempfile.mkstemp(dir=cache_directory(), prefix="kv-")
        self.path = Path(name)
        finalize(self, _delete, self._descriptor, self.path)
        self._spare: list[int] = []
        self._end = 0

    def allocate(self, nbytes: int) -> Memory:
        """Return memory where attention reads it."""
        return Arena(nbytes)

    def put(self, chunk: Chunk, together: int) -> LayerBlob:
        """Write a full chunk. Raises ResourceError if the disk takes no more."""
        nbytes, memory = chunk.memory.nbytes, chunk.memory
        assert isinstance(memory, Arena), "made here"
        place = self._spare.pop() if self._spare else self._end
        try:
            written = 0
            while written < nbytes:
                written += os.pwrite(self._descriptor, memory.view(written, nbytes - written), place + written)
        except OSError as error:
            raise ResourceError(f"{self.path}: keys and values cannot be written ({error.strerror})") from None
        self._end = max(self._end, place + nbytes)
        return LayerBlob(self.path, _name(place // nbytes), place, nbytes, {}, {})

    def drop(self, blob: LayerBlob) -> None:
        """Let others take its place."""
        self._spare.append(blob.offset)

    def fence(self) -> Fence | None:
        """Return None: chunks are read by the thread that asks."""
        return None

    def wait_for(self, fence: Fence | None) -> None:
        """Do nothing."""


class HostStore:
    """Pinned host memory, for attention on a device; chunks are copied there and back in the stream of the copies.

    copies, copies_back: where those to the device and those out of it are noted.
    """

    def __init__(self, device: Device, copies: CopyLog, copies_back: CopyLog) -> None:
        self._device, self._copies_back = device, copies_back
        self._places: list[Memory] = []
        self._spare: list[int] = []
        self._blobs: dict[str, tuple[Kept, int]] = {}
        self.queue = CopyQueue(device, self._blobs, None, copies)
        self._registered: list[Arena] = []
        self._allocated: list[Tensor] = []
        finalize(self, _free, device, self._registered, self._allocated)

    def allocate(self, nbytes: int) -> Memory:
        """Return memory where attention reads it. Raises torch.OutOfMemoryError."""
        return self._device.allocate(nbytes)

    def put(self, chunk: Chunk, together: int) -> LayerBlob:
        """Queue a copy of a full chunk, as it will be when what was queued before is computed.

        together: chunks that memory is pinned for at once, where none is left. Raises ResourceError if the system gives
        none.
        """
        nbytes = chunk.memory.nbytes
        if not self._spare:
            with torch.inference_mode(False):  # it outlives the mode of the caller
                self._grow(nbytes, together)
        place = self._spare.pop()
        self._device.copies_wait(self._device.mark_compute())
        blob = LayerBlob(Path(), _name(place), place, nbytes, {}, {})
        with self._copies_back.copying(blob):
            self._device.copy_back(self._places[place].bytes[:nbytes], chunk.memory.bytes)
            chunk.free = self._device.mark_copies()
        return blob

    def drop(self, blob: LayerBlob) -> None:
        """Let others take its place; copies are made one after the other."""
        self._spare.append(blob.offset)

    def fence(self) -> Fence | None:
        """Return one behind all that the device was told to compute."""
        return self._device.mark_compute()

    def wait_for(self, fence: Fence | None) -> None:
        """Let what is computed from now on begin behind a fence."""
        if fence is not None:
            self._device.compute_waits(fence)

    def _grow(self, nbytes: int, count: int) -> None:
        """Have room for so many chunks more."""
        size = whole_pages(nbytes)
        arena = Arena(count * size)
        if self._device.pin(arena):
            self._registered.append(arena)
            memory = arena.bytes
        else:
            memory = self._driver_memory(arena.nbytes)
        for start in range(0, arena.nbytes, size):
            place = len(self._places)
            self._places.append(Memory(memory[start : start + size]))
            self._blobs[_name(place)] = (Kept(self._places), place)
            self._spare.append(place)

    def _driver_memory(self, nbytes: int) -> Tensor:
        if not self._allocated:
            _log.warning(
                "memory for keys and values cannot be pinned (`ulimit -l`): it is the driver's own, in powers of two, "
                "up to twice of what is planned"
            )
        try:
            memory = self._device.allocate_pinned(nbytes)
        except RuntimeError as error:
            raise ResourceError(
                f"{format_bytes(nbytes)} of pinned memory for keys and values are not to be had: "
                f"{str(error).splitlines()[0]}"
            ) from None
        self._allocated.append(memory)
        return memory


def _name(place: int) -> str:
    return f"keys and values {place}"


def _delete(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    path.unlink(missing_ok=True)


def _free(device: Device, registered: list[Arena], allocated: list[Tensor]) -> None:
    device.settle()
    while registered:
        device.unpin(registered.pop())
    while allocated:
        device.free_pinned(allocated.pop())
