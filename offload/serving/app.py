"""The routes, each behind the key."""

import asyncio
import hmac
import json
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from offload.serving.answer import Answer
from offload.serving.metrics import Metrics
from offload.serving.prefixes import Prefixes
from offload.serving.reply import DONE, Replies, error_object, event
from offload.serving.request import Bounds, Kind, RequestError, check
from offload.serving.rounds import Rounds
from offload.session import Session

_log = logging.getLogger(__name__)

_CLIENT_CLOSED = 499  # nginx's; nobody receives it, but it is counted


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes serve. name: of the model; most: requests that may be there at once, running or waiting."""

    session: Session
    rounds: Rounds
    metrics: Metrics
    bounds: Bounds
    name: str
    most: int
    prefixes: Prefixes | None = None

    def application(self, key: str) -> ASGIApp:
        """Return the routes, as an application that demands `key` on each of them."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._text, methods=["POST"]),
        ]
        return _Keyed(Starlette(routes=routes, exception_handlers={HTTPException: _refused}), key)

    async def _health(self, http: HttpRequest) -> Response:
        status, code = ("ok", 200) if self.rounds.alive else ("failed", 503)
        state = {"status": status, "running": self.rounds.running, "waiting": self.rounds.waiting}
        return JSONResponse(state, code)

    async def _metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, http: HttpRequest) -> Response:
        if http.path_params["name"] != self.name:
            return _error(RequestError("no such model here", "model", "model_not_found", 404))
        return JSONResponse(self._described())

    def _described(self) -> dict[str, object]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._complete(http, "chat")

    async def _text(self, http: HttpRequest) -> Response:
        return await self._complete(http, "text")

    async def _complete(self, http: HttpRequest, kind: Kind) -> Response:
        response: Response
        try:
            response = await self._answered(http, kind)
        except RequestError as error:
            response = _error(error)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_CLOSED)
        except Exception as error:  # the client learns that it was, the log what it was
            response = _error(_internal(error))
        self.metrics.requests.labels(http.url.path, response.status_code).inc()
        return response

    async def _answered(self, http: HttpRequest, kind: Kind) -> Response:
        body = await _json(http, self.bounds)
        request = check(body, kind, self.name, self.session.prompts, self.bounds)
        if self.rounds.running + self.rounds.waiting >= self.most:
            raise RequestError("too many requests are waiting; try again later", code="queue_full", status=429)
        self.metrics.prompt_tokens.inc(len(request.tokens))
        answer, replies = Answer(self.session, request, self.prefixes), Replies(request, self.name)
        if request.stream:
            return StreamingResponse(self._events(answer, replies), media_type="text/event-stream")
        self.rounds.add(answer.sequence)
        reading = asyncio.ensure_future(self._read(answer))
        leaving = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ClientDisconnect
            return JSONResponse(replies.whole(await reading, answer))
        finally:
            for task in (reading, leaving):
                task.cancel()
            self._end(answer)

    async def _read(self, answer: Answer) -> str:
        return "".join([piece async for piece in answer.pieces()])

    async def _events(self, answer: Answer, replies: Replies) -> AsyncIterator[str]:
        self.rounds.add(answer.sequence)  # not before: whoever leaves before the first event is never heard of again
        try:
            for chunk in replies.first():
                yield event(chunk)
            async for piece in answer.pieces():
                yield event(replies.piece(piece))
            for chunk in replies.last(answer):
                yield event(chunk)
            yield DONE
        except Exception as error:
            yield event(error_object(_internal(error)))
        finally:
            self._end(answer)

    def _end(self, answer: Answer) -> None:
        self.rounds.cancel(answer.sequence)
        self.metrics.new_tokens.inc(answer.new_tokens)
        self.metrics.reused_tokens.inc(answer.reused_tokens)


class _Keyed:
    """Answers 401 to whoever does not bring the key, whatever is asked."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        brought = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(brought, self._expected):
            await self._app(scope, receive, send)
            return
        message = "no API key, or a wrong one: send `Authorization: Bearer KEY`"
        await _error(RequestError(message, code="invalid_api_key", status=401))(scope, receive, send)


async def _json(http: HttpRequest, bounds: Bounds) -> object:
    body = bytearray()
    try:
        async with asyncio.timeout(bounds.body_seconds):
            async for chunk in http.stream():
                body += chunk
                if len(body) > bounds.body_bytes:
                    raise RequestError(f"a body of more than {bounds.body_bytes} bytes", status=413)
    except TimeoutError:
        raise RequestError(f"the body was not there after {bounds.body_seconds:g} seconds", status=408) from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON") from None


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _internal(error: BaseException) -> RequestError:
    number = secrets.token_hex(4)
    _log.error("error %s", number, exc_info=error)
    return RequestError(f"the server failed; its log says why under {number}", status=500)


def _error(error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    return JSONResponse(error_object(error), error.status, headers)


def _refused(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "this handler is for nothing else"
    message = f"{http.method} {http.url.path}: {error.detail}"
    response = _error(RequestError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response
