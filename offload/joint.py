"""Work that several sequences may want at the same place of a pass, and that costs less done for all at once."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Joint(Protocol):
    """A part of a model that computes for several sequences in one call what it would for each, bit for bit.

    order: where it comes in a pass, of all such parts. gather: takes what one sequence wants and returns when it is
    done; None does it at once.
    """

    order: int
    gather: "Gather | None"

    def compute(self, jobs: Sequence[Any]) -> None:
        """Do what some sequences want, one job of each."""


Gather = Callable[[Joint, Any], None]


def do(joint: Joint, job: Any) -> None:
    """Have a job done, with those of others where somebody gathers them."""
    if joint.gather is None:
        joint.compute([job])
    else:
        joint.gather(joint, job)
