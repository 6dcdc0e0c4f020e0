"""What only a GPU can show: attention over 8-bit keys and values there, and a model whose layers take every tier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attention import BF16, Case, random_context, random_mask, random_query
from test_captured import PROMPT, decode
from test_decoder import Case as LayerCase
from test_decoder import Inputs, random_inputs, random_layer
from test_device import passes
from test_device_step import dense_past, int8_blocks
from test_device_step import on_gpu as on_device
from torch import Tensor

from kernels.device_step import DeviceStep
from kernels.kv_block import KVBlock, KVBlocks, KVContext, write_tokens
from kernels.reference import attention_reference
from kernels.step_room import StepRoom, StepShape
from offload.executor import executor_of, load
from offload.gpu.device import CudaDevice
from offload.planning.arrangement import arranged

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CASES = [Case(tokens=64), Case(tokens=600, queries=7), Case(tokens=5000, dtype=BF16), Case(tokens=2077, queries=16)]


def on_gpu(context: KVContext) -> KVContext:
    blocks = KVBlocks(context.shape, [KVBlock(context.shape, block.memory.cuda()) for block in context.blocks])
    offset = None if context.key_offset is None else context.key_offset.cuda()
    return KVContext(blocks, context.tokens, offset)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_attention_errs_as_little_as_in_the_interpreter(case: Case) -> None:
    from kernels.attention import attention

    torch.manual_seed(0)
    context, query = random_context(case), random_query(case)
    for mask in (None, random_mask(case)):
        expected = attention_reference(query, context, 1.0, mask)
        ours = attention(query.cuda(), on_gpu(context), 1.0, None if mask is None else mask.cuda()).cpu()
        largest = expected.abs().max()
        assert (ours.float() - expected).abs().max() <= 0.01 * largest


def test_gpu_appends_the_bytes_of_the_reference() -> None:
    from kernels.attention import append_tokens

    context = random_context(Case(tokens=300))
    shape, there = context.shape, on_gpu(context)
    key, value = (torch.randn(shape.batch, shape.key_heads, 70, dim) for dim in (shape.key_dim, shape.value_dim))
    write_tokens(context.blocks, 130, key, value)
    append_tokens(there.blocks, 130, key.cuda(), value.cuda())
    for one, other in zip(context.blocks, there.blocks, strict=True):
        assert torch.equal(one.memory, other.memory.cpu())


ALIKE = {"resident": ["half staged", "staged", "disk to staged"], "mapped": ["disk to mapped"]}


@pytest.mark.parametrize("reference", ALIKE)
def test_gpu_placements_give_the_same_bits(tiny_checkpoint: Path, reference: str) -> None:
    model = load(tiny_checkpoint, n_gpu_layers=-1, poison=True)
    executor = executor_of(model)
    executor.rearrange(arranged(executor.placement, reference))
    expected = passes(model)
    assert all(logits.isfinite().all() for logits in expected)
    host = passes(load(tiny_checkpoint))
    for one, other in zip(expected, host, strict=True):
        assert (one.cpu().float() - other.float()).norm() < 0.05 * other.float().norm()
    for name in ALIKE[reference]:
        executor.rearrange(arranged(executor.placement, name))
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(passes(model), expected, strict=True)), name
    executor.close()


@pytest.mark.parametrize("name", ["resident", "staged", "disk to staged", "mapped"])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_gpu_replays_what_it_would_launch(
    tiny_checkpoint: Path, name: str, kv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture, replays = CudaDevice.capture, []

    def counted(device: CudaDevice, queue: Callable[[], None]) -> Callable[[], None]:
        replay = capture(device, queue)
        return lambda: replays.append(replay())

    with monkeypatch.context() as patched:
        patched.setattr(CudaDevice, "capture", lambda _, queue: queue)
        expected = decode_on_gpu(tiny_checkpoint, name, kv)
    monkeypatch.setattr(CudaDevice, "capture", counted)
    assert torch.equal(decode_on_gpu(tiny_checkpoint, name, kv), expected)
    assert len(replays) >= 3 * 20
    assert (expected.float() - host_decode(tiny_checkpoint, kv).float()).norm() < 0.05 * expected.float().norm()


def decode_on_gpu(directory: Path, name: str, kv: Any) -> Tensor:
    """The logits of tokens one by one, which pass 256 on their way, of two texts."""
    model = load(directory, n_gpu_layers=-1, kv=kv, poison=True)
    executor = executor_of(model)
    executor.rearrange(arranged(executor.placement, name))
    prompts = (PROMPT, torch.cat([PROMPT] * 36, dim=1))
    found = [decode(model, prompt, list(range(1, 31))).cpu() for prompt in prompts for _ in range(2)]
    executor.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    return torch.cat(found)


def host_decode(directory: Path, kv: Any) -> Tensor:
    """The same on the host."""
    model = load(directory, kv=kv, mode="exact")
    prompts = (PROMPT, torch.cat([PROMPT] * 36, dim=1))
    return torch.cat([decode(model, prompt, list(range(1, 31))) for prompt in prompts for _ in range(2)])


def test_gpu_kernels_once_each_sanitized() -> None:
    """Small enough for compute-sanitizer, which is hundreds of times slower."""
    from kernels.attention import append_tokens, attention
    from kernels.matmul import dequant_matmul
    from kernels.packed import PackedWeight

    for bits in (4, 8):
        codes = torch.randint(0, 256, (70, 192 * bits // 8), dtype=torch.uint8, device="cuda")
        scale = torch.rand(70, 3, device="cuda").bfloat16()
        weight = PackedWeight(codes, scale, None, 64, bits)
        for rows in (1, 17, 200):
            assert dequant_matmul(torch.randn(rows, 192, device="cuda").bfloat16(), weight).isfinite().all()
    context = on_gpu(random_context(Case(tokens=600, queries=2)))
    append_tokens(
        context.blocks,
        599,
        *(
            torch.randn(context.shape.batch, context.shape.key_heads, 1, dim).cuda()
            for dim in (context.shape.key_dim, context.shape.value_dim)
        ),
    )
    assert attention(random_query(Case(tokens=600, queries=2)).cuda(), context, 1.0, None).isfinite().all()
    for int8 in (False, True):
        assert step_on_gpu(int8).isfinite().all()
    torch.cuda.synchronize()


def step_on_gpu(int8: bool) -> Tensor:
    """What a decode step gives whose room begins as NaN."""
    case = LayerCase(tokens=300)
    layer = random_layer(case)
    shape = StepShape.of(layer, case.rotary, case.dtype, int8, 512)
    room = StepRoom(shape, torch.full((shape.nbytes,), 0xFF, dtype=torch.uint8, device="cuda"))
    step, inputs = DeviceStep(on_device(layer, pinned=False), room), random_inputs(case)
    given = Inputs(**{name: x.cuda() for name, x in vars(inputs).items()})
    blocks = int8_blocks(given, case.tokens, None)
    past = blocks.device_addresses(given.keys.device) if int8 else dense_past(given)
    step.load(given.hidden, given.cos, given.sin, past, case.tokens)
    step.run()
    return step.out.clone()
