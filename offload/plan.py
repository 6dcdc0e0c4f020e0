"""Plan a run before it: where every layer lives, how fast it will be, and what would help. `python -m offload.plan`"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.command import Parser, format_bytes, run, say
from offload.errors import InputError, ResourceError, UsageError
from offload.planning.wishes import Wishes, WishWords, add_wish_flags, flag, words_of
from offload.source import DEFAULT_OUTPUT

if TYPE_CHECKING:
    from offload.planning.forecast import Prediction, Subject
    from offload.planning.machine import Machine
    from offload.planning.placement import Placement


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Tokens a second, as predicted for the placement that was loaded and as measured on it.

    decode_predicted_after: what would have been predicted with the disk as it was right after, None if none was read.
    """

    decode_predicted: float
    decode_predicted_after: float | None
    decode_measured: float
    prefill_predicted: float
    prefill_measured: float

    def in_words(self) -> str:
        """Return it as lines for a person."""
        lines = ["confirmed by a run"]
        for name in ("decode", "prefill"):
            predicted, measured = getattr(self, f"{name}_predicted"), getattr(self, f"{name}_measured")
            error = f"{abs(predicted / measured - 1):.0%} {'over' if predicted > measured else 'under'} it"
            lines.append(f"  {name:8} {measured:8.1f} tokens/s; predicted {predicted:.1f}, {error}")
        if self.decode_predicted_after is not None:
            lines[1] += f"; {self.decode_predicted_after:.1f} with the disk as it was right after"
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    for word in ("context", "batch"):
        if getattr(options, word) < 1:
            raise UsageError(f"--{word} {getattr(options, word)}: expected at least 1")
    words = words_of(options)
    wishes = Wishes.of(words)
    if not options.model.is_dir() and options.model == DEFAULT_OUTPUT:
        raise InputError(f"{options.model}: not made yet; `python -m quant.awq --bits 4` makes it, or name a --model")
    from offload.formats.convert import opened

    options.model = opened(options.model, plain=True)
    subject = _subject(options, wishes)
    hypothetical = None if options.machine is None else f"{options.machine} ({subject.machine.description})"
    runs = not (options.no_confirm or hypothetical)
    if runs and subject.wants_rehearsal:
        subject = _rehearsed(options, words, subject)
    from offload.planning.forecast import predict

    if runs and "disk" in subject.placed().units_tiers:
        subject = _with_disk_as_it_is(subject, options.model)
    placement = subject.placed()
    prediction = predict(subject, placement)
    if options.picture is not None:
        _draw(options.picture, options.model.resolve().name, placement, prediction)
    if not options.json:
        print(_in_words(subject, placement, prediction, hypothetical), flush=True)
    confirmation = _confirmed(options, words, subject) if runs else None
    if options.json:
        print(json.dumps(_as_json(subject, placement, prediction, confirmation, hypothetical)))
    elif confirmation is not None:
        print(confirmation.in_words())


