"""An answer as it comes: a sequence of the rounds on one side, an asynchronous iterator of text on the other."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from offload.serving.prefixes import Prefixes
from offload.serving.request import Request
from offload.serving.rounds import Cancelled, Sequence
from offload.session import Prompts, Session

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextFeed(StoppingCriteria):  # type: ignore[misc]
    """A streamer, and what ends the stream: passes text on as it is certain, up to the first of the stop strings.

    send: is given each piece. text: all of it so far. Held back is what may become a stop string, or another character.
    """

    def __init__(self, prompts: Prompts, stops: tuple[str, ...], send: Callable[[str], None]) -> None:
        self._prompts, self._stops, self._send = prompts, stops, send
        self._prompt_seen = False
        self.tokens: list[int] = []
        self.text, self.stopped = "", False

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token after the other."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens += value.flatten().tolist()
        text = self._prompts.text(self.tokens)
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._pass_on(text[: min(ends)])
        else:
            self._pass_on(text[: len(text) - self._uncertain(text)])

    def end(self) -> None:
        """Pass on what was held back, unless a stop string ended the text."""
        if not self.stopped:
            self._pass_on(self._prompts.text(self.tokens))

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Return whether to stop, bool [1]; what `generate()` asks after each token."""
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    def _uncertain(self, text: str) -> int:
        """Return how many characters at the end may yet change, or be the beginning of a stop string."""
        begun = [
            length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length])
        ]  # fmt: skip
        return max([len(text) - len(text.rstrip(_UNFINISHED)), *begun])

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.text) and text.startswith(self.text):
            self._send(text[len(self.text) :])
            self.text = text


class Answer:
    """What the rounds are to run for a request. Made in the event loop that reads it.

    prefixes: where prompts begin, None to compute each anew. reused_tokens: of the prompt, what was found there.
    """

    def __init__(self, session: Session, request: Request, prefixes: Prefixes | None = None) -> None:
        self._session, self._request, self._prefixes = session, request, prefixes
        self.reused_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._error: BaseException | None = None
        self._feed = TextFeed(session.prompts, request.stops, self._put)
        self.sequence = Sequence(self._run, self._end)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it comes. Raises what ended the sequence before its time."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if isinstance(self._error, Cancelled):
            raise RuntimeError("the answer was cancelled")
        if self._error is not None:
            raise self._error

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated so far."""
        return len(self._feed.tokens)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the text ends, once it has: at a stop string or the model's own end, or for want of room."""
        ends = self._session.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ended = self._feed.stopped or self._feed.tokens[-1:] in [[token] for token in ends]
        return "stop" if ended else "length"

    def _run(self) -> None:
        cache, prompt = self._session.new_cache(), self._request.tokens
        if self._prefixes is not None and cache is not None:
            self.reused_tokens = self._prefixes.take(prompt, cache)
        self._session.generate(
            prompt,
            self._request.new_tokens,
            self._request.sampling,
            self._feed,
            cache,
            stopping_criteria=StoppingCriteriaList([self._feed]),
        )
        if self._prefixes is not None and cache is not None:
            self._prefixes.keep(prompt, cache)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._put(None)

    def _put(self, piece: str | None) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody reads
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
