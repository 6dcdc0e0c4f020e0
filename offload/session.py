"""What generate, chat and serve share: a tokenizer with its template, the streamed model, and a clock of its tokens."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from offload.checkpoint import is_checkpoint
from offload.errors import InputError
from offload.executor import Executor, executor_of, load
from offload.planning.costs import recall_costs
from offload.planning.wishes import WishWords
from offload.sampling import Sampling
from offload.skeleton import read_config
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


class Clock:
    """A streamer that notes when each new token came, and hands it on.

    streamer: of transformers, or None. on_token: called after each of them.
    """

    def __init__(self, streamer: Any = None, on_token: Callable[["Clock"], None] | None = None) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._streamer, self._on_token = streamer, on_token
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token after the other."""
        new = self._prompt_seen
        self._prompt_seen = True
        if new:
            self.times.append(time.perf_counter())
            self.tokens += value.tolist()
        if self._streamer is not None:
            self._streamer.put(value)
        if new and self._on_token is not None:
            self._on_token(self)

    def end(self) -> None:
        """Flush what is left."""
        if self._streamer is not None:
            self._streamer.end()

    @property
    def prompt_seconds(self) -> float:
        """What the first token took, 0 if there was none."""
        return self.times[0] - self.started if self.times else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: of what came after the first token."""
        seconds = self.times[-1] - self.times[0] if self.times else 0.0
        return (len(self.times) - 1) / seconds if seconds else 0.0


class Session:
    """A checkpoint that is loaded and answers. Raises what `offload.load` raises.

    context_tokens: keys and values to leave room for, of all sequences together. exact: activations in float32.
    """

    def __init__(self, prompts: Prompts, context_tokens: int, words: WishWords, exact: bool = False) -> None:
        self.prompts = prompts
        costs = recall_costs(prompts.directory, min(context_tokens, prompts.longest_tokens) // 2)
        self.model: PreTrainedModel = load(
            prompts.directory,
            context_tokens=context_tokens,
            prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
            mode="exact" if exact else "fast",
            costs=costs,
            **words,
        )
        self.executor: Executor = executor_of(self.model)
        placement = self.executor.placement
        self.predicted_tokens_per_second = None if costs is None else 1 / placement.seconds(costs)

    def new_cache(self) -> Cache | None:
        """Return an empty cache that `generate` fills, None for a model that keeps its past in another way."""
        if not self.model._supports_default_dynamic_cache() or "mamba" in type(self.model).__name__.lower():
            return None
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

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
        """
        if cache is not None:
            more["past_key_values"] = cache
        cached = 0 if cache is None else cache.get_seq_length()
        output = self.model.generate(
            torch.tensor([list(tokens)]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
            max_new_tokens=new_tokens,
            streamer=streamer,
            prefill_chunk_size=PREFILL_CHUNK_TOKENS if len(tokens) - cached > PREFILL_CHUNK_TOKENS else None,
            **sampling.arguments(),
            **more,
        )
        found: list[int] = output[0, len(tokens) :].tolist()
        return found
