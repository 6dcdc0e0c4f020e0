"""One layer's cache and attention while a token is decoded, over the context: int8 blocks against transformers'.

"bf16 sdpa" is what transformers does, which copies keys and values to append to them and again for heads to share them;
"bf16 in place" does neither. A step appends one token and attends to all, and takes the token back. Steps rotate
through layers that together outgrow the caches. Beside them a loop reads the bytes that the int8 step has to read.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, QuantizedCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from eval.speed.report import Rows
from eval.speed.timing import Samples, Step, copies_in, paired
from kernels.cpu_matmul import read_seconds
from offload.command import Progress, say
from offload.errors import ResourceError, UsageError
from offload.kv.cache import Int8Layer, int8_attention

_POOL_BYTES = 384 << 20
_SAMPLE_SECONDS = 0.1
_QUANTIZED = {"hqq int8": "hqq", "quanto int4": "quanto"}
"""Transformers' own; quanto has no 8 bits there."""

_CALLS = 16
_MOST_QUANTIZED = 4
"""Layers of theirs: each takes seconds to fill, and dequantises far more than the caches hold at every step."""

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's attention, of one sequence, on a device."""

    heads: int
    key_heads: int
    head_dim: int
    context: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return a query, a key and a value of a token, bfloat16 [1, heads, 1, head_dim]."""
        query, key, value = (
            torch.randn(1, heads, 1, self.head_dim, dtype=torch.bfloat16, device=self.device)
            for heads in (self.heads, self.key_heads, self.key_heads)
        )
        return query, key, value

    def past(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the context, bfloat16 [1, key_heads, context, head_dim]."""
        size = (2, 1, self.key_heads, self.context, self.head_dim)
        past = torch.randn(size, dtype=torch.bfloat16, device=self.device)
        return past[0], past[1]


class KVReport(Rows):
    """What one run measured, a row a contender and context."""

    __slots__ = ()

    def table(self) -> str:
        """Return a line for each."""
        lines = [f"{'context':>8} {'contender':14} {'us':>9} {'bytes/token':>12} {'of read':>8} {'x int8':>7}"]
        lines += [
            f"{row['context']:8} {row['contender']:14} {row['p50_us']:9} {row['bytes_per_token']:>12} "
            f"{row['of_read'] and format(row['of_read'], '.0%'):>8} {row['x_int8']:7}"
            for row in self.measured
        ]
        return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--contexts", default="2048,8192", help="tokens before the one that is decoded, separated by commas")
    add("--heads", type=int, default=32, help="of the queries")
    add("--key-heads", type=int, default=8, help="of keys and values")
    add("--head-dim", type=int, default=128, help="elements of a head")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where keys, values and attention are")
    add("--rounds", type=int, default=11, help="samples of each contender")


def measure(options: argparse.Namespace) -> KVReport:
    """Time every contender at every context. Raises UsageError for flags that cannot be meant."""
    parts = options.contexts.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--contexts {options.contexts!r}: expected numbers above zero, separated by commas")
    if options.heads % options.key_heads:
        raise UsageError(f"--heads {options.heads}: not a multiple of --key-heads {options.key_heads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device; leave it out to measure the CPU")
    device = torch.device(options.device)
    shapes = [Shape(options.heads, options.key_heads, options.head_dim, int(part), device) for part in parts]
    progress = Progress("context", len(shapes))
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        rows += _rows(shape, options.rounds)
        progress.advance(f"{shape.context} tokens")
    return KVReport(tuple(rows))


