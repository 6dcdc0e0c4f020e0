"""The product on the CPU: our compiled kernel, else torch's own int4 operation, else dequantise and multiply.

Which of them runs is decided once, at the first call, and logged with its reason when it is not the first choice.
"""

import ctypes
import logging
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.cpu_build import BuildError, load_library
from kernels.packed import PackedWeight, dequantize, unpack

_log = logging.getLogger(__name__)

LEVELS = ("portable", "avx2", "avx512-vnni", "amx")
"""Instruction sets of the compiled kernel, by the number the library knows them by."""

_EXACT_BATCH = 8
_PANEL_BYTES = 8 << 20
_BUILTIN_GROUPS = (32, 64, 128)


def dequant_matmul_cpu(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, mode: Literal["fast", "exact"], level: int | None = None
) -> Tensor:
    """Return x @ W.T + bias for operands that `dequant_matmul` has checked.

    "fast" rounds activations to int8, 32 of a row under one scale (128 where they are tiled), and is exact otherwise;
    "exact" keeps them float32.
    level: an index of LEVELS not above this machine's, for tests. Row m of the result depends on row m of x alone, and
    on neither the batch nor the number of threads, with two exceptions in the last bits: an exact product of more than
    8 activations, which torch multiplies, and with AMX whether the batch has 6 activations, from where on it is tiled.
    """
    library = compiled_library()
    rows = x.reshape(-1, weight.in_features)
    if library is None:
        y = _builtin(rows, weight) if mode == "fast" else rows.float() @ dequantize(weight).T
        y = y if bias is None else y + bias.float()
    elif mode == "exact" and len(rows) > _EXACT_BATCH:
        y = _exact_by_panels(library, rows.float(), weight, bias, cpu_level() if level is None else level)
    else:
        y = _compiled(library, rows, weight, bias, mode, cpu_level() if level is None else level)
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def cpu_backend() -> str:
    """Name what multiplies on this machine: "cpu-avx512-vnni", "cpu-avx2", "cpu-portable" or "torch"."""
    return "torch" if compiled_library() is None else f"cpu-{LEVELS[cpu_level()]}"


def dequantize_cpu(weight: PackedWeight, start: int, stop: int) -> Tensor:
    """Return rows start..stop of W in float32, as `kernels.packed.dequantize` gives them, faster."""
    library = compiled_library()
    if library is None:
        return dequantize(weight)[start:stop]
    return _dequantize_rows(library, weight, start, stop, cpu_level())


def read_seconds(buffer: Tensor) -> float:
    """Return the seconds that reading a uint8 tensor once takes with all of torch's threads."""
    library = compiled_library()
    if library is None:
        raise RuntimeError("measuring the read bandwidth needs the compiled kernels")
    seconds: float = library.int4_read_seconds(cpu_level(), torch.get_num_threads(), buffer.data_ptr(), buffer.nbytes)
    return seconds


@cache
def compiled_library() -> ctypes.CDLL | None:
    """Return the compiled kernels, None (said once, with the reason) where there are none."""
    try:
        library = load_library()
    except BuildError as error:
        _log.warning("int4 products run through torch, several times slower: %s", error)
        return None
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    weight: list[Any] = [integer, integer, pointer, pointer, integer, pointer, long, long, long, integer]
    library.int4_workspace_bytes.argtypes = [long, long, long]
    library.int4_workspace_bytes.restype = long
    library.int4_fast.argtypes = [*weight, pointer, long, pointer, pointer, pointer]
    library.int4_exact.argtypes = [*weight, pointer, long, pointer, pointer]
    library.int4_dequantize.argtypes = [*weight, pointer, long, long]
    library.int4_relay_awq.argtypes = [integer, pointer, pointer, long, long]
    library.int4_relay_awq.restype = None
    library.int4_read_seconds.argtypes = [integer, integer, pointer, long]
    library.int4_read_seconds.restype = ctypes.c_double
    for function in (library.int4_fast, library.int4_exact, library.int4_dequantize):
        function.restype = None
    return library


@cache
def cpu_level() -> int:
    """Return the index in LEVELS of the best instruction set this machine has; 0 without the compiled kernel."""
    library = compiled_library()
    return 0 if library is None else int(library.int4_level())


def untiled_level() -> int:
    """Return the best level at which a batch of any size gets the bits of its activations one by one."""
    return min(cpu_level(), LEVELS.index("avx512-vnni"))


def _operands(weight: PackedWeight, level: int) -> tuple[int | None, ...]:
    """Return what every function of the library begins with."""
    return (
        level,
        torch.get_num_threads(),
        weight.codes.data_ptr(),
        weight.scale.data_ptr(),
        int(weight.scale.dtype == torch.bfloat16),
        None if weight.zero is None else weight.zero.data_ptr(),
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.bits,
    )


def _compiled(
    library: ctypes.CDLL, x: Tensor, weight: PackedWeight, bias: Tensor | None, mode: str, level: int
) -> Tensor:
    x = x.float().contiguous()
    added = None if bias is None else bias.float().contiguous()
    out = torch.empty(len(x), weight.out_features)
    tail = (x.data_ptr(), len(x), None if added is None else added.data_ptr(), out.data_ptr())
    if mode == "fast":
        size = library.int4_workspace_bytes(len(x), weight.in_features, weight.group_size)
        workspace = torch.empty(size, dtype=torch.uint8)
        library.int4_fast(*_operands(weight, level), *tail, workspace.data_ptr())
    else:
        library.int4_exact(*_operands(weight, level), *tail)
    return out


def _exact_by_panels(library: ctypes.CDLL, x: Tensor, weight: PackedWeight, bias: Tensor | None, level: int) -> Tensor:
    """Dequantise some rows at a time and leave the product to torch, which is faster from a few activations on."""
    out = torch.empty(len(x), weight.out_features)
    rows = max(1, _PANEL_BYTES // (4 * weight.in_features))
    for start in range(0, weight.out_features, rows):
        stop = min(start + rows, weight.out_features)
        torch.matmul(x, _dequantize_rows(library, weight, start, stop, level).T, out=out[:, start:stop])
    return out if bias is None else out.add_(bias.float())


def _dequantize_rows(library: ctypes.CDLL, weight: PackedWeight, start: int, stop: int, level: int) -> Tensor:
    panel = torch.empty(stop - start, weight.in_features)
    whole = _operands(weight, level)
    library.int4_dequantize(*whole, panel.data_ptr(), start, stop)
    return panel


def _builtin(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply through torch's `_weight_int4pack_mm_for_cpu`, which wants bf16 and a layout of its own.

    It cannot be given that layout once and for all, since streamed weights share their memory, so it is only used where
    it takes the shape; otherwise, and for 8 bits, the weight is dequantised.
    """
    fits = (
        weight.bits == 4
        and weight.group_size in _BUILTIN_GROUPS
        and weight.out_features % 64 == 0
        and weight.scale.dtype == torch.bfloat16
    )
    if not fits:
        return x.float() @ dequantize(weight).T
    codes, zero = unpack(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    scale = weight.scale.float()
    # torch's formula is (q - 8) * s + z, with its own meaning of z
    offset = (8 - zero.float()) * scale
    scale_and_zero = torch.stack((scale, offset), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.to(torch.bfloat16), packed, weight.group_size, scale_and_zero
    )
    return product.float()
