"""GPTQ: each column's rounding error is carried into the columns still to be rounded. `python -m quant.gptq --bits 4`

Rounding (arXiv:2210.17323, section 3): with G = E[x x^T] of a linear's inputs and U the upper Cholesky factor of
(G + damping)^-1, the columns of W are rounded one after another, and what column i lost goes into the later ones,

    w_j -= (w_i - q_i) U_ij / U_ii      for j > i

which is the best that the later columns can do about it, and leaves a loss of (w_i - q_i)^2 / U_ii^2. Columns with loud
inputs go first, their groups' scales and zero points are fixed beforehand, for the least sum of those losses, and the
file has them in their own places: the order costs nothing at inference.

Three things around it. Linears are quantized in the order in which a layer runs them, each on the inputs that the
rounded ones before it give. What those inputs lack is put into the weights (QEP, arXiv:2504.09629, eq. 7): with x of
the unquantized model beside x' of the quantized one, and 0 < share <= 1,

    W* = W + share W E[(x - x') x'^T] (E[x' x'^T] + damping)^-1.

And AWQ's scales can go into the layer first.
"""

import copy
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offload.command import say
from quant.awq import Awq, AwqSettings, scale_layer, search_clip_by_column
from quant.cost import FLOAT_BYTES, Cost, Shape, Windows
from quant.groupwise import Grid, Parameters, fake_quantize, kept_range, minmax
from quant.layer import LayerInputs, UnreachedError, inputs_of, moments
from quant.scale_groups import sets_by_input

