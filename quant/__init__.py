"""Calibration: commands that turn a model into an int4 checkpoint, one layer at a time."""
