"""Attention over 8-bit keys and values on the CPU, through the compiled kernels.

Queries are rounded to 15 bits and the weights of values to 16, both under a scale of their own, so that both products
are of integers; that error is far below that of the 8-bit codes. Each 256 tokens of the context are attended to apart
and merged in order: the result depends neither on the number of threads, nor on how many queries are asked at once, nor
on which part of the context is in memory at a time.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.cpu_matmul import compiled_library, cpu_level
from kernels.kv_block import BlockShape, KVBlocks, KVContext

PIECE_TOKENS = 256
"""Tokens that are attended to apart; a part of a context that is taken by itself begins at a multiple of it."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def append_tokens_cpu(
    blocks: KVBlocks,
    start: int,
    key_BKND: Tensor,
    value_BKND: Tensor,
    key_offset: Tensor | None = None,
    level: int | None = None,
) -> None:
    """Do what `kernels.kv_block.write_tokens` does, bit for bit. level: see `dequant_matmul_cpu`."""
    context = context_struct(blocks, start, key_offset)
    level = cpu_level() if level is None else level
    keys, values = _rows(key_BKND), _rows(value_BKND)
    _library().int4_kv_append(level, torch.get_num_threads(), context, keys, values, key_BKND.shape[2])


class CompiledAttention:
    """Attention of a few queries over a context of which a part may be in memory at a time.

    query_BHND: float32, bfloat16 or float16, of the last N tokens of `context`, scaled by `scaling`. mask: bool
    [1 or B, 1, N, T] or None, as for `attention_reference`. level: see `dequant_matmul_cpu`.
    """

    def __init__(
        self, query_BHND: Tensor, context: KVContext, scaling: float, mask: Tensor | None, level: int | None = None
    ) -> None:
        self._query, self._context = query_BHND if query_BHND.stride(-1) == 1 else query_BHND.contiguous(), context
        self._level = cpu_level() if level is None else level
        batch, heads, queries, _ = query_BHND.shape
        self._mask = None if mask is None else mask.expand(-1, 1, queries, context.tokens).contiguous()
        shared = self._mask is None or self._mask.shape[0] == 1
        self._job = _Job(
            context_struct(context.blocks, context.tokens, None),
            _rows(self._query),
            heads,
            queries,
            scaling,
            None if self._mask is None else self._mask.data_ptr(),
            0 if shared else queries * context.tokens,
        )
        self._workspace = torch.empty(_library().int4_kv_workspace_bytes(self._job), dtype=torch.uint8)
        self._out = torch.empty(batch, queries, heads, context.shape.value_dim, dtype=query_BHND.dtype)

    def attend(self, first: int, last: int) -> None:
        """Take the tokens first..last, whose blocks are in memory; `first` is a multiple of PIECE_TOKENS."""
        self._job.context.blocks = self._context.blocks.addresses.buffer_info()[0]
        threads = torch.get_num_threads()
        _library().int4_kv_attend(self._level, threads, self._job, first, last, self._workspace.data_ptr())

    def result(self) -> Tensor:
        """Return [B, H, N, value_dim] in the queries' dtype, once every token was taken."""
        out = self._out
        _library().int4_kv_merge(self._level, self._job, self._workspace.data_ptr(), _DTYPES[out.dtype], out.data_ptr())
        return out.transpose(1, 2)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "key_heads", "key_dim", "value_dim")]


class _Context(ctypes.Structure):
    """`KvContext` of cpu/attention.h, field by field; so for the next two."""

    _fields_ = [
        ("shape", _Shape),
        ("blocks", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("key_offset", ctypes.c_void_p),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("strides", ctypes.c_int64 * 3)]


class _Job(ctypes.Structure):
    _fields_ = [
        ("context", _Context),
        ("queries", _Rows),
        ("heads", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
    ]


def context_struct(blocks: KVBlocks, tokens: int, key_offset: Tensor | None) -> ctypes.Structure:
    """Return the first `tokens` tokens of blocks as the compiled kernels take them, valid while those live."""
    shape: BlockShape = blocks.shape
    sizes = _Shape(shape.batch, shape.key_heads, shape.key_dim, shape.value_dim)
    offset = None if key_offset is None else key_offset.data_ptr()
    return _Context(sizes, blocks.addresses.buffer_info()[0], tokens, offset)


def _rows(x_BHND: Tensor) -> _Rows:
    assert x_BHND.stride(-1) == 1, "the elements of a row lie side by side"
    return _Rows(x_BHND.data_ptr(), _DTYPES[x_BHND.dtype], (ctypes.c_int64 * 3)(*x_BHND.stride()[:3]))


@cache
def _library() -> ctypes.CDLL:
    library = compiled_library()
    assert library is not None, "who calls has looked whether there are compiled kernels"
    for function, struct in ((library.int4_kv_context_bytes, _Context), (library.int4_kv_job_bytes, _Job)):
        function.restype = ctypes.c_int64
        found, expected = function(), ctypes.sizeof(struct)
        assert found == expected, f"{struct.__name__} takes {found} bytes in C++ and {expected} here"
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    job: Any = ctypes.POINTER(_Job)
    rows: Any = ctypes.POINTER(_Rows)
    library.int4_kv_workspace_bytes.argtypes = [job]
    library.int4_kv_workspace_bytes.restype = long
    library.int4_kv_append.argtypes = [integer, integer, ctypes.POINTER(_Context), rows, rows, long]
    library.int4_kv_attend.argtypes = [integer, integer, job, long, long, pointer]
    library.int4_kv_merge.argtypes = [integer, job, pointer, integer, pointer]
    for function in (library.int4_kv_append, library.int4_kv_attend, library.int4_kv_merge):
        function.restype = None
    return library
