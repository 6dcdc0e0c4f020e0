"""A decode step that a GPU replays, in Triton's interpreter, against an independent float64 layer; NaN all around.

Triton decides when it is imported whether it interprets, so the interpreter has a process of its own.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from test_decoder import CASES, FP16, FP32, Case, Inputs, naive_step, random_inputs, random_layer
from torch import Tensor

from kernels.decoder import DecoderLayer
from kernels.device_step import DeviceStep, StepRoom, StepShape
from kernels.kv_block import BLOCK_TOKENS, BlockShape, KVBlock, KVBlocks, write_tokens
from kernels.triton_tuning import GpuKind, split_tokens

# the interpreter's bfloat16 is wrong
STEP_CASES = [
    *(replace(case, dtype=case.dtype if case.dtype == FP32 else FP16) for case in CASES),
    Case(dtype=FP32, group_size=4096, symmetric=False, tokens=63),  # a group a row
    Case(dtype=FP16, heads=34, head_dim=16, rotary=8, joined=True, bias=True, tokens=64),  # more than a tile of queries
    Case(dtype=FP16, bits=(8, 4, 4, 8, 4, 8, 8), symmetric=False, head_norms=True, rotary=16, tokens=511),
]
SPLIT = split_tokens(1024)
AT_EDGES = [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 77, 1023]


def room_of(layer: DecoderLayer, case: Case, int8: bool, most_tokens: int = 1024) -> StepRoom:
    """A room whose bytes are those of NaN, between others that are none of its own."""
    shape = StepShape.of(layer, case.rotary, case.dtype, int8, most_tokens, GpuKind(8, 4))
    return StepRoom(shape, torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8))


def dense_past(inputs: Inputs) -> Tensor:
    return torch.tensor([inputs.keys.data_ptr(), inputs.values.data_ptr(), inputs.keys.shape[1]])


def run_dense(step: DeviceStep, inputs: Inputs, tokens: int) -> Tensor:
    step.load(inputs.hidden, inputs.cos, inputs.sin, dense_past(inputs), tokens)
    step.run()
    return step.out.clone()


def int8_blocks(inputs: Inputs, tokens: int, offset: Tensor | None) -> KVBlocks:
    shape = BlockShape(1, inputs.keys.shape[0], inputs.keys.shape[2], inputs.keys.shape[2])
    memory = [torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8) for _ in range(tokens // BLOCK_TOKENS + 1)]
    blocks = KVBlocks(shape, (KVBlock(shape, one) for one in memory))
    if tokens:
        write_tokens(blocks, 0, inputs.keys[None, :, :tokens], inputs.values[None, :, :tokens], offset)
    return blocks


def run_int8(step: DeviceStep, inputs: Inputs, blocks: KVBlocks, tokens: int) -> Tensor:
    step.load(inputs.hidden, inputs.cos, inputs.sin, blocks.device_addresses(torch.device("cpu")), tokens)
    step.run()
    return step.out.clone()


def interpreted_dense(case: Case) -> list[tuple[float, float]]:
    """Return how far output, key and value are from float64, and how far they may be."""
    torch.manual_seed(0)
    layer, inputs = random_layer(case), random_inputs(case)
    truth, *new = naive_step(layer, inputs, case.tokens, torch.float64)
    plain, *plain_new = naive_step(layer, inputs, case.tokens, case.dtype)
    given = inputs.fresh()
    out = run_dense(DeviceStep(layer, room_of(layer, case, int8=False)), given, case.tokens)
    assert out.dtype == case.dtype
    for found, before in ((given.keys, inputs.keys), (given.values, inputs.values)):
        assert torch.equal(found[:, : case.tokens], before[:, : case.tokens])
        assert found[:, case.tokens + 1 :].isnan().all()
    found = [out, given.keys[:, case.tokens], given.values[:, case.tokens]]
    expected = [truth, *(x[:, case.tokens] for x in new)]
    by_torch = [plain, *(x[:, case.tokens] for x in plain_new)]
    return [
        (float((f.double() - e).norm()), 2 * float((p.double() - e).norm()) + 1e-6 * float(e.norm()))
        for f, e, p in zip(found, expected, by_torch, strict=True)
    ]


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_interpreted_step_errs_at_most_twice_as_much_as_torch(interpreter: ProcessPoolExecutor, case: Case) -> None:
    for error, allowed in interpreter.submit(interpreted_dense, case).result(timeout=120):
        assert error <= allowed
