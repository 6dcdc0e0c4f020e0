"""A shard in memory, as views that are put in their places in the model and taken out again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.packed import PackedWeight
from offload.checkpoint import LayerBlob, TensorSpec
from offload.linear import PackedLinear
from offload.memory import Arena, Memory

PACKED, SCALE, ZERO, SHAPE = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"
ORDER = ".input_order"
"""What follows the name of a packed linear in the names of its tensors. The order of inputs is there where a checkpoint
of another tool has reordered them."""

_ALIGNMENT = 64
"""Of every copy in the memory that copies share, as of tensors in a shard."""


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
            table[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def as_mapped(self) -> "LayerView":
        """Return the same, few activations to be multiplied to the bits that they have from host memory."""
        packed = tuple((linear, replace(weight, as_mapped=True)) for linear, weight in self.packed)
        return replace(self, packed=packed)

    @property
    def memory(self) -> list[Tensor]:
        """The memory that its tensors are views of, each piece whole and once, uint8 [bytes]."""
        tensors = [*(weight.codes for _, weight in self.packed), *(tensor for _, _, tensor in self.others)]
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        return [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in storages.values()]


def copied(blob: LayerBlob, dtype: torch.dtype, moved: bool = False) -> dict[str, TensorSpec]:
    """Return the tensors of a shard that a model of `dtype` cannot use as they lie, as copies side by side.

    These are floating tensors of another dtype; where a device computes out of host memory, `moved`, everything that is
    not packed: norms, biases, orders of inputs. Of packed weights it reads those there too.
    """
    packed = {name.removesuffix(PACKED) for name in blob.tensors if name.endswith(PACKED)}
    parts = {name + kind for name in packed for kind in (PACKED, SCALE, ZERO)}
    copies: dict[str, TensorSpec] = {}
    end = 0
    for name, spec in blob.tensors.items():
        wanted = dtype if spec.dtype.is_floating_point else spec.dtype
        if name in parts or name.endswith(SHAPE) or (wanted == spec.dtype and not moved):
            continue
        nbytes = spec.nbytes // spec.dtype.itemsize * wanted.itemsize
        copies[name] = TensorSpec(end, nbytes, spec.shape, wanted)
        end = -(-(end + nbytes) // _ALIGNMENT) * _ALIGNMENT
    return copies


def copied_bytes(blob: LayerBlob, dtype: torch.dtype, moved: bool = False) -> int:
    """Return the memory that the copies of `copied` take together."""
    return max((spec.offset + spec.nbytes for spec in copied(blob, dtype, moved).values()), default=0)


def layer_view(
    model: PreTrainedModel,
    blob: LayerBlob,
    memory: Memory,
    group_size: int | None,
    allocate: Callable[[int], Memory] | None = None,
) -> LayerView:
    """Describe where a shard's tensors lie in some memory and where in the model they belong.

    group_size: of the packed weights, None for one group a row. allocate: gives so many bytes of the memory of a device
    that computes, for what it cannot use where it lies, see `copied`; None where the host computes.
    """
    copies = copied(blob, model.dtype, moved=allocate is not None and isinstance(memory, Arena))
    room = allocate(copied_bytes(blob, model.dtype, isinstance(memory, Arena))) if allocate and copies else None
    tensors = {
        name: memory.tensor(spec.offset, spec.nbytes, spec.shape, spec.dtype) for name, spec in blob.tensors.items()
    }
    packed: list[tuple[PackedLinear, PackedWeight]] = []
    others: list[tuple[dict[str, Any], str, Tensor]] = []
    converted: list[tuple[Tensor, Tensor]] = []
    for name in [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]:
        codes = tensors.pop(name + PACKED).view(torch.uint8)
        scale, zero = tensors.pop(name + SCALE), tensors.pop(name + ZERO, None)
        tensors.pop(name + SHAPE, None)
        linear = model.get_submodule(name)
        assert isinstance(linear, PackedLinear), f"{name} was not replaced"
        weight = PackedWeight(codes, scale, zero, group_size or linear.in_features, linear.bits)
        packed.append((linear, weight))
    for name, tensor in tensors.items():
        if name.endswith(SHAPE):  # of a linear that is read apart
            continue
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if (copy := copies.get(name)) is not None:
            source, tensor = tensor, _copy_in(room, copy)
            converted.append((tensor, source))
        if key in owner._parameters:
            others.append((owner._parameters, key, nn.Parameter(tensor, requires_grad=False)))
        else:
            others.append((owner._buffers, key, tensor))
    return LayerView(tuple(packed), tuple(others), tuple(converted))


def _copy_in(room: Memory | None, copy: TensorSpec) -> Tensor:
    """Return where a copy is to be, in host memory of its own where it has no room beside others."""
    if room is None:
        return torch.empty(copy.shape, dtype=copy.dtype)
    return room.tensor(copy.offset, copy.nbytes, copy.shape, copy.dtype)
