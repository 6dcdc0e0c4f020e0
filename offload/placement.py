"""Where every layer lives: decided from sizes and a budget before anything is loaded.

On a machine without a GPU a decoder layer is either on the `host`, in memory for good, or on `disk`, read into a ring
of slots for each pass; embeddings, norms and head are always on the host. The budget is one for the whole process,
with Python and the libraries in it.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from offload.checkpoint import Checkpoint
from offload.command import format_bytes
from offload.errors import ResourceError

Tier = Literal["resident", "staged", "mapped", "host", "disk"]

_DEPTH = 3
CODE_BYTES = 180 << 20
"""What the code of Python, torch and transformers takes once a model has run. The kernel counts whole pieces of a file
around each page that was touched: the same run was measured at 95 MiB and, with libraries freshly written, at 176."""

_RESERVE_BYTES = 8 << 20
"""The allocator's own waste, and the streamer."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model takes beside its decoder layers, in bytes, and what each layer takes.

    runtime: Python, torch and transformers, their code included. fixed: embeddings, norms and head. cache: keys and
    values at the asked context. activations: the largest pass. layers: one entry a decoder layer, in order.
    """

    runtime_bytes: int
    fixed_bytes: int
    cache_bytes: int
    activation_bytes: int
    layers_bytes: tuple[int, ...]

    @property
    def around_bytes(self) -> int:
        """Everything that is not a decoder layer."""
        return self.runtime_bytes + self.fixed_bytes + self.cache_bytes + self.activation_bytes + _RESERVE_BYTES


@dataclass(frozen=True, slots=True)
class Placement:
    """The tier of every decoder layer, the depth of the ring for those on disk, and what all of it takes."""

    tiers: tuple[Tier, ...]
    depth: int
    needs: Needs
    budget_bytes: int | None

    @property
    def disk_bytes(self) -> int:
        """Bytes that one pass over the model reads from disk."""
        return sum(n for n, tier in zip(self.needs.layers_bytes, self.tiers, strict=True) if tier == "disk")

    @property
    def slots_bytes(self) -> int:
        """Bytes of the ring."""
        return self.depth * max(self.needs.layers_bytes) if self.disk_bytes else 0

    @property
    def expected_bytes(self) -> int:
        """The process's peak, as planned."""
        return self.needs.around_bytes + sum(self.needs.layers_bytes) - self.disk_bytes + self.slots_bytes


def plan(needs: Needs, budget_bytes: int | None) -> Placement:
    """Keep as many layers in memory as the budget allows, spread evenly between those that are streamed.

    Never streams what fits. Raises ResourceError naming the smallest budget if not even the ring does.
    """
    count = len(needs.layers_bytes)
    all_kept: list[Tier] = ["host"] * count
    everything = Placement(tuple(all_kept), 0, needs, budget_bytes)
    if budget_bytes is None or everything.expected_bytes <= budget_bytes:
        return everything
    largest = max(needs.layers_bytes)
    depth = min(_DEPTH, count)
    while depth > 1 and needs.around_bytes + depth * largest > budget_bytes:
        depth -= 1
    left = budget_bytes - needs.around_bytes - depth * largest
    if left < 0:
        raise ResourceError(_too_small(needs, budget_bytes))
    kept = min(left // largest, count - 1)
    tiers: list[Tier] = ["disk"] * count
    for index in range(kept):
        tiers[index * count // kept] = "host"
    return Placement(tuple(tiers), min(depth, count - kept), needs, budget_bytes)


def _too_small(needs: Needs, budget_bytes: int) -> str:
    smallest_mib = -(-(needs.around_bytes + max(needs.layers_bytes)) // (1 << 20))  # rounded up: it is to be tried
    return (
        f"--cpu-memory {format_bytes(budget_bytes)}: too small for this model; at least {smallest_mib} MiB is "
        f"needed: {format_bytes(needs.runtime_bytes)} for Python, torch and transformers, "
        f"{format_bytes(needs.fixed_bytes)} for embeddings and head, "
        f"{format_bytes(needs.cache_bytes)} for keys and values, "
        f"{format_bytes(needs.activation_bytes + _RESERVE_BYTES)} for activations and reserve, "
        f"{format_bytes(max(needs.layers_bytes))} for one layer"
    )


def cache_bytes(config: PretrainedConfig, context_tokens: int, element_bytes: int) -> int:
    """Return the bytes of keys and values of `context_tokens` tokens, all layers."""
    text = config.get_text_config(decoder=True)
    query_heads = getattr(text, "num_attention_heads", None)
    if not query_heads:  # a recurrent model keeps a state of fixed size
        return 0
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    return int(2 * text.num_hidden_layers * heads * head_dim * context_tokens * element_bytes)


def activation_bytes(config: PretrainedConfig, chunk_tokens: int) -> int:
    """Return what a pass over `chunk_tokens` tokens holds at most: float32 MLP activations, residuals, and the logits.

    A gated MLP has four tensors of its width alive, attention three of the hidden size; one row of logits in float32
    and its copies for sampling.
    """
    text = config.get_text_config(decoder=True)
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int(4 * chunk_tokens * (4 * width + 4 * text.hidden_size) + 4 * 4 * text.vocab_size)


def layer_bytes(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the payload of every decoder layer, rounded up to the pages it takes in memory."""
    return tuple(-(-blob.nbytes // 4096) * 4096 for blob in checkpoint.blobs if blob.module)


def describe(placement: Placement) -> str:
    """Return the plan as lines for a person."""
    needs, count = placement.needs, len(placement.tiers)
    kept = count - placement.tiers.count("disk")
    kept_bytes = sum(needs.layers_bytes) - placement.disk_bytes
    lines = [
        ("Python, torch, transformers", needs.runtime_bytes),
        ("embeddings, norms, head", needs.fixed_bytes),
        ("keys and values", needs.cache_bytes),
        ("activations and reserve", needs.activation_bytes + _RESERVE_BYTES),
        (f"{kept} of {count} layers, kept in memory", kept_bytes),
    ]
    if placement.disk_bytes:
        lines.append((f"ring of {placement.depth} slots for the other {count - kept}, on disk", placement.slots_bytes))
    total = f"together, of a budget of {format_bytes(placement.budget_bytes)}" if placement.budget_bytes else "together"
    lines.append((total, placement.expected_bytes))
    text = "\n".join(f"  {format_bytes(size):>10}  {what}" for what, size in lines)
    return f"plan\n{text}\n  {format_bytes(placement.disk_bytes):>10}  read from disk for every pass over the model"
