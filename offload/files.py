"""Files of a model as they are opened: regular ones only, JSON of a bounded size, and errors that name the file."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offload.errors import CheckpointError

_MAX_JSON_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that is opened or read inside into a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; copy or download the model again") from None
    except OSError as error:
        reason = error.strerror or error  # transformers raises it with a text of its own
        raise CheckpointError(f"{path}: cannot be read ({reason}); check the file, the disk and permissions") from None
    except ValueError as error:  # a name with NUL or half a surrogate pair in it
        raise CheckpointError(f"{str(path)!r}: cannot be read ({error})") from None


def check_regular(path: Path) -> None:
    """Raise CheckpointError unless `path` is a readable regular file (a link to one is fine) and no Git LFS pointer."""
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            start = os.read(descriptor, len(_LFS_POINTER)) if regular else b""
        finally:
            os.close(descriptor)
    if not regular:
        raise CheckpointError(f"{path}: not a regular file")
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` or download the model again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 64 MiB. Raises CheckpointError."""
    check_regular(path)
    with reading(path), path.open("rb") as file:
        content = file.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        size = path.stat().st_size
        raise CheckpointError(f"{path}: {size} bytes; a file of this kind has at most {_MAX_JSON_BYTES}")
    try:
        values = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); it is damaged or cut off") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def parse_json(content: bytes) -> Any:
    """Parse JSON in which no name stands twice. Raises ValueError, or RecursionError where it is nested too deep."""
    return json.loads(content, object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} stands twice")
        values[key] = value
    return values
