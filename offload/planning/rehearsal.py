"""A trial of a model: what the links do not explain is measured on the model itself, once, and predicted from then.

A trial tells what a layer computes, one in memory and one out of the ring, and how fast reads are meanwhile. The latter
is held against the disk as it was right after: a shared disk is another one by the next trial, but the share of its
rate that a running model gets stays.
"""

from pathlib import Path

from offload.planning.costs import Overheads, Shape
from offload.planning.forecast import PREFILL_TOKENS, START_TOKENS
from offload.planning.machine import Machine
from offload.planning.predict import Tier
from offload.planning.trial import Trial, run_trial
from offload.planning.wishes import WishWords


def rehearse(directory: Path, shape: Shape, machine: Machine, words: WishWords, context_tokens: int) -> Overheads:
    """Try the checkpoint for some seconds, placed as `words` ask for, and return what was found.

    Raises ResourceError if a budget is too small for the model.
    """
    trial = run_trial(directory, words, (START_TOKENS, PREFILL_TOKENS), context_tokens=context_tokens)
    short, long = trial.timings
    count, more_tokens = len(trial.tiers), max(1, long.context_tokens - short.context_tokens)
    context = (long.computing_seconds - short.computing_seconds) / count / more_tokens
    prefill = (long.prefill_seconds - long.prefill_wait_seconds - short.outside_seconds) / count / long.prompt_tokens
    operations = 2 * sum(shape.layers_weights) / count / machine.kernel_operations_per_second
    kept, streamed = trial.tiers.count("host"), trial.tiers.count("disk")
    in_memory = short.kept_seconds - _mean_kernel(trial, "host", shape, machine) if kept else None
    in_ring = short.streamed_seconds - _mean_kernel(trial, "disk", shape, machine) if streamed else in_memory
    return Overheads(
        layer_seconds=(in_ring if in_memory is None else in_memory) or 0.0,
        streamed_seconds=in_ring or 0.0,
        outside_seconds=short.outside_seconds - shape.head_bytes / machine.read_bytes_per_second,
        context_seconds=max(0.0, context),
        prefill_seconds=max(0.0, prefill - operations),
        reading_share=_reading_share(trial),
        kept=kept,
        streamed=streamed,
        joint=trial.joint,
    )


def _mean_kernel(trial: Trial, tier: Tier, shape: Shape, machine: Machine) -> float:
    """Return what the product's link explains of a layer of a tier, on average."""
    sizes = [nbytes for nbytes, one in zip(shape.computed_bytes(1), trial.tiers, strict=True) if one == tier]
    return sum(sizes) / len(sizes) / machine.kernel_bytes_per_second


def _reading_share(trial: Trial) -> float:
    """Return the share of the disk's rate that reads had in a trial; more than all of it is noise."""
    disk, timing = trial.disk, trial.timings[0]
    if disk is None or not timing.bytes_read_per_second:
        return 1.0
    return min(1.0, timing.bytes_read_per_second / disk.bytes_per_second)
