"""OpenAI's objects: completions, the chunks of a stream, errors."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offload.serving.answer import Answer
from offload.serving.request import Request, RequestError

DONE = "data: [DONE]\n\n"
"""What ends a stream."""


@dataclass(frozen=True, slots=True)
class Replies:
    """Makes the objects that answer one request to `model`."""

    request: Request
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """Return the object of an answer that is not streamed."""
        if self.request.kind == "chat":
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            said = {"text": text}
        return self._object(said, answer.finish_reason) | {"usage": self._usage(answer)}

    def first(self) -> list[dict[str, Any]]:
        """Return the chunks before any text: whose turn it is, in a chat."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.request.kind == "chat" else []

    def piece(self, text: str) -> dict[str, Any]:
        """Return the chunk of some text."""
        return self._chunk({"content": text} if self.request.kind == "chat" else text)

    def last(self, answer: Answer) -> list[dict[str, Any]]:
        """Return the chunks after all text: why it ends, and the count of tokens if that was asked for."""
        ends = [self._chunk({} if self.request.kind == "chat" else "", answer.finish_reason)]
        if self.request.usage:
            ends.append(self._chunk("") | {"choices": [], "usage": self._usage(answer)})
        return ends

    def _chunk(self, said: Any, finish_reason: str | None = None) -> dict[str, Any]:
        return self._object({"delta" if self.request.kind == "chat" else "text": said}, finish_reason, ".chunk")

    def _object(self, said: dict[str, Any], finish_reason: str | None, chunk: str = "") -> dict[str, Any]:
        chat = self.request.kind == "chat"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.number}",
            "object": f"chat.completion{chunk}" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}],
        }

    def _usage(self, answer: Answer) -> dict[str, Any]:
        prompt, new = len(self.request.tokens), answer.new_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return counts | {"prompt_tokens_details": {"cached_tokens": answer.reused_tokens}}


def error_object(error: RequestError) -> dict[str, Any]:
    """Return OpenAI's object of an error."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def event(values: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
