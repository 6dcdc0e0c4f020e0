"""Measurement: accuracy, and speed beside the physical limit."""

import offload  # noqa: F401  first, so that `kernels` is ours whatever else bears that name
