"""The runtime: the checkpoint file, memory, transfers, placement, and transformers models that stream their layers.

`offload.load(CHECKPOINT, cpu_memory="8GiB")` returns such a model; see `offload.executor.load`. Once this package is
imported, so does transformers' `AutoModelForCausalLM.from_pretrained(CHECKPOINT, max_memory={"cpu": "8GiB"})`.
"""

from typing import Any

from offload.auto import register
from offload.namesake import claim
from offload.version import VERSION

__version__ = VERSION


def __getattr__(name: str) -> Any:
    """Import `load` when it is first used: torch and transformers take seconds, and most commands need neither."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from offload.executor import load

    return load


claim()
register()
