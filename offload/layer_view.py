"""A shard in memory, as views that are put in their places in the model and taken out again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.packed import PackedWeight
from offload.checkpoint import LayerBlob
from offload.linear import PackedLinear
from offload.memory import Memory

PACKED, SCALE, ZERO, SHAPE = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"
ORDER = ".input_order"
"""What follows the name of a packed linear in the names of its tensors. The order of inputs is there where a checkpoint
of another tool has reordered them."""

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's tensors as they lie in some memory, each with the place in the model it is for.

    packed: linears and their weights. others: tables of parameters or buffers, the key in each, and the tensor there.
    converted: those of them that are wanted elsewhere or in another dtype, and what they are filled from.
    """

    packed: tuple[tuple[PackedLinear, PackedWeight], ...]
    others: tuple[tuple[dict[str, Any], str, Tensor], ...]
    converted: tuple[tuple[Tensor, Tensor], ...]

    def attach(self) -> None:
        """Put every tensor in its place."""
        for linear, weight in self.packed:
            linear.packed = weight
        for target, source in self.converted:
            target.copy_(source, non_blocking=True)
        for table, key, tensor in self.others:
            table[key] = tensor

    def detach(self) -> None:
        """Leave nothing behind that could be read after another layer lies in the memory."""
        for linear, _ in self.packed:
            linear.packed = None
        for table, key, tensor in self.others:
            table[key] = torch.empty_like(tensor, device="meta")

    @property
    def memory(self) -> list[Tensor]:
        """The memory that its tensors are views of, each piece whole and once, uint8 [bytes]."""
        tensors = [*(weight.codes for _, weight in self.packed), *(tensor for _, _, tensor in self.others)]
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        return [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in storages.values()]


def layer_view(
    model: PreTrainedModel,
    blob: LayerBlob,
    memory: Memory,
    group_size: int | None,
    device: torch.device = _HOST,
) -> LayerView:
    """Describe where a shard's tensors lie in some memory and where in the model they belong.

    group_size: of the packed weights, None for one group a row. device: where what is not packed has to be, norms and
    biases; of packed weights a device reads also those in pinned host memory.
    """
    layer, prefix = model.get_submodule(blob.module), f"{blob.module}." if blob.module else ""
    tensors = {
        name.removeprefix(prefix): memory.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype)
        for name, spec in blob.tensors.items()
    }
    packed: list[tuple[PackedLinear, PackedWeight]] = []
    others: list[tuple[dict[str, Any], str, Tensor]] = []
    converted: list[tuple[Tensor, Tensor]] = []
    for name in [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]:
        codes = tensors.pop(name + PACKED).view(torch.uint8)
        scale, zero = tensors.pop(name + SCALE), tensors.pop(name + ZERO, None)
        tensors.pop(name + SHAPE, None)
        linear = layer.get_submodule(name)
        assert isinstance(linear, PackedLinear), f"{name} was not replaced"
        weight = PackedWeight(codes, scale, zero, group_size or linear.in_features, linear.bits)
        packed.append((linear, weight))
    for name, tensor in tensors.items():
        if name.endswith(SHAPE):  # of an expert that is read apart
            continue
        owner_name, _, key = name.rpartition(".")
        owner = layer.get_submodule(owner_name)
        dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
        if dtype != tensor.dtype or device != tensor.device:
            source, tensor = tensor, torch.empty_like(tensor, dtype=dtype, device=device)
            converted.append((tensor, source))
        if key in owner._parameters:
            others.append((owner._parameters, key, nn.Parameter(tensor, requires_grad=False)))
        else:
            others.append((owner._buffers, key, tensor))
    return LayerView(tuple(packed), tuple(others), tuple(converted))
