"""How long a pass over the model takes, by walking through it: who waits for what, before anything is loaded.

The walk follows the executor's own rules (`offload/transfer.py`): one reader takes the layers on disk in order, around
the end of the model, as far ahead as the ring has free slots; one link copies to the device likewise; a layer runs when
it is there and the one before has ended. Experts that are not in memory are read once a layer has begun, before what
is read ahead. So depth, spread and what a slow link hides behind are all counted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Tier = Literal["resident", "staged", "mapped", "host", "disk"]
Way = Literal["host", "staged", "mapped"]

_PASSES = 3
"""The first passes fill the rings; the last one is a steady state."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one pass; each tuple has one entry a layer, in order.

    host, device, mapped: computing a layer on the CPU, on the device from its own memory, on the device across the bus.
    copy: bringing it to the device. read: bringing it from disk, while nothing else runs. streamed: what a layer out of
    a ring takes beside that, to be put in its place. outside: what lies between two passes over the layers, head and
    sampling, without and with a device. computing_beside: share of its own speed that computing on the CPU keeps while
    something is read.

    What can be had apart: head, head_read: computing and reading each block of the head, the former a part of outside.
    around_read: reading a layer without its experts. fetch: reading all experts that a layer needs, for want of which
    it waits. cache_read, cache_copy: of keys and values that are not at hand, all layers', from disk or to the device.
    """

    host_seconds: tuple[float, ...]
    read_seconds: tuple[float, ...]
    outside_seconds: float = 0.0
    streamed_seconds: float = 0.0
    computing_beside: float = 1.0
    device_seconds: tuple[float, ...] = ()
    mapped_seconds: tuple[float, ...] = ()
    copy_seconds: tuple[float, ...] = ()
    outside_device_seconds: float = 0.0
    head_seconds: tuple[float, ...] = ()
    head_read_seconds: tuple[float, ...] = ()
    around_read_seconds: tuple[float, ...] = ()
    fetch_seconds: tuple[float, ...] = ()
    cache_read_seconds: float = 0.0
    cache_copy_seconds: float = 0.0

    def with_experts_apart(self, layers: Collection[int], missed: float) -> "Costs":
        """Return the costs where the experts of some layers are fetched, a share `missed` of them from disk."""
        count, around = len(self.read_seconds), self.around_read_seconds
        return replace(
            self,
            read_seconds=tuple((around if at in layers else self.read_seconds)[at] for at in range(count)),
            fetch_seconds=tuple(missed * self.fetch_seconds[at] if at in layers else 0.0 for at in range(count)),
        )

    def with_head_apart(self) -> "Costs":
        """Return the costs of as many layers and, behind them, the blocks of the head, one entry each."""
        nothing = (0.0,) * len(self.head_seconds)
        return replace(
            self,
            host_seconds=self.host_seconds + self.head_seconds,
            read_seconds=self.read_seconds + self.head_read_seconds,
            fetch_seconds=self.fetch_seconds and self.fetch_seconds + nothing,
            outside_seconds=max(0.0, self.outside_seconds - sum(self.head_seconds)),
        )

    def in_parts(self, shares: Sequence[Sequence[float]]) -> "Costs":
        """Return the costs where each layer is several, of these shares of it."""

        def parted(seconds: tuple[float, ...]) -> tuple[float, ...]:
            each = zip(seconds, shares, strict=True) if seconds else ()
            return tuple(whole * share for whole, parts in each for share in parts)

        return replace(
            self,
            host_seconds=parted(self.host_seconds),
            read_seconds=parted(self.read_seconds),
            device_seconds=parted(self.device_seconds),
            mapped_seconds=parted(self.mapped_seconds),
            copy_seconds=parted(self.copy_seconds),
            fetch_seconds=parted(self.fetch_seconds),
        )

    def of(self, how: Tier) -> tuple[float, ...]:
        """Return the seconds of computing each layer in a way."""
        if how == "host":
            return self.host_seconds
        return self.mapped_seconds if how == "mapped" else self.device_seconds


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass in the steady state: its seconds, and those of them in which a layer was waited for."""

    seconds: float
    wait_seconds: float


