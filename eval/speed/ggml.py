"""ggml's product on the CPU, through its C interface: what llama.cpp runs, to be timed beside ours.

The weight is Q4_0 (4 bits) or Q8_0 (8 bits), 32 weights under a scale, in a layout that ggml makes of it: its extra
buffer types, of which llama.cpp takes the first that supports the product. AMX is for processors that have that, REPACK
interleaves 8 rows for AVX2 and AVX512, and what neither takes stays as it is; all round activations to int8, 32 of them
under a scale. Some builds of AMX crash as soon as there is more than one activation, so each layout is tried in a
process of its own before it is timed.
"""

import ctypes
import subprocess
import sys
import weakref
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.speed.timing import Step, copies_in
from kernels.packed import PackedWeight, dequantize
from offload.command import say
from offload.errors import UsageError

LAYOUTS = {"ggml amx": "AMX", "ggml repack": "CPU_REPACK", "ggml plain": "CPU"}
"""ggml's names of its buffer types, by the names of the contenders, in ggml's order of preference."""

_TYPES = {4: (2, 18), 8: (8, 34)}
"""By bits: GGML_TYPE_Q4_0 and GGML_TYPE_Q8_0, and the bytes of a block of 32 weights."""
_F32 = 0
_DEVICE_CPU = 0
_PANEL_ROWS = 256
_CONTEXT_BYTES = 1 << 20
_TRIED_BATCHES = (1, 2)


class _ContextSize(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_tensor_data", ctypes.c_bool))


_POINTER, _INTEGER, _SIZE, _LONG, _TEXT = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_int64,
    ctypes.c_char_p,
)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_version": (_TEXT,),
    "ggml_log_set": (None, _POINTER, _POINTER),
    "ggml_init": (_POINTER, _ContextSize),
    "ggml_free": (None, _POINTER),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INTEGER, _LONG, _LONG),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_quantize_chunk": (_SIZE, _INTEGER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER),
    "ggml_backend_dev_by_type": (_POINTER, _INTEGER),
    "ggml_backend_dev_init": (_POINTER, _POINTER, _TEXT),
    "ggml_backend_dev_backend_reg": (_POINTER, _POINTER),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _POINTER, _POINTER),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, _TEXT),
    "ggml_backend_dev_buffer_type": (_POINTER, _POINTER),
    "ggml_backend_buft_name": (_TEXT, _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_tensor_alloc": (_INTEGER, _POINTER, _POINTER, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_graph_compute": (_INTEGER, _POINTER, _POINTER),
}
"""What is called, with the type of its result and those of its arguments."""


def find_directory(named: Path | None) -> Path | None:
    """Return the directory of ggml's shared libraries: the one that was named, else that of the package llama_cpp.

    Raises UsageError if the named one has none.
    """
    if named is not None:
        if not (named / "libggml.so").exists():
            raise UsageError(f"--ggml {named}: no libggml.so there; name the directory of ggml's shared libraries")
        return named
    package = find_spec("llama_cpp")
    roots = package.submodule_search_locations if package else None
    return next((folder for root in roots or () if (folder := Path(root, "lib")).joinpath("libggml.so").exists()), None)


