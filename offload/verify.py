"""Prove a checkpoint on this machine: its checksums, and streamed against resident bit for bit. `-m offload.verify`"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.command import Parser, Progress, format_bytes, run, say
from offload.errors import InputError, UsageError
from offload.source import DEFAULT_OUTPUT

if TYPE_CHECKING:
    from torch import Tensor

    from offload.checkpoint import Checkpoint
    from offload.gpu.device import Device
    from offload.planning.wishes import WishWords

_SLOTS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Offer:
    """A placement this machine can offer, in words and as what `load` is asked for.

    alike: those that are computed by the same kernels, and so to the same bits. arrangement: of the layers once the
    model is loaded, see `offload.planning.arrangement`; None to leave them. modules: single tokens go through
    transformers' modules, as they do where layers come in parts.
    """

    name: str
    words: "WishWords"
    alike: str = "host"
    arrangement: str | None = None
    modules: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a placement did. reference: the first one alike; differs: the first pass with other logits, None if none."""

    placement: str
    reference: str
    tokens_per_second: float
    differs: str | None


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    for word in ("prompt_tokens", "new_tokens"):
        if getattr(options, word) < 1:
            raise UsageError(f"--{word.replace('_', '-')} {getattr(options, word)}: expected at least 1")
    if not options.model.is_dir() and options.model == DEFAULT_OUTPUT:
        raise InputError(f"{options.model}: not made yet; `python -m quant.awq --bits 4` makes it, or name a --model")
    from offload.checkpoint import Checkpoint
    from offload.formats.convert import opened

    options.model = opened(options.model, plain=True)
    checkpoint = Checkpoint.open(options.model)
    check_sums(checkpoint)
    outcomes = _outcomes(options, checkpoint)
    if options.json:
        print(json.dumps({"nbytes": checkpoint.nbytes, "placements": [asdict(outcome) for outcome in outcomes]}))
    bad = [f"{outcome.placement} ({outcome.differs})" for outcome in outcomes if outcome.differs]
    references = [outcome.reference for outcome in outcomes if outcome.differs]
    if bad:
        raise InputError(
            f"{options.model}: other logits than {', '.join(dict.fromkeys(references))}: {'; '.join(bad)}; no token of "
            "these placements can be trusted: report it with the output of this command"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("offload.verify", "Verify a checkpoint's checksums, then that streaming it changes no bit.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    add("--prompt-tokens", type=int, default=64, help="tokens of the prompt whose logits are compared")
    add("--new-tokens", type=int, default=8, help="tokens after it, one pass each")
    add("--exact", action="store_true", help="compare with float32 activations instead of int8")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def check_sums(checkpoint: "Checkpoint") -> None:
    """Read every tensor past the page cache and compare it with the manifest. Raises CheckpointError."""
    from offload.checksums import verify
    from offload.memory import Arena, FileReader
    from offload.read_queue import read_blob

    reader, arena = FileReader(), Arena(max(blob.nbytes for blob in checkpoint.blobs))
    progress = Progress("checksums", len(checkpoint.blobs))
    try:
        for blob in checkpoint.blobs:
            read_blob(reader, blob, arena)
            verify(blob, arena)
            progress.advance(blob.path.name)
    finally:
        reader.close()


def offers(checkpoint: "Checkpoint", available_bytes: int) -> list[Offer]:
    """Return the placements of a checkpoint on a machine with so much memory free; the first is the reference."""
    layers = [blob.module for blob in checkpoint.blobs if blob.module]
    found = []
    if checkpoint.nbytes < available_bytes:
        found.append(Offer("all layers in memory", {"device_map": "cpu"}))
    found += [
        Offer(f"all layers on disk, {slots} slot{'s' if slots > 1 else ''}", {"device_map": "disk", "slots": slots})
        for slots in _SLOTS[: len(layers)]
    ]
    if checkpoint.nbytes < available_bytes and len(layers) > 1:
        places = {"": "cpu"} | dict.fromkeys(layers[::2], "disk")
        found.append(Offer("every second layer on disk", {"device_map": places, "slots": min(2, len(layers[::2]))}))
    return found


def device_offers(checkpoint: "Checkpoint", available_bytes: int, device: "Device") -> list[Offer]:
    """Return those of a GPU, the reference of each kind first.

    Weights in its memory and weights across the bus are multiplied by different kernels, and single tokens replayed or
    not by others again; layers that the host computes for it take those of `offers`.
    """
    on_device = checkpoint.nbytes < device.total_bytes - device.used_bytes
    names = ["resident", "half staged"] if on_device else []
    names += ["staged"] if checkpoint.nbytes < available_bytes else []
    names += ["disk to staged"]
    found = [Offer(f"GPU: {name}", {"device_map": "auto"}, "device", name) for name in names]
    found.append(Offer(f"GPU: {names[0]}, modules", {"device_map": "auto"}, "modules", names[0], modules=True))
    names = ["staged in parts"] if checkpoint.nbytes < available_bytes else []
    names += ["disk to staged in parts"]
    found += [Offer(f"GPU: {name}", {"device_map": "auto"}, "modules", name, modules=True) for name in names]
    names = (["mapped"] if checkpoint.nbytes < available_bytes else []) + ["disk to mapped"]
    return found + [Offer(f"GPU: {name}", {"device_map": "auto"}, "mapped", name) for name in names]


def _all_offers(checkpoint: "Checkpoint") -> list[Offer]:
    """Return what is to be tried here, and say what is not."""
    from offload.gpu.device import find_device

    available, device = available_bytes(), find_device()
    tried = offers(checkpoint, available)
    if len(tried) < len(offers(checkpoint, sys.maxsize)):
        need = f"{format_bytes(checkpoint.nbytes)} do not fit into the {format_bytes(available)} that are free"
        say(f"{need}: the reference is {tried[0].name}")
    if device is None:
        say("no GPU: its placements are not tried")
        return tried
    return tried + device_offers(checkpoint, available, device)


def _outcomes(options: argparse.Namespace, checkpoint: "Checkpoint") -> list[Outcome]:
    outcomes: list[Outcome] = []
    references: dict[str, tuple[str, list[Tensor]]] = {}
    for offer in _all_offers(checkpoint):
        logits, tokens_per_second = _logits(options, offer)
        reference, expected = references.setdefault(offer.alike, (offer.name, logits))
        outcome = Outcome(offer.name, reference, tokens_per_second, _difference(expected, logits))
        outcomes.append(outcome)
        if not options.json:
            state = "DIFFERS" if outcome.differs else "ok"
            where = f"  {outcome.differs}" if outcome.differs else ""
            print(f"{state:8} {offer.name:28} {tokens_per_second:8.1f} tokens/s{where}", flush=True)
    return outcomes


def _logits(options: argparse.Namespace, offer: Offer) -> "tuple[list[Tensor], float]":
    """Return the logits of a prompt and of the tokens after it, and how many of the latter a second."""
    import torch

    from offload.executor import executor_of, load
    from offload.kv.cache import CACHE_NAME
    from offload.planning.arrangement import arranged
    from offload.proved import unfuse

    context = options.prompt_tokens + options.new_tokens
    mode: Any = "exact" if options.exact else "fast"
    model = load(options.model, context_tokens=context, mode=mode, poison=True, **offer.words)
    executor = executor_of(model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    try:
        if offer.arrangement is not None:
            executor.rearrange(arranged(executor.placement, offer.arrangement))
        if offer.modules:
            unfuse(executor.layers)
        with torch.inference_mode():
            output = model(tokens[:, : options.prompt_tokens], use_cache=True)
            logits, started = [output.logits], time.perf_counter()
            for position in range(options.prompt_tokens, context):
                output = model(tokens[:, position : position + 1], **{CACHE_NAME: output[CACHE_NAME]})
                logits.append(output.logits)
            elapsed = time.perf_counter() - started
    finally:
        executor.close()
        del model, executor
        gc.collect()  # a model is full of circles, and the next one needs its memory
    return logits, options.new_tokens / elapsed


def _difference(expected: "Sequence[Tensor]", found: "Sequence[Tensor]") -> str | None:
    """Name the first pass whose logits differ in any bit."""
    import torch

    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):  # as bytes: NaN is equal to itself
            return "in the prompt" if number == 0 else f"in token {number} after the prompt"
    return None


def available_bytes() -> int:
    """Return the memory that the system says could be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
