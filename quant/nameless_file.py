"""Files without a name: nothing of them is left, whatever ends the process."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from offload.command import format_bytes
from offload.errors import ResourceError


class NamelessFile:
    """A file without a name in `directory`, with room for `nbytes` at first. purpose: what it holds, in words.

    Raises ResourceError if the disk has no room for it.
    """

    def __init__(self, directory: Path, purpose: str, nbytes: int = 0) -> None:
        self.descriptor, self.nbytes = -1, 0
        self._directory, self.purpose = directory, purpose
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                self.descriptor = os.dup(file.fileno())
        except OSError as error:
            raise self._no_room(nbytes, error) from None
        self.grow(nbytes)

    def grow(self, nbytes: int) -> None:
        """Make room for as many bytes more. Raises ResourceError if the disk has none."""
        if not nbytes:
            return
        try:
            os.posix_fallocate(self.descriptor, self.nbytes, nbytes)
        except OSError as error:
            raise self._no_room(self.nbytes + nbytes, error) from None
        self.nbytes += nbytes

    def read_into(self, offset: int, tensor: Tensor) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on."""
        view = _bytes(tensor)
        while view:
            count = os.preadv(self.descriptor, [view], offset)
            view, offset = view[count:], offset + count

    def write(self, offset: int, tensor: Tensor) -> None:
        """Write a tensor's values from `offset` on."""
        view = _bytes(tensor.contiguous())
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _no_room(self, nbytes: int, error: OSError) -> ResourceError:
        what = f"{format_bytes(nbytes)} for {self.purpose}"
        return ResourceError(f"{self._directory}: {what} cannot be had on that disk ({error.strerror})")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _bytes(tensor: Tensor) -> memoryview:
    """Return a view of a contiguous tensor, which may have no values."""
    return tensor.flatten().view(torch.uint8).numpy().data
