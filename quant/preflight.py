"""What a run takes, said before it starts: memory at its peak, disk, time, and where the result will load.

Memory is the process's own, with Python and the libraries in it, and the code of these. Every figure is an upper bound
from shapes alone; `--cpu-memory` is kept by putting hidden states on disk, then statistics as well, and by refusing
what would not fit even so.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from offload.command import format_bytes, format_seconds
from offload.errors import ResourceError
from offload.experts import Experts
from offload.memory import own_memory_bytes, peak_memory_bytes, trim_memory
from offload.planning.needs import CODE_BYTES, Needs, activation_bytes, cache_bytes
from offload.skeleton import decoder_layers
from quant.cost import FLOAT_BYTES, Cost, OnDisk, Windows
from quant.layer import linears
from quant.model_card import parted
from quant.plan import Plan
from quant.sensitivity import average_bits, measuring_cost
from quant.walk import Method
from quant.walk_inputs import most_batch_samples

_RESERVE_BYTES = 48 << 20
"""Pieces of the source while it is checked; what the allocator and the mathematical libraries keep for themselves."""

RUNTIME_BYTES = CODE_BYTES + (290 << 20)
"""Python and libraries in the command that runs a checkpoint: 275 MiB of their own were measured with torch 2.13."""

_DISK_BYTES_PER_SECOND = 300e6
_READS_OF_SOURCE = 4
_CONTEXT_TOKENS, _CHUNK_TOKENS = 2048, 512


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
    which is then sensitivity_on_disk. purpose: what the method needs memory for, in words.
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

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process will have."""
        layer_bytes = self.layer_bytes + self._original_bytes + self.narrow_bytes
        at_layer = layer_bytes + self._method_bytes + self.activation_bytes
        at_work = max(self.around_bytes, at_layer)
        at_work = max(at_work + (0 if self.spilled else self.states_bytes), self._sensitivity_bytes)
        planned = self.runtime_bytes + _RESERVE_BYTES + at_work
        return max(planned, self.reached_bytes)

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
    def _method_bytes(self) -> int:
        """What the method needs while a batch runs, and what it needs while none does beyond that batch."""
        if self.on_disk is None or not self.statistics_spilled:
            return self.method_bytes
        working = self.kept_bytes + self.on_disk.working_bytes - self.activation_bytes
        return max(self.on_disk.observing_bytes, working)

    def smallest(self) -> "Footprint":
        """Return the same with on disk what can be there."""
        if self.on_disk is None:
            return replace(self, spilled=True)
        seconds = self.seconds + self.on_disk.traffic_bytes / _DISK_BYTES_PER_SECOND
        return replace(self, spilled=True, statistics_spilled=True, seconds=seconds)

    @property
    def smallest_mib(self) -> int:
        """The smallest budget that is kept, rounded up, as it is to be tried."""
        return -(-self.smallest().peak_bytes // (1 << 20))

    def within(self, budget_bytes: int | None) -> "Footprint":
        """Return the same, states and then statistics spilled if that is what it takes.

        Raises ResourceError if that is not enough.
        """
        spilled = self.smallest()
        if budget_bytes is None:
            return self
        for choice in (self, replace(self, spilled=True), spilled):
            if choice.peak_bytes <= budget_bytes:
                return choice
        parts = ", ".join(f"{format_bytes(size)} for {what}" for what, size in spilled.parts() if size)
        raise ResourceError(
            f"--cpu-memory {format_bytes(budget_bytes)}: too small for this run; at least {self.smallest_mib} MiB is "
            f"needed: {parts}"
        )

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
        ]


