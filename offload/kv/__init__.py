"""Keys and values: a cache in 8 bits, what of it is not at hand, and where that is."""
