"""The negative log-likelihood of a text, window by window: what perplexity and divergence are made of."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from offload.command import Progress
from offload.errors import InputError
from offload.kv.cache import CACHE_NAME, KVCache
from offload.planning.wishes import KVFormat

_HEAD_CHUNK_TOKENS = 256
_PREFILLED_TOKENS = 512
_STEP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a text is cut: windows of so many tokens, one every `stride`, the first `limit` of them, None for all.

    kv: "int8" to read each window through an int8 cache, 512 tokens at once and then 16 at a time; None: in one pass.
    """

    window: int
    stride: int
    limit: int | None = None
    kv: KVFormat | None = None


class Divergence:
    """How far a model's predictions lie from those of the original, summed over tokens as they are scored."""

    def __init__(self, original: PreTrainedModel) -> None:
        self.original = original
        self._kl, self._equal, self._tokens = 0.0, 0, 0

    def add(self, logits: Tensor, expected: Tensor) -> None:
        """Count tokens by the logits, float32 [tokens, V], of the model and of the original."""
        self._kl += float(F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True))
        self._equal += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        self._tokens += len(logits)

    @property
    def kl(self) -> float:
        """Mean KL(original || model) of a token, in nats."""
        return self._kl / self._tokens

    @property
    def top1(self) -> float:
        """Share of the tokens at which both find the same token likeliest."""
        return self._equal / self._tokens


@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokens: Tensor, protocol: Protocol, label: str, beside: Divergence | None = None
) -> tuple[list[float], list[int]]:
    """Return the mean negative log-likelihood, in nats, and the scored tokens of each window of tokens [T].

    beside: counts the same tokens, if given; its original is then run on each window too, without `protocol.kv`. Raises
    InputError if the text has not one window.
    """
    window, stride = protocol.window, protocol.stride
    starts = list(range(0, len(tokens) - window + 1, stride))[: protocol.limit]
    if not starts:
        raise InputError(
            f"the text has {len(tokens)} tokens, not one window of {window}; use --window {len(tokens)} or less"
        )
    probe = tokens[: min(window, 16)]
    predictors = [_predictor(model, probe, protocol.kv)]
    predictors += [] if beside is None else [_predictor(beside.original, probe, None)]
    means, counts = [], []
    progress = Progress(label, len(starts))
    for start in starts:
        window_T = tokens[start : start + window]
        scored = window - 1 if start == 0 else min(stride, window - 1)
        total = 0.0
        targets = window_T[-scored:].split(_HEAD_CHUNK_TOKENS)
        predictions = zip(*(predict(window_T, scored) for predict in predictors), strict=True)
        for wanted, (logits, *expected) in zip(targets, predictions, strict=True):
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
            if beside is not None:
                beside.add(logits, *expected)
        means.append(total / scored)
        counts.append(scored)
        progress.advance(f"nll {sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts):.4f}")
    return means, counts


def _predictor(model: PreTrainedModel, probe: Tensor, kv: KVFormat | None) -> Callable[[Tensor, int], Iterator[Tensor]]:
    """Return a function that yields what predicts the last tokens of a window, float32 logits [at most 256, V] at once.

    Logits of all positions exist only if they are more than the output embedding of the last hidden state, capped say.
    """
    body, head = model.base_model, model.get_output_embeddings()
    head_is_all = torch.equal(
        head(body(probe[None], use_cache=False).last_hidden_state), model(probe[None], use_cache=False).logits
    )

    def read(window_T: Tensor) -> Tensor:
        found, cache = [], None if kv is None else KVCache.of(model)
        steps = range(_PREFILLED_TOKENS, len(window_T), _STEP_TOKENS) if cache is not None else ()
        for start, stop in pairwise((0, *steps, len(window_T))):
            part = window_T[None, start:stop]
            out = (body if head_is_all else model)(part, use_cache=cache is not None, **{CACHE_NAME: cache})
            found.append(out.last_hidden_state[0] if head_is_all else out.logits[0])
        return torch.cat(found)

    def predict(window_T: Tensor, scored: int) -> Iterator[Tensor]:
        predicting = read(window_T)[len(window_T) - 1 - scored : -1]
        for part in predicting.split(_HEAD_CHUNK_TOKENS):
            yield (head(part) if head_is_all else part).float()

    return predict


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean; NaN of a single value, which says nothing about its own spread."""
    if len(values) < 2:
        return math.nan
    return float(torch.tensor(values, dtype=torch.float64).std() / math.sqrt(len(values)))
