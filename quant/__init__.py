"""Calibration: commands that turn a model into a quantized checkpoint, one layer at a time."""
