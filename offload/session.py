"""What generate and chat share: a tokenizer with its template, and the streamed model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from offload.checkpoint import is_checkpoint
from offload.errors import InputError
from offload.executor import executor_of, load, new_cache
from offload.finite import CheckedStreamer, FiniteLogits
from offload.kv.cache import CACHE_NAME
from offload.planning.costs import recall_costs
from offload.planning.wishes import Wishes, WishWords
from offload.sampling import Sampling
from offload.skeleton import read_config
from offload.streaming import Executor
from offload.text import load_tokenizer

PREFILL_CHUNK_TOKENS = 512
"""Of a prompt that are taken in one pass over the model."""

Message = Mapping[str, str]
"""role: "system", "user" or "assistant"; content: the text."""


class Prompts:
    """Turns text and conversations into tokens, as a checkpoint's tokenizer and chat template say.

    longest_tokens: what the model takes at most. Raises InputError if the directory holds no checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        if directory.is_dir() and not is_checkpoint(directory):
            raise InputError(
                f"{directory}: not a quantized checkpoint; `python -m quant.awq --model {directory}` makes one of it"
            )
        self.directory, self.tokenizer = directory, load_tokenizer(directory)
        self.longest_tokens: int = read_config(directory).get_text_config(decoder=True).max_position_embeddings

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer knows how a conversation is written."""
        return bool(self.tokenizer.chat_template)

    def plain(self, text: str) -> list[int]:
        """Return the tokens of a text that is to be continued as it is."""
        tokens: list[int] = self.tokenizer(text).input_ids
        return tokens

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation whose next turn is the model's.

        Without a template, the contents one after the other. Raises InputError if the template refuses the messages.
        """
        if not self.has_template:
            return self.plain("\n\n".join(message["content"] for message in messages))
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without the special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


class Session:
    """A checkpoint that is loaded and answers. Raises what `offload.load` raises.

    context_tokens: keys and values to leave room for, of each of `parallel` sequences that share passes; kept_tokens:
    of as many tokens more. exact: activations in float32. predicted_tokens_per_second: of all sequences together, None
    for a model that `offload.plan` has not rehearsed.
    """

    def __init__(
        self,
        prompts: Prompts,
        context_tokens: int,
        words: WishWords,
        exact: bool = False,
        parallel: int = 1,
        kept_tokens: int = 0,
    ) -> None:
        self.prompts = prompts
        context = min(context_tokens, prompts.longest_tokens) // 2
        costs = recall_costs(prompts.directory, context, Wishes.of(words), parallel)
        self.model: PreTrainedModel = load(
            prompts.directory,
            context_tokens=context_tokens,
            parallel=parallel,
            kept_tokens=kept_tokens,
            prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
            mode="exact" if exact else "fast",
            costs=costs,
            **words,
        )
        self.executor: Executor = executor_of(self.model)
        placement = self.executor.placement
        self.predicted_tokens_per_second = None if costs is None else parallel / placement.seconds(costs)

    def close(self) -> None:
        """Stop reading and close the files; nothing can be generated afterwards."""
        self.executor.close()

    def new_cache(self) -> Cache | None:
        """Return an empty cache that `generate` fills, None for a model that keeps its past in another way."""
        return new_cache(self.model)

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[int],
        new_tokens: int,
        sampling: Sampling,
        streamer: Any = None,
        cache: Cache | None = None,
        **more: Any,
    ) -> list[int]:
        """Return at most `new_tokens` tokens that follow `tokens`.

        cache: keys and values of the first of the tokens, extended in place. more: for transformers' `generate()`.
        Raises InputError where the model's logits are NaN or infinite.
        """
        if cache is not None:
            more[CACHE_NAME] = cache
        cached = 0 if cache is None else cache.get_seq_length()
        prompt = torch.tensor([list(tokens)], device=self.executor.device)
        finite = self._finite_logits()
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            streamer=None if streamer is None else CheckedStreamer(streamer, finite),
            prefill_chunk_size=PREFILL_CHUNK_TOKENS if len(tokens) - cached > PREFILL_CHUNK_TOKENS else None,
            **sampling.arguments(finite),
            **more,
        )
        found: list[int] = output[0, len(tokens) :].tolist()
        finite.check()
        return found

    def _finite_logits(self) -> FiniteLogits:
        names, side = [blob.module for blob in self.executor.blobs], self.executor.device_side
        layers = dict(zip(names, self.executor.layers, strict=True))
        return FiniteLogits(self.model, layers, None if side is None else side.device)