_BLOCK_COLUMNS = 64
_DAMPING_STEP = 10.0


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What GPTQ does besides rounding.

    damping: added to the diagonal of G, in units of its mean. On text unlike the calibration's, layer 3 of SmolLM2-135M
    loses a tenth less with 0.1 than with 0.01, on text like it 1% more; WikiText-2, calibrated on its validation text,
    rises by 0.070 with 0.1 and by 0.061 with 0.01.
    sequential: each linear on the inputs that the rounded ones before it give; else on the inputs that all have before
    any is rounded, which one pass shows.
    propagation: the share of the error of the inputs that the weights make up for, 0 if not sequential.
    scale: AWQ's scales first. search: how finely scales and ranges are searched.
    """

    damping: float = 0.1
    sequential: bool = True
    propagation: float = 0.5
    scale: bool = False
    search: AwqSettings = field(default_factory=AwqSettings)


class Gptq:
    """The method, as the walk over the layers calls it."""

    name = "gptq"
    needs_inputs = True

    def __init__(self, settings: GptqSettings) -> None:
        self.settings = settings
        self.needs_original = settings.sequential and settings.propagation > 0

    def settings_json(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        return asdict(self.settings)

    def cost(self, shapes: list[Shape], grid: Grid, windows: Windows | None) -> Cost:
        """Return what a layer whose linears have these shapes will take.

        Memory, in float64: while a linear's Hessian is made, six matrices [K, K]; while it is rounded, three and some
        weights [N, K]; a search over candidates. What one pass shows of all linears is held meanwhile; AWQ's scales
        come before.
        """
        assert windows is not None, "it needs inputs"
        search, scaling = self.settings.search, Awq(self.settings.search).cost(shapes, grid, windows)
        candidates = search.clip_points * (2 if grid.symmetric else 1)
        held = 0 if self.settings.sequential else FLOAT_BYTES * sum(k * k for _, k in shapes)
        largest = held + max(
            8 * max(6 * k * k + n * k, 3 * k * k + 9 * n * k) + 4 * FLOAT_BYTES * candidates * n * grid.group(k)
            for n, k in shapes
        )
        weights, tokens = sum(n * k for n, k in shapes), windows.samples * windows.tokens
        passes = 2.0 * weights * tokens * (6 if self.needs_original else 3)
        rounding = sum(6.0 * n * k * k + 4.0 * k**3 for n, k in shapes)
        operations = passes + rounding + (scaling.operations if self.settings.scale else 0)
        return Cost(max(scaling.memory_bytes if self.settings.scale else 0, largest), operations)

    def quantize_layer(
        self, layer: nn.Module, inputs: LayerInputs, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        """Leave representable weights in the named linears of `layer` (float32) and return their parameters.

        Rounding those weights to nearest gives the codes chosen here. Raises ArithmeticError for inputs not finite.
        """
        settings = self.settings
        report: dict[str, Any] = {"ranges": {}}
        if settings.scale:
            _, report["scales"] = scale_layer(layer, inputs, grids, head_dim, settings.search)
        original = copy.deepcopy(layer) if self.needs_original else None
        found: dict[str, Parameters] = {}
        seen = {} if settings.sequential else moments(layer, inputs, grids)
        for members in sets_by_input(layer, inputs, list(grids)):
            first = members[0]
            try:
                gram, cross = (seen[first].gram.double(), None) if seen else observe(layer, original, inputs, first)
            except UnreachedError:  # rounding what comes before has sent an expert's few tokens elsewhere
                say(f"{', '.join(members)}: rounding what comes before left no token here; rounded to nearest")
                report.setdefault("lost_tokens", []).extend(members)
                weights = {name: layer.get_parameter(f"{name}.weight").data for name in members}
                found |= {name: minmax(weight, grids[name]) for name, weight in weights.items()}
                continue
            if not torch.isfinite(gram).all():
                raise ArithmeticError(f"{first}: its inputs are not finite")
            hessian = Hessian.of(gram, settings.damping)
            if hessian.damping > settings.damping:
                report.setdefault("raised_damping", {})[", ".join(members)] = hessian.damping
            for name in members:
                parameter = layer.get_parameter(f"{name}.weight")
                weight = parameter.data
                if cross is not None:
                    weight = propagate(weight, hessian, cross, settings.propagation)
                found[name], parameter.data = round_weight(weight, hessian, grids[name], settings.search)
                report["ranges"][name] = kept_range(weight, found[name], grids[name])
        return found, report


def observe(
    layer: nn.Module, original: nn.Module | None, inputs: LayerInputs, name: str
) -> tuple[Tensor, Tensor | None]:
    """Return E[x x^T] and E[x0 x^T], float64 [K, K], of the inputs x of a linear and x0 of the same in `original`.

    The second is None without `original`, and where the two do not see the same tokens, as behind a router. Raises
    UnreachedError if no sample calls the linear.
    """
    width = layer.get_parameter(f"{name}.weight").shape[1]
    gram, cross = torch.zeros(2, width, width, dtype=torch.float64)
    tokens, paired = 0, original is not None
    others = inputs_of(layer if original is None else original, inputs.original(), name)
    for x_TK in inputs_of(layer, inputs, name):
        tokens += len(x_TK)
        gram += x_TK.T @ x_TK
        x0_TK = next(others) if paired else x_TK
        paired = paired and len(x0_TK) == len(x_TK)
        if paired:
            cross += x0_TK.T @ x_TK
    if not tokens:
        raise UnreachedError(f"{name}: not called by any calibration sample")
    return gram.div_(tokens), cross.div_(tokens) if paired else None


@dataclass(frozen=True, slots=True)
class Hessian:
    """The loss of a linear's weights around W, and the order in which its columns are rounded.

    gram: G, float64 [K, K]. order: int64 [K], columns by falling diagonal. factor: U, float64 [K, K], upper, with
    U^T U = (G + damping mean(diag G))^-1 for columns in that order. damping: what it took to have one.
    """

    gram: Tensor
    order: Tensor
    factor: Tensor
    damping: float

    @staticmethod
    def of(gram: Tensor, damping: float) -> "Hessian":
        """Factorise a finite gram; the damping is raised until that succeeds.

        A dead channel has nothing but the damping: its column is rounded to nearest and moves no other. The same holds
        for all of them if no input is ever other than zero.
        """
        order = gram.diagonal().argsort(descending=True, stable=True)
        unit = float(gram.diagonal().mean()) or 1.0
        # With the columns reversed, L L^T = reverse(H) gives H = R R^T, R upper: U = R^-1, in one factorisation.
        backwards = order.flip(0)
        while True:
            damped = gram[backwards[:, None], backwards]
            damped.diagonal().add_(damping * unit)
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped  # of matrices this large, no more are kept than are needed
            if not failed:
                break
            damping = max(damping, 1e-6) * _DAMPING_STEP
        upper = lower.flip(0, 1)
        del lower
        factor = torch.linalg.solve_triangular(upper, torch.eye(len(gram), dtype=torch.float64), upper=True)
        return Hessian(gram, order, factor, damping)

    def importance(self) -> Tensor:
        """Return what an error of 1 in a column costs when the later ones make up for it, float64 [K]: 1 / U_ii^2.

        The carried rounding's whole (damped) loss is the sum of these times the squared errors, so they and not the
        diagonal of G are what its groups' ranges are best searched under.
        """
        importance = torch.empty_like(self.factor[0])
        importance[self.order] = self.factor.diagonal() ** -2
        return importance

    def loss(self, difference: Tensor) -> Tensor:
        """Return E[|d x|^2] of every row d of a float64 difference [N, K], undamped: [N]."""
        return ((difference @ self.gram) * difference).sum(1)

    def solve(self, rows: Tensor) -> Tensor:
        """Return rows (G + damping)^-1, float64 [N, K]."""
        solved = torch.empty_like(rows)
        solved[:, self.order] = rows[:, self.order] @ self.factor.T @ self.factor
        return solved


def propagate(weight: Tensor, hessian: Hessian, cross: Tensor, share: float) -> Tensor:
    """Return W*, float32 [N, K]: what the inputs lost on their way here, as far as it can be told from what is left."""
    pull = weight.double() @ (cross - hessian.gram)
    return (weight.double() + share * hessian.solve(pull)).float()


def round_weight(weight: Tensor, hessian: Hessian, grid: Grid, search: AwqSettings) -> tuple[Parameters, Tensor]:
    """Return parameters and the weight rounded to their grid, both float32, for a float32 weight [N, K].

    A row that carrying makes worse than rounding to nearest under the same parameters is so rounded.
    """
    parameters = search_clip_by_column(weight, hessian.importance().float(), grid, search)
    nearest = fake_quantize(weight, parameters, grid).double()
    carried = round_columns(weight.double(), hessian, parameters, grid)
    worse = hessian.loss(carried - weight) >= hessian.loss(nearest - weight)
    return parameters, torch.where(worse[:, None], nearest, carried).float()


def round_columns(weight: Tensor, hessian: Hessian, parameters: Parameters, grid: Grid) -> Tensor:
    """Return the values that GPTQ chooses for a weight, float64 [N, K]; each is representable in float32.

    Within a block of columns errors are carried at once, into the columns after it by one product a block.
    """
    w_KN = weight.T[hessian.order].contiguous()
    group = hessian.order // grid.group(weight.shape[1])
    scale_KN = parameters.scale.double().T[group].contiguous()
    zero_KN = parameters.zero.double().T[group].contiguous()
    for start in range(0, len(w_KN), _BLOCK_COLUMNS):
        end = min(start + _BLOCK_COLUMNS, len(w_KN))
        factor = hessian.factor[start:end]
        errors = torch.empty_like(w_KN[start:end])
        for i, w_N in enumerate(w_KN[start:end]):
            scale_N, zero_N = scale_KN[start + i], zero_KN[start + i]
            codes_N = (w_N / scale_N + zero_N).round_().clamp_(0, grid.code_max)
            value_N = (codes_N - zero_N) * scale_N
            torch.div(w_N - value_N, factor[i, start + i], out=errors[i])
            w_KN[start + i : end].addr_(factor[i, start + i : end], errors[i], alpha=-1)
            w_N.copy_(value_N)
        w_KN[end:].addmm_(factor[:, end:].T, errors, alpha=-1)
    values = torch.empty_like(w_KN)
    values[hessian.order] = w_KN
    return values.T.contiguous()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    from quant.pipeline import run_method

    tiers = {"best": GptqSettings(), "fast": GptqSettings(sequential=False, propagation=0.0)}
    return run_method("gptq", Gptq, argv, tiers)


if __name__ == "__main__":
    sys.exit(main())
