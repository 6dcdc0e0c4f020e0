"""From the names that tensors are stored under to those they have in the model, by transformers' own tables.

A checkpoint on the hub may name a tensor otherwise than transformers does today, with another prefix, or hold the
experts of a layer one by one where transformers fuses them. The experts of `offload/experts.py` are apart again, so a
stored tensor of an expert is one tensor of the model: nothing is converted, only found.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from offload.checkpoint import Checkpoint
from offload.experts import fused_names

_PACKED_PARTS = re.compile(r"\.weight_(packed|scale|zero_point|shape)$")
_STACKED, _STACKED_IN_TWO = [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Return the model's name of every stored tensor that has a place in it, packed parts of a weight included.

    A tensor of fused experts, whose place is taken by those of `Experts`, has its fused name. Tensors without a place
    are left out, and so are those that transformers' tables would compute.
    """
    tables, found = _Tables(model), {}
    for name in sorted(stored):  # in the order in which transformers asks its tables
        part = _PACKED_PARTS.search(name)
        place = tables.place(name if part is None else f"{name[: part.start()]}.weight")
        if place is not None:
            found[name] = place if part is None else place.removesuffix(".weight") + part[0]
    return found


def checkpoint_in_model(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """Return a checkpoint whose tensors have the names of `model`; those without a place keep their own."""
    names = names_in_model(model, (name for blob in checkpoint.blobs for name in blob.tensors))
    blobs = (
        replace(
            blob,
            tensors={names.get(name, name): spec for name, spec in blob.tensors.items()},
            checksums={names.get(name, name): checksum for name, checksum in blob.checksums.items()},
        )
        for blob in checkpoint.blobs
    )
    return replace(checkpoint, blobs=tuple(blobs))


class _Tables:
    """transformers' tables for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        tables = get_model_conversion_mapping(model)
        self.renamings = [table for table in tables if isinstance(table, WeightRenaming)]
        self.converters = [table for table in tables if isinstance(table, WeightConverter)]
        self.fused, self.prefix = fused_names(model), model.base_model_prefix
        self.places: dict[str, object] = {**model.state_dict(), **self.fused}

    def place(self, name: str) -> str | None:
        """Return the model's name of one stored tensor: by the tables; else its own, but for the model's prefix."""
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.places)
        if pattern is not None:
            expert = self._of_expert(name, renamed, pattern)
            if expert in self.places:
                return expert
        elif renamed in self.places:
            return str(renamed)
        bare, _ = rename_source_key(name, [], [], self.prefix, self.places)
        return bare if bare in self.places else None

    def _of_expert(self, name: str, renamed: str, pattern: str) -> str | None:
        """Return the expert's linear, if `pattern` is of a table that would stack tensors into a fused parameter."""
        parts = self.fused.get(renamed, ())
        table = next(table for table in self.converters if pattern in table.source_patterns)
        operations = [(type(operation), operation.dim) for operation in table.operations]
        number = re.search(pattern.replace("*", r"(\d+)"), rename_source_key(name, self.renamings, [])[0])
        if operations != (_STACKED, _STACKED_IN_TWO)[len(parts) - 1] or len(table.source_patterns) != len(parts):
            return None
        if number is None:
            return None
        return f"{renamed.rpartition('.')[0]}.{number[1]}.{parts[table.source_patterns.index(pattern)]}.weight"
