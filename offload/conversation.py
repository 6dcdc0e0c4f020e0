"""A conversation with a loaded model: its turns, and the keys and values of what the model has read of it already.

Only what is new is computed: the tokens of the next prompt are compared with those in the cache, which is cut back to
what both have in common. So /undo, /retry and an interrupted answer cost no more than their own tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import Cache
from transformers.cache_utils import DynamicLayer

from offload.clock import Clock
from offload.errors import InputError, ResourceError
from offload.kv.cache import Int8Layer, keeps_nothing
from offload.sampling import Sampling
from offload.session import Session

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. reused_tokens: of the prompt's tokens, those that were in the cache."""

    text: str
    prompt_tokens: int
    reused_tokens: int
    interrupted: bool


class Conversation:
    """Turns so far, `messages`, the first of them the system's if there is one. context_tokens: room for all of it."""

    def __init__(self, session: Session, context_tokens: int, system: str | None = None) -> None:
        self._session = session
        self.context_tokens = min(context_tokens, session.prompts.longest_tokens)
        self.messages: list[dict[str, str]] = []
        self._cache: Cache | None = None
        self._cached: list[int] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message, None if there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Begin anew under this system message."""
        self.messages = [{"role": "system", "content": text}] if text else []

    def undo(self) -> str | None:
        """Forget the last question and its answer; return the question, None if there was none."""
        while self.messages and self.messages[-1]["role"] != "system":
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def ask(self, text: str, sampling: Sampling, new_tokens: int, clock: Clock) -> Reply:
        """Add a question and return its answer, also the part of one that an interrupt leaves.

        Nothing is added if the question was refused or the interrupt came before the first token. clock: counts the
        tokens and passes them on. Raises InputError if the conversation does not fit the context.
        """
        self.messages.append({"role": "user", "content": text})
        answered = False
        try:
            tokens = self._session.prompts.chat(self.messages)
            reply = self._answer(tokens, sampling, new_tokens, clock)
            answered = bool(clock.tokens)
        finally:
            if not answered:
                self.messages.pop()
        if answered:
            self.messages.append({"role": "assistant", "content": reply.text})
        return reply

    def _answer(self, tokens: list[int], sampling: Sampling, new_tokens: int, clock: Clock) -> Reply:
        room = self.context_tokens - len(tokens)
        if room < 1:
            raise InputError(
                f"the conversation has {len(tokens)} tokens, the context only {self.context_tokens}: /undo or /reset"
            )
        reused = self._keep_common(tokens)
        interrupted = False
        try:
            self._session.generate(tokens, min(new_tokens, room), sampling, clock, self._cache)
        except KeyboardInterrupt:
            interrupted = True
            clock.end()
        finally:
            self._cached = [*tokens, *clock.tokens]
            self._cut(_complete_tokens(self._cache, interrupted))
        return Reply(self._session.prompts.text(clock.tokens), len(tokens), reused, interrupted)

    def _keep_common(self, tokens: Sequence[int]) -> int:
        """Leave in the cache what it has in common with `tokens`, the last of them excepted; return how many."""
        pairs = zip(self._cached, tokens[:-1], strict=False)
        self._cut(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if self._cache is None:
            self._cache = self._session.new_cache()
        return len(self._cached)

    def _cut(self, length: int) -> None:
        """Cut the cache back to its first `length` tokens, or give it up where a layer cannot forget a part."""
        held = None if self._cache is None else _cut_back(self._cache, length)
        self._cache, self._cached = held, [] if held is None else self._cached[:length]

    def save(self, path: Path) -> None:
        """Write the turns as JSON. Raises ResourceError if that cannot be done."""
        try:
            path.write_text(json.dumps({"messages": self.messages}, indent=1, ensure_ascii=False))
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        """Go on from turns that `save` wrote. Raises InputError if the file holds none, and changes nothing then."""
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a conversation ({error})") from None
        self.messages = _checked(values, path)


def _checked(values: Any, path: Path) -> list[dict[str, str]]:
    messages = values.get("messages") if isinstance(values, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InputError(f'{path}: expected {{"messages": [{{"role": "user", "content": "..."}}, ...]}}')
    if messages and messages[-1]["role"] == "user":
        messages.pop()  # a question that was never answered
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        return False
    return isinstance(message.get("content"), str)


def _complete_tokens(cache: Cache | None, interrupted: bool) -> int:
    """Return how many tokens every layer has.

    An interrupted pass leaves the first layers with more than the last, and may leave one with a key but no value; what
    other kinds of layers it leaves half done cannot be told, so nothing of them is kept.
    """
    layers = [] if cache is None else [layer for layer in cache.layers if not keeps_nothing(layer)]
    if interrupted and not all(_is_whole(layer) for layer in layers):
        return 0
    return min((int(layer.get_seq_length()) for layer in layers), default=0)


def _is_whole(layer: Any) -> bool:
    if isinstance(layer, Int8Layer):  # counts a token once its key and its value are written
        return True
    whole = type(layer) is DynamicLayer and layer.is_initialized
    return bool(whole and layer.keys.shape[:-1] == layer.values.shape[:-1])


def _cut_back(cache: Cache, length: int) -> Cache | None:
    """Return the cache with `length` tokens in every layer, None if that cannot be had or nothing is left."""
    if length == 0:
        return None
    for layer in cache.layers:
        surplus = 0 if keeps_nothing(layer) else int(layer.get_seq_length()) - length
        if surplus < 0 or (surplus and not layer.is_croppable):
            return None
        try:
            layer.crop(-surplus) if surplus else None
        except RuntimeError:  # of a sliding window, which has dropped what would be the last tokens now
            return None
    return cache