def footprint(plan: Plan, method: Method, windows: Windows | None, widens: bool = False) -> Footprint:
    """Compute what a run takes, from shapes.

    windows: None for a method that sees nothing. widens: whether sensitivity is measured first, for `--target-bits`.
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
        sensitivity = _sensitivity(measuring, values * FLOAT_BYTES, activations, _around_bytes(plan, windows))
    seconds = operations / _operations_per_second(torch.float32)
    seconds += pass_operations / _operations_per_second(method.pass_dtype) if pass_operations else 0.0
    trim_memory()
    return Footprint(
        runtime_bytes=own_memory_bytes() + CODE_BYTES,
        around_bytes=_around_bytes(plan, windows),
        layer_bytes=values * FLOAT_BYTES + max(plan.layers_bytes),
        method_bytes=max(cost.memory_bytes for cost in costs),
        activation_bytes=activations,
        states_bytes=0 if windows is None else _states_bytes(plan, windows) * (3 if method.needs_original else 1),
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
    return int(FLOAT_BYTES * windows.samples * windows.tokens * per_token)


def _held_out_samples(windows: Windows) -> int:
    return -(-windows.samples // 8)


def _sample_bytes(plan: Plan, windows: Windows) -> int:
    return FLOAT_BYTES * windows.tokens * plan.hidden_size


def _states_bytes(plan: Plan, windows: Windows) -> int:
    return FLOAT_BYTES * windows.samples * windows.tokens * plan.hidden_size


def _around_bytes(plan: Plan, windows: Windows | None) -> int:
    """Return what lies outside the layers, as it is written; in float32 where the layers are fed."""
    prefix, _ = decoder_layers(plan.model)
    outer = {name: place.spec for name, place in plan.source.locations.items() if not name.startswith(f"{prefix}.")}
    written = sum(spec.nbytes for spec in outer.values())
    if windows is None:
        return written
    parent = prefix.rpartition(".")[0]
    fed = [spec for name, spec in outer.items() if name.startswith(f"{parent}.")]
    as_floats = sum(FLOAT_BYTES * spec.nbytes // spec.dtype.itemsize for spec in fed)
    return max(written, as_floats)


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


def describe(plan: Plan, method: Method, output: Path, windows: Windows | None, needed: Footprint) -> str:
    """Return what will be done, what will not, and what it takes, as lines for the person who waits."""
    _, layers = decoder_layers(plan.model)
    grid = plan.grid
    kind = f"int{grid.bits} {'symmetric' if grid.symmetric else 'asymmetric'}"
    size = "whole rows" if grid.group_size is None else f"groups of {grid.group_size}"
    wide = sum(each.bits > grid.bits for each in plan.grids.values())
    average = average_bits(plan.model, plan.grids)
    widths = [f"widths   {wide} linears in 8 bits; {average:.3f} bits a weight, all counted"] if wide else []
    lines = [
        f"model    {plan.name}, {type(plan.model).__name__}, {len(layers)} layers, {format_bytes(plan.source.nbytes)}",
        f"method   {method.name}, {kind}, {size}; {len(plan.grids)} linears, left alone: {len(plan.skipped)}",
        *widths,
        *(f"         left as it is, no linear: {what}" for what in plan.others),
    ]
    if windows is not None:
        where = f"on the disk of {output}" if needed.spilled else "in memory"
        states = f"their hidden states take {format_bytes(needed.states_bytes)}, {where}"
        lines.append(f"data     {windows.samples} windows of {windows.tokens} tokens; {states}")
    if needed.statistics_spilled:
        lines.append(f"         statistics of a layer take {format_bytes(needed.statistics_file_bytes)} there as well")
    if windows is not None:
        lines.append(f"passes   through the layers in {str(method.pass_dtype).removeprefix('torch.')}")
    lines.append(f"memory   at most {format_bytes(needed.peak_bytes)} for the whole process")
    lines += [f"  {format_bytes(part):>12}  {what}" for what, part in needed.parts() if part]
    if needed.smallest().peak_bytes < needed.peak_bytes:
        lines.append(f"         {needed.smallest_mib} MiB would do, with --cpu-memory: the rest goes to disk")
    lines.append(f"time     about {format_seconds(needed.seconds)}, if nothing else runs here")
    lines.append(f"output   {output}, about {format_bytes(plan.expected_bytes)}; {_where_it_loads(plan)}")
    return "\n".join(lines)


def _where_it_loads(plan: Plan) -> str:
    """Say where the checkpoint will load, and with how little memory it will run here."""
    here = format_bytes(smallest_memory(plan, own_memory_bytes() + CODE_BYTES))
    wide = any(grid.bits > plan.grid.bits for grid in plan.grids.values())
    others = [] if parted(plan.skipped) else ["vLLM"]
    if plan.grid.symmetric:
        others.insert(0, "transformers")
    elif not wide:  # transformers 5.23 dequantizes every linear by the first group's bits
        others.append("transformers with dequantize=True")
    there = f", and in {', '.join(others)}" if others else ""
    return f"loads here, from {here} of memory on (context of {_CONTEXT_TOKENS} tokens){there}"


def smallest_memory(plan: Plan, runtime_bytes: int = RUNTIME_BYTES) -> int:
    """Return the bytes that a process needs to run the checkpoint, its layers on disk."""
    config = plan.model.config
    needs = Needs(
        runtime_bytes=runtime_bytes,
        fixed_bytes=_around_bytes(plan, None),
        cache_bytes=cache_bytes(config, _CONTEXT_TOKENS, 2),
        activation_bytes=activation_bytes(config, _CHUNK_TOKENS),
        layers_bytes=plan.layers_bytes,
    )
    return needs.around_bytes + max(plan.layers_bytes)
