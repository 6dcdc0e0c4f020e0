"""One product that was timed, and what it was set against."""

from dataclasses import dataclass

from eval.speed.timing import Samples

PEERS = (
    "torch fp32",
    "torch bf16",
    "torch int4",
    "torch int8",
    "ggml amx",
    "ggml repack",
    "ggml plain",
    "gemlite",
    "marlin",
)
"""What ours is set against, where it is installed and takes the shape."""


@dataclass(frozen=True, slots=True)
class Case:
    """One product: x [M, K] times a weight [N, K] of B bits in groups of G."""

    n: int
    k: int
    group_size: int
    m: int
    bits: int = 4

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.n * self.k * self.bits // 8 + 2 * self.n * (self.k // self.group_size)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender at one case. limit: the read of the packed bytes in the same rounds, None where it is no limit."""

    case: Case
    contender: str
    time: Samples
    limit: Samples | None
    peers: dict[str, Samples]
    device: str = "cpu"

    @property
    def packed_gb_per_second(self) -> float:
        """Packed bytes of the weight by the median time, in 10^9 bytes a second, whatever the contender reads."""
        return self.case.packed_bytes / self.time.median / 1e9

    @property
    def gop_per_second(self) -> float:
        """2 M N K operations by the median time, in 10^9 a second."""
        return 2 * self.case.m * self.case.n * self.case.k / self.time.median / 1e9

    def row(self) -> dict[str, str | int | float]:
        """Return the figures as columns of the results file, empty where there is none."""
        limit, over = self.limit, {name: self.time.speedup_over(peer) for name, peer in self.peers.items()}
        return {
            "n": self.case.n,
            "k": self.case.k,
            "group_size": self.case.group_size,
            "m": self.case.m,
            "contender": self.contender,
            "p20_us": round(self.time.percentile(0.2) * 1e6, 1),
            "p50_us": round(self.time.median * 1e6, 1),
            "p80_us": round(self.time.percentile(0.8) * 1e6, 1),
            "packed_gb_per_s": round(self.packed_gb_per_second, 2),
            "gop_per_s": round(self.gop_per_second, 1),
            "read_gb_per_s": "" if limit is None else round(self.case.packed_bytes / limit.median / 1e9, 2),
            "of_read": "" if limit is None else round(self.time.speedup_over(limit), 3),
            **{f"x_{name.replace(' ', '_')}": round(over[name], 2) if name in over else "" for name in PEERS},
            "bits": self.case.bits,
            "device": self.device,
            **({} if self.device == "cpu" else {"backend": "triton"}),
        }
