"""Weights as they are, kept while others are tried in their place: in memory, or in a file."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.groupwise import row_chunks
from quant.nameless_file import NamelessFile


class KeptWeights:
    """Copies of float32 parameters, in a file in `directory`, in memory without one.

    Raises ResourceError if the disk has no room.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], directory: Path | None) -> None:
        self._parameters, self._file = parameters, None
        self._held: list[Tensor] = []
        if directory is None:
            self._held = [parameter.data.clone() for parameter in parameters]
            return
        sizes = [parameter.nbytes for parameter in parameters]
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self._file = NamelessFile(directory, "weights of a layer", sum(sizes))
        for offset, parameter in zip(self._offsets, parameters, strict=True):
            self._file.write(offset, parameter.data)

    def rows(self, index: int, rows: slice) -> Tensor:
        """Return some rows of a copy, not to be changed. index: of the parameter, among those given."""
        if self._file is None:
            return self._held[index][rows]
        like = self._parameters[index][rows]
        kept = torch.empty(like.shape)
        self._file.read_into(self._offsets[index] + rows.start * like[:1].nbytes, kept)
        return kept

    def put_back(self) -> None:
        """Overwrite the parameters with what was kept."""
        for index, parameter in enumerate(self._parameters):
            for rows in row_chunks(len(parameter), parameter[:1].numel()):
                parameter.data[rows] = self.rows(index, rows)
