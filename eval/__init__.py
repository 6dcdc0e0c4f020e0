"""Measurement: accuracy, and speed beside the physical limit."""
