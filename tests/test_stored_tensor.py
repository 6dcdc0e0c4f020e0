"""Tensors that go from file to file without ever being whole in memory: the same bytes, and damage named."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload import source_weights
from offload.checkpoint_writer import write_safetensors
from offload.errors import CheckpointError
from offload.source_weights import SourceWeights

PAGE = 4096
PIECE = 2 * PAGE


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose tensors begin and end anywhere on their pages, for pieces of two pages."""
    monkeypatch.setattr(source_weights, "_PIECE_BYTES", PIECE)
    sizes = (0, 1, 77, PAGE, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 13)
    tensors = {f"t{size}": torch.randint(256, (size,), dtype=torch.uint8) for size in sizes}
    tensors["half"] = torch.randn(3, 5, 700).half()
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_its_pieces_are_its_bytes(source: Path) -> None:
    weights, expected = SourceWeights.open(source), load_file(source / "model.safetensors")
    assert len(weights.locations) == len(expected) == 9
    for name, tensor in expected.items():
        stored = weights.stored_tensor(name)
        assert (stored.dtype, stored.shape, stored.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        pieces = [bytes(piece) for piece in stored.pieces()]
        assert b"".join(pieces) == tensor.view(-1).view(torch.uint8).numpy().tobytes()
        assert all(len(piece) <= PIECE for piece in pieces)
    with pytest.raises(CheckpointError, match="tensor 'other' is missing from the model; it names 9 others"):
        weights.stored_tensor("other")


def test_a_shard_of_them_is_the_shard_of_tensors(source: Path, tmp_path: Path) -> None:
    weights = SourceWeights.open(source)
    whole = {name: weights.read(name) for name in weights.locations}
    stored = {name: weights.stored_tensor(name) for name in weights.locations}
    checksums = write_safetensors(tmp_path / "whole", whole)
    assert write_safetensors(tmp_path / "stored", stored) == checksums
    assert (tmp_path / "stored").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_file_that_was_cut_meanwhile_is_named(source: Path, tmp_path: Path) -> None:
    path, weights = source / "model.safetensors", SourceWeights.open(source)
    stored = {"last": weights.stored_tensor(max(weights.locations, key=lambda n: weights.locations[n].spec.offset))}
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"tensor '.*': {path}: ends at byte \d+; it was truncated while in use"):
        write_safetensors(tmp_path / "shard", stored)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"tensor '.*': {path}: cannot be read at byte \d+ \(No such file"):
        write_safetensors(tmp_path / "shard", stored)
    assert not list(tmp_path.glob("*shard*"))
