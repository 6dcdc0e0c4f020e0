"""Calibration: commands that turn a model into a quantized checkpoint, one layer at a time."""

import offload  # noqa: F401  first, so that `kernels` is ours whatever else bears that name
from offload.lean_import import import_lean

import_lean()  # before its commands import transformers
