"""What a method says of the work that a layer of some shapes will be."""

from dataclasses import dataclass

from quant.groupwise import chunk_rows

Shape = tuple[int, int]
"""Outputs and inputs of a linear."""

FLOAT_BYTES = 4

MOST_IN_SET = 4
"""Linears of one shape that share an input, at most: gates and projections, queries, keys and values."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How much text there is: `samples` windows of `tokens` tokens."""

    samples: int
    tokens: int

    def nbytes(self, values: float) -> int:
        """Return the bytes of so many float32 values of each token, of all windows."""
        return int(FLOAT_BYTES * self.samples * self.tokens * values)


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What one layer takes where statistics, and the inputs of its linears, lie in files.

    observing_bytes: of memory while a batch runs. working_bytes: while none does. disk_bytes: of files, besides the
    inputs of all linears. traffic_bytes: read and written, about.
    """

    observing_bytes: int
    working_bytes: int
    disk_bytes: int
    traffic_bytes: int

    def after(self, before: "OnDisk") -> "OnDisk":
        """Return what two pieces of work take, one after the other."""
        return OnDisk(
            max(self.observing_bytes, before.observing_bytes),
            max(self.working_bytes, before.working_bytes),
            max(self.disk_bytes, before.disk_bytes),
            self.traffic_bytes + before.traffic_bytes,
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """What one layer takes, besides its weights and a run of it: bytes at most, and operations in all, about.

    on_disk: the same for methods that can put their statistics into files. purpose: of the memory, in words.
    pass_operations: those among the operations that are done in the dtype of passes.
    """

    memory_bytes: int
    operations: float
    on_disk: OnDisk | None = None
    purpose: str = "statistics and searches"
    pass_operations: float = 0.0

    def after(self, before: "Cost") -> "Cost":
        """Return what two pieces of work take, one after the other; on disk only what both can put there."""
        both = None if self.on_disk is None or before.on_disk is None else self.on_disk.after(before.on_disk)
        return Cost(
            max(self.memory_bytes, before.memory_bytes),
            self.operations + before.operations,
            both,
            self.purpose,
            self.pass_operations + before.pass_operations,
        )

    @classmethod
    def of_rounding(cls, shapes: list[Shape]) -> "Cost":
        """Return the cost of rounding to nearest: some rows a few times over, and a few passes over each linear."""
        chunks = [min(rows, chunk_rows(columns)) * columns for rows, columns in shapes]
        return cls(6 * FLOAT_BYTES * max(chunks), 100.0 * sum(rows * columns for rows, columns in shapes))
