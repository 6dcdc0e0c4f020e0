"""A model loaded and timed in a process of its own: what was measured or planned before is not in its memory.

`run_trial` starts the process, and `offload.planning.trial_process` is what runs in it: a request in JSON comes
as its argument, the answer goes to stdout.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from offload.checkpoint import Checkpoint
from offload.errors import InputError, ResourceError, ToolkitError, UsageError
from offload.executor import executor_of, load
from offload.fused import fused_layers
from offload.planning.machine import DiskRate, Machine, measure, time_disk
from offload.planning.placement import Placement
from offload.planning.predict import Costs, Tier, Way
from offload.planning.timing import Timing, time_decode
from offload.planning.wishes import WishWords

_MOST_STEPS, _LEAST_STEPS = 24, 4
_RUN_SECONDS = 4.0
_DECIDED = (
    *("tiers", "depth", "device_depth", "way", "split"),
    *("embedding_on_disk", "head_tiers", "experts_apart", "expert_slots"),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial found: the placement it was loaded with, one timing for each prompt, and the disk right after.

    disk: None if nothing was streamed. joint: whether layers compute for several sequences in one call. The other
    fields are those of `Placement`.
    """

    tiers: tuple[Tier, ...]
    depth: int
    timings: tuple[Timing, ...]
    disk: DiskRate | None = None
    device_depth: int = 0
    way: Way = "host"
    split: bool = False
    embedding_on_disk: bool = False
    head_tiers: tuple[Tier, ...] = ()
    experts_apart: tuple[int, ...] = ()
    expert_slots: int = 0
    joint: bool = False

    @classmethod
    def of(cls, placement: Placement, timings: Sequence[Timing], disk: DiskRate | None, joint: bool) -> "Trial":
        """Return what was found of a placement."""
        decided = {name: getattr(placement, name) for name in _DECIDED}
        return cls(timings=tuple(timings), disk=disk, joint=joint, **decided)

    def placed(self, planned: Placement) -> Placement:
        """Return the placement that was tried, of the model and the budgets of one that was planned."""
        return replace(planned, **{name: getattr(self, name) for name in _DECIDED})


def run_trial(
    directory: Path,
    words: WishWords,
    prompts: Sequence[int],
    *,
    context_tokens: int,
    batch_size: int = 1,
    costs: Costs | None = None,
) -> Trial:
    """Load a checkpoint in a process of its own and time decoding after prompts of so many tokens.

    costs: to plan by, see `offload.executor.load`. Raises what loading raises there.
    """
    request = {
        "directory": str(directory.resolve()),
        "words": words,
        "prompts": list(prompts),
        "context_tokens": context_tokens,
        "batch_size": batch_size,
        "costs": None if costs is None else asdict(costs),
    }
    answer = _ask(request)
    timings = tuple(Timing(**timing) for timing in answer.pop("timings"))
    disk = answer.pop("disk")
    return Trial(timings=timings, disk=None if disk is None else DiskRate(**disk), **_with_tuples(answer))


def run_trial_here(
    directory: Path,
    words: WishWords,
    prompts: Sequence[int],
    *,
    context_tokens: int,
    batch_size: int = 1,
    costs: Costs | None = None,
) -> Trial:
    """Do what `run_trial` does in this process."""
    model = load(directory, context_tokens=context_tokens, batch_size=batch_size, costs=costs, **words)
    executor = executor_of(model)
    prompts = [max(1, min(prompt, context_tokens - _LEAST_STEPS - 2)) for prompt in prompts]
    for _ in range(2):  # the first checks every layer that is read for the first time
        warm = time_decode(model, prompts[0], 2, batch_size)
    steps = round(min(_MOST_STEPS, max(_LEAST_STEPS, _RUN_SECONDS / warm.step_seconds)))
    timings = [
        time_decode(model, prompt, max(2, min(steps, context_tokens - prompt - 1)), batch_size) for prompt in prompts
    ]
    disk = None
    if executor.slots is not None:
        executor.slots.reset()
        disk = time_disk(executor.streamed_blobs, executor.reader, executor.slots.arenas[0])
    executor.close()
    return Trial.of(executor.placement, timings, disk, bool(fused_layers(executor.layers)))


def run_measurement(directory: Path) -> Machine:
    """Measure this machine, and the disk of a checkpoint, in a process of its own."""
    return Machine.from_json(_ask({"measure": str(directory.resolve())}))


def _ask(request: dict[str, Any]) -> Any:
    command = [sys.executable, "-m", "offload.planning.trial_process", json.dumps(request)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True, cwd=root)
    if result.returncode == 0:
        return json.loads(result.stdout)
    message = result.stderr.strip().removeprefix("error: ") or "it said nothing"
    for kind in (UsageError, InputError, ResourceError):
        if result.returncode == kind.exit_code:
            raise kind(message)
    if result.returncode < 0:
        message = (
            f"it was ended by signal {-result.returncode}, which is how the system ends what takes too much memory"
        )
    raise ToolkitError(f"a trial run of the model failed: {message}")


def answer(asked: str) -> str:
    """Do in this process what another asks of it, in JSON, and return what was found, in JSON."""
    request = json.loads(asked)
    if "measure" in request:
        blobs = [blob for blob in Checkpoint.open(request["measure"]).blobs if blob.module]
        return json.dumps(asdict(measure(blobs)))
    trial = run_trial_here(
        Path(request["directory"]),
        cast(WishWords, request["words"]),
        request["prompts"],
        context_tokens=request["context_tokens"],
        batch_size=request["batch_size"],
        costs=None if request["costs"] is None else Costs(**_with_tuples(request["costs"])),
    )
    return json.dumps(asdict(trial))


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
