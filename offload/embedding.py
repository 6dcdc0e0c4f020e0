"""Input embeddings that stay in their file: a token reads one row, so they are the cheapest bytes to do without."""

import os
import weakref
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.checkpoint import LayerBlob
from offload.checksums import check_digest
from offload.errors import CheckpointError

_CHUNK_BYTES = 8 << 20


def plain_embedding(model: PreTrainedModel, fixed: Sequence[LayerBlob]) -> tuple[LayerBlob, str] | None:
    """Return the shard and the name of plain embeddings that nothing but tokens reads, None if there are none.

    fixed: the shards around the decoder layers.
    """
    module = model.get_input_embeddings()
    names = [f"{name}.weight" for name, found in model.named_modules() if found is module]
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    if type(module) is not nn.Embedding or set(names) & {*tied, *tied.values()}:
        return None
    return next(((blob, name) for blob in fixed for name in names if name in blob.tensors), None)


class DiskEmbedding(nn.Module):
    """Stands where an `nn.Embedding` was; reads the rows that are asked for, through the page cache.

    blob, name: the shard and the tensor in it, [vocabulary, hidden], whose checksum is compared with the manifest now.
    dtype: of the result. Raises CheckpointError if the file cannot be read, or is not what was written.
    """

    def __init__(self, blob: LayerBlob, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._blob, self._name = blob, name
        spec = blob.tensors[name]
        self._start, self._row_bytes, self._stored = blob.offset + spec.offset, spec.nbytes // spec.shape[0], spec.dtype
        self.num_embeddings, self.embedding_dim = spec.shape
        try:
            self._descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{blob.path}: cannot be read ({error.strerror})") from None
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        # No row is held; what asks the model for its device and dtype asks the first parameter.
        self.weight = nn.Parameter(torch.empty(0, self.embedding_dim, dtype=dtype), requires_grad=False)
        self._verify()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of int64 tokens [...], as [..., hidden] in the model's dtype."""
        distinct, places = tokens.unique(return_inverse=True)
        rows = torch.empty(len(distinct), self.embedding_dim, dtype=self._stored)
        held = memoryview(rows.view(torch.uint8).numpy().data)
        for row, token in enumerate(distinct.tolist()):
            if not 0 <= token < self.num_embeddings:
                raise IndexError(f"token {token}: the vocabulary has {self.num_embeddings}")
            self._read(token * self._row_bytes, held[row : row + 1].cast("B"))
        return rows[places].to(self.weight.dtype)

    def close(self) -> None:
        """Close the file."""
        self._closing()
        self._descriptor = -1  # its number may be another file's by now

    def _verify(self) -> None:
        checksum, left, done = xxhash.xxh3_64(), self.num_embeddings * self._row_bytes, 0
        chunk = bytearray(min(_CHUNK_BYTES, left))
        while left:
            part = memoryview(chunk)[: min(len(chunk), left)]
            self._read(done, part)
            checksum.update(part)
            done, left = done + len(part), left - len(part)
        os.posix_fadvise(self._descriptor, self._start, done, os.POSIX_FADV_DONTNEED)
        check_digest(self._blob, self._name, checksum.hexdigest())

    def _read(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:]], self._start + offset + done)
            except OSError as error:
                raise CheckpointError(f"{self._blob.path}: cannot be read ({error.strerror})") from None
            if count == 0:
                raise CheckpointError(f"{self._blob.path}: was truncated while in use")
            done += count
