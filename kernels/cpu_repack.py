"""Codes of other tools re-laid through the compiled kernels: memory at a time, not a tensor operation at a time."""

import torch
from torch import Tensor

from kernels.cpu_matmul import compiled_library


def awq_codes_cpu(qweight: Tensor) -> Tensor | None:
    """Return codes uint8 [N, K/2] of AWQ's qweight int32 [K, N/8], K even; None where no kernels are compiled."""
    library = compiled_library()
    if library is None:
        return None
    qweight = qweight.contiguous()
    inputs, words = qweight.shape
    codes = torch.empty(words * 8, inputs // 2, dtype=torch.uint8)
    library.int4_relay_awq(torch.get_num_threads(), qweight.data_ptr(), codes.data_ptr(), inputs, words)
    return codes
