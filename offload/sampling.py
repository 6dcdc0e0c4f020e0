"""How the next token is chosen: the likeliest, or one drawn, by a generator that belongs to the request alone.

`generate()` draws from torch's global generator, which requests that run at once would share. Adding Gumbel noise to
the logarithms of the probabilities and taking the largest draws from the same distribution (Maddison et al., A*
Sampling, 2014), and the noise comes from its own generator: the same seed gives the same text, alone or in company.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature: 0 takes the likeliest token. top_p: of the likeliest tokens of this total probability, 1 for all.

    top_k: of so many likeliest tokens, 0 for all. seed: of what is drawn. Raises UsageError for what is none of these.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature {self.temperature}: expected a number between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: expected a number above 0, at most 1")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k}: expected 0 for all tokens, or how many")

    def arguments(self, *before: Any) -> dict[str, Any]:
        """Return what `generate()` is to be told: always greedy, after the noise where a token is to be drawn.

        before: logits processors that come before its own.
        """
        steps = list(before)
        if self.temperature > 0:
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                steps.append(TopPLogitsWarper(self.top_p))
            steps.append(_GumbelNoise(self.seed))
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**greedy, "logits_processor": LogitsProcessorList(steps)}


class _GumbelNoise:
    """Adds noise to the logarithms of probabilities [B, vocabulary], so that the largest is drawn by probability."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape, generator=self._generator).clamp_(min=torch.finfo(torch.float32).tiny)
        return scores - (-uniform.log()).log().to(scores.device)
