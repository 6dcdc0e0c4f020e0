"""What a streaming model has moved so far."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamingStats:
    """What has been read from disk since the model was loaded: weights, and keys and values that are not at hand.

    layer_reads: through the queue of the weights. cache_bytes_copied: keys and values between host memory and a device,
    in both directions. layer_bytes_copied: layers to it, however they cross.
    """

    bytes_read: int
    layer_reads: int
    wait_seconds: float
    direct: bool
    cache_bytes_copied: int = 0
    layer_bytes_copied: int = 0
