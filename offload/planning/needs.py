"""What a model takes, in bytes, before any of it is loaded: counted from its configuration and its files."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from offload.checkpoint import Checkpoint
from offload.memory import own_memory_bytes

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
    device_runtime: what a GPU's memory holds before any tensor. embedding: what of the fixed bytes is a table that can
    stay on disk.
    """

    runtime_bytes: int
    fixed_bytes: int
    cache_bytes: int
    activation_bytes: int
    layers_bytes: tuple[int, ...]
    device_runtime_bytes: int = 0
    embedding_bytes: int = 0

    def without_embedding(self) -> "Needs":
        """Return what is needed when the embeddings are left on disk."""
        return replace(self, fixed_bytes=self.fixed_bytes - self.embedding_bytes, embedding_bytes=0)

    @property
    def around_bytes(self) -> int:
        """Everything that is not a decoder layer, without a GPU."""
        return self.runtime_bytes + self.fixed_bytes + self.cache_bytes + self.activation_bytes + _RESERVE_BYTES

    @property
    def working_bytes(self) -> int:
        """Activations, and what allocators waste."""
        return self.activation_bytes + _RESERVE_BYTES


def count_needs(
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    element_bytes: int,
    *,
    context_tokens: int,
    batch_size: int,
    chunk_tokens: int,
    device_runtime_bytes: int = 0,
    embedding_bytes: int = 0,
) -> Needs:
    """Return the needs of a checkpoint in this process, as it is before loading.

    element_bytes: of activations, keys and values, and of what is not quantized. chunk_tokens: tokens of each sequence
    in the largest pass. embedding_bytes: of a table of embeddings that can stay on disk, as it lies there.
    """
    fixed = sum(blob.nbytes for blob in checkpoint.blobs if not blob.module)
    return Needs(
        runtime_bytes=own_memory_bytes() + CODE_BYTES,
        fixed_bytes=int(fixed * element_bytes / 2),
        cache_bytes=batch_size * cache_bytes(config, context_tokens, element_bytes),
        activation_bytes=batch_size * activation_bytes(config, min(context_tokens, chunk_tokens)),
        layers_bytes=layer_bytes(checkpoint),
        device_runtime_bytes=device_runtime_bytes,
        embedding_bytes=int(embedding_bytes * element_bytes / 2),
    )


def cache_bytes(config: PretrainedConfig, context_tokens: int, element_bytes: int) -> int:
    """Return the bytes of keys and values of `context_tokens` tokens, all layers, for one sequence."""
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
