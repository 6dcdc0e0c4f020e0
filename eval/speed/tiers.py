"""One model whose layers take every tier in turn: how fast it decodes and reads a prompt, and how much of the link.

The same loaded model is rearranged from one tier to the next. Beside each the link that bounds it is measured, what
single tokens take through transformers' modules alone, and accelerate's `cpu_offload` of the same shape in bfloat16 on
the same GPU, where both are there.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.speed.random_model import MODELS, SHAPES, ModelShape, write_checkpoint
from eval.speed.report import Rows
from offload.command import Progress, format_bytes, say
from offload.errors import ToolkitError, UsageError
from offload.executor import executor_of, load, new_cache
from offload.kv.cache import CACHE_NAME
from offload.limit import Limit, measure_limit
from offload.planning.arrangement import ARRANGEMENTS, WITHOUT_A_DEVICE, arranged
from offload.proved import unfuse
from offload.single_token import stand_ins
from offload.trace import Trace

_PROMPT_TOKENS = 16
_PEER_TOKENS = 3
_TRACED_TOKENS = 8


class TiersReport(Rows):
    """What one run measured, a row a tier and batch."""

    __slots__ = ()

    def table(self) -> str:
        """Return a line for each."""
        lines = [
            f"{'tier':15} {'batch':>5} {'tokens/s':>9} {'over the link':>14} {'link':>14} {'GB/s':>7} {'of it':>6} "
            f"{'prompt':>9} {'x modules':>9} {'x accelerate':>12}"
        ]
        for row in self.measured:
            prompt = f"{row['prompt_s']:.3f} s" if row["prompt_s"] != "" else ""
            lines.append(
                f"{row['tier']:15} {row['batch']:5} {row['tokens_per_s']:9.2f} "
                f"{format_bytes(row['link_bytes_per_token']):>14} {row['link']:>14} {row['link_gb_per_s']:7.2f} "
                f"{row['of_link']:6.0%} {prompt:>9} {row['x_modules']:>9} {row['x_accelerate']:>12}"
            )
        return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--shape", default="8b", choices=SHAPES, help="of the random model")
    add("--tiers", default=",".join(ARRANGEMENTS), help="separated by commas; without a GPU: host, disk to host")
    add("--batches", default="1,64", help="sequences that decode together, separated by commas")
    add("--tokens", type=int, default=24, help="to decode for each batch")
    add("--prompt-tokens", type=int, default=2048, help="of the prompt whose time is taken")
    add("--models", type=Path, default=MODELS, help="where the random models are kept")
    add("--trace", type=Path, metavar="FILE", help="write what one tier does as a Perfetto trace")
    add("--trace-tier", metavar="TIER", help="the tier; default: staged, or the last where that is not among them")


def measure(options: argparse.Namespace) -> TiersReport:
    """Rearrange one model from tier to tier and time each. Raises UsageError for flags that cannot be meant."""
    names, batches = options.tiers.split(","), _batches(options.batches)
    for name in names:
        if name not in ARRANGEMENTS:
            raise UsageError(f"--tiers {name!r}: expected some of {', '.join(ARRANGEMENTS)}")
    if options.trace_tier not in (None, *names):
        raise UsageError(f"--trace-tier {options.trace_tier!r}: expected one of --tiers, {', '.join(names)}")
    model = options.models / f"{options.shape}.int4"
    write_checkpoint(SHAPES[options.shape], model)
    on_device = any(name not in WITHOUT_A_DEVICE for name in names)
    tokens = max(options.prompt_tokens, _PROMPT_TOKENS + options.tokens + 1)
    loaded = load(
        model,
        context_tokens=tokens,
        batch_size=max(batches),
        prefill_chunk_tokens=options.prompt_tokens,
        n_gpu_layers=-1 if on_device else None,
    )
    try:
        rows = list(_rows(loaded, names, batches, options))
    finally:
        executor_of(loaded).close()
    if on_device and (peer := _accelerate_seconds(SHAPES[options.shape])) is not None:
        rows = [
            row | {"x_accelerate": round(peer / row["p50_ms"] * 1e3, 2) if row["batch"] == 1 else ""} for row in rows
        ]
    return TiersReport(tuple(rows))


def _batches(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batches {text!r}: expected numbers above zero, separated by commas")
    return [int(part) for part in parts]


def _rows(
    loaded: PreTrainedModel, names: list[str], batches: list[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the rows of every tier; one that fails is left out from there on, and said."""
    traced = options.trace_tier or ("staged" if "staged" in names else names[-1])
    progress = Progress("tier", len(names))
    for name in names:
        try:
            yield from _rows_of(loaded, name, batches, options)
            if options.trace is not None and name == traced:
                _trace(loaded, name, options.trace)
        except (ToolkitError, RuntimeError) as error:  # torch's own are of the second kind
            say(f"{name}: left out, {type(error).__name__}: {error}")
        progress.advance(name)


