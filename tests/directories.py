"""What a directory of a checkpoint holds."""

from pathlib import Path

from offload.checkpoint import RUN_NAME


def contents(directory: Path) -> dict[str, bytes]:
    """Return all that two runs of one recipe have in common; a file of a run that was cut off would show."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != RUN_NAME)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
