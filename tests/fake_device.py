"""A device without hardware: its memory is host memory apart, its copies happen only when a fence is waited for.

Beside that laziness it keeps vector clocks of what is queued: a kernel that runs without having waited for the copy of
its weights, a copy into memory that a kernel may still read, a kernel that writes to what is still being copied, and a
read from disk into memory that is still being copied or computed from are errors, whichever order things took.
"""

import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from triton.runtime.interpreter import InterpretedFunction

from kernels.attention import CompiledAttention, DequantizedAttention, append_tokens
from kernels.kv_block import BLOCK_TOKENS, KVBlocks
from kernels.triton_tuning import GpuKind, split_elements, tuning_of
from offload.linear import PackedLinear
from offload.memory import Arena, FileReader, Memory

Clock = dict[str, int]


class Region:
    """A range of memory. written: the copy that filled it last, made: the kernel; taken, used: that read it last."""

    def __init__(self, memory: Tensor) -> None:
        self.start, self.end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        self.written = self.made = self.taken = self.used = 0


class FakeFence:
    def __init__(self, device: "FakeDevice", clock: Clock) -> None:
        self.device, self.clock = device, clock

    def synchronize(self) -> None:
        with self.device.lock:
            thread = threading.current_thread().name
            self.device.waited_in.append(thread)
            self.device.run_copies(self.clock.get("copy", 0))
            join(self.device.clock_of(thread), self.clock)


class FakeStamp:
    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def seconds_after(self, other: "FakeStamp") -> float:
        return self.seconds - other.seconds


