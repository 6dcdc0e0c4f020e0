"""Perplexity, by the standard protocol, with its standard error. `python -m eval.ppl`

The text is joined and tokenised once, cut into windows of W tokens, and each window read from an empty context. With a
stride S below W only the last S tokens of a window are scored, the first window whole. The mean negative log-likelihood
is over all scored tokens; its standard error is that of the windows' means, which neighbouring tokens do not shrink.
"""

import argparse
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from eval.likelihood import Divergence, Protocol, measure, standard_error
from eval.results import append, circumstances, command_line
from kernels.cpu_matmul import cpu_backend
from kernels.matmul import Mode
from offload.checkpoint import Checkpoint, is_checkpoint
from offload.command import Parser, run, say
from offload.errors import InputError, UsageError
from offload.executor import load
from offload.formats.convert import opened
from offload.formats.gguf_file import gguf_path
from offload.kv.cache import use_int8_attention
from offload.kv.calibration import KV_NAME
from offload.planning.wishes import KVFormat
from offload.source import DEFAULT_OUTPUT, resolve_model
from offload.text import Text, load_text, load_tokenizer, tokenize


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measurement and its protocol. nll and nll_stderr in nats a token; tokens: those scored, in all windows.

    kl: mean over them of KL(original || model), in nats; top1: the share of them whose likeliest token is the
    original's. Both None where there is no original beside. kv: see `Protocol`.
    """

    perplexity: float
    nll: float
    nll_stderr: float
    tokens: int
    windows: int
    window: int
    stride: int
    text: str
    text_sha256: str
    model: str
    backend: str
    seconds: float
    tokens_per_second: float
    window_nll: tuple[float, ...]
    kl: float | None = None
    top1: float | None = None
    kv: KVFormat | None = None


def evaluate(
    model: PreTrainedModel,
    name: str,
    backend: str,
    tokens: Tensor,
    text: Text,
    protocol: Protocol,
    original: PreTrainedModel | None = None,
) -> Perplexity:
    """Measure one model, beside the original if given.

    Raises UsageError if it cannot read a whole window.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and protocol.window > longest:
        raise UsageError(f"--window {protocol.window}: {name} reads at most {longest} tokens at once")
    beside = None if original is None else Divergence(original)
    started = time.monotonic()
    means, counts = measure(model, tokens, protocol, f"{name}, window", beside)
    seconds = time.monotonic() - started
    nll = sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts)
    return Perplexity(
        perplexity=math.exp(nll),
        nll=nll,
        nll_stderr=standard_error(means),
        tokens=sum(counts),
        windows=len(means),
        window=protocol.window,
        stride=protocol.stride,
        text=text.name,
        text_sha256=text.sha256,
        model=name,
        backend=backend,
        seconds=round(seconds, 2),
        tokens_per_second=round(len(means) * protocol.window / seconds, 1),
        window_nll=tuple(means),
        kl=None if beside is None else beside.kl,
        top1=None if beside is None else beside.top1,
        kv=protocol.kv,
    )


def strict_json(value: Any) -> str:
    """Return JSON that every parser reads: NaN, the spread of a single window, is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return json.dumps(plain(value), allow_nan=False)


def load_for_evaluation(directory: Path, mode: str, kv: KVFormat | None = None) -> tuple[PreTrainedModel, str]:
    """Return a model in float32, and the name of what multiplies its weights. kv: of the caches it is read with."""
    if is_checkpoint(directory):
        if mode not in ("exact", "fast"):
            raise UsageError(f"--backend {mode}: expected exact or fast")
        exact: Mode = "exact" if mode == "exact" else "fast"
        return load(directory, dtype=torch.float32, mode=exact, kv=kv), f"{cpu_backend()}-{mode}"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if kv is not None:
        use_int8_attention(model)
    return model, "torch-float32"


def default_model(model: str | None) -> Path:
    """Return the directory of `--model`: what quant.awq writes by default without it."""
    if model is not None:
        return opened(gguf_path(Path(model)) or resolve_model(model))
    if not DEFAULT_OUTPUT.is_dir():
        raise InputError(f"{DEFAULT_OUTPUT}: not made yet; `python -m quant.awq --bits 4` makes it, or name a --model")
    return DEFAULT_OUTPUT


def add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that make up the protocol."""
    add = parser.add_argument
    add("--text", metavar="FILE|DATASET", help="text; default: half of the topics of pydoc_data, not calibrated on")
    add("--window", type=int, default=2048, help="tokens of a window")
    add("--stride", type=int, help="tokens from window to window; default: the window")
    add("--limit-windows", type=int, metavar="N", help="only the first N windows")
    add("--backend", choices=["exact", "fast"], default="exact", help="activations of packed layers: float32, or int8")


