"""A decode step that a GPU replays, in Triton's interpreter, against an independent float64 layer; NaN all around.

Triton decides when it is imported whether it interprets, so the interpreter has a process of its own.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_decoder import CASES, FP16, FP32, Case, Inputs, naive_step, random_inputs, random_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.decoder import DecoderLayer, Projection
from kernels.device_step import DeviceStep
from kernels.kv_block import (
    BLOCK_TOKENS,
    BlockShape,
    KVBlock,
    KVBlocks,
    KVContext,
    dequantize_blocks,
    quantize_tokens,
    write_tokens,
)
from kernels.packed import PackedWeight
from kernels.step_room import StepRoom, StepShape
from kernels.triton_attention import TritonAttention
from kernels.triton_matmul import dequant_matmul_triton
from kernels.triton_tuning import GpuKind, product_bytes, split_tokens

# the interpreter's bfloat16 is wrong
STEP_CASES = [
    *(replace(case, dtype=case.dtype if case.dtype == FP32 else FP16) for case in CASES),
    Case(dtype=FP16, rotary=0),
    # a group a row, where codes of 4 and 8 bits want sums of other steps
    Case(dtype=FP32, hidden=160, group_size=4096, bits=(8, 4, 8, 4, 8, 4, 4), symmetric=False, tokens=63),
    Case(dtype=FP16, heads=34, head_dim=16, rotary=8, joined=True, bias=True, tokens=64),  # more than a tile of queries
    Case(dtype=FP16, bits=(8, 4, 4, 8, 4, 8, 8), symmetric=False, head_norms=True, rotary=16, tokens=511),
]
INT8_CASES = [
    case
    for case in STEP_CASES
    if case.head_dim != Case.head_dim or case.rotary != Case.rotary or case.head_norms or case.dtype == FP32
]
SPLIT = split_tokens(1024)
AT_EDGES = [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 77, 1023]


def room_of(layer: DecoderLayer, case: Case, int8: bool, most_tokens: int = 1024) -> StepRoom:
    """A room whose bytes are those of NaN, between others that are none of its own."""
    shape = StepShape.of(layer, case.rotary, case.dtype, int8, most_tokens, GpuKind(8, 4))
    return StepRoom(shape, torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8))


def dense_past(inputs: Inputs) -> Tensor:
    found = [inputs.keys.data_ptr(), inputs.values.data_ptr(), inputs.keys.shape[1]]
    return torch.tensor(found, device=inputs.keys.device)


def run_dense(step: DeviceStep, inputs: Inputs, tokens: int) -> Tensor:
    step.load(inputs.hidden, inputs.cos, inputs.sin, dense_past(inputs), tokens)
    step.run()
    return step.out.clone()


def int8_blocks(inputs: Inputs, tokens: int, offset: Tensor | None) -> KVBlocks:
    shape = BlockShape(1, inputs.keys.shape[0], inputs.keys.shape[2], inputs.keys.shape[2])
    memory = torch.full((tokens // BLOCK_TOKENS + 1, shape.nbytes), 0xFF, dtype=torch.uint8, device=inputs.keys.device)
    blocks = KVBlocks(shape, (KVBlock(shape, one) for one in memory))
    if tokens:
        write_tokens(blocks, 0, inputs.keys[None, :, :tokens], inputs.values[None, :, :tokens], offset)
    return blocks


def run_int8(step: DeviceStep, inputs: Inputs, blocks: KVBlocks, tokens: int) -> Tensor:
    step.load(inputs.hidden, inputs.cos, inputs.sin, blocks.device_addresses(torch.device("cpu")), tokens)
    step.run()
    return step.out.clone()


def interpreted_dense(case: Case, mapped: bool = False) -> list[tuple[float, float]]:
    """Return how far output, key and value are from float64, and how far they may be."""
    torch.manual_seed(0)
    layer, inputs = random_layer(case), random_inputs(case)
    truth, *new = naive_step(layer, inputs, case.tokens, torch.float64)
    plain, *plain_new = naive_step(layer, inputs, case.tokens, case.dtype)
    given = inputs.fresh()
    with patch("kernels.triton_step.is_mapped", lambda *_: mapped):
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


def interpreted_int8(case: Case, offset: Tensor | None) -> list[float]:
    """Assert the bytes of `write_tokens` and the bits of `TritonAttention`; return the error over the allowed one."""
    torch.manual_seed(0)
    layer, inputs, tokens = random_layer(case), random_inputs(case), case.tokens
    blocks, expected_blocks = int8_blocks(inputs, tokens, offset), int8_blocks(inputs, tokens, offset)
    room, dense = room_of(layer, case, int8=True), inputs.fresh()
    out = run_int8(DeviceStep(layer, room, offset), inputs, blocks, tokens)
    run_dense(DeviceStep(layer, room_of(layer, case, int8=False)), dense, tokens)
    new = (x[None, :, tokens : tokens + 1] for x in (dense.keys, dense.values))
    write_tokens(expected_blocks, tokens, *new, offset)
    for found, expected in zip(blocks, expected_blocks, strict=True):
        assert torch.equal(found.memory, expected.memory)
    queries, context = room["queries"].view(1, case.heads, 1, -1), KVContext(blocks, tokens + 1, offset)
    attending = TritonAttention(queries, context, layer.scaling, None)
    attending.attend(0, tokens + 1)
    assert torch.equal(attending.result().flatten(), room["mixed"])

    keys, values = (x[0] for x in dequantize_blocks(context))
    truth, plain = (
        naive_step(layer, replace(inputs, keys=keys, values=values), tokens, dtype, quantized(offset))[0].double()
        for dtype in (torch.float64, case.dtype)
    )
    return [float((out.double() - truth).norm()), 2 * float((plain - truth).norm()) + 1e-3 * float(truth.norm())]


def interpreted_longer_splits(case: Case) -> list[float]:
    with patch("kernels.triton_tuning.MOST_SPLITS", 2):
        assert room_of(random_layer(case), case, int8=True).shape.splits == 2
        return interpreted_int8(case, None)


def quantized(offset: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return what a cache in 8 bits makes of new keys, and at its second call of values."""
    offsets = iter((torch.zeros(()) if offset is None else offset, torch.zeros(())))

    def cached(new: Tensor) -> Tensor:
        less = next(offsets)
        codes, scale = quantize_tokens((new - less)[None, :, None])
        return (codes.float() * scale.float()[..., None])[0, :, 0] + less

    return cached