def join(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


class Bytes(bytearray):
    """Memory of which it can be told when the last tensor in it is gone."""


class FakeDevice:
    """fail_at: the allocation that finds no memory. unpinned: the arena that is refused, 0 for all of them.

    limit: memory for allocations, None for no end of it; held_bytes: what they hold now, peak_bytes: held at most;
    buffers_bytes: of pinned memory that was allocated; crossed_bytes: that came to it out of host memory. fused_batch:
    activations up to which a product takes no memory for its dequantized weight; split_products: that took memory for
    sums of splits. streams: that something was computed in; each thread has a current one.

    eager: copies happen when they are queued instead of as late as can be.
    """

    torch_device = torch.device("cpu")

    def __init__(
        self, fail_at: int = 0, unpinned: int | None = None, eager: bool = False, most_mapped: int = 2
    ) -> None:
        self.fail_at, self.unpinned, self.eager, self.most_mapped = fail_at, unpinned, eager, most_mapped
        self.total_bytes, self.used_bytes = 8 << 30, 100 << 20
        self.lock = threading.RLock()
        self.allocations = self.copies = self.copied_back_bytes = self.pins = self.stamps = self.read_laters = 0
        self.captures = self.replays = 0
        self.held_bytes = self.peak_bytes = self.buffers_bytes = self.crossed_bytes = 0
        self.gpu = GpuKind(8, 4)
        self.fused_batch, self.split_products = tuning_of(self.gpu.capability).fused_batch, 0
        self.limit: int | None = None
        self.regions: list[Region] = []
        self.pinned: dict[int, Region] = {}
        self.waited_in: list[str] = []
        self._clocks: dict[str, Clock] = {}
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._current = threading.local()
        self.streams: set[str] = set()

    @property
    def stream(self) -> str:
        return str(getattr(self._current, "stream", "the default"))

    @contextmanager
    def in_stream(self, name: str) -> Iterator[None]:
        before, self._current.stream = self.stream, name
        try:
            yield
        finally:
            self._current.stream = before

    def computing(self) -> Callable[[], AbstractContextManager[None]]:
        return partial(self.in_stream, self.stream)

    def clock_of(self, stream: str) -> Clock:
        return self._clocks.setdefault(stream, {})

    def allocate(self, nbytes: int) -> Memory:
        self.allocations += 1
        if self.allocations == self.fail_at or (self.limit is not None and self.held_bytes + nbytes > self.limit):
            raise torch.OutOfMemoryError("told to have no memory")
        buffer = Bytes(nbytes)
        memory = torch.frombuffer(buffer, dtype=torch.uint8).fill_(0xFF)
        region = Region(memory)
        region.used = self.clock_of("compute").get("compute", 0)  # it may be memory that was just given back
        self.regions.append(region)
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(buffer, self._freed, region, nbytes)
        return Memory(memory)

    def _freed(self, region: Region, nbytes: int) -> None:
        self.regions.remove(region)
        self.held_bytes -= nbytes

    def pin(self, arena: Arena) -> bool:
        self.pins += 1
        if self.unpinned in (0, self.pins):
            return False
        self.pinned[arena.bytes.data_ptr()] = Region(arena.bytes)
        return True

    def unpin(self, arena: Arena) -> None:
        del self.pinned[arena.bytes.data_ptr()]

    def allocate_pinned(self, nbytes: int) -> Tensor:
        memory = Arena(nbytes).bytes[:nbytes].fill_(0xFF)
        self.buffers_bytes += nbytes
        self.pinned[memory.data_ptr()] = Region(memory)
        return memory

    def free_pinned(self, memory: Tensor) -> None:
        self.buffers_bytes -= memory.nbytes
        del self.pinned[memory.data_ptr()]

    def copy(self, target: Tensor, source: Tensor) -> None:
        with self.lock:
            into, out = self._region(target.data_ptr(), self.regions), self._region(source.data_ptr())
            assert into is not None, "a copy into memory that is not the device's"
            assert out is not None, "a copy out of memory that is not pinned"
            clock = self.clock_of("copy")
            assert clock.get("compute", 0) >= into.used, "a slot is overwritten while a kernel may read it"
            clock["copy"] = into.written = out.taken = clock.get("copy", 0) + 1
            self.copies += 1
            self.crossed_bytes += source.nbytes
            self._pending.append((clock["copy"], target, source))
            if self.eager:
                self.run_copies(clock["copy"])

    def copy_back(self, target: Tensor, source: Tensor) -> None:
        with self.lock:
            into, out = self._region(target.data_ptr()), self._region(source.data_ptr(), self.regions)
            assert into is not None, "a copy into memory that is not pinned"
            assert out is not None, "a copy out of memory that is not the device's"
            assert target.nbytes == source.nbytes
            clock = self.clock_of("copy")
            assert clock.get("compute", 0) >= out.made, "memory is copied before a kernel has written to it"
            clock["copy"] = into.written = out.taken = clock.get("copy", 0) + 1
            self.copied_back_bytes += source.nbytes
            self._pending.append((clock["copy"], target, source))
            if self.eager:
                self.run_copies(clock["copy"])

    def copy_now(self, target: Tensor, source: Tensor) -> None:
        assert self._region(target.data_ptr(), self.regions) is not None, "a copy into memory that is not the device's"
        if self._region(source.data_ptr()) is None:  # what is not pinned crosses as well
            self.crossed_bytes += source.nbytes
        self.kernel_reads(source)
        self.kernel_writes(target)
        target.copy_(source)

    def run_copies(self, until: int) -> None:
        while self._pending and self._pending[0][0] <= until:
            _, target, source = self._pending.pop(0)
            target.copy_(source)

    def mark_copies(self) -> FakeFence:
        with self.lock:
            return FakeFence(self, dict(self.clock_of("copy")))

    def mark_compute(self) -> FakeFence:
        with self.lock:
            self.streams.add(self.stream)
            return FakeFence(self, dict(self.clock_of("compute")))

    def stamp_copies(self) -> FakeStamp:
        self.stamps += 1
        return FakeStamp()

    def stamp_compute(self) -> FakeStamp:
        self.stamps += 1
        return FakeStamp()

    def copies_wait(self, fence: FakeFence) -> None:
        with self.lock:
            join(self.clock_of("copy"), fence.clock)

    def compute_waits(self, fence: FakeFence) -> None:
        with self.lock:
            self.streams.add(self.stream)
            self.run_copies(fence.clock.get("copy", 0))
            join(self.clock_of("compute"), fence.clock)

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        """Keep what is launched, with its operands as they are now: whatever else `queue` does is not replayed."""
        launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        run = InterpretedFunction.run
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                InterpretedFunction,
                "run",
                lambda *arguments, **options: launches.append((arguments[0], arguments[1:], options)),
            )
            queue()
        assert launches, "nothing is captured"
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for kernel, arguments, options in launches:
                run(kernel, *arguments, **options)

        return replay

    def read_later(self, value: Tensor) -> Callable[[], bool]:
        self.read_laters += 1
        fence, held = self.mark_compute(), value.clone()

        def tell() -> bool:
            reached = self.clock_of(threading.current_thread().name).get("compute", 0)
            if reached < fence.clock.get("compute", 0):
                fence.synchronize()
            return bool(held)

        return tell

    def read_back(self) -> None:
        """Let this thread have waited for all that is queued to be computed, as reading a result back does."""
        with self.lock:
            join(self.clock_of(threading.current_thread().name), self.clock_of("compute"))

    def settle(self) -> None:
        with self.lock:
            self.run_copies(1 << 60)
            for waiting in (threading.current_thread().name, "copy", "compute"):
                for stream in ("copy", "compute"):
                    join(self.clock_of(waiting), self.clock_of(stream))

    def multiply(self, linear: PackedLinear, x: Tensor) -> None:
        """Take what a product takes while it runs, where the weight is the device's to read."""
        assert linear.packed is not None, "it is attached"
        address, rows = linear.packed.codes.data_ptr(), x.numel() // x.shape[-1]
        on_device, pinned = self._region(address, self.regions), self._region(address)
        if rows > self.fused_batch and (on_device or pinned):
            self.allocate(linear.in_features * linear.out_features * x.dtype.itemsize)
        elif on_device or pinned:
            tuning = tuning_of(self.gpu.capability)
            mapped = linear.packed.as_mapped or on_device is None
            count = split_elements(rows, linear.packed, tuning, self.gpu.processors, mapped)
            self.split_products += count > 0
            self.allocate(4 * count) if count else None

    def kernel_reads(self, tensor: Tensor) -> None:
        with self.lock:
            region, pinned = self._region(tensor.data_ptr(), self.regions), self._region(tensor.data_ptr())
            self.crossed_bytes += 0 if pinned is None else tensor.nbytes
            region = region or pinned
            if region is not None:
                self.streams.add(self.stream)
                clock = self.clock_of("compute")
                assert clock.get("copy", 0) >= region.written, "a kernel reads a slot without waiting for its copy"
                clock["compute"] = region.used = clock.get("compute", 0) + 1

    def kernel_writes(self, tensor: Tensor) -> None:
        with self.lock:
            region = self._region(tensor.data_ptr(), self.regions)
            if region is not None:
                clock = self.clock_of("compute")
                assert clock.get("copy", 0) >= region.written, "a kernel writes where a copy may still write"
                assert clock.get("copy", 0) >= region.taken, "a kernel writes to what is still being copied"
                clock["compute"] = region.made = region.used = clock.get("compute", 0) + 1

    def host_writes(self, address: int) -> None:
        with self.lock:
            region = self._region(address)
            if region is not None:
                clock = self.clock_of(threading.current_thread().name)
                assert clock.get("copy", 0) >= region.taken, "disk is read over what is still being copied"
                assert clock.get("compute", 0) >= region.used, "disk is read over what a kernel may still read"

    def _region(self, address: int, regions: list[Region] | None = None) -> Region | None:
        among = self.pinned.values() if regions is None else regions
        return next((region for region in among if region.start <= address < region.end), None)


