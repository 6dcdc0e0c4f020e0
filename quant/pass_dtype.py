"""The dtype that linears multiply in while layers are run for calibration, chosen once for a checkpoint.

Bfloat16 where the processor has instructions for its products, which then take half the time. Only linears are narrowed
(`quant/layer.py`); what is made of their inputs, Gram matrices apart, stays float32 or float64.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offload.checkpoint import WIDE_BITS
from offload.checkpoint_writer import recipe_in
from offload.errors import UsageError

AUTO = "auto"

PASS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_pass_dtype(name: str) -> None:
    """Raise ValueError for a name that is neither a dtype's nor "auto"."""
    if name not in (AUTO, *PASS_DTYPES):
        raise ValueError(f"pass_dtype={name!r}: expected one of {', '.join((AUTO, *PASS_DTYPES))}")


def of_processor() -> str:
    """Return the name of the dtype that this processor multiplies fastest.

    On ARM it is float32: nothing was measured there.
    """
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def settled(settings: Any, output: Path, options: argparse.Namespace) -> Any:
    """Return settings with another dtype in the place of "auto": that of the run in `output`, else the processor's.

    A run that goes on, here or on another machine, so keeps what it began with. Weights of 8 bits err less than
    bfloat16 rounds, and would be judged by that: where there are to be any, "auto" is float32. Settings without a
    `pass_dtype` are returned as they are. Raises UsageError for bfloat16 beside weights of 8 bits.
    """
    name = getattr(settings, "pass_dtype", None)
    if options.bits == WIDE_BITS or options.target_bits is not None:
        if name == "bfloat16":
            raise UsageError("--pass-dtype bfloat16: rounds more than weights of 8 bits do; leave it away")
        return settings if name is None else replace(settings, pass_dtype="float32")
    if name != AUTO:
        return settings
    found = None if options.overwrite else recipe_in(output)
    there = found.get("settings") if found else None
    name = there.get("pass_dtype") if isinstance(there, dict) else None
    return replace(settings, pass_dtype=name if name in PASS_DTYPES else of_processor())