@contextmanager
def recorded() -> Iterator[list[Callable[[], None]]]:
    """Keep what is launched, arguments and all, as a graph does, and run none of it; nothing but views may be made."""
    from triton.runtime.interpreter import InterpretedFunction

    launches: list[Callable[[], None]] = []
    run = InterpretedFunction.run

    def record(*arguments: Any, **options: Any) -> None:
        launches.append(partial(run, *arguments, **options))

    with patch.object(InterpretedFunction, "run", record), OnlyViews():
        yield launches


class OnlyViews(TorchDispatchMode):
    """Refuses every operation of torch that allocates, computes or waits."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        assert operation.is_view, operation
        return operation(*arguments, **(options or {}))


def interpreted_replays(case: Case, int8: bool) -> None:
    """Assert that launches recorded once serve several sequences, to the bit, and write nothing around the room."""
    torch.manual_seed(0)
    layer, offset = random_layer(case), torch.randn(case.key_heads, case.head_dim) if int8 else None
    shape = room_of(layer, case, int8).shape
    memory = torch.full((shape.nbytes + 256,), 0xFF, dtype=torch.uint8)
    step = DeviceStep(layer, StepRoom(shape, memory[128:-128]), offset)
    with recorded() as launches:
        step.run()
    for tokens in (5, 2 * SPLIT + 77, 0, 1023, 5):
        inputs = random_inputs(replace(case, tokens=tokens))
        fresh, fresh_step = inputs.fresh(), DeviceStep(layer, room_of(layer, case, int8), offset)
        if int8:
            blocks, fresh_blocks = (int8_blocks(inputs, tokens, offset) for _ in range(2))
            expected = run_int8(fresh_step, fresh, fresh_blocks, tokens)
            past = blocks.device_addresses(torch.device("cpu"))
        else:
            expected = run_dense(fresh_step, fresh, tokens)
            past = dense_past(inputs)
        step.load(inputs.hidden, inputs.cos, inputs.sin, past, tokens)
        for launch in launches:
            launch()
        assert torch.equal(step.out, expected)
        if int8:
            assert all(torch.equal(a.memory, b.memory) for a, b in zip(blocks, fresh_blocks, strict=True))
        else:
            for found, other in ((inputs.keys, fresh.keys), (inputs.values, fresh.values)):
                assert torch.equal(found[:, : tokens + 1], other[:, : tokens + 1])
                assert found[:, tokens + 1 :].isnan().all()
    assert (memory[:128] == 0xFF).all()
    assert (memory[-128:] == 0xFF).all()


def interpreted_loading() -> None:
    """Assert that loading is one launch, also of the room's own output, and takes no more of a table than fits."""
    torch.manual_seed(0)
    case = Case(dtype=FP16)
    layer, inputs = random_layer(case), random_inputs(case)
    room = room_of(layer, case, int8=True, most_tokens=256)
    step = DeviceStep(layer, room)
    table = torch.arange(1, 40)
    with recorded() as launches:
        step.load(room.out, inputs.cos, inputs.sin, table, 200)
    assert len(launches) == 1
    room.out.copy_(inputs.hidden)
    behind = room["hidden"].clone()
    assert not torch.equal(behind, inputs.hidden)
    launches[0]()
    assert torch.equal(room["hidden"], inputs.hidden)
    assert torch.equal(room["cos"], inputs.cos)
    assert torch.equal(room["sin"], inputs.sin)
    assert room["table"].tolist() == [1, 2, 3, 4]
    assert room["tokens"].tolist() == [200]
    assert room["qkv"].isnan().all()


