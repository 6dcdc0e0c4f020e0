"""A body of OpenAI's chat and text completions, checked: nothing that would change the answer is ignored."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from offload.errors import InputError
from offload.sampling import Sampling
from offload.session import Prompts

Kind = Literal["chat", "text"]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MOST_STOPS = 4
_STOP_CHARACTERS = 256
_SEEDS = (-(2**63), 2**63 - 1)
_COMMON = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "user"}
_KNOWN: Mapping[Kind, set[str]] = {
    "chat": _COMMON | {"messages", "max_completion_tokens"},
    "text": _COMMON | {"prompt"},
}
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
}
"""Parameters of OpenAI that cannot be had here, and the values at which they ask for nothing."""


class RequestError(Exception):
    """A request that is answered with an error object. param: the field at fault; code: OpenAI's word for it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request may have at most: tokens of prompt and answer together, tokens of an answer, bytes of a body.

    body_seconds: until all of a body is there.
    """

    context_tokens: int
    new_tokens: int
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be answered. usage: whether a stream ends with the count of tokens."""

    kind: Kind
    tokens: tuple[int, ...]
    new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def check(body: Any, kind: Kind, model: str, prompts: Prompts, bounds: Bounds) -> Request:
    """Return what a decoded JSON body asks of the model that is served as `model`. Raises RequestError."""
    if not isinstance(body, dict):
        raise RequestError("expected a JSON object")
    values = {name: value for name, value in body.items() if value is not None}
    _check_names(values, kind)
    if values.get("model") != model:
        message = f"the model {values.get('model')!r} does not exist; this server has {model!r}"
        raise RequestError(message, "model", "model_not_found", 404)
    tokens = _chat(values, prompts) if kind == "chat" else _text(values, prompts)
    stream, options = _boolean(values, "stream"), values.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage"}:
        raise RequestError('stream_options: expected {"include_usage": true or false}', "stream_options")
    return Request(
        kind=kind,
        tokens=tokens,
        new_tokens=_new_tokens(values, len(tokens), bounds),
        sampling=Sampling(
            temperature=_number(values, "temperature", (0, 2), 1.0),
            top_p=_number(values, "top_p", (1e-6, 1), 1.0),
            top_k=_whole(values, "top_k", (0, 2**31), 0),
            seed=_whole(values, "seed", _SEEDS, secrets.randbits(63)),
        ),
        stops=_stops(values),
        stream=stream,
        usage=stream and _boolean(options, "include_usage"),
    )


def _check_names(values: Mapping[str, Any], kind: Kind) -> None:
    for name, value in values.items():
        if name in _KNOWN[kind]:
            continue
        if name not in _WITHOUT_EFFECT:
            raise RequestError(f"unrecognized request argument supplied: {name[:80]!r}", name[:80])
        if not any(type(value) is type(allowed) and value == allowed for allowed in _WITHOUT_EFFECT[name]) and not (
            isinstance(value, float) and value in _WITHOUT_EFFECT[name]
        ):
            raise RequestError(f"{name}: not supported by this server", name, "unsupported_parameter")


def _chat(values: Mapping[str, Any], prompts: Prompts) -> tuple[int, ...]:
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list of at least one message", "messages")
    found = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    try:
        return tuple(prompts.chat(found))
    except InputError as error:
        raise RequestError(str(error), "messages") from None


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{where}: expected an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{where}.role: expected one of {', '.join(_ROLES)}", f"{where}.role")
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    return {"role": _ROLES[role], "content": _string(content, f"{where}.content")}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text(values: Mapping[str, Any], prompts: Prompts) -> tuple[int, ...]:
    prompt = values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not isinstance(prompt, list):
        return tuple(prompts.plain(_string(prompt, "prompt")))
    vocabulary = len(prompts.tokenizer)
    if not all(type(token) is int and 0 <= token < vocabulary for token in prompt):
        raise RequestError(f"prompt: expected one text, or tokens from 0 to {vocabulary - 1}", "prompt")
    return tuple(prompt)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: expected text", where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where}: half of a surrogate pair is no text", where) from None
    return value


def _new_tokens(values: Mapping[str, Any], prompt_tokens: int, bounds: Bounds) -> int:
    if prompt_tokens == 0:
        raise RequestError("the prompt is empty", "prompt")
    room = bounds.context_tokens - prompt_tokens
    if room < 1:
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens, the context only {bounds.context_tokens}",
            code="context_length_exceeded",
        )
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in values]
    if not names:
        return min(bounds.new_tokens, room)
    if len(names) > 1:
        raise RequestError("max_tokens and max_completion_tokens: give one of them", names[0])
    asked = _whole(values, names[0], (1, bounds.new_tokens), 1)
    if asked > room:
        raise RequestError(
            f"{names[0]} {asked}: with the prompt's {prompt_tokens} tokens more than the context's "
            f"{bounds.context_tokens}",
            names[0],
            "context_length_exceeded",
        )
    return asked


def _stops(values: Mapping[str, Any]) -> tuple[str, ...]:
    stop = values.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise RequestError(f"stop: expected a text or a list of at most {_MOST_STOPS}", "stop")
    if not all(isinstance(text, str) and 0 < len(text) <= _STOP_CHARACTERS for text in stops):
        raise RequestError(f"stop: expected texts of 1 to {_STOP_CHARACTERS} characters", "stop")
    return tuple(stops)


def _boolean(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name}: expected true or false", name)
    return value


def _number(values: Mapping[str, Any], name: str, bounds: tuple[float, float], default: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not bounds[0] <= value <= bounds[1]:
        raise RequestError(f"{name}: expected a number between {bounds[0]:g} and {bounds[1]:g}", name)
    return float(value)


def _whole(values: Mapping[str, Any], name: str, bounds: tuple[int, int], default: int) -> int:
    value = values.get(name, default)
    if type(value) is not int or not bounds[0] <= value <= bounds[1]:
        raise RequestError(f"{name}: expected a whole number between {bounds[0]} and {bounds[1]}", name)
    return value
