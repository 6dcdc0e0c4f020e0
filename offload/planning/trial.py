"""A model loaded and timed in a process of its own: what was measured or planned before is not in its memory.

`run_trial` starts the process, and `python -m offload.planning.trial` is what runs in it: a request in JSON comes
as its argument, the answer goes to stdout.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from offload.checkpoint import Checkpoint
from offload.clock import Clock
from offload.command import run
from offload.errors import InputError, ResourceError, ToolkitError, UsageError
from offload.executor import executor_of, load
from offload.planning.machine import Machine, measure
from offload.planning.predict import Costs, Tier
from offload.planning.wishes import WishWords

_MOST_STEPS, _LEAST_STEPS = 24, 4
_RUN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of decoded tokens, in seconds: whole steps, what of them lies between embedding and head, and waits.

    prefill_seconds, prefill_wait_seconds: of the pass over the prompt of prompt_tokens. context_tokens: before the
    token in the middle of those that were decoded.
    """

    prompt_tokens: int
    context_tokens: int
    step_seconds: float
    inside_seconds: float
    wait_seconds: float
    prefill_seconds: float
    prefill_wait_seconds: float

    @property
    def computing_seconds(self) -> float:
        """What the layers compute for a token."""
        return self.inside_seconds - self.wait_seconds

    @property
    def outside_seconds(self) -> float:
        """What lies outside the layers: head, sampling, the loop."""
        return self.step_seconds - self.inside_seconds


def time_decode(model: PreTrainedModel, prompt_tokens: int, steps: int, batch_size: int = 1) -> Timing:
    """Generate `steps` tokens after a prompt of `prompt_tokens`, of each sequence, and time them after the first."""
    executor = executor_of(model)
    stamps: list[tuple[float, float]] = []

    def stamp(*_: Any) -> None:
        stamps.append((time.perf_counter(), executor.stats.wait_seconds))

    handles = [
        model.get_input_embeddings().register_forward_hook(stamp),
        model.get_output_embeddings().register_forward_pre_hook(stamp),
    ]
    clock = Clock()
    tokens = (torch.arange(prompt_tokens) % 100 + 100).repeat(batch_size, 1)
    try:
        with torch.inference_mode():
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                min_new_tokens=steps + 1,
                max_new_tokens=steps + 1,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                streamer=clock,
            )
    finally:
        for handle in handles:
            handle.remove()
    passes = [(end[0] - begin[0], end[1] - begin[1]) for begin, end in zip(stamps[::2], stamps[1::2], strict=True)]
    return Timing(
        prompt_tokens=prompt_tokens,
        context_tokens=prompt_tokens + steps // 2,
        step_seconds=statistics.median(after - before for before, after in pairwise(clock.times)),
        inside_seconds=statistics.median(inside for inside, _ in passes[1:]),
        wait_seconds=statistics.median(wait for _, wait in passes[1:]),
        prefill_seconds=clock.prompt_seconds,
        prefill_wait_seconds=passes[0][1],
    )


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial found: the placement it was loaded with, and one timing for each prompt."""

    tiers: tuple[Tier, ...]
    depth: int
    timings: tuple[Timing, ...]


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
    timings = tuple(Timing(**timing) for timing in answer["timings"])
    return Trial(tuple(answer["tiers"]), answer["depth"], timings)


def run_measurement(directory: Path) -> Machine:
    """Measure this machine, and the disk of a checkpoint, in a process of its own."""
    return Machine.from_json(_ask({"measure": str(directory.resolve())}))


def main(argv: list[str] | None = None) -> int:
    """Answer one request; returns the exit status."""
    return run(_command, argv)


def _ask(request: dict[str, Any]) -> Any:
    command = [sys.executable, "-m", "offload.planning.trial", json.dumps(request)]
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


def _command(argv: list[str]) -> None:
    request = json.loads(argv[0])
    if "measure" in request:
        blobs = [blob for blob in Checkpoint.open(request["measure"]).blobs if blob.module]
        print(json.dumps(asdict(measure(blobs))))
        return
    context_tokens, batch_size = request["context_tokens"], request["batch_size"]
    model = load(
        request["directory"],
        context_tokens=context_tokens,
        batch_size=batch_size,
        costs=None if request["costs"] is None else _costs(request["costs"]),
        **cast(WishWords, request["words"]),
    )
    executor = executor_of(model)
    prompts = [max(1, min(prompt, context_tokens - _LEAST_STEPS - 2)) for prompt in request["prompts"]]
    for _ in range(2):  # the first checks every layer that is read for the first time
        warm = time_decode(model, prompts[0], 2, batch_size)
    steps = round(min(_MOST_STEPS, max(_LEAST_STEPS, _RUN_SECONDS / warm.step_seconds)))
    timings = [
        time_decode(model, prompt, max(2, min(steps, context_tokens - prompt - 1)), batch_size) for prompt in prompts
    ]
    executor.close()
    placement = executor.placement
    answer = {"tiers": placement.tiers, "depth": placement.depth, "timings": [asdict(timing) for timing in timings]}
    print(json.dumps(answer))


def _costs(values: dict[str, Any]) -> Costs:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Costs(**fields)


if __name__ == "__main__":
    sys.exit(main())
