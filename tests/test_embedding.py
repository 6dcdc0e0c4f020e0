"""Embeddings that stay in their file give the rows that memory would; the head may be packed wider than the layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eval.speed.random_model import SHAPES, write_checkpoint
from offload.checkpoint import Checkpoint
from offload.embedding import DiskEmbedding
from offload.errors import CheckpointError
from offload.executor import executor_of, load
from offload.linear import PackedLinear
from offload.planning.choice import plan
from offload.planning.needs import Needs
from offload.planning.placement import Placement
from offload.units import without

NAME = "model.embed_tokens.weight"
TOKENS = torch.tensor([[5, 1023, 0, 5, 77, 9]])


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose head is a packed weight of 8 bits."""
    directory = tmp_path_factory.mktemp("random") / "tiny.int4"
    write_checkpoint(SHAPES["tiny"], directory)
    return directory


def test_rows_are_those_of_the_file(untied: Path) -> None:
    blob = Checkpoint.open(untied).blobs[0]
    table = load_file(blob.path)[NAME]
    embedding = DiskEmbedding(blob, NAME, torch.bfloat16)
    assert torch.equal(embedding(TOKENS), table[TOKENS])
    assert torch.equal(DiskEmbedding(blob, NAME, torch.float32)(TOKENS[0]), table.float()[TOKENS[0]])
    with pytest.raises(IndexError, match="token 1024: the vocabulary has 1024"):
        embedding(torch.tensor([1024]))
    embedding.close()
    embedding.close()


def test_streamed_with_embeddings_on_disk_equals_resident(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = load(untied)
    assert isinstance(resident.get_output_embeddings(), PackedLinear)
    assert not executor_of(resident).placement.embedding_on_disk
    with torch.inference_mode():
        expected = resident.generate(TOKENS, max_new_tokens=8, do_sample=False)

    def least(needs: Needs, *arguments: Any) -> Placement:
        return Placement(
            ("disk",) * len(needs.layers_bytes), 2, needs.without_embedding(), None, embedding_on_disk=True
        )

    monkeypatch.setattr("offload.executor.plan", least)
    model = load(untied, poison=True)
    assert isinstance(model.get_input_embeddings(), DiskEmbedding)
    assert model.device == torch.device("cpu")
    with torch.inference_mode():
        assert torch.equal(model.generate(TOKENS, max_new_tokens=8, do_sample=False), expected)
        assert torch.equal(model(TOKENS).logits, resident(TOKENS).logits)
    executor_of(model).close()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_embeddings_are_refused(untied: Path, damage: str) -> None:
    blob = Checkpoint.open(untied).blobs[0]
    whole = blob.path.read_bytes()
    at = blob.offset + blob.tensors[NAME].offset + 1000
    try:
        damaged = whole[:at] + (bytes([whole[at] ^ 1]) + whole[at + 1 :] if damage == "flip" else b"")
        blob.path.write_bytes(damaged)
        told = "tensor 'model.embed_tokens.weight' is damaged" if damage == "flip" else "was truncated while in use"
        with pytest.raises(CheckpointError, match=told):
            DiskEmbedding(blob, NAME, torch.bfloat16)
    finally:
        blob.path.write_bytes(whole)


def test_a_shard_without_one_tensor_keeps_the_others(untied: Path) -> None:
    first, *_, last = Checkpoint.open(untied).blobs
    assert without(first, [NAME]) is None
    rest = without(last, ["lm_head.weight_packed"])
    assert rest is not None
    assert rest.offset % 4096 == 0
    for name, spec in rest.tensors.items():
        assert rest.offset + spec.offset == last.offset + last.tensors[name].offset
        assert spec.offset + spec.nbytes <= rest.nbytes
    assert set(rest.checksums) == set(last.checksums) - {"lm_head.weight_packed"}


def test_embeddings_leave_memory_before_any_layer() -> None:
    needs = Needs(400, 60, 40, 30, (20,) * 10, embedding_bytes=50)
    whole = plan(needs, None).expected_bytes
    assert not plan(needs, whole).embedding_on_disk
    for budget in (whole - 1, whole - 50):
        placement = plan(needs, budget)
        assert placement.embedding_on_disk
        assert placement.disk_bytes == 0
        assert placement.expected_bytes == whole - 50
    assert plan(needs, whole - 51).disk_bytes > 0
