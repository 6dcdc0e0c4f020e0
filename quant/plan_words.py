"""A plan in words: what will be done, what it takes, and where the result will load."""

from pathlib import Path

from offload.command import format_bytes, format_seconds
from offload.skeleton import decoder_layers
from quant.cost import Windows
from quant.model_card import parted
from quant.plan import Plan, average_bits
from quant.preflight import Footprint
from quant.running import CONTEXT_TOKENS, smallest_memory
from quant.walk import Method


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
    lines.append(f"time     about {format_seconds(needed.whole_seconds)}, if nothing else runs here")
    lines.append(
        f"output   {output}, about {format_bytes(plan.expected_bytes)}; {_where_it_loads(plan, needed.runtime_bytes)}"
    )
    if (run := needed.cache_run) is not None:
        where = "all of it in memory" if run.given_bytes == run.most_bytes else "whose layers are read for each"
        lines.append(f"cache    then {run.samples} of the windows run through the result, {where}")
    return "\n".join(lines)


def _where_it_loads(plan: Plan, runtime_bytes: int) -> str:
    """Say where the checkpoint will load, and with how little memory it will run here."""
    here = format_bytes(smallest_memory(plan, runtime_bytes))
    wide = any(grid.bits > plan.grid.bits for grid in plan.grids.values())
    others = [] if parted(plan.skipped) else ["vLLM"]
    if plan.grid.symmetric:
        others.insert(0, "transformers")
    elif not wide:  # transformers 5.23 dequantizes every linear by the first group's bits
        others.append("transformers with dequantize=True")
    there = f", and in {', '.join(others)}" if others else ""
    return f"loads here, from {here} of memory on (context of {CONTEXT_TOKENS} tokens){there}"