def protocol_of(options: argparse.Namespace) -> Protocol:
    """Read the flags of `add_protocol_flags`. Raises UsageError unless the protocol's numbers make sense."""
    if options.window < 2:
        raise UsageError(f"--window {options.window}: expected at least 2")
    if options.stride is not None and not 1 <= options.stride <= options.window:
        raise UsageError(f"--stride {options.stride}: expected 1 to the window, {options.window}")
    if options.limit_windows is not None and options.limit_windows < 1:
        raise UsageError(f"--limit-windows {options.limit_windows}: expected at least 1")
    return Protocol(options.window, options.stride or options.window, options.limit_windows)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    parser = Parser("eval.ppl", "Measure a model's perplexity on a text.")
    parser.add_argument("-m", "--model", help="checkpoint, model directory or hub id; default: what quant.awq writes")
    add_protocol_flags(parser)
    parser.add_argument("--kv", choices=["int8"], help="read each window through a cache of this format")
    parser.add_argument("--baseline", action="store_true", help="also measure the model the checkpoint was made from")
    parser.add_argument("--record", action="store_true", help="write the figures into the checkpoint's README.md")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append the figures to a results file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    protocol = replace(protocol_of(options), kv=options.kv)
    directory = default_model(options.model)
    text = load_text(options.text, "evaluation")
    tokens = tokenize(text, load_tokenizer(directory))
    compressed = is_checkpoint(directory)
    for flag, given in (("--baseline", options.baseline), ("--record", options.record)):
        if given and not compressed:
            raise UsageError(f"{flag}: {directory} is not a checkpoint made from another model")
    model, backend = load_for_evaluation(directory, options.backend, options.kv)
    result = evaluate(model, str(directory), backend, tokens, text, protocol)
    baseline = None
    if options.baseline:
        del model
        source = resolve_model(Checkpoint.open(directory).recipe.source)
        baseline = evaluate(*load_original(source), tokens, text, replace(protocol, kv=None))
    if options.record:
        record(directory, result, baseline)
    if options.results is not None:
        append(options.results, [circumstances(command_line("eval.ppl", argv)) | _columns(result)])
    _print(result, baseline, options.json)


def _columns(result: Perplexity) -> dict[str, Any]:
    """Return a row of a results file."""
    calibrated = result.kv is not None and (Path(result.model) / KV_NAME).exists()
    return {
        "model": Path(result.model).name,
        "kv": f"{result.kv or ''}{', offsets' if calibrated else ''}",
        "arithmetic": result.backend,
        "text": result.text,
        "text_sha256": result.text_sha256[:16],
        "windows": result.windows,
        "window": result.window,
        "perplexity": round(result.perplexity, 4),
        "nll": round(result.nll, 5),
        "nll_stderr": round(result.nll_stderr, 5),
    }


def load_original(source: Path) -> tuple[PreTrainedModel, str, str]:
    """Return the uncompressed model in float32, its name, and the name of what multiplies its weights."""
    model, backend = load_for_evaluation(source, "exact")
    return model, str(source), backend


def rise(result: Perplexity, baseline: Perplexity) -> tuple[float, float]:
    """Return how much the mean nll rose, and the standard error of the windows' differences."""
    differences = [a - b for a, b in zip(result.window_nll, baseline.window_nll, strict=True)]
    return result.nll - baseline.nll, standard_error(differences)


def record(directory: Path, result: Perplexity, baseline: Perplexity | None) -> None:
    """Put the figures into the model card's section on accuracy, in place of earlier ones of the same protocol."""
    card = directory / "README.md"
    before = card.read_text() if card.exists() else ""
    protocol = f"{result.text}, sha256 {result.text_sha256[:16]}, {result.windows} windows of {result.window}"
    protocol += "" if result.stride == result.window else f", stride {result.stride}"
    protocol += "" if result.kv is None else f", keys and values in {result.kv}"
    line = f"- perplexity {result.perplexity:.3f} (nll {result.nll:.4f} ± {result.nll_stderr:.4f})"
    if baseline is not None:
        change, error = rise(result, baseline)
        line += f"; the original {baseline.perplexity:.3f}, nll rise {change:.4f} ± {error:.4f}"
    line += f" on {protocol}, {result.backend}\n"
    kept = re.sub(rf"^- perplexity .* on {re.escape(protocol)}, \S+\n", "", before, flags=re.MULTILINE)
    if "## Accuracy\n" not in kept:
        kept = f"{kept.rstrip()}\n\n## Accuracy\n\n"
    card.write_text(kept.replace("## Accuracy\n\n", f"## Accuracy\n\n{line}", 1))
    say(f"recorded in {card}")


def _print(result: Perplexity, baseline: Perplexity | None, as_json: bool) -> None:
    if as_json:
        values = asdict(result)
        if baseline is not None:
            change, error = rise(result, baseline)
            values |= {"baseline": asdict(baseline), "nll_rise": change, "nll_rise_stderr": error}
        print(strict_json(values))
        return
    print(f"perplexity {result.perplexity:.3f}   nll {result.nll:.4f} ± {result.nll_stderr:.4f}   {result.model}")
    if baseline is not None:
        change, error = rise(result, baseline)
        print(f"original   {baseline.perplexity:.3f}   nll {baseline.nll:.4f} ± {baseline.nll_stderr:.4f}")
        print(f"rise in nll {change:.4f} ± {error:.4f}, window by window")
    print(f"protocol   {result.text} (sha256 {result.text_sha256[:16]}), {result.windows} windows of {result.window}")
    kv = "" if result.kv is None else f"keys and values in {result.kv}; "
    print(f"           stride {result.stride}, {result.tokens} scored; {kv}{result.backend}, {result.seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
