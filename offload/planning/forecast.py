"""What a plan is worth: tokens a second before anything is loaded, what bounds them, and what would help."""

import math
from dataclasses import dataclass, replace

from offload.command import format_bytes
from offload.planning.choice import plan
from offload.planning.costs import Overheads, Shape, decode_costs, prefill_costs
from offload.planning.machine import Machine
from offload.planning.needs import Needs
from offload.planning.placement import Placement
from offload.planning.predict import Costs
from offload.planning.wishes import Wishes

START_TOKENS = 16
"""Of context, where decoding is said to start."""

PREFILL_TOKENS = 512
"""Of a prompt that are taken in one pass."""

_SHARES = (0.25, 0.5, 1.0)
"""Of the budget, added to see what more memory would do."""

_FREE = 1e6
"""Times as fast as it is: what takes no time any more."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned: a model of some shape and needs, asked for with wishes, on a machine."""

    shape: Shape
    needs: Needs
    wishes: Wishes
    machine: Machine
    overheads: Overheads
    context_tokens: int
    batch_size: int

    @property
    def costs(self) -> Costs:
        """What placements are compared by: decoding with half of the context behind."""
        return decode_costs(self.shape, self.machine, self.overheads, self.context_tokens // 2, self.batch_size)

    @property
    def wants_rehearsal(self) -> bool:
        """Whether the model was not rehearsed, or with too few layers in memory, or on disk, for a plan of many.

        Never for a plan with a GPU: what is learned there of the host's layers is not what they take without one.
        """
        placement, rehearsed = self.placed(), self.overheads
        tiers = placement.tiers
        return not placement.uses_device and (
            tiers.count("host") > 3 * rehearsed.kept or tiers.count("disk") > 3 * rehearsed.streamed
        )

    def placed(self) -> Placement:
        """Choose the placement. Raises ResourceError if nothing fits."""
        return plan(self.needs, self.wishes, self.costs)

    def decode_seconds(self, placement: Placement, context_tokens: int) -> float:
        """Predict a token of each sequence, with so many tokens before it."""

        return placement.seconds(
            decode_costs(self.shape, self.machine, self.overheads, context_tokens, self.batch_size)
        )

    def prefill_seconds(self, placement: Placement, tokens: int) -> float:
        """Predict a pass over prompts of so many tokens."""

        return placement.seconds(prefill_costs(self.shape, self.machine, self.overheads, tokens * self.batch_size))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens a second of all sequences together, at the start and with the context full; what bounds the former.

    bound_share: of a token's time that would be gone if that took none. help: what would make decoding faster, and how
    many times.
    """

    decode_tokens_per_second: float
    decode_full_tokens_per_second: float
    prefill_tokens_per_second: float
    bound: str
    bound_share: float
    help: dict[str, float]


def predict(subject: Subject, placement: Placement) -> Prediction:
    """Predict a placement's speed, find what bounds it and what would help."""
    seconds = subject.decode_seconds(placement, START_TOKENS)
    gains = {
        name: 1 - other.decode_seconds(placement, START_TOKENS) / seconds
        for name, other in _without_each(subject).items()
    }
    bound = max(gains, key=lambda name: gains[name])
    tokens = min(PREFILL_TOKENS, subject.context_tokens)
    return Prediction(
        decode_tokens_per_second=subject.batch_size / seconds,
        decode_full_tokens_per_second=subject.batch_size / subject.decode_seconds(placement, subject.context_tokens),
        prefill_tokens_per_second=subject.batch_size * tokens / subject.prefill_seconds(placement, tokens),
        bound=bound,
        bound_share=gains[bound],
        help=_help(subject, placement, seconds),
    )


def _without_each(subject: Subject) -> dict[str, Subject]:
    """Return the subject with one thing at a time that takes no time any more."""
    machine, overheads = subject.machine, subject.overheads
    no_disk = replace(subject, machine=_faster_disk(machine, _FREE))
    no_bus = replace(
        machine,
        copy_bytes_per_second=machine.copy_bytes_per_second * _FREE,
        mapped_bytes_per_second=machine.device_bytes_per_second,
    )
    no_weights = replace(
        machine,
        read_bytes_per_second=machine.read_bytes_per_second * _FREE,
        kernel_bytes_per_second=machine.kernel_bytes_per_second * _FREE,
        kernel_operations_per_second=machine.kernel_operations_per_second * _FREE,
        device_bytes_per_second=machine.device_bytes_per_second * _FREE,
        device_operations_per_second=machine.device_operations_per_second * _FREE,
    )
    no_overhead = replace(overheads, layer_seconds=0.0, streamed_seconds=0.0, outside_seconds=0.0)
    return {
        "reading from disk": no_disk,
        "the bus to the GPU": replace(subject, machine=no_bus),
        "multiplying the weights": replace(subject, machine=no_weights),
        "what surrounds the products": replace(subject, overheads=no_overhead),
    }


def _faster_disk(machine: Machine, factor: float) -> Machine:
    return replace(
        machine,
        disk_bytes_per_second=machine.disk_bytes_per_second * factor,
        disk_seconds_per_read=machine.disk_seconds_per_read / factor,
    )


def _help(subject: Subject, placement: Placement, seconds: float) -> dict[str, float]:
    """Return how many times as fast decoding would be with more memory, where there is a budget, or a faster disk."""
    wishes = subject.wishes
    tried: dict[str, Subject] = {}
    if wishes.cpu_bytes and placement.streamed_bytes and wishes.layers is None:
        for more in _additions(wishes.cpu_bytes):
            tried[f"{_plus(more)} RAM"] = replace(subject, wishes=replace(wishes, cpu_bytes=wishes.cpu_bytes + more))
    if wishes.gpu_bytes and placement.bytes_in("resident") < sum(placement.needs.layers_bytes) and not wishes.layers:
        for more in _additions(wishes.gpu_bytes):
            larger = replace(wishes, gpu_bytes=wishes.gpu_bytes + more)
            tried[f"{_plus(more)} GPU memory"] = replace(subject, wishes=larger)
    if placement.disk_bytes:
        tried["a disk twice as fast"] = replace(subject, machine=_faster_disk(subject.machine, 2.0))
    return {name: seconds / other.decode_seconds(other.placed(), START_TOKENS) for name, other in tried.items()}


def _additions(budget_bytes: int) -> list[int]:
    """Return a quarter, a half and the whole of a budget, as the powers of two nearest to them."""
    return [1 << round(math.log2(budget_bytes * share)) for share in _SHARES]


def _plus(more_bytes: int) -> str:
    return f"+{format_bytes(more_bytes).replace('.0', '')}"
