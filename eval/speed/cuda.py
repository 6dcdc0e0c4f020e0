"""The contenders on a CUDA device: ours, resident and read across the bus, torch, gemlite, Marlin; and the two reads.

Each is captured in a graph of many calls, so that the device and not the interpreter is what is timed.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.speed.cpu import has_room, pool
from eval.speed.timing import Bind, Samples, Step, copies_in, paired
from kernels.packed import PackedWeight, dequantize, symmetric_zero, unpack
from kernels.triton_matmul import dequant_matmul_triton, most_mapped, read_sums
from offload.command import say

_POOL_BYTES = 512 << 20  # several times the largest level 2 cache
_LINE_BYTES = 128
_LAUNCH_BOUND_BATCH = 64
_CALLS, _CALLS_OF_LARGE = 64, 4


class Contenders:
    """What is timed on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peer_versions = ", ".join(f"{name} {version(name)}" for name in ("gemlite", "vllm") if find_spec(name))

    def __call__(self, weight: PackedWeight) -> dict[str, Bind]:
        """Return contenders for one weight, by name, each with its own copies; the reads are those of the packed ones.

        weight: on the CPU. Left out, which is said, is what might take more than a quarter of the device's free memory,
        and a package that does not take the weight.
        """
        device = self._device
        resident, resident_bytes = _packed_pool(weight, device, mapped=False)
        mapped, mapped_bytes = _packed_pool(weight, device, mapped=True)
        binds: dict[str, Bind] = {
            "triton": _ours(resident, most=None),
            "triton mapped": _ours(mapped, most_mapped(device)),
            "read": lambda x: lambda i: read_sums(resident_bytes[i % len(resident_bytes)], device),
            "read mapped": lambda x: lambda i: read_sums(mapped_bytes[i % len(mapped_bytes)], device),
        }
        on_device = PackedWeight(weight.codes.to(device), weight.scale.to(device), None, weight.group_size, weight.bits)
        for name, (largest_bytes, prepare) in _PEERS.items():
            if has_room(name, weight, _POOL_BYTES, largest_bytes, _free_bytes(device)):
                try:
                    bind = prepare(on_device)
                except Exception as error:  # whatever another package raises
                    say(f"{name}: left out, {type(error).__name__}: {error}")
                    continue
                if bind is not None:
                    binds[name] = bind
        return binds

    def activations(self, m: int, k: int) -> Tensor:
        """Return bfloat16 [M, K] on the device."""
        return torch.randn(m, k, device=self._device, dtype=torch.bfloat16)

    def time(self, steps: Mapping[str, Step], m: int, rounds: int, sample_seconds: float) -> dict[str, Samples]:
        """Time the steps in turn, each from a graph of as many calls as outweigh its launch."""
        calls = _CALLS if m <= _LAUNCH_BOUND_BATCH else _CALLS_OF_LARGE
        graphs = {name: captured(step, calls) for name, step in steps.items()}
        times = paired(graphs, rounds, sample_seconds, torch.cuda.synchronize)
        return {name: Samples(tuple(seconds / calls for seconds in time.seconds)) for name, time in times.items()}


def captured(step: Step, calls: int) -> Step:
    """Return the replay of a graph of that many calls. What is compiled or tuned at a first call is so before it."""
    step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            step(i)
    return lambda i: graph.replay()


def _packed_pool(
    weight: PackedWeight, device: torch.device, mapped: bool
) -> tuple[tuple[PackedWeight, ...], tuple[Tensor, ...]]:
    """Return copies of the weight, on the device or in pinned host memory, and the bytes of each as one tensor."""
    codes, scale = weight.codes.view(-1), weight.scale.view(-1).view(torch.uint8)
    whole = torch.cat((codes, scale, torch.zeros(-weight.nbytes % _LINE_BYTES, dtype=torch.uint8)))
    stacked = whole.expand(copies_in(_POOL_BYTES, len(whole)), -1).contiguous()
    if device.type == "cuda":
        stacked = stacked.pin_memory() if mapped else stacked.to(device)
    rows = stacked.unbind()
    packed = tuple(
        PackedWeight(
            row[: len(codes)].view(weight.codes.shape),
            row[len(codes) : weight.nbytes].view(weight.scale.dtype).view(weight.scale.shape),
            None,
            weight.group_size,
            weight.bits,
        )
        for row in rows
    )
    return packed, rows