def _rows(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    past = shape.past()
    found = dict(contenders(shape, past, shape.token(), copies_in(_POOL_BYTES, past[0].nbytes + past[1].nbytes)))
    read_bytes = found["int8"].bytes_per_token * shape.context
    pool = torch.ones(max(_POOL_BYTES, 2 * read_bytes), dtype=torch.uint8, device=shape.device)
    pieces = pool.split(read_bytes // 4 * 4)[:-1]
    steps: dict[str, Step] = {name: contender.step for name, contender in found.items()}
    steps["read"] = lambda i: _read(pieces[i % len(pieces)])
    with torch.inference_mode():
        times = _on_device(steps, rounds) if pool.is_cuda else paired(steps, rounds, _SAMPLE_SECONDS)
    limit = times.pop("read")
    for name, time in times.items():
        per_token = found[name].bytes_per_token
        yield {
            **{"heads": shape.heads, "key_heads": shape.key_heads, "head_dim": shape.head_dim},
            "context": shape.context,
            "contender": name,
            "p20_us": round(time.percentile(0.2) * 1e6, 1),
            "p50_us": round(time.median * 1e6, 1),
            "p80_us": round(time.percentile(0.8) * 1e6, 1),
            "bytes_per_token": per_token or "",
            "read_gb_per_s": round(read_bytes / limit.median / 1e9, 2),
            "of_read": round(_share(time, limit, per_token, read_bytes / shape.context), 3) if per_token else "",
            "x_int8": round(time.speedup_over(times["int8"]), 2),
            **({"device": "cuda"} if pool.is_cuda else {}),
        }


def _on_device(steps: dict[str, Step], rounds: int) -> dict[str, Samples]:
    """Time steps from graphs of several calls; one of which none can be made is left out, and said."""
    from eval.speed.cuda import captured  # needs triton, which a machine without a GPU may lack

    graphs = {}
    for name, step in steps.items():
        try:
            graphs[name] = captured(step, _CALLS)
        except RuntimeError as error:
            say(f"{name}: left out, no graph of it ({str(error).splitlines()[0]})")
    times = paired(graphs, rounds, _SAMPLE_SECONDS, torch.cuda.synchronize)
    return {name: Samples(tuple(seconds / _CALLS for seconds in time.seconds)) for name, time in times.items()}


def _read(piece: Tensor) -> object:
    if not piece.is_cuda:
        return read_seconds(piece)
    from kernels.triton_matmul import read_sums  # needs triton, which a machine without a GPU may lack

    return read_sums(piece, piece.device)


def _share(time: Samples, limit: Samples, per_token: float, read_per_token: float) -> float:
    """Return the share of the reading loop's rate at which a step takes in its own bytes."""
    return time.speedup_over(limit) * per_token / read_per_token


@dataclass(frozen=True, slots=True)
class Contender:
    """Layers of one kind of cache that are full, and the attention over them. bytes_per_token: 0 if not known."""

    shape: Shape
    layers: tuple[CacheLayerMixin, ...]
    attend: Attend
    bytes_per_token: int
    token: tuple[Tensor, Tensor, Tensor]
    module: nn.Module

    def step(self, index: int) -> Tensor:
        """Append a token, attend, take it back where that can be done."""
        query, key, value = self.token
        layer = self.layers[index % len(self.layers)]
        out = self.attend(self.module, query, *layer.update(key, value))
        if layer.is_croppable:
            layer.crop(-1)
        return out


class _InPlace(DynamicLayer):  # type: ignore[misc]
    """Transformers' layer without its copies: keys and values lie in buffers with room for one token more."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens behind the others; the first call's are the context."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [torch.cat([past, past[:, :, -1:]], dim=2) for past in (key_states, value_states)]
            self._tokens = key_states.shape[2]
        else:
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, self._tokens :] = new
        return self._buffers[0], self._buffers[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: the next token takes the place of the last."""


def contenders(
    shape: Shape, past: tuple[Tensor, Tensor], token: tuple[Tensor, Tensor, Tensor], copies: int
) -> Iterator[tuple[str, Contender]]:
    """Yield what can be compared here, the int8 blocks first: `copies` layers each, filled with keys and values."""
    module = nn.Module()
    module.num_key_value_groups = shape.heads // shape.key_heads  # type: ignore[assignment]
    element_bytes = 2 * 2 * shape.key_heads * shape.head_dim

    def full(make: Callable[[], CacheLayerMixin], most: int = copies) -> tuple[CacheLayerMixin, ...]:
        layers = tuple(make() for _ in range(min(copies, most)))
        for layer in layers:
            layer.update(*past)
        return layers

    def int8(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return int8_attention(module, query, key, value, None)[0]

    def sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = sdpa_attention_forward(module, query, key, value, None, is_causal=False)[0]
        return out

    def grouped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = query.view(1, shape.key_heads, -1, shape.head_dim)  # heads of one key head as its queries
        return scaled_dot_product_attention(shared, key, value).view(1, 1, shape.heads, shape.head_dim)

    blocks = full(lambda: Int8Layer(direct=True))
    yield "int8", Contender(shape, blocks, int8, blocks[0].nbytes // shape.context, token, module)
    yield "bf16 sdpa", Contender(shape, full(DynamicLayer), sdpa, element_bytes, token, module)
    yield "bf16 in place", Contender(shape, full(_InPlace), grouped, element_bytes, token, module)
    for name, backend in _QUANTIZED.items():
        if (make := _quantized(backend)) is not None:
            layers = full(make, _MOST_QUANTIZED)
            yield name, Contender(shape, layers, sdpa, 0, token, module)


def _quantized(backend: str) -> Callable[[], CacheLayerMixin] | None:
    """Return what makes a layer of transformers' quantized cache, None where its package is not installed."""
    installed = {"hqq": is_hqq_available, "quanto": is_optimum_quanto_available}
    if not installed[backend]():
        return None
    config, bits = LlamaConfig(num_hidden_layers=1), 8 if backend == "hqq" else 4
    axis = 1 if backend == "hqq" else 0

    def make() -> CacheLayerMixin:
        try:
            return QuantizedCache(backend, config, nbits=bits, axis_key=axis, axis_value=axis).layers[0]
        except ImportError as error:
            raise ResourceError(f"{backend}: installed, but cannot be used ({error})") from None

    return make
