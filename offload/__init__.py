"""The runtime: the checkpoint file, memory, transfers, placement, and transformers models that stream their layers."""
