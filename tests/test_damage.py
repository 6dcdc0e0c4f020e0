"""Random damage: every flipped bit of a tensor is caught and named, and no mutant of a header or manifest passes."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from offload.checkpoint import Checkpoint
from offload.checksums import verify
from offload.errors import CheckpointError
from offload.memory import Arena, FileReader
from offload.read_queue import read_blob

FLIPS = 1500
KINDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
KINDS += ("layernorm.weight", "embed_tokens.weight", "model.norm.weight")


def test_every_flipped_bit_of_a_tensor_is_caught_where_it_is_first_read(tiny_asymmetric: Path) -> None:
    chance, reader = random.Random(7), FileReader()
    blobs = Checkpoint.open(tiny_asymmetric).blobs
    tensors = [(blob, name) for blob in blobs for name in blob.tensors]
    seen: set[str] = set()
    arenas = {}
    for blob in blobs:
        arenas[blob.path] = Arena(blob.nbytes)
        read_blob(reader, blob, arenas[blob.path])
        verify(blob, arenas[blob.path])
    for number in range(FLIPS):
        blob, name = tensors[number % len(tensors)]
        spec, memory = blob.tensors[name], arenas[blob.path].bytes
        place, bit = spec.offset + chance.randrange(spec.nbytes), 1 << chance.randrange(8)
        memory[place] ^= bit
        with pytest.raises(CheckpointError) as caught:
            verify(blob, arenas[blob.path])
        memory[place] ^= bit
        assert repr(name) in str(caught.value)
        seen.add(next(kind for kind in KINDS if name.endswith(kind)))
    assert seen == set(KINDS)
    reader.close()


def test_no_mutant_of_headers_index_manifest_or_configuration_gets_through(tiny_checkpoint: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("fuzz_checkpoint.py")), str(tiny_checkpoint)]
    result = subprocess.run([*command, "--seconds", "6"], capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "safetensors refused" in result.stdout
    assert "json refused" in result.stdout
    assert ", 0 wrong" in result.stdout
