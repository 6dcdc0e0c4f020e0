"""Hidden states of all calibration samples, in memory or in a file.

Axes: S samples, T tokens, D hidden.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quant.nameless_file import NamelessFile


@dataclass(frozen=True, slots=True)
class Spilled:
    """Float32 [samples, *shape] in a file: it has a length, slices and `split`, as a tensor has.

    shape: of one sample, [T, D] as a rule. first: the sample in the file that is the first here.
    """

    file: NamelessFile
    samples: int
    shape: tuple[int, ...]
    first: int = 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, part: slice) -> "Spilled":
        start, stop, _ = part.indices(self.samples)
        return replace(self, first=self.first + start, samples=max(0, stop - start))

    def split(self, samples: int) -> Iterator[Tensor]:
        """Yield float32 [at most `samples`, *shape], read one after the other."""
        for start in range(0, self.samples, samples):
            batch_BTD = torch.empty(min(samples, self.samples - start), *self.shape)
            self.file.read_into(self._offset(start), batch_BTD)
            yield batch_BTD

    def write(self, start: int, batch_BTD: Tensor) -> None:
        """Overwrite the samples from `start` on."""
        self.file.write(self._offset(start), batch_BTD)

    def _offset(self, sample: int) -> int:
        return 4 * (self.first + sample) * math.prod(self.shape)


HiddenStates = Tensor | Spilled


def new_states(samples: int, like: Tensor, directory: Path | None) -> HiddenStates:
    """Return room for hidden states of as many samples, float32 [S, T, D], as `like` [1, T, D] is those of one.

    They lie in a file in `directory`, in memory without one.
    """
    shape = like.shape[1:]
    if directory is None:
        return torch.empty(samples, *shape)
    return Spilled(NamelessFile(directory, "hidden states", 4 * samples * math.prod(shape)), samples, tuple(shape))


def fill(states: HiddenStates, batches: Iterable[Tensor]) -> HiddenStates:
    """Put batches [B, T, D] into `states` one after the other and return it."""
    start = 0
    for batch_BTD in batches:
        if isinstance(states, Tensor):
            states[start : start + len(batch_BTD)] = batch_BTD
        else:
            states.write(start, batch_BTD)
        start += len(batch_BTD)
    return states
