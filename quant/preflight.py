"""What a run takes, counted before it starts: memory at its peak, disk, time.

Memory is the process's own, with Python and the libraries in it, and the code of these. Every figure is an upper bound
from shapes alone; `--cpu-memory` is kept by putting hidden states on disk, then statistics as well, and by refusing
what would not fit even so.
"""

import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from offload.command import format_bytes
from offload.errors import ResourceError
from offload.experts import Experts
from offload.memory import own_memory_bytes, peak_memory_bytes
from offload.planning.needs import settle_libraries
from offload.skeleton import decoder_layers
from quant.cost import FLOAT_BYTES, Cost, OnDisk, Windows
from quant.layer import linears
from quant.plan import Plan, around_bytes
from quant.running import CacheRun
from quant.sensitivity import measuring_cost
from quant.walk import Method
from quant.walk_inputs import most_batch_samples

_RESERVE_BYTES = 48 << 20
"""Pieces of the source while it is checked; what the allocator and the mathematical libraries keep for themselves."""

_DISK_BYTES_PER_SECOND = 300e6
_READS_OF_SOURCE = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes of a run.

    runtime: Python and libraries, their code included. around: embeddings and what else lies outside the layers, while
    it is in memory. layer: the largest layer, in float32 and packed. method: what the method needs besides it.
    activations: of the samples that run at once. states: hidden states of all samples. output: the checkpoint.
    spilled: whether the states are on disk. seconds: about. reached: the most that the process has had already, as
    importing libraries that were just installed maps more of their code than running them needs. sensitivity: what is
    held while it is measured, before anything is quantized. original: a copy of the unquantized layer. narrow: the
    largest weight in the dtype of passes, where that is not float32. kept: outputs of held-out samples, among the
    activations. on_disk: what the method needs with its statistics on disk, the inputs of the unquantized linears in
    the place of that copy; statistics_spilled: whether they are there, and what measuring sensitivity makes as well,
    which is then sensitivity_on_disk. purpose: what the method needs memory for, in words. cache_run: what comes after
    all that, for `--kv`.
    """

    runtime_bytes: int
    around_bytes: int
    layer_bytes: int
    method_bytes: int
    activation_bytes: int
    states_bytes: int
    output_bytes: int
    seconds: float
    spilled: bool = False
    reached_bytes: int = 0
    sensitivity_bytes: int = 0
    sensitivity_on_disk_bytes: int = 0
    original_bytes: int = 0
    narrow_bytes: int = 0
    kept_bytes: int = 0
    on_disk: OnDisk | None = None
    statistics_spilled: bool = False
    purpose: str = "statistics and searches"
    cache_run: CacheRun | None = None

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process will have."""
        layer_bytes = self.layer_bytes + self._original_bytes + self.narrow_bytes
        at_layer = layer_bytes + self._method_bytes + self.activation_bytes
        at_work = max(self.around_bytes, at_layer)
        at_work = max(at_work + (0 if self.spilled else self.states_bytes), self._sensitivity_bytes)
        planned = self.runtime_bytes + _RESERVE_BYTES + at_work
        return max(planned, self.reached_bytes, self.runtime_bytes + self._cache_run_bytes)

    @property
    def whole_seconds(self) -> float:
        """The time of all, of running the result for its cache as well."""
        return self.seconds + (0.0 if self.cache_run is None else self.cache_run.read_bytes / _DISK_BYTES_PER_SECOND)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the output's disk has to have."""
        return self.output_bytes + (self.states_bytes if self.spilled else 0) + self.statistics_file_bytes

    @property
    def statistics_file_bytes(self) -> int:
        """Bytes of statistics on disk."""
        return self.on_disk.disk_bytes if self.on_disk is not None and self.statistics_spilled else 0

    @property
    def _original_bytes(self) -> int:
        return 0 if self.statistics_spilled else self.original_bytes

    @property
    def _sensitivity_bytes(self) -> int:
        return self.sensitivity_on_disk_bytes if self.statistics_spilled else self.sensitivity_bytes

    @property
    def _cache_run_bytes(self) -> int:
        return 0 if self.cache_run is None else self.cache_run.given_bytes

    @property
    def _method_bytes(self) -> int:
        """What the method needs while a batch runs, and what it needs while none does beyond that batch."""
        if self.on_disk is None or not self.statistics_spilled:
            return self.method_bytes
        working = self.kept_bytes + self.on_disk.working_bytes - self.activation_bytes
        return max(self.on_disk.observing_bytes, working)

    def smallest(self) -> "Footprint":
        """Return the same with on disk what can be there."""
        spilled = replace(self, spilled=True, cache_run=None if self.cache_run is None else self.cache_run.given(0))
        if self.on_disk is None:
            return spilled
        seconds = self.seconds + self.on_disk.traffic_bytes / _DISK_BYTES_PER_SECOND
        return replace(spilled, statistics_spilled=True, seconds=seconds)

    @property
    def smallest_mib(self) -> int:
        """The smallest budget that is kept, rounded up, as it is to be tried."""
        return -(-self.smallest().peak_bytes // (1 << 20))

    def within(self, budget_bytes: int | None) -> "Footprint":
        """Return the same, states and then statistics spilled if that is what it takes, the result run in what is left.

        Raises ResourceError if that is not enough.
        """
        if budget_bytes is None:
            return self
        run = None if self.cache_run is None else self.cache_run.given(budget_bytes - self.runtime_bytes)
        fitted, smallest = replace(self, cache_run=run), self.smallest()
        for choice in (fitted, replace(fitted, spilled=True), replace(smallest, cache_run=run)):
            if choice.peak_bytes <= budget_bytes:
                return choice
        asked = f"--cpu-memory {format_bytes(budget_bytes)}"
        if replace(smallest, cache_run=None).peak_bytes <= budget_bytes:
            raise ResourceError(
                f"{asked}: --kv runs the result, which takes {format_bytes(smallest.peak_bytes)}; leave --kv away, and "
                "calibrate the cache later: python -m quant.kv"
            )
        parts = ", ".join(f"{format_bytes(size)} for {what}" for what, size in smallest.parts() if size)
        raise ResourceError(f"{asked}: too small for this run; at least {self.smallest_mib} MiB is needed: {parts}")

    def parts(self) -> list[tuple[str, int]]:
        """Return the memory by purpose, in words. Embeddings and layers are not in memory at the same time."""
        return [
            ("Python, torch, transformers and a reserve", self.runtime_bytes + _RESERVE_BYTES),
            ("embeddings or head, before or after the layers", self.around_bytes),
            ("the largest layer, in float32 and packed", self.layer_bytes),
            ("the same layer before it is quantized", self._original_bytes),
            ("the largest weight as passes multiply it", self.narrow_bytes),
            (self.purpose, self._method_bytes),
            ("activations", self.activation_bytes),
            ("hidden states of all windows", 0 if self.spilled else self.states_bytes),
            ("measuring sensitivity, before that", self._sensitivity_bytes),
            ("running the result for its cache, after that", self._cache_run_bytes),
        ]


def footprint(
    plan: Plan, method: Method, windows: Windows | None, widens: bool = False, cached: Windows | None = None
) -> Footprint:
    """Compute what a run takes, from shapes.

    windows: None for a method that sees nothing. widens: whether sensitivity is measured first, for `--target-bits`.
    cached: those of the windows that are run through the result, for `--kv`.
    """
    _, layers = decoder_layers(plan.model)
    shapes = [[(x.out_features, x.in_features) for x in linears(layer).values()] for layer in layers]
    costs = [method.cost(layer_shapes, plan.grid, windows) for layer_shapes in shapes]
    values = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    operations, sensitivity = sum(cost.operations - cost.pass_operations for cost in costs), (0, 0)
    pass_operations = sum(cost.pass_operations for cost in costs)
    narrow = 0 if method.pass_dtype == torch.float32 else method.pass_dtype.itemsize
    activations = 0 if windows is None else max(_activation_bytes(plan, layer, windows) for layer in layers)
    if windows is not None and widens:
        measuring = [measuring_cost(layer_shapes, plan.grid, windows, plan.hidden_size) for layer_shapes in shapes]
        operations += sum(cost.operations for cost in measuring)
        sensitivity = _sensitivity(measuring, values * FLOAT_BYTES, activations, around_bytes(plan, as_floats=True))
    cache_run = None if cached is None else CacheRun.of(plan, cached)
    operations += 0.0 if cache_run is None else cache_run.operations
    seconds = operations / _operations_per_second(torch.float32)
    seconds += pass_operations / _operations_per_second(method.pass_dtype) if pass_operations else 0.0
    code_bytes = settle_libraries()
    return Footprint(
        runtime_bytes=own_memory_bytes() + code_bytes,
        around_bytes=around_bytes(plan, as_floats=windows is not None),
        layer_bytes=values * FLOAT_BYTES + max(plan.layers_bytes),
        method_bytes=max(cost.memory_bytes for cost in costs),
        activation_bytes=activations,
        states_bytes=0 if windows is None else windows.nbytes(plan.hidden_size) * (3 if method.needs_original else 1),
        output_bytes=plan.expected_bytes,
        seconds=seconds + _READS_OF_SOURCE * plan.source.nbytes / _DISK_BYTES_PER_SECOND,
        reached_bytes=peak_memory_bytes(),
        sensitivity_bytes=sensitivity[0],
        sensitivity_on_disk_bytes=sensitivity[1],
        original_bytes=values * FLOAT_BYTES if method.needs_original else 0,
        narrow_bytes=narrow * max(n * k for layer_shapes in shapes for n, k in layer_shapes),
        kept_bytes=0 if windows is None else _held_out_samples(windows) * _sample_bytes(plan, windows),
        on_disk=_on_disk(plan, costs, windows),
        purpose=costs[0].purpose,
        cache_run=cache_run,
    )


def _sensitivity(costs: list[Cost], layer_bytes: int, activation_bytes: int, around_bytes: int) -> tuple[int, int]:
    """Return what is held while sensitivity is measured: in memory, and with all on disk that can be there."""
    parts = [cost.on_disk for cost in costs if cost.on_disk is not None]
    in_memory = max(cost.memory_bytes for cost in costs) + max(layer_bytes + activation_bytes, around_bytes)
    running = max(activation_bytes + part.observing_bytes for part in parts)
    at_layer = layer_bytes + max(running, *(part.working_bytes for part in parts))
    return in_memory, max(at_layer, around_bytes)


def _on_disk(plan: Plan, costs: list[Cost], windows: Windows | None) -> OnDisk | None:
    """Return the most that any layer takes with its statistics on disk, None if the method cannot put them there."""
    parts = [cost.on_disk for cost in costs if cost.on_disk is not None]
    if not parts or windows is None:
        return None
    recorded = [_input_bytes(plan, layer, windows) for layer in decoder_layers(plan.model)[1]]
    return OnDisk(
        observing_bytes=max(part.observing_bytes for part in parts),
        working_bytes=max(part.working_bytes for part in parts),
        disk_bytes=max(part.disk_bytes for part in parts) + max(recorded),
        traffic_bytes=sum(part.traffic_bytes for part in parts) + 2 * sum(recorded),
    )


def _input_bytes(plan: Plan, layer: nn.Module, windows: Windows) -> int:
    """Return the bytes of the inputs of all linears of a layer, for all windows."""
    shared = linears(layer).items()
    per_token = sum(_share_of_tokens(plan, layer, name) * module.in_features for name, module in shared)
    return windows.nbytes(per_token)


def _held_out_samples(windows: Windows) -> int:
    return -(-windows.samples // 8)


def _sample_bytes(plan: Plan, windows: Windows) -> int:
    return FLOAT_BYTES * windows.tokens * plan.hidden_size


def _activation_bytes(plan: Plan, layer: nn.Module, windows: Windows) -> int:
    """Return what a batch holds if all inputs and outputs of linears stay; outputs of held-out samples; search inputs.

    An expert sees its share of the tokens. Attention that is computed step by step holds scores of all pairs.
    """
    per_token = float(4 * plan.hidden_size)
    for name, module in layer.named_modules():
        if type(module) is nn.Linear:
            per_token += _share_of_tokens(plan, layer, name) * (module.in_features + 2 * module.out_features)
    scores = 3 * plan.heads * windows.tokens if plan.eager else 0
    batch = most_batch_samples(windows.tokens) * windows.tokens * (per_token + scores)
    kept_samples = _held_out_samples(windows) + 3 * min(8, windows.samples)
    return int(FLOAT_BYTES * (batch + kept_samples * windows.tokens * plan.hidden_size))


def _share_of_tokens(plan: Plan, layer: nn.Module, name: str) -> float:
    parents = [name.rsplit(".", cut)[0] for cut in range(1, name.count(".") + 1)]
    experts = next((len(m) for p in parents if isinstance(m := layer.get_submodule(p), Experts)), None)
    return 1.0 if experts is None else min(1.0, plan.experts_per_token / experts)


def _operations_per_second(dtype: torch.dtype) -> float:
    """Measure products on this machine, for a twentieth of a second."""
    a = torch.randn(768, 768, dtype=dtype)
    a @ a
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.05:
        a @ a
        count += 1
    return float(2 * count * 768**3 / (time.perf_counter() - started))
