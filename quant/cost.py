"""What a method says of the work that a layer of some shapes will be."""

from dataclasses import dataclass

Shape = tuple[int, int]
"""Outputs and inputs of a linear."""

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Windows:
    """How much text there is: `samples` windows of `tokens` tokens."""

    samples: int
    tokens: int


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What one layer takes where statistics, and what the unquantized layer sees, lie in files.

    observing_bytes: of memory while a batch runs. working_bytes: while none does. disk_bytes: of files, besides the
    inputs of the unquantized linears. traffic_bytes: read and written, about.
    """

    observing_bytes: int
    working_bytes: int
    disk_bytes: int
    traffic_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one layer takes, besides its weights and a run of it: bytes at most, and operations in all, about.

    on_disk: the same for methods that can put their statistics into files.
    """

    memory_bytes: int
    operations: float
    on_disk: OnDisk | None = None

    @classmethod
    def of_rounding(cls, shapes: list[Shape]) -> "Cost":
        """Return the cost of rounding to nearest: the largest linear a few times over, and a few passes over each."""
        weights = [rows * columns for rows, columns in shapes]
        return cls(6 * FLOAT_BYTES * max(weights), 100.0 * sum(weights))
