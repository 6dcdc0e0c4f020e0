"""How products and attention are launched on a GPU, and what products take of its memory: known without triton."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.kv_block import CHUNK_TOKENS, MOST_FUSED_QUERIES

OLDEST = 8
"""Major compute capability."""

SPLIT_TOKENS, MOST_SPLITS = 256, 64
"""A split of a context has at least so many tokens, and up to CHUNK_TOKENS where there would be more of them."""

_INTERPRETED_PROCESSORS = 4


class Shaped(Protocol):
    """What of a packed weight [N, K] a launch depends on: `PackedWeight`, or one that is not there yet."""

    @property
    def out_features(self) -> int:
        """N."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def group_size(self) -> int:
        """Codes that share a scale."""

    @property
    def bits(self) -> int:
        """Of a code."""


@dataclass(frozen=True, slots=True)
class WeightShape:
    """A packed weight that is not there yet, see `Shaped`."""

    out_features: int
    in_features: int
    group_size: int
    bits: int

    @classmethod
    def of(cls, weight: Shaped) -> "WeightShape":
        """Return that of a weight."""
        return cls(weight.out_features, weight.in_features, weight.group_size, weight.bits)


@dataclass(frozen=True, slots=True)
class GpuKind:
    """What launches depend on: the major compute capability of a GPU, and its multiprocessors."""

    capability: int
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> "GpuKind":
        """Return that of a CUDA device; for another one a small one, as the interpreter is given."""
        if device.type != "cuda":
            return cls(OLDEST, _INTERPRETED_PROCESSORS)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.major, properties.multi_processor_count)


@dataclass(frozen=True, slots=True)
class Tile:
    """How the fused kernel is launched: activations and outputs of a program, the most codes of 4 bits at a time.

    scale_weights: the codes are scaled, not their sums, so that a step may take several groups.
    """

    block_m: int
    block_n: int
    largest_step: int
    num_warps: int
    num_stages: int
    scale_weights: bool = False

    def step(self, group: int, bits: int) -> int:
        """Return the codes of one step, of as many bytes for all bits; groups are of `group` codes, 0 the whole row."""
        largest = self.largest_step * 4 // bits
        return largest if self.scale_weights else min(group or largest, largest)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is chosen for an architecture.

    tiles: in order of the activations they are for. mapped: for weights in host memory, whose rows are asked for in
    whole 128-byte lines. fused_batch: activations up to which dequantising in the kernel costs less than doing it once.
    programs_per_processor: how many the device should be given, at least, before K is left in one piece.
    """

    tiles: tuple[Tile, ...]
    mapped: Tile
    fused_batch: int
    programs_per_processor: int


_DECODE, _SMALL, _MAPPED = (
    Tile(16, 64, 128, 2, 4),
    Tile(32, 128, 128, 4, 3),
    Tile(16, 32, 256, 4, 3, scale_weights=True),
)
_AMPERE = Tuning((_DECODE, _SMALL, Tile(64, 128, 128, 8, 3)), _MAPPED, fused_batch=64, programs_per_processor=4)
_HOPPER = Tuning((_DECODE, _SMALL, Tile(64, 128, 64, 4, 3)), _MAPPED, fused_batch=128, programs_per_processor=4)
TUNINGS = {8: _AMPERE, 9: _HOPPER, 10: _HOPPER, 12: _AMPERE}
"""By major compute capability. The tiles were chosen by their machine code (`python -m kernels.ahead_of_time`): nothing
spills, and the decode loop keeps to 4 instructions a weight. `fused_batch` and `programs_per_processor` follow from
what each path moves and issues, and have not met a GPU yet."""

_LARGEST_SPLIT = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """How one fused product runs: its tile, and the splits of K with the steps in each."""

    tile: Tile
    splits: int
    steps_per_split: int


def plan_launch(M: int, weight: Shaped, tuning: Tuning, processors: int, mapped: bool) -> Launch:
    """Choose tile and splits for M activations on a device of that many multiprocessors."""
    largest = tuning.tiles[-1]
    tile = tuning.mapped if mapped else next((t for t in tuning.tiles if t.block_m >= M), largest)
    steps = _cdiv(weight.in_features, tile.step(group_codes(weight), weight.bits))
    programs = _cdiv(weight.out_features, tile.block_n) * _cdiv(M, tile.block_m)
    wanted = _cdiv(tuning.programs_per_processor * processors, max(1, programs))
    splits = max(1, min(wanted, _LARGEST_SPLIT, steps // 2))
    steps_per_split = _cdiv(steps, splits)
    return Launch(tile, _cdiv(steps, steps_per_split), steps_per_split)


def split_elements(M: int, weight: Shaped, tuning: Tuning, processors: int, mapped: bool) -> int:
    """Return how many float32 a product of M activations needs between its two kernels; 0 where it needs none."""
    if tuning.fused_batch < M:
        return 0
    launch = plan_launch(M, weight, tuning, processors, mapped)
    return 0 if launch.splits == 1 else launch.splits * M * weight.out_features


def product_bytes(weights: Iterable[Shaped], most_rows: int, element_bytes: int, gpu: GpuKind) -> int:
    """Return what a product of 1 to `most_rows` activations by one of `weights` takes beside operands and result.

    That is the weight in elements of `element_bytes` where it is dequantized, or sums of its splits, in float32.
    """
    tuning = tuning_of(gpu.capability)
    fused_rows = range(1, min(most_rows, tuning.fused_batch) + 1)
    largest = 0
    for weight in set(weights):
        if most_rows > tuning.fused_batch:
            largest = max(largest, weight.out_features * weight.in_features * element_bytes)
        for rows in fused_rows:
            for mapped in (False, True) if rows <= tuning.mapped.block_m else (False,):
                largest = max(largest, 4 * split_elements(rows, weight, tuning, gpu.processors, mapped))
    return largest


def split_tokens(tokens: int, queries: int = 1) -> int:
    """Return the tokens of every split but the last, a power of two: of a context of so many, for so many queries.

    For few queries it is the same for all numbers of tokens from above one power of two up to the next.
    """
    if queries > MOST_FUSED_QUERIES:  # they fill a device without splits, and what each split finds is large
        return CHUNK_TOKENS
    most = _cdiv(tokens, MOST_SPLITS)
    return min(CHUNK_TOKENS, max(SPLIT_TOKENS, 1 << (most - 1).bit_length()))


def tuning_of(capability: int) -> Tuning:
    """Return what is chosen for a major compute capability; for one that is newer than all, the newest."""
    return TUNINGS.get(capability, TUNINGS[max(TUNINGS)])


def group_codes(weight: Shaped) -> int:
    """Return the codes of a group as kernels are told them, 0 for the whole row."""
    return 0 if weight.group_size == weight.in_features else weight.group_size


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)