def walk(tiers: Sequence[Tier], costs: Costs, depth: int, device_depth: int = 0, way: Way = "host") -> Pass:
    """Return a pass over layers of these tiers.

    depth, device_depth: slots of the rings that disk and the bus fill. way: how layers from disk are computed.
    """
    hows: list[Tier] = [way if tier == "disk" else tier for tier in tiers]
    work = [
        costs.of(how)[index] + (costs.streamed_seconds if tier == "disk" or how == "staged" else 0.0)
        for index, (tier, how) in enumerate(zip(tiers, hows, strict=True))
    ]
    outside = costs.outside_seconds if set(hows) == {"host"} else costs.outside_device_seconds
    fetches = costs.fetch_seconds or (0.0,) * len(work)
    machine = _Machine(tiers, hows, costs, depth, device_depth)
    started = waited = 0.0
    for _ in range(_PASSES):
        started, waited = machine.now, machine.waited
        for tier, how, seconds, fetch in zip(tiers, hows, work, fetches, strict=True):
            machine.wait(tier, how)
            machine.fetch(fetch)
            machine.compute(seconds, how)
            machine.release(tier, how)
        machine.compute(outside, "host")
    return Pass(machine.now - started, machine.waited - waited)


class _Machine:
    """A processor, a disk and a bus that work at once: time moves to the next end of what one of them is doing."""

    def __init__(
        self, tiers: Sequence[Tier], hows: Sequence[Tier], costs: Costs, depth: int, device_depth: int
    ) -> None:
        self.now = self.waited = 0.0
        self._computing_beside = costs.computing_beside
        self._reads = [seconds for seconds, tier in zip(costs.read_seconds, tiers, strict=True) if tier == "disk"]
        staged = [index for index, how in enumerate(hows) if how == "staged"]
        self._copies = [(costs.copy_seconds[index], tiers[index] == "disk") for index in staged]
        self._slots, self._device_slots = depth if self._reads else 0, device_depth if self._copies else 0
        self._read_left = self._copy_left = 0.0  # of the transfer under way; 0 for none
        self._begun = {"read": 0, "copy": 0}
        self._there = {"read": 0, "copy": 0}  # arrived, not yet used

    def wait(self, tier: Tier, how: Tier) -> None:
        """Let time pass until the next layer of this kind is where it is computed."""
        kind = "copy" if how == "staged" else "read" if tier == "disk" else None
        if kind is None:
            return
        self._begin()
        while not self._there[kind]:
            ends = [left for left in (self._read_left, self._copy_left) if left]
            assert ends, "nothing is under way that could be waited for"
            self.waited += min(ends)
            self._pass(min(ends))
        self._there[kind] -= 1

    def fetch(self, seconds: float) -> None:
        """Let a read pass that goes before all that are waiting, behind the one that is under way."""
        if seconds:
            self.waited += self._read_left + seconds
            self._pass(self._read_left)
            self.now += seconds

    def compute(self, seconds: float, how: Tier) -> None:
        """Let the time pass that a computation takes beside what is being read."""
        left = seconds
        while left > 0:
            self._begin()
            speed = self._computing_beside if how == "host" and self._read_left else 1.0
            step = min([left / speed, *(other for other in (self._read_left, self._copy_left) if other)])
            left = 0.0 if step == left / speed else left - step * speed
            self._pass(step)

    def release(self, tier: Tier, how: Tier) -> None:
        """Free the slot of the layer that has just been computed."""
        if how == "staged":
            self._device_slots += 1
        elif tier == "disk":
            self._slots += 1

    def _begin(self) -> None:
        """Begin what has an idle link, a free slot and its bytes."""
        if self._copies and not self._copy_left and self._device_slots:
            seconds, from_disk = self._copies[self._begun["copy"] % len(self._copies)]
            if not from_disk or self._there["read"]:
                self._there["read"] -= from_disk
                self._begun["copy"] += 1
                self._device_slots -= 1
                self._copy_left, self._copy_from_disk = seconds or 1e-12, from_disk
        if self._reads and not self._read_left and self._slots:
            self._read_left = self._reads[self._begun["read"] % len(self._reads)] or 1e-12
            self._begun["read"] += 1
            self._slots -= 1

    def _pass(self, seconds: float) -> None:
        """Move all clocks on, by at most what is left of any transfer."""
        self.now += seconds
        if self._read_left:
            self._read_left = _rest(self._read_left - seconds)
            self._there["read"] += not self._read_left
        if self._copy_left:
            self._copy_left = _rest(self._copy_left - seconds)
            if not self._copy_left:
                self._there["copy"] += 1
                self._slots += self._copy_from_disk  # the host's slot is free once its layer is on the device
        self._begin()


def _rest(seconds: float) -> float:
    """Return what is left of a transfer, nothing for what rounding leaves."""
    return seconds if seconds > 1e-12 else 0.0
