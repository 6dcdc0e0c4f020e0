"""What the methods can be told, besides the grid of the weights: what `--set NAME=VALUE` changes and tiers name."""

from dataclasses import dataclass, field

from quant.pass_dtype import check_pass_dtype


@dataclass(frozen=True, slots=True)
class AwqSettings:
    """How finely AWQ searches.

    scale_points: values of r in (0, 1]. clip_points: shrink factors of a group's range, from 1 down to clip_floor.
    clip_damping: added to the diagonal of G there, in units of its mean: groups are searched one after another, and
    cancel less of each other's errors than G promises, on other text above all.
    search_samples: samples on which the outputs of blocks are compared, and of wide linears that are alone; moments
    always see all of them. In two layers of SmolLM2-135M, 2 of 512 tokens chose scales whose loss on 16 is within 0.3%
    of that of 8's choice.
    """

    scale_points: int = 20
    clip_points: int = 12
    clip_floor: float = 0.4
    clip_damping: float = 1.0
    search_samples: int = 2


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How long rounding is learned: not at all with no steps.

    size: of the first step, in codes. samples: windows that a step sees.
    """

    steps: int = 0
    size: float = 0.001
    samples: int = 2


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What GPTQ does besides rounding.

    damping: added to the diagonal of G, in units of its mean. On text unlike the calibration's, layer 3 of SmolLM2-135M
    loses a tenth less with 0.1 than with 0.01, on text like it 1% more; WikiText-2, calibrated on its validation text,
    rises by 0.070 with 0.1 and by 0.061 with 0.01.
    sequential: each linear on the inputs that the rounded ones before it give; else on the inputs that all have before
    any is rounded, which one pass shows.
    propagation: the share of the error of the inputs that the weights make up for, 0 if not sequential.
    scale: AWQ's scales first. search: how finely scales and ranges are searched. learn: rounding learned afterwards.
    pass_dtype: in which linears multiply when layers are run: "float32", "bfloat16", or "auto" until that is chosen.
    Raises ValueError for another.
    """

    damping: float = 0.1
    sequential: bool = True
    propagation: float = 0.5
    scale: bool = False
    search: AwqSettings = field(default_factory=AwqSettings)
    learn: LearningSettings = field(default_factory=LearningSettings)
    pass_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_pass_dtype(self.pass_dtype)

    @property
    def propagates(self) -> bool:
        """Whether weights make up for what their inputs lack of the unquantized model's."""
        return self.sequential and self.propagation > 0