def _ours(packed: tuple[PackedWeight, ...], most: int | None) -> Bind:
    def bind(x: Tensor) -> Step | None:
        if most is not None and len(x) > most:
            return None
        return lambda i: dequant_matmul_triton(x, packed[i % len(packed)])

    return bind


def _torch_fp32(weight: PackedWeight) -> Bind:
    dense = pool(dequantize(weight), _POOL_BYTES)

    def bind(x: Tensor) -> Step:
        x = x.float()
        return lambda i: F.linear(x, dense[i % len(dense)])

    return bind


def _torch_bf16(weight: PackedWeight) -> Bind:
    dense = pool(dequantize(weight, torch.bfloat16), _POOL_BYTES)

    def bind(x: Tensor) -> Step:
        x = x.to(torch.bfloat16)
        return lambda i: F.linear(x, dense[i % len(dense)])

    return bind


def _torch_int4(weight: PackedWeight) -> Bind | None:
    """torch's operation on CUDA has the first of two codes in the high nibble, and tiles of 8 by 128 codes."""
    if weight.bits != 4 or weight.out_features % 8 or weight.in_features % 128:
        return None
    swapped = weight.codes << 4 | weight.codes >> 4
    packed = pool(torch.ops.aten._convert_weight_to_int4pack(swapped, 8), _POOL_BYTES)
    scale_and_zero = torch.stack((weight.scale, torch.zeros_like(weight.scale)), dim=-1).transpose(0, 1).contiguous()
    return lambda x: (
        lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i % len(packed)], weight.group_size, scale_and_zero)
    )


def _gemlite(weight: PackedWeight) -> Bind | None:
    if find_spec("gemlite") is None:
        return None
    from gemlite import DType, GemLiteLinear

    codes = unpack(weight)[0]
    zero = torch.full_like(weight.scale, symmetric_zero(weight.bits))
    layers = []
    for _ in range(copies_in(_POOL_BYTES, weight.nbytes)):
        layer = GemLiteLinear(
            weight.bits,
            group_size=weight.group_size,
            in_features=weight.in_features,
            out_features=weight.out_features,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        layer.pack(codes, weight.scale, zero, None)
        layers.append(layer)
    return lambda x: lambda i: layers[i % len(layers)](x)


def _marlin(weight: PackedWeight) -> Bind | None:
    """Marlin as vLLM has it; its own function quantises the weight anew."""
    if find_spec("vllm") is None:
        return None
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8 if weight.bits == 4 else scalar_types.uint8b128
    dense = dequantize(weight, torch.bfloat16).T.contiguous()
    codes, scale = marlin_utils_test.marlin_quantize(dense, kind, weight.group_size, act_order=False)[1:3]
    copies = pool(codes, _POOL_BYTES)
    none = torch.empty(0, dtype=torch.int32, device=codes.device)
    fixed = {
        "weight_scale": scale,
        "weight_zp": none,
        "g_idx": none,
        "g_idx_sort_indices": none,
        "workspace": marlin_utils.marlin_make_workspace_new(codes.device),
        "wtype": kind,
        "output_size_per_partition": weight.out_features,
        "input_size_per_partition": weight.in_features,
        "is_k_full": True,
    }
    return lambda x: lambda i: marlin_utils.apply_gptq_marlin_linear(input=x, weight=copies[i % len(copies)], **fixed)


_PEERS: dict[str, tuple[int, Callable[[PackedWeight], Bind | None]]] = {
    "torch fp32": (12, _torch_fp32),
    "torch bf16": (12, _torch_bf16),
    "torch int4": (2, _torch_int4),
    "gemlite": (4, _gemlite),
    "marlin": (16, _marlin),
}
"""By name: the most bytes that an element of the weight takes while it is prepared, and what prepares it."""


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
