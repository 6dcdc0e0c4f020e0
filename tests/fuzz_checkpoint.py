"""Damage the files of a checkpoint at random: it is refused by name or is right, quickly, in bounded memory.

    python tests/fuzz_checkpoint.py CHECKPOINT --seconds 600

Headers, index, manifest and configuration are changed byte by byte, cut, grown, and given values that JSON allows and
nobody expects. What `Checkpoint.open` accepts is compared with what safetensors itself says of every tensor.
"""

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from safetensors import safe_open  # noqa: E402

from offload.checkpoint import Checkpoint  # noqa: E402
from offload.errors import InputError  # noqa: E402

SLOWEST_SECONDS = 5.0
LONGEST_MESSAGE = 4000
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "x" * 1000,
    "../../etc/passwd",
    [],
    {},
    [[[]]],
    "\ud800",
)


@dataclass
class Tally:
    """What became of the mutants. wrong: those for which the promise was broken, in words."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Return other bytes: some flipped, removed, repeated or put in, or a value of the JSON in them replaced."""
    kind = chance.choice(("flip", "cut", "repeat", "insert", "value", "value", "name"))
    if kind in ("value", "name"):
        changed = _mutated_json(content, chance, kind == "name")
        if changed is not None:
            return changed
        kind = "flip"
    data = bytearray(content)
    at = chance.randrange(min(len(data), 4096))
    if kind == "flip":
        for _ in range(chance.choice((1, 1, 1, 4, 16))):
            place = chance.randrange(min(len(data), 4096))
            data[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[at : at + chance.choice((1, 8, 4096, len(data)))]
    elif kind == "repeat":
        data[at:at] = data[at : at + chance.choice((1, 16, 512))]
    else:
        data[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 8, 64))))
    return bytes(data)


def _mutated_json(content: bytes, chance: random.Random, rename: bool) -> bytes | None:
    """Return the file with one value, or name, of its JSON replaced; a shard's header keeps its length right."""
    shard = not content.lstrip().startswith(b"{")
    length = int.from_bytes(content[:8], "little") if shard else len(content)
    try:
        values = json.loads(content[8 : 8 + length] if shard else content)
    except ValueError:
        return None
    places: list[tuple[Any, Any]] = []
    rows = [values]
    while rows:
        row = rows.pop()
        keys = range(len(row)) if isinstance(row, list) else list(row)
        places += [(row, key) for key in keys]
        rows += [row[key] for key in keys if isinstance(row[key], dict | list)]
    if not places:
        return None
    row, key = chance.choice(places)
    if rename and isinstance(row, dict):
        row[str(chance.choice(STRANGE))] = row.pop(key)
    else:
        row[key] = chance.choice((*STRANGE, row[key] + 1 if isinstance(row[key], int) else 1))
    text = json.dumps(values).encode("utf-8", "surrogatepass")
    if not shard:
        return text
    padded = text.ljust(length) if chance.random() < 0.5 else text
    return len(padded).to_bytes(8, "little") + padded + content[8 + length :]


def judge(directory: Path) -> str:
    """Return how a directory was taken. Raises AssertionError if it was taken and is not what safetensors finds."""
    refusal = ""
    try:
        checkpoint = Checkpoint.open(directory)
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert str(directory) in refusal, f"the message names no file: {refusal}"
        assert len(refusal) < LONGEST_MESSAGE, "a message of more than a screen"
        return "refused"
    for blob in checkpoint.blobs:
        with safe_open(blob.path, framework="np") as file:
            assert set(file.keys()) == set(blob.tensors), "other tensors than safetensors finds"
            for name, spec in blob.tensors.items():
                assert tuple(file.get_slice(name).get_shape()) == spec.shape, f"{name}: another shape"
    return "accepted"


def fuzz(original: Path, seconds: float, seed: int, say: Callable[[str], None] = lambda line: None) -> Tally:
    """Try mutants of a checkpoint for some time."""
    chance, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "checkpoint"
        shutil.copytree(original, directory)
        targets = sorted(directory.glob("*.safetensors")) + sorted(directory.glob("*.json"))
        targets = [path for path in targets if path.name.startswith(("model", "config", "manifest"))]
        ended, number = time.monotonic() + seconds, 0
        while time.monotonic() < ended:
            number += 1
            path = chance.choice(targets)
            whole = path.read_bytes()
            path.write_bytes(mutate(whole, chance))
            started = time.monotonic()
            where = f"mutant {number} of seed {seed}, {path.name}"
            try:
                outcome = judge(directory)
            except Exception as error:
                outcome = "wrong"
                tally.wrong.append(f"{where}: {type(error).__name__}: {error}")
            if (took := time.monotonic() - started) > SLOWEST_SECONDS:
                tally.wrong.append(f"{where}: took {took:.1f} s")
            tally.outcomes[f"{path.suffix[1:]} {outcome}"] += 1
            path.write_bytes(whole)
            if number % 1000 == 0:
                say(f"{number} mutants, {dict(tally.outcomes)}")
    return tally


def main() -> int:
    """Run the command; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="Damage the files of a checkpoint at random.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
    tally = fuzz(options.checkpoint, options.seconds, options.seed, lambda line: print(line, flush=True))
    print(f"{tally.outcomes.total()} mutants, {dict(tally.outcomes)}, {len(tally.wrong)} wrong")
    print("\n".join(tally.wrong))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
