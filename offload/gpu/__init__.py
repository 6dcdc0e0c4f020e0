"""What a GPU computes: its memory and streams, what of a model is there, and how it gets there."""
