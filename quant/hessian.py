"""The factor that GPTQ rounds by, of what is known of a linear's inputs, and the loss of weights under that.

Axes: K inputs of a linear, N outputs.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant.statistics import Statistics
from quant.tiles import Tiles, factorise, invert, quadratic

_DAMPING_STEP = 10.0


@dataclass(frozen=True, slots=True)
class Hessian:
    """The loss of a linear's weights around W, and what rounding one column should do to the later ones.

    seen: moments of the inputs, G among them. factor: U, upper, with U^T U = (G + damping mean(diag G))^-1, in the
    moments' order. damping: what it took to have one.
    """

    seen: Statistics
    factor: Tiles
    damping: float

    @classmethod
    def of(cls, seen: Statistics, damping: float, directory: Path | None = None) -> "Hessian":
        """Factorise finite moments; the damping is raised until that succeeds. directory: for the factor's tiles.

        A dead channel has nothing but the damping: its column is rounded to nearest and moves no other. The same holds
        for all of them if no input is ever other than zero.
        """
        diagonal = torch.empty_like(seen.order, dtype=torch.float64)
        diagonal[seen.order] = seen.gram.diagonal()
        unit = float(diagonal.mean()) or 1.0
        while (factor := factorise(seen.gram, damping * unit, directory)) is None:
            damping = max(damping, 1e-6) * _DAMPING_STEP
        invert(factor)
        return cls(seen, factor, damping)

    @property
    def order(self) -> Tensor:
        """The channels in the order in which their columns are rounded, int64 [K]."""
        return self.seen.order

    def importance(self) -> Tensor:
        """Return what an error of 1 in a column costs when the later ones make up for it, float64 [K]: 1 / U_ii^2.

        The carried rounding's whole (damped) loss is the sum of these times the squared errors, so they and not the
        diagonal of G are what its groups' ranges are best searched under.
        """
        importance = torch.empty_like(self.order, dtype=torch.float64)
        importance[self.order] = self.factor.diagonal() ** -2
        return importance

    def loss(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return E[|d x|^2] of every row d = values - weight, both float32 [N, K], undamped: float64 [N]."""
        difference = values[:, self.order].double()
        return quadratic(difference.sub_(weight[:, self.order]), self.seen.gram)
