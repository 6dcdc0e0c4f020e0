"""Checkpoints of other tools, and models that nobody quantized: read, and laid out as ours."""