def _parser() -> argparse.ArgumentParser:
    parser = Parser("offload.plan", "Plan where every layer of a checkpoint lives, predict its speed, and confirm it.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    add("--context", type=int, default=2048, help="tokens to leave room for")
    add("--batch", type=int, default=1, help="sequences at once")
    add("--no-confirm", action="store_true", help="only predict: run nothing, unless this machine was never measured")
    add("--remeasure", action="store_true", help="measure machine and model again instead of using what is cached")
    add("--machine", type=Path, metavar="FILE", help="plan for a machine of these figures instead of this one")
    add("--save-machine", type=Path, metavar="FILE", help="write this machine's figures")
    add("--picture", type=Path, metavar="FILE.svg", help="draw where every layer lives and what fills the memory")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add_wish_flags(parser)
    return parser


def _subject(options: argparse.Namespace, wishes: Wishes) -> "Subject":
    """Describe what is planned; what cannot fit is refused before anything is measured."""
    import torch

    from offload.checkpoint import Checkpoint
    from offload.memory import trim_memory
    from offload.names import checkpoint_in_model
    from offload.planning.choice import plan
    from offload.planning.costs import Shape, recall_overheads
    from offload.planning.device_needs import device_scratch
    from offload.planning.forecast import PREFILL_TOKENS, Subject
    from offload.planning.needs import CODE_BYTES, count_needs, settle_libraries
    from offload.planning.step_needs import step_shape, with_steps
    from offload.skeleton import build_skeleton, read_config
    from offload.units import Units

    checkpoint = Checkpoint.open(options.model)
    config = read_config(checkpoint.directory)
    longest = config.get_text_config(decoder=True).max_position_embeddings
    if options.context > longest:
        raise UsageError(f"--context {options.context}: the model takes {longest} tokens at most")
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    trim_memory()  # what is mapped from here on is what `load` finds mapped as well
    layers = [blob.module for blob in checkpoint.blobs if blob.module]
    skeleton = build_skeleton(config, dtype)
    checkpoint = checkpoint_in_model(checkpoint, skeleton)
    wishes = wishes.on([name for name, _ in skeleton.named_modules()], layers)
    units = Units.of(skeleton, checkpoint)
    code_bytes = settle_libraries()
    needs = count_needs(
        config,
        checkpoint,
        units,
        dtype,
        context_tokens=options.context,
        batch_size=options.batch,
        chunk_tokens=PREFILL_TOKENS,
        kv=wishes.kv,
        kv_bytes=wishes.kv_bytes,
        code_bytes=code_bytes,
    )
    if wishes.gpu_word is None and not wishes.anywhere:
        plan(needs, wishes)
    machine, asked = _machine(options), wishes.gpu_word is not None
    if wishes.gpu_word is not None or (wishes.anywhere and machine.has_device):
        wishes = _on_device(wishes, machine)
    if machine.has_device:
        needs = replace(needs, runtime_bytes=needs.runtime_bytes - code_bytes + CODE_BYTES)
    rows = options.batch * min(options.context, PREFILL_TOKENS)
    scratch = device_scratch(checkpoint, dtype, machine.gpu, rows, options.batch)
    if options.batch == 1:
        step = step_shape(config, checkpoint, dtype, options.context, machine.gpu, wishes.kv)
        scratch = with_steps(scratch, step)
    return Subject(
        shape=Shape.of(checkpoint, units, config, dtype.itemsize, wishes),
        needs=replace(
            needs if asked else needs.unsplit(), device_runtime_bytes=machine.device_runtime_bytes, device=scratch
        ),
        wishes=wishes,
        machine=machine,
        overheads=recall_overheads(checkpoint),
        context_tokens=options.context,
        batch_size=options.batch,
    )


def _machine(options: argparse.Namespace) -> "Machine":
    """Return the figures to plan with: out of a file, out of the cache, or measured and cached now."""
    from offload.planning.machine import Machine, cache_file, load_cache, read_machine, save_json
    from offload.planning.trial import run_measurement

    if options.machine is not None:
        return read_machine(options.machine)
    path = cache_file(options.model)
    cache = {} if options.remeasure else load_cache(path)
    if not cache:
        say("measuring this machine, once")
        cache = {"machine": asdict(run_measurement(options.model)), "models": {}}
        save_json(path, cache)
    if options.save_machine is not None:
        save_json(options.save_machine, cache["machine"])
    return Machine.from_json(cache["machine"])


def _rehearsed(options: argparse.Namespace, words: WishWords, subject: "Subject") -> "Subject":
    """Rehearse the model, cache what was found, and return the subject with it."""
    from offload.checkpoint import Checkpoint
    from offload.planning.costs import remember_overheads
    from offload.planning.rehearsal import rehearse

    say("rehearsing the model on it, once")
    found = rehearse(options.model, subject.shape, subject.machine, words, options.context)
    overheads = found.over(subject.overheads)
    remember_overheads(Checkpoint.open(options.model), overheads)
    return replace(subject, overheads=overheads)


def _with_disk_as_it_is(subject: "Subject", directory: Path) -> "Subject":
    """Return the subject with its disk timed again: shared disks change their speed by the hour, memory does not."""
    from offload.checkpoint import Checkpoint
    from offload.planning.machine import disk_rate

    disk = disk_rate([blob for blob in Checkpoint.open(directory).blobs if blob.module])
    return replace(subject, machine=subject.machine.with_disk(disk))


def _on_device(wishes: Wishes, machine: "Machine") -> Wishes:
    """Return the wishes with a budget on the GPU. Raises ResourceError if the machine has none."""
    word, _, value = (wishes.gpu_word or "").partition(" ")
    if not machine.has_device:
        raise ResourceError(
            f"{flag(word)}{value and f' {value}'}: no CUDA device here; leave it out, or plan for a machine that has "
            "one with --machine FILE"
        )
    memory = machine.device_memory_bytes or None
    if memory is not None and wishes.gpu_bytes is not None and wishes.gpu_bytes > memory:
        raise ResourceError(f"--gpu-memory {format_bytes(wishes.gpu_bytes)}: the GPU has {format_bytes(memory)}")
    return replace(wishes, gpu_bytes=wishes.gpu_bytes or memory)


def _confirmed(options: argparse.Namespace, words: WishWords, subject: "Subject") -> Confirmation:
    """Load the model as planned, time some tokens, and predict the same for the placement it was loaded with."""
    from offload.planning.forecast import PREFILL_TOKENS, START_TOKENS
    from offload.planning.trial import run_trial

    batch, prompts = subject.batch_size, (START_TOKENS, PREFILL_TOKENS)
    trial = run_trial(
        options.model,
        words,
        prompts,
        context_tokens=subject.context_tokens,
        batch_size=batch,
        costs=subject.costs,
    )
    placement = trial.placed(subject.placed())
    short, long = trial.timings
    after = None if trial.disk is None else replace(subject, machine=subject.machine.with_disk(trial.disk))
    return Confirmation(
        decode_predicted=batch / subject.decode_seconds(placement, short.context_tokens),
        decode_predicted_after=None if after is None else batch / after.decode_seconds(placement, short.context_tokens),
        decode_measured=batch / short.step_seconds,
        prefill_predicted=batch * long.prompt_tokens / subject.prefill_seconds(placement, long.prompt_tokens),
        prefill_measured=batch * long.prompt_tokens / long.prefill_seconds,
    )


def _in_words(subject: "Subject", placement: "Placement", prediction: "Prediction", hypothetical: str | None) -> str:
    from offload.planning.words import describe

    machine = subject.machine
    lines = [f"hypothetical: a machine of {hypothetical}, not this one"] if hypothetical else []
    lines += [
        f"machine  {machine.description}, measured {machine.date}",
        f"  memory {_rate(machine.read_bytes_per_second)}, int4 product {_rate(machine.kernel_bytes_per_second)}, "
        f"disk {_rate(machine.disk_bytes_per_second)}",
    ]
    if machine.has_device:
        lines.append(
            f"  GPU memory {_rate(machine.device_bytes_per_second)}, copied to it "
            f"{_rate(machine.copy_bytes_per_second)}, read by it {_rate(machine.mapped_bytes_per_second)}"
        )
    lines += [describe(placement), "layers"]
    for tier, ranges in _where(placement.tiers).items():
        lines.append(f"  {tier:9}{ranges}")
    start, full = prediction.decode_tokens_per_second, prediction.decode_full_tokens_per_second
    context = f"{full:.1f} with {subject.context_tokens} tokens before"
    lines += [
        "predicted" if subject.overheads.known else "predicted from the links alone, as the model was not rehearsed",
        f"  decode   {start:8.1f} tokens/s at the start, {context}",
        f"  prefill  {prediction.prefill_tokens_per_second:8.1f} tokens/s",
        f"  bound by {prediction.bound}: without it a token would take {prediction.bound_share:.0%} less",
        *(f"  {name}: {times:.1f}x" for name, times in prediction.help.items()),
    ]
    return "\n".join(lines)


def _draw(path: Path, name: str, placement: "Placement", prediction: "Prediction") -> None:
    """Write the picture. Raises ResourceError if that cannot be done."""
    from offload.planning.picture import draw_plan

    try:
        path.write_text(draw_plan(name, placement, prediction), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"--picture {path}: cannot be written ({error.strerror})") from None
    say(f"{path} written")


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"


def _where(tiers: Sequence[str]) -> dict[str, str]:
    """Return the layers of each tier: {"host": "0, 3, 6-8"}."""
    ranges: dict[str, list[str]] = {}
    first = 0
    for tier, group in groupby(tiers):
        last = first + len(list(group)) - 1
        ranges.setdefault(tier, []).append(str(first) if first == last else f"{first}-{last}")
        first = last + 1
    return {tier: ", ".join(parts) for tier, parts in ranges.items()}


def _as_json(
    subject: "Subject",
    placement: "Placement",
    prediction: "Prediction",
    measured: Confirmation | None,
    hypothetical: str | None,
) -> dict[str, Any]:
    return {
        "tiers": list(placement.tiers),
        "slots": placement.depth,
        "device_slots": placement.device_depth,
        "layers_in_parts": placement.split,
        "way_from_disk": placement.way,
        "expected_bytes": placement.expected_bytes,
        "device_bytes": placement.device_bytes,
        "disk_bytes_per_token": placement.disk_bytes,
        "budget_bytes": placement.budget_bytes,
        "device_budget_bytes": placement.device_budget_bytes,
        "prediction": asdict(prediction),
        "confirmation": None if measured is None else asdict(measured),
        "hypothetical": hypothetical,
        "machine": asdict(subject.machine),
        "overheads": subject.overheads.to_json(),
    }


if __name__ == "__main__":
    sys.exit(main())