class Ggml:
    """The libraries of one directory, and a CPU backend with as many threads as torch has."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("base", "cpu"):
            ctypes.CDLL(str(directory / f"libggml-{name}.so"), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(directory / "libggml.so"), mode=ctypes.RTLD_GLOBAL)
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self._silence = ctypes.CFUNCTYPE(None, _INTEGER, _TEXT, _POINTER)(lambda *_: None)
        self.library.ggml_log_set(ctypes.cast(self._silence, _POINTER), None)
        self.device = self.library.ggml_backend_dev_by_type(_DEVICE_CPU)
        self.backend = self.library.ggml_backend_dev_init(self.device, None)
        self._function("ggml_backend_set_n_threads", None, _POINTER, _INTEGER)(self.backend, torch.get_num_threads())

    def _function(self, name: str, *types: Any) -> Any:
        """Return a function that the backend alone knows."""
        registry = self.library.ggml_backend_dev_backend_reg(self.device)
        return ctypes.CFUNCTYPE(*types)(self.library.ggml_backend_reg_get_proc_address(registry, name.encode()))

    @property
    def version(self) -> str:
        """ggml's own version."""
        return str(self.library.ggml_version().decode())

    def layouts(self) -> dict[str, int]:
        """Return handles of the layouts that there are on this machine, by the names of the contenders."""
        handles = self._function("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(_POINTER), _POINTER)(self.device)
        found: dict[str, int] = {}
        while handle := handles[len(found)]:
            found[self.library.ggml_backend_buft_name(handle).decode()] = handle
        found["CPU"] = self.library.ggml_backend_dev_buffer_type(self.device)
        return {name: found[theirs] for name, theirs in LAYOUTS.items() if theirs in found}

    def context(self) -> int:
        """Return a new context for the descriptions of some tensors, or of one graph."""
        return int(self.library.ggml_init(_ContextSize(_CONTEXT_BYTES, None, True)))


class GgmlWeight:
    """Copies of one weight in one of ggml's layouts, which live as long as this."""

    def __init__(self, ggml: Ggml, layout: int, weight: PackedWeight, pool_bytes: int) -> None:
        """Quantise anew: where a group of 32 does not use code 0, its values move a little."""
        self._ggml, self._shape = ggml, (weight.out_features, weight.in_features)
        kind, block_bytes = _TYPES[weight.bits]
        self.quantized = _quantize(ggml, weight, kind, block_bytes)
        call, data = ggml.library, self.quantized
        self._context = ggml.context()
        weakref.finalize(self, call.ggml_free, self._context)
        n, k = self._shape
        self._copies = [
            call.ggml_new_tensor_2d(self._context, kind, k, n) for _ in range(copies_in(pool_bytes, data.nbytes))
        ]
        buffer = call.ggml_backend_alloc_ctx_tensors_from_buft(self._context, layout)
        weakref.finalize(self, call.ggml_backend_buffer_free, buffer)
        x = call.ggml_new_tensor_2d(self._context, _F32, k, 1)
        product = call.ggml_mul_mat(self._context, self._copies[0], x)
        self.supported = bool(call.ggml_backend_dev_supports_op(ggml.device, product))
        if self.supported:
            for copy in self._copies:
                call.ggml_backend_tensor_set(copy, data.data_ptr(), 0, data.nbytes)

    def product(self, x: Tensor) -> Step:
        """Return the product with x float32 [M, K]; each call returns float32 [M, N], in the same memory."""
        call, context = self._ggml.library, self._ggml.context()
        (n, k), x = self._shape, x.contiguous()
        out = torch.empty(len(x), n)
        buffers = [call.ggml_backend_cpu_buffer_from_ptr(tensor.data_ptr(), tensor.nbytes) for tensor in (x, out)]
        of_x = call.ggml_new_tensor_2d(context, _F32, k, len(x))
        call.ggml_backend_tensor_alloc(buffers[0], of_x, x.data_ptr())
        graphs, contexts = [], [context]
        for copy in self._copies:
            contexts.append(self._ggml.context())
            of_out = call.ggml_mul_mat(contexts[-1], copy, of_x)
            call.ggml_backend_tensor_alloc(buffers[1], of_out, out.data_ptr())
            graphs.append(call.ggml_new_graph(contexts[-1]))
            call.ggml_build_forward_expand(graphs[-1], of_out)

        def step(i: int, lives: tuple[object, ...] = (self, x)) -> Tensor:
            if call.ggml_backend_graph_compute(self._ggml.backend, graphs[i % len(graphs)]):
                raise RuntimeError("ggml could not compute the product")
            return out

        for context in contexts:
            weakref.finalize(step, call.ggml_free, context)
        for buffer in buffers:
            weakref.finalize(step, call.ggml_backend_buffer_free, buffer)
        return step


def _quantize(ggml: Ggml, weight: PackedWeight, kind: int, block_bytes: int) -> Tensor:
    """Return the weight in ggml's type, uint8 [N, K/32 * block_bytes]; some rows at a time are dequantised for it."""
    n, k = weight.out_features, weight.in_features
    data = torch.empty(n, k // 32 * block_bytes, dtype=torch.uint8)
    for start in range(0, n, _PANEL_ROWS):
        rows = slice(start, min(n, start + _PANEL_ROWS))
        panel = dequantize(PackedWeight(weight.codes[rows], weight.scale[rows], None, weight.group_size, weight.bits))
        target = data[rows]
        ggml.library.ggml_quantize_chunk(kind, panel.data_ptr(), target.data_ptr(), 0, len(panel), k, None)
    return data


@cache
def survived(directory: Path, name: str, bits: int) -> frozenset[int]:
    """Return which of 1 and 2 activations a layout multiplies without ending its process."""
    command = [sys.executable, "-m", "eval.speed.ggml", str(directory), name, str(bits)]
    root = Path(__file__).parents[2]
    child = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    batches = frozenset(map(int, child.stdout.split()))
    if missing := [str(m) for m in _TRIED_BATCHES if m not in batches]:
        say(
            f"{name}: left out from {missing[0]} activations on, this build of ggml ends with status {child.returncode}"
        )
    return batches


def _try(directory: str, name: str, bits: str) -> None:
    ggml = Ggml(Path(directory))
    codes = torch.zeros(64, 256 * int(bits) // 8, dtype=torch.uint8)
    packed = PackedWeight(codes, torch.ones(64, 8, dtype=torch.bfloat16), None, 32, int(bits))
    weight = GgmlWeight(ggml, ggml.layouts()[name], packed, 0)
    for m in _TRIED_BATCHES:
        weight.product(torch.zeros(m, 256))(0)
        print(m, flush=True)


if __name__ == "__main__":
    _try(*sys.argv[1:])
