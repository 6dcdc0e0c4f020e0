"""The inputs of a layer's linears, recorded once to be gone through again and again: in memory, or in files.

Axes: T tokens of a batch, K inputs of a linear.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.layer import LayerInputs, observed_inputs
from quant.nameless_file import NamelessFile


class Recording:
    """Inputs of a linear, float32 [T, K] a batch, kept in memory or in a file, to be gone through again and again.

    tokens: of every batch. energy: the sum of x^2, float64 [K]. Raises ResourceError if the disk has no room.
    """

    def __init__(self, width: int, directory: Path | None) -> None:
        self.width, self.tokens = width, list[int]()
        self.energy = torch.zeros(width, dtype=torch.float64)
        self._held: list[Tensor] = []
        self._file = None if directory is None else NamelessFile(directory, "inputs of a layer")

    @classmethod
    def of(cls, batches: Iterable[Tensor], width: int, directory: Path | None) -> "Recording":
        """Record all batches."""
        recording = cls(width, directory)
        for x_TK in batches:
            recording.append(x_TK)
        return recording

    def append(self, x_TK: Tensor) -> None:
        """Record one batch."""
        self.tokens.append(len(x_TK))
        for x_tK in x_TK.split(64):  # in float64, without a second batch
            self.energy += x_tK.double().square_().sum(0)
        if self._file is None:
            self._held.append(x_TK.clone())
            return
        offset = self._file.nbytes
        self._file.grow(x_TK.nbytes)
        self._file.write(offset, x_TK)

    def __iter__(self) -> Iterator[Tensor]:
        if self._file is None:
            yield from self._held
            return
        offset = 0
        for tokens in self.tokens:
            x_TK = torch.empty(tokens, self.width)
            self._file.read_into(offset, x_TK)
            yield x_TK
            offset += x_TK.nbytes


def record(layer: nn.Module, inputs: LayerInputs, names: Sequence[str], directory: Path | None) -> dict[str, Recording]:
    """Run the layer once and return what each named linear is called with first; no tokens where it is not called."""
    widths = {name: layer.get_parameter(f"{name}.weight").shape[1] for name in names}
    recordings = {name: Recording(width, directory) for name, width in widths.items()}
    missing: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        if name in missing:
            missing.remove(name)
            recordings[name].append(x.flatten(0, -2))

    with observed_inputs(layer, names, see):
        missing.update(names)
        for _ in inputs.outputs(layer):
            for name in missing:
                recordings[name].append(torch.empty(0, widths[name]))
            missing.update(names)
    return recordings
