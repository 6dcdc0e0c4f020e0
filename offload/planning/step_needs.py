"""What the decode step that a GPU replays takes there (offload/gpu/captured.py), counted before a layer is loaded."""

from dataclasses import replace

import torch
from transformers import PretrainedConfig

from kernels.step_room import StepShape
from kernels.triton_tuning import GpuKind
from offload.checkpoint import Checkpoint
from offload.gpu.captured import FEWEST_TOKENS, most_tokens, room_bytes
from offload.planning.device_needs import DeviceScratch, packed_shapes
from offload.planning.wishes import KVFormat

_GRAPH_BYTES = 128 << 10
"""What the driver keeps of some twenty launches: taken high, not measured."""


def step_shape(
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    context_tokens: int,
    gpu: GpuKind | None,
    kv: KVFormat | None,
) -> StepShape | None:
    """Return that of a decoder layer behind so many tokens, None where no layer is like Llama's, or without a GPU."""
    text = config.get_text_config(decoder=True)
    heads, mlp = getattr(text, "num_attention_heads", None), getattr(text, "intermediate_size", None)
    layers = [blob for blob in checkpoint.blobs if blob.module]
    weights = packed_shapes(checkpoint, layers[:1])
    if gpu is None or not heads or not mlp or not weights:
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return StepShape(
        hidden=text.hidden_size,
        heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rotary=head_dim,
        mlp=mlp,
        weights=tuple(weights),
        dtype=dtype,
        int8=kv is not None,
        most_tokens=most_tokens(context_tokens),
        gpu=gpu,
    )


def with_steps(scratch: DeviceScratch, shape: StepShape | None) -> DeviceScratch:
    """Return what computing takes with steps of this shape, and of all that are for fewer tokens; None: without."""
    if shape is None:
        return scratch
    ranges = (shape.most_tokens // FEWEST_TOKENS).bit_length()
    return replace(scratch, step_bytes=room_bytes(shape), graphs_bytes=ranges * _GRAPH_BYTES)