def _rows_of(
    loaded: PreTrainedModel, name: str, batches: list[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    executor = executor_of(loaded)
    executor.rearrange(arranged(executor.placement, name))
    prompt_seconds: float | None = _prefill(loaded, options.prompt_tokens)
    for batch in batches:
        seconds = _decode(loaded, batch, options.tokens)
        row = _row(name, batch, seconds, measure_limit(executor), prompt_seconds)
        yield row | {"x_modules": _x_modules(loaded, options.tokens, seconds) if batch == 1 else ""}
        prompt_seconds = None  # of one sequence, whatever decodes


def _x_modules(loaded: PreTrainedModel, tokens: int, seconds: list[float]) -> float | str:
    """Return how many times `seconds` a token takes through transformers' modules; "" where it goes through them."""
    executor = executor_of(loaded)
    if not stand_ins(executor.layers):
        return ""
    unfuse(executor.layers)
    try:
        return round(statistics.median(_decode(loaded, 1, tokens)) / statistics.median(seconds), 3)
    finally:
        executor.fuse()


def _trace(loaded: PreTrainedModel, name: str, path: Path) -> None:
    """Write what some tokens more do, which nothing else is timed by."""
    trace = Trace(executor_of(loaded))
    try:
        _decode(loaded, 1, _TRACED_TOKENS)
        trace.write(path)
        say(f"trace of {name}: {trace.describe_links()}")
    finally:
        trace.close()


@torch.inference_mode()
def _prefill(model: PreTrainedModel, tokens: int) -> float:
    """Return the seconds of a prompt, to the logits of its last token. A first try, which may compile, is not timed."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        _next(model, _prompt(model, 1, tokens), new_cache(model))
        taken.append(time.perf_counter() - started)
    return taken[-1]


@torch.inference_mode()
def _decode(model: PreTrainedModel, batch: int, tokens: int) -> list[float]:
    """Return the seconds of each of `tokens` passes of `batch` sequences, after a short prompt."""
    cache = new_cache(model)
    token, seconds = _next(model, _prompt(model, batch, _PROMPT_TOKENS), cache), []
    for _ in range(tokens):
        started = time.perf_counter()
        token = _next(model, token[:, None], cache)
        seconds.append(time.perf_counter() - started)
    return seconds


def _prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    ids = 1 + torch.arange(tokens).remainder(model.config.vocab_size - 1)
    return ids.expand(batch, -1)


def _next(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Return the likeliest next token of each sequence, int64 [B], on the host, where whoever generates needs it."""
    logits = model(ids.to(executor_of(model).device), use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache}).logits
    likeliest: Tensor = logits[:, -1].argmax(dim=-1).cpu()
    return likeliest


def _row(name: str, batch: int, seconds: list[float], limit: Limit, prompt_seconds: float | None) -> dict[str, Any]:
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    return {
        "tier": name,
        "batch": batch,
        "tokens_per_s": round(batch / median, 3),
        "p20_ms": round(ordered[len(ordered) // 5] * 1e3, 3),
        "p50_ms": round(median * 1e3, 3),
        "p80_ms": round(ordered[len(ordered) * 4 // 5] * 1e3, 3),
        "link": limit.link,
        "link_bytes_per_token": limit.bytes_per_token,
        "link_gb_per_s": round(limit.bytes_per_second / 1e9, 3),
        "of_link": round(limit.bytes_per_token / limit.bytes_per_second / median, 4),
        "prompt_s": "" if prompt_seconds is None else round(prompt_seconds, 4),
        "x_accelerate": "",
    }


def _accelerate_seconds(shape: ModelShape) -> float | None:
    """Return the seconds of a token under accelerate's `cpu_offload`, bfloat16; None, said, where it cannot be had."""
    if find_spec("accelerate") is None or not torch.cuda.is_available():
        say("accelerate: left out, " + ("not installed" if find_spec("accelerate") is None else "no GPU"))
        return None
    try:
        return _decode_offloaded(shape)
    except Exception as error:  # whatever another package raises
        say(f"accelerate: left out, {type(error).__name__}: {error}")
        return None


def _decode_offloaded(shape: ModelShape) -> float:
    from accelerate import cpu_offload
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    config = AutoConfig.for_model(**shape.config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(1e-3)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are numbers, which nothing has filled
    cpu_offload(model, execution_device=torch.device("cuda", 0))
    cache, ids = DynamicCache(config=config), torch.ones(1, _PROMPT_TOKENS, dtype=torch.int64, device="cuda")
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + _PEER_TOKENS):
            started = time.perf_counter()
            ids = model(ids, logits_to_keep=1, **{CACHE_NAME: cache}).logits[:, -1].argmax(dim=-1)[:, None]
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
