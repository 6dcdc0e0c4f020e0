"""A skeleton made ready for a checkpoint: packed linears in their places, and exactly the tensors it has to bring."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from kernels.matmul import Mode
from kernels.packed import codes_per_word
from offload.checkpoint import Checkpoint, describe_difference
from offload.errors import CheckpointError
from offload.layer_view import ORDER, PACKED, SCALE, SHAPE, ZERO
from offload.linear import PackedLinear


def replace_linears(model: PreTrainedModel, checkpoint: Checkpoint, mode: Mode) -> list[str]:
    """Put a PackedLinear where the checkpoint holds a packed weight; return their names."""
    names = [name.removesuffix(PACKED) for blob in checkpoint.blobs for name in blob.tensors if name.endswith(PACKED)]
    ordered = {name for blob in checkpoint.blobs for name in blob.tensors if name.endswith(ORDER)}
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if type(linear) is not nn.Linear:
            raise CheckpointError(
                f"{checkpoint.directory}: {name!r} is packed, but no linear layer of {type(model).__name__}"
            )
        bits, has_bias = checkpoint.recipe.bits_of(name), linear.bias is not None
        packed = PackedLinear(linear.in_features, linear.out_features, has_bias, model.dtype, bits, mode)
        if name + ORDER in ordered:
            packed.reorder_inputs()
        model.set_submodule(name, packed)
    return names


def check_tensors(model: PreTrainedModel, checkpoint: Checkpoint, packed: Sequence[str]) -> None:
    """Demand exactly the tensors the model has, each of its shape and a fitting dtype. Raises CheckpointError."""
    expected = _expected_tensors(model, checkpoint, packed)
    found = {name: (blob, spec) for blob in checkpoint.blobs for name, spec in blob.tensors.items()}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if set(found) | tied != set(expected) | tied:
        difference = describe_difference(set(found) - tied, set(expected) - tied, "by the configuration")
        raise CheckpointError(f"{checkpoint.directory}: {difference}")
    for name, (blob, spec) in found.items():
        shape, dtypes = expected[name]
        if spec.shape != shape or spec.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise CheckpointError(
                f"{blob.path}: tensor {name!r} is {spec.dtype} {list(spec.shape)}, expected {wanted} {list(shape)}"
            )
        if blob.module and not name.startswith(f"{blob.module}."):
            raise CheckpointError(f"{blob.path}: tensor {name!r} is not of layer {blob.module!r}")


def _expected_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, packed: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    floats = (torch.bfloat16, torch.float16, torch.float32)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        name: (tuple(tensor.shape), floats if tensor.is_floating_point() else (tensor.dtype,))
        for name, tensor in model.state_dict().items()
    }
    for name in packed:
        linear = model.get_submodule(name)
        rows, inputs = int(linear.out_features), int(linear.in_features)
        groups, per_word = inputs // (checkpoint.recipe.group_size or inputs), codes_per_word(linear.bits)
        expected[name + PACKED] = ((rows, inputs // per_word), (torch.int32,))
        expected[name + SCALE] = ((rows, groups), (torch.bfloat16, torch.float16))
        expected[name + SHAPE] = ((2,), (torch.int64,))
        if not checkpoint.recipe.symmetric:
            expected[name + ZERO] = ((-(-rows // per_word), groups), (torch.int32,))
    return expected