def interpreted_stages(case: Case) -> None:
    """Assert that each stage makes of what lies in the room what transformers' modules make of it, rounding and all.

    A product in the room is that of `dequant_matmul_triton`; what else is rounded may be off by that once in a hundred.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    torch.manual_seed(0)
    layer, inputs = random_layer(case), random_inputs(case)
    room = room_of(layer, case, int8=False)
    run_dense(DeviceStep(layer, room), inputs, case.tokens)

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        module = LlamaRMSNorm(len(weight), layer.norm_epsilon)
        module.weight.data = weight
        return module(x)

    def times(x: Tensor, projections: tuple[Projection, ...]) -> Tensor:
        return torch.cat([dequant_matmul_triton(x, p.weight, p.bias) for p in projections])

    heads = room["qkv"].view(-1, case.head_dim)
    parts = heads.split([case.heads, case.key_heads, case.key_heads])
    normed = [norm(x, w)[None, :, None] for x, w in zip(parts, (layer.query_norm, layer.key_norm), strict=False)]
    queries, keys = apply_rotary_pos_emb(*normed, inputs.cos[None, None], inputs.sin[None, None])
    gate, up = room["gate_up"].chunk(2)
    exact = [
        (times(norm(inputs.hidden, layer.input_norm), layer.qkv), room["qkv"]),
        (parts[2], inputs.values[:, case.tokens]),
        (inputs.hidden + times(room["mixed"], (layer.output,)), room["residual"]),
        (times(room["normed"], layer.gate_up), room["gate_up"]),
        (times(room["gated"], (layer.down,)), room["product"]),
        (room["residual"] + room["product"], room.out),
    ]
    for expected, found in exact:
        assert torch.equal(expected, found)
    close = [
        (queries, room["queries"]),
        (keys, inputs.keys[:, case.tokens]),
        (norm(room["residual"], layer.mlp_norm), room["normed"]),
        (torch.nn.functional.silu(gate) * up, room["gated"]),
    ]
    for expected, found in close:
        assert (expected.flatten() == found.flatten()).float().mean() > 0.99
        torch.testing.assert_close(expected.flatten(), found.flatten(), rtol=2e-3, atol=1e-3)


def interpreted_nan() -> None:
    torch.manual_seed(0)
    case = Case(dtype=FP16, tokens=300)
    layer, inputs = random_layer(case), random_inputs(case)
    inputs.keys[1, 299, 3] = torch.nan
    assert run_dense(DeviceStep(layer, room_of(layer, case, int8=False)), inputs, 300).isnan().all()


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_interpreted_step_errs_at_most_twice_as_much_as_torch(interpreter: ProcessPoolExecutor, case: Case) -> None:
    for error, allowed in interpreter.submit(interpreted_dense, case).result(timeout=120):
        assert error <= allowed


@pytest.mark.parametrize("tokens", AT_EDGES)
def test_interpreted_step_at_the_edges_of_splits(interpreter: ProcessPoolExecutor, tokens: int) -> None:
    case = Case(heads=3, key_heads=1, rotary=8, mlp=64, tokens=tokens, dtype=FP16)
    for error, allowed in interpreter.submit(interpreted_dense, case).result(timeout=120):
        assert error <= allowed


def test_interpreted_step_reads_weights_across_the_bus(interpreter: ProcessPoolExecutor) -> None:
    for case in (Case(dtype=FP16, bias=True), Case(dtype=FP16, symmetric=False, hidden=192, mlp=544, heads=6)):
        for error, allowed in interpreter.submit(interpreted_dense, case, mapped=True).result(timeout=120):
            assert error <= allowed


@pytest.mark.parametrize("tokens", AT_EDGES)
def test_interpreted_int8_step_has_the_bits_of_what_it_is_made_of(
    interpreter: ProcessPoolExecutor, tokens: int
) -> None:
    case = Case(heads=3, key_heads=1, rotary=8, mlp=64, tokens=tokens, dtype=FP16)
    for offset in (None, torch.randn(case.key_heads, case.head_dim)):
        error, allowed = interpreter.submit(interpreted_int8, case, offset).result(timeout=120)
        assert error <= allowed


@pytest.mark.parametrize("case", INT8_CASES, ids=str)
def test_interpreted_int8_step_of_every_kind_of_head(interpreter: ProcessPoolExecutor, case: Case) -> None:
    offset = torch.randn(case.key_heads, case.head_dim)
    error, allowed = interpreter.submit(interpreted_int8, case, offset).result(timeout=120)
    assert error <= allowed


def test_interpreted_int8_step_over_longer_splits(interpreter: ProcessPoolExecutor) -> None:
    """As behind 16384 tokens, which take the interpreter long."""
    case = Case(heads=2, key_heads=1, mlp=32, tokens=700, dtype=FP16)
    error, allowed = interpreter.submit(interpreted_longer_splits, case).result(timeout=120)
    assert error <= allowed


@pytest.mark.parametrize("int8", [False, True])
def test_interpreted_launches_serve_every_sequence(interpreter: ProcessPoolExecutor, int8: bool) -> None:
    case = Case(hidden=128, heads=3, key_heads=1, head_dim=32, rotary=8, mlp=128, dtype=FP16, symmetric=False)
    interpreter.submit(interpreted_replays, case, int8).result(timeout=240)


def test_interpreted_loading_is_one_launch(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_loading).result(timeout=60)


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=FP16, head_norms=True, bias=True, rotary=16, hidden=192, mlp=544),
        Case(dtype=FP16, joined=True, symmetric=False, tokens=0),
    ],
    ids=str,
)
def test_interpreted_stages_round_as_modules_do(interpreter: ProcessPoolExecutor, case: Case) -> None:
    interpreter.submit(interpreted_stages, case).result(timeout=120)


def test_interpreted_nan_is_not_lost(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_nan).result(timeout=60)


@pytest.mark.parametrize("tokens", [1, 256, 257, 16384, 16385, 20000, 32768, 32769, 65536, 65537, 1 << 20])
def test_splits_are_those_of_the_next_power_of_two(tokens: int) -> None:
    assert split_tokens(tokens) == split_tokens(max(256, 1 << (tokens - 1).bit_length()))


def test_a_room_is_as_large_as_announced_and_its_parts_lie_apart() -> None:
    case = Case(dtype=FP16, hidden=512)
    layer = random_layer(case)
    small, large = (StepShape.of(layer, case.rotary, FP16, True, 4096, gpu) for gpu in (GpuKind(8, 4), GpuKind(9, 132)))
    assert small == StepShape.of(random_layer(case), case.rotary, FP16, True, 4096, GpuKind(8, 4))
    assert large.nbytes > small.nbytes
    memory = torch.zeros(large.nbytes, dtype=torch.uint8)
    room = StepRoom(large, memory)
    taken = 0
    for name in large.parts():
        taken += room[name].nbytes
        assert not room[name].view(torch.uint8).any(), name
        room[name].view(torch.uint8).fill_(1)
    assert int(memory.sum()) == taken > large.nbytes - 128 * len(large.parts())
    assert room["splits"].nbytes == product_bytes(large.weights, 1, 2, large.gpu) > 0
    assert room["sums"].numel() == case.hidden // 32
    assert room.out.shape == (case.hidden,)
    with pytest.raises(ValueError, match=f"memory: expected contiguous uint8 of {large.nbytes} at a multiple of 16"):
        StepRoom(large, memory[:-1])
    with pytest.raises(ValueError, match="at a multiple of 16 bytes"):
        StepRoom(small, memory[8:])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"most_tokens": 300}, "most_tokens=300: expected a power of two, at least 256"),
        ({"most_tokens": 128}, "most_tokens=128: expected a power of two, at least 256"),
        ({"rotary": 15}, "rotary=15: expected an even number up to head_dim=32"),
        ({"rotary": 34}, "rotary=34: expected an even number up to head_dim=32"),
        ({"dtype": torch.int8}, "dtype=torch.int8: expected float32, bfloat16 or float16"),
    ],
)
def test_a_shape_out_of_range_is_refused(changed: dict[str, Any], told: str) -> None:
    shape = StepShape.of(random_layer(Case()), 32, FP16, True, 1024)
    with pytest.raises(ValueError, match=told):
        replace(shape, **changed)


def test_operands_that_do_not_fit_are_refused() -> None:
    case = Case(dtype=FP16)
    layer, inputs = random_layer(case), random_inputs(case)
    room = room_of(layer, case, int8=True)
    with pytest.raises(ValueError, match="make a room of the layer's shape"):
        DeviceStep(random_layer(replace(case, bits=(8,) * 7)), room)
    with pytest.raises(ValueError, match=r"key_offset: expected contiguous float32 \[2, 32\], .*float32 \[32, 2\]"):
        DeviceStep(layer, room, torch.zeros(32, 2))
    with pytest.raises(ValueError, match=r"for a past in 8 bits, .*int8=False"):
        DeviceStep(layer, room_of(layer, case, int8=False), torch.zeros(2, 32))
    step, table = DeviceStep(layer, room), torch.zeros(16, dtype=torch.int64)
    given = {"hidden": inputs.hidden, "cos": inputs.cos, "sin": inputs.sin, "past": table, "tokens": 1023}
    for changed, told in (
        ({"hidden": inputs.hidden.float()}, r"hidden: expected contiguous torch.float16 \[64\], found torch.float32"),
        ({"sin": inputs.sin[:16]}, r"sin: expected contiguous torch.float16 \[32\], found torch.float16 \[16\]"),
        ({"tokens": 1024}, "1024 tokens and a new one in a room for 1024; make a larger room"),
        ({"past": table[1:]}, r"past: expected int64 of at least 16, found torch.int64 \[15\]"),
        ({"past": table.int()}, "past: expected int64 of at least 16, found torch.int32"),
    ):
        with pytest.raises(ValueError, match=told):
            step.load(**(given | changed))


def on_gpu(layer: DecoderLayer, pinned: bool) -> DecoderLayer:
    """The layer on the GPU, its weights in pinned host memory if `pinned`."""

    def moved(projection: Projection) -> Projection:
        weight = projection.weight
        tensors = [
            None if x is None else x.pin_memory() if pinned else x.cuda()
            for x in (weight.codes, weight.scale, weight.zero)
        ]
        packed = PackedWeight(*tensors, weight.group_size, weight.bits)
        return Projection(packed, None if projection.bias is None else projection.bias.cuda())

    return replace(
        layer,
        qkv=tuple(map(moved, layer.qkv)),
        output=moved(layer.output),
        gate_up=tuple(map(moved, layer.gate_up)),
        down=moved(layer.down),
        input_norm=layer.input_norm.cuda(),
        mlp_norm=layer.mlp_norm.cuda(),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_gpu_graph_serves_every_sequence(int8: bool, pinned: bool) -> None:
    case = Case(hidden=1024, heads=8, key_heads=2, head_dim=128, rotary=128, mlp=2048, symmetric=False, bias=True)
    layer = random_layer(case)
    shape = StepShape.of(layer, case.rotary, case.dtype, int8, 1024)
    rooms = [StepRoom(shape, torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8, device="cuda")) for _ in range(2)]
    step, launched = (DeviceStep(on_gpu(layer, pinned), room) for room in rooms)
    graph: torch.cuda.CUDAGraph | None = None
    for tokens in (5, 2 * SPLIT + 77, 1023, 0):
        inputs = random_inputs(replace(case, tokens=tokens))
        given = Inputs(**{name: x.cuda() for name, x in vars(inputs).items()})
        blocks = int8_blocks(given, tokens, None)
        past = blocks.device_addresses(given.keys.device) if int8 else dense_past(given)
        for one in (launched, step):
            one.load(given.hidden, given.cos, given.sin, past, tokens)
        launched.run()
        if graph is None:
            step.run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step.run()
        graph.replay()
        assert torch.equal(step.out, launched.out)
        if int8:
            queries = step.room["queries"].view(1, case.heads, 1, -1)
            attending = TritonAttention(queries, KVContext(blocks, tokens + 1), layer.scaling, None)
            attending.attend(0, tokens + 1)
            assert torch.equal(attending.result().flatten(), step.room["mixed"])
        truth, plain = (naive_step(layer, inputs, tokens, dtype)[0].double() for dtype in (torch.float64, case.dtype))
        allowed = 2 * (plain - truth).norm() + (1e-2 if int8 else 1e-6) * truth.norm()
        assert (step.out.cpu().double() - truth).norm() <= allowed
