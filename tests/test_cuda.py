"""What only a GPU can show: attention over 8-bit keys and values there, and a model whose layers take every tier."""

from pathlib import Path

import pytest
import torch
from test_attention import BF16, Case, random_context, random_mask, random_query
from test_device import passes

from kernels.kv_block import KVBlock, KVBlocks, KVContext, write_tokens
from kernels.reference import attention_reference
from offload.executor import executor_of, load
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
    torch.cuda.synchronize()
