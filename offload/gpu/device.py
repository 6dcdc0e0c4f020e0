"""What the executor needs of a device beside the host: memory, one stream that copies to it, and fences between.

Everything that is computed is queued in the stream that the caller computes in; copies are queued in a stream of their
own. Nothing here waits for the device but `Fence.synchronize`, which the token loop never calls, and what `read_later`
returns, which it calls when the device has come there.
"""

import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.triton_tuning import GpuKind
from offload.memory import Arena, Memory

_REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable, cudaHostRegisterMapped


class Fence(Protocol):
    """A place in a stream, reached when all that was queued before it is done."""

    def synchronize(self) -> None:
        """Let this thread wait until it is reached."""


class Stamp(Protocol):
    """A moment in a stream, known once the stream has come there."""

    def seconds_after(self, other: Any) -> float:
        """Return the seconds since another stamp of the same device. Both have been reached."""


class Device(Protocol):
    """A device of which `torch_device` is torch's name."""

    torch_device: torch.device

    @property
    def gpu(self) -> GpuKind:
        """What its kernels are launched by."""

    @property
    def most_mapped(self) -> int:
        """Activations that are multiplied by weights in host memory."""

    @property
    def total_bytes(self) -> int:
        """Memory that it has."""

    @property
    def used_bytes(self) -> int:
        """What of it is taken now, by whomever."""

    def allocate(self, nbytes: int) -> Memory:
        """Return memory on the device. Raises torch.OutOfMemoryError."""

    def pin(self, arena: Arena) -> bool:
        """Let the device read an arena where it lies; False if the system refuses."""

    def unpin(self, arena: Arena) -> None:
        """Take it back."""

    def allocate_pinned(self, nbytes: int) -> Tensor:
        """Return host memory that is the device's to read from the start, uint8 [nbytes]. Raises RuntimeError."""

    def free_pinned(self, memory: Tensor) -> None:
        """Give it back; nothing of it is in use."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of as many bytes, out of pinned memory, in the stream of the copies."""

    def copy_back(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of as many bytes from the device into pinned memory, in the same stream."""

    def copy_now(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of as many bytes, out of any host memory, where the caller has the device compute."""

    def mark_copies(self) -> Fence:
        """Return a fence behind the copies that are queued."""

    def mark_compute(self) -> Fence:
        """Return a fence behind what the caller has queued to be computed."""

    def stamp_copies(self) -> Stamp:
        """Return the moment at which the copies that are queued are done."""

    def stamp_compute(self) -> Stamp:
        """Return the moment at which what the caller has queued to be computed is done."""

    def copies_wait(self, fence: Fence) -> None:
        """Let copies that are queued from now on begin behind a fence."""

    def compute_waits(self, fence: Fence) -> None:
        """Let what the caller queues from now on begin behind a fence."""

    def computing(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return a context in which any thread computes in the stream in which this one does now."""

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        """Return what queues, in one call, all that `queue` would queue in the stream that the caller computes in.

        queue: launches the same kernels each time, with the same operands in the same places, allocates nothing, and
        was run before. It is called now, and nothing of it is computed.
        """

    def read_later(self, value: Tensor) -> Callable[[], bool]:
        """Queue bringing a truth value to the host, bool [], behind what computes it.

        Returns what tells it, which waits if it is called before the device has come there.
        """

    def settle(self) -> None:
        """Wait for all that is queued, and let memory that was given back be the device's again."""


def find_device() -> Device | None:
    """Return the GPU that torch would take, None if there is none."""
    return CudaDevice() if torch.cuda.is_available() else None


class CudaFence:
    """An event of CUDA."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def synchronize(self) -> None:
        """Let this thread wait until it is reached."""
        self.event.synchronize()


class CudaStamp:
    """An event of CUDA that keeps its time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def seconds_after(self, other: "CudaStamp") -> float:
        """Return the seconds since another stamp of the same device. Both have been reached."""
        return float(other.event.elapsed_time(self.event)) / 1e3


class CudaDevice:
    """A GPU through torch.cuda.

    Host memory is registered as it lies (cudaHostRegister), an arena at a time: torch's own pinned memory is rounded up
    to a power of two, and no copy may cross from one registration into the next.
    """

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self.torch_device)
        self._captures = torch.cuda.Stream(self.torch_device)  # the default stream cannot be captured
        self._probe = torch.zeros(1, device=self.torch_device)

    @cached_property
    def gpu(self) -> GpuKind:
        """What its kernels are launched by."""
        return GpuKind.of(self.torch_device)

    @cached_property
    def most_mapped(self) -> int:
        """Activations that are multiplied by weights in host memory."""
        from kernels.triton_matmul import most_mapped  # needs triton, which a machine without a GPU may lack

        return most_mapped(self.torch_device)

    @property
    def total_bytes(self) -> int:
        """Memory that it has."""
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    @property
    def used_bytes(self) -> int:
        """What of it is taken now, by whomever."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(total - free)

    def allocate(self, nbytes: int) -> Memory:
        """Return memory on the device. Raises torch.OutOfMemoryError."""
        return Memory(torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device))

    def pin(self, arena: Arena) -> bool:
        """Let the device read an arena where it lies; False if the system refuses."""
        pointer = arena.bytes.data_ptr()
        assert pointer % mmap.PAGESIZE == 0, "arenas are mapped"
        if int(torch.cuda.cudart().cudaHostRegister(pointer, arena.nbytes, _REGISTER_FLAGS)) == 0:
            return True
        with suppress(RuntimeError):  # a refusal stays CUDA's last error, which the next launch would be blamed for
            self._probe.zero_()
        return False

    def unpin(self, arena: Arena) -> None:
        """Take it back."""
        torch.cuda.cudart().cudaHostUnregister(arena.bytes.data_ptr())

    def allocate_pinned(self, nbytes: int) -> Tensor:
        """Return host memory that is the device's to read from the start, uint8 [nbytes]. Raises RuntimeError.

        The driver's own, which `ulimit -l` does not bound; in powers of two.
        """
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def free_pinned(self, memory: Tensor) -> None:
        """Do nothing: torch takes it back with the last tensor in it."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of as many bytes, out of pinned memory, in the stream of the copies."""
        target.record_stream(self._copies)  # torch may be given it back before it is written
        self._copy(target, source)

    def copy_back(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of as many bytes from the device into pinned memory, in the same stream."""
        source.record_stream(self._copies)
        self._copy(target, source)

    def copy_now(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of as many bytes, out of any host memory, in the stream in which the caller computes."""
        target.copy_(source, non_blocking=True)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def mark_copies(self) -> Fence:
        """Return a fence behind the copies that are queued."""
        return CudaFence(self._copies)

    def mark_compute(self) -> Fence:
        """Return a fence behind what the caller has queued to be computed."""
        return CudaFence(torch.cuda.current_stream(self.torch_device))

    def stamp_copies(self) -> Stamp:
        """Return the moment at which the copies that are queued are done."""
        return CudaStamp(self._copies)

    def stamp_compute(self) -> Stamp:
        """Return the moment at which what the caller has queued to be computed is done."""
        return CudaStamp(torch.cuda.current_stream(self.torch_device))

    def copies_wait(self, fence: Fence) -> None:
        """Let copies that are queued from now on begin behind a fence."""
        assert isinstance(fence, CudaFence), "fences of one device"
        self._copies.wait_event(fence.event)

    def compute_waits(self, fence: Fence) -> None:
        """Let what the caller queues from now on begin behind a fence."""
        assert isinstance(fence, CudaFence), "fences of one device"
        torch.cuda.current_stream(self.torch_device).wait_event(fence.event)

    def computing(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return a context in which any thread computes in the stream in which this one does now.

        torch's current stream, and its current device, are each thread's own.
        """
        return partial(torch.cuda.stream, torch.cuda.current_stream(self.torch_device))

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        """Return a CUDA graph's replay: all that `queue` would queue, in one call.

        Not through `torch.cuda.graph`, which waits for the device and collects garbage before each. Other threads may
        go on with what a capture in their own would forbid, as registering memory.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._captures):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                queue()
            finally:
                graph.capture_end()
        return graph.replay

    def read_later(self, value: Tensor) -> Callable[[], bool]:
        """Queue bringing a truth value to the host, bool [], behind what computes it.

        Returns what tells it, which waits if it is called before the device has come there.
        """
        there = torch.empty((), dtype=torch.bool, pin_memory=True)
        there.copy_(value, non_blocking=True)
        fence = self.mark_compute()

        def tell() -> bool:
            fence.synchronize()
            return bool(there)

        return tell

    def settle(self) -> None:
        """Wait for all that is queued, and let memory that was given back be the device's again."""
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