@contextmanager
def fake_gpu(
    monkeypatch: pytest.MonkeyPatch, device: FakeDevice | None = None, steps: bool = False
) -> Iterator[FakeDevice]:
    """Let `load` find a device, and tell it of every module that runs, of keys and values, and of reads from disk.

    steps: let single tokens take captured steps, where Triton interprets.
    """
    device = device or FakeDevice()
    read_into = FileReader.read_into
    _watch_cache(monkeypatch, device)

    def watched(reader: FileReader, path: Path, offset: int, nbytes: int, target: memoryview) -> None:
        device.host_writes(ctypes.addressof(ctypes.c_char.from_buffer(target)))
        read_into(reader, path, offset, nbytes, target)

    def touch(module: nn.Module, arguments: Any, _: Any) -> None:
        """Before a hook of the module takes its weights away, and not before one brought them."""
        packed = module.packed if isinstance(module, PackedLinear) else None
        held = [] if packed is None else [packed.codes, packed.scale]
        held += [tensor for tensor in module._parameters.values() if tensor is not None and not tensor.is_meta]
        for tensor in held:
            device.kernel_reads(tensor)
        if isinstance(module, PackedLinear) and packed is not None:
            device.multiply(module, arguments[0])

    monkeypatch.setattr(FileReader, "read_into", watched)
    monkeypatch.setattr("offload.executor.find_device", lambda: device)
    if steps:
        _watch_launches(monkeypatch, device)
    else:
        monkeypatch.setattr("offload.gpu.device_side.fuse", lambda *_: 0)
        for module in ("needs", "step_needs"):  # nor is anything planned for them
            monkeypatch.setattr(f"offload.planning.{module}.step_shape", lambda *_: None)
    handle = register_module_forward_hook(touch)
    try:
        yield device
    finally:
        handle.remove()


def watch_reads(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    """Tell a device of tensors that are read back to the host, as generate() does with every token."""

    def watch(name: str) -> None:
        read = getattr(Tensor, name)

        def watched(tensor: Tensor, *more: Any) -> Any:
            device.read_back()
            return read(tensor, *more)

        monkeypatch.setattr(Tensor, name, watched)

    watch("cpu")
    watch("tolist")


def _watch_launches(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    """Tell a device of the operands of every kernel of Triton's."""
    run = InterpretedFunction.run

    def watched(kernel: Any, *arguments: Any, **options: Any) -> Any:
        for operand in arguments:
            if isinstance(operand, Tensor):
                device.kernel_reads(operand)
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", watched)


def _watch_cache(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    """Tell a device of the blocks of keys and values that are written to and attended to."""

    def appended(blocks: KVBlocks, start: int, key: Tensor, *more: Any) -> None:
        for index in range(start // BLOCK_TOKENS, -(-(start + key.shape[2]) // BLOCK_TOKENS)):
            device.kernel_writes(blocks[index].memory)
        append_tokens(blocks, start, key, *more)

    def watch(kind: Any) -> None:
        attend = kind.attend

        def attended(self: Any, first: int, last: int) -> None:
            for index in range(first // BLOCK_TOKENS, -(-last // BLOCK_TOKENS)):
                device.kernel_reads(self._context.blocks[index].memory)
            attend(self, first, last)

        monkeypatch.setattr(kind, "attend", attended)

    monkeypatch.setattr("offload.kv.cache.append_tokens", appended)
    watch(CompiledAttention)
    watch(DequantizedAttention)
