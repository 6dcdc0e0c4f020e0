"""Measurement: accuracy, and speed beside the physical limit."""

import offload  # noqa: F401  first, so that `kernels` is ours whatever else bears that name
from offload.lean_import import import_lean

import_lean()  # before its commands import transformers
