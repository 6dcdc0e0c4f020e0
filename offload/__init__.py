"""The runtime: the checkpoint file, memory, transfers, placement, and transformers models that stream their layers."""

__version__ = "0.1.0"
