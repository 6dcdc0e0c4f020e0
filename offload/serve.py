"""Serve a checkpoint inside a memory budget, over OpenAI's API. `python -m offload.serve`

transformers has a serving application, but not one that fits here: it runs `generate()` for one request at a time, or
batches through paged attention, whose kernels and caches know nothing of layers that come and go, and its routes load
and unload models for whoever asks. What is needed of HTTP is small: starlette has the routes, uvicorn the connections.
"""

import argparse
import logging
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offload.command import Parser, run, say
from offload.errors import ResourceError, UsageError
from offload.planning.wishes import Wishes, WishWords, add_wish_flags, words_of
from offload.source import DEFAULT_OUTPUT, check_made

if TYPE_CHECKING:
    from offload.serving.prefixes import Prefixes
    from offload.session import Session

_KEY_VARIABLE = "OFFLOAD_API_KEY"
_COUNTS = {"context": 2, "max_new_tokens": 1, "parallel": 1, "queue": 1, "grace": 0, "prefix_tokens": 0}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    for word, least in _COUNTS.items():
        if getattr(options, word) < least:
            raise UsageError(f"--{word.replace('_', '-')} {getattr(options, word)}: expected at least {least}")
    words = words_of(options)
    if Wishes.of(words).kv_bytes is not None:
        raise UsageError(
            "keys and values beyond memory: the budget is one request's, and a server has many; use --kv int8 alone"
        )
    key = _key(options)
    check_made(options.model)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ResourceError(f"{error.name} is not installed; `pip install 'int4-offload[serve]'`") from None
    with _listen(options.host, options.port) as listener:
        serve(options, words, key, listener)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("offload.serve", "Serve a quantized checkpoint over OpenAI's API, inside a memory budget.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    add("--name", help="what clients call the model; default: the directory's name")
    add("--host", default="127.0.0.1", help="address to listen at")
    add("--port", type=int, default=8000, help="to listen at, 0 for a free one")
    add("--api-key", metavar="KEY", help=f"what clients send; default: {_KEY_VARIABLE}, else one is made and printed")
    add("--context", type=int, default=2048, help="tokens of a prompt and its answer at most")
    add("--max-new-tokens", type=int, default=1024, help="tokens of an answer at most")
    add("--parallel", type=int, default=16, help="requests that share the passes; memory is planned for all of them")
    add("--queue", type=int, default=64, help="requests that may wait for those; more are answered 429")
    add("--prefix-tokens", type=int, default=2048, help="of prompts, kept for those that begin alike; 0 keeps none")
    add("--grace", type=int, default=30, metavar="SECONDS", help="for running requests, once told to end")
    add("--exact", action="store_true", help="float32 activations instead of int8: slower, for proofs")
    add_wish_flags(parser)
    return parser


def _key(options: argparse.Namespace) -> str:
    key: str | None = options.api_key if options.api_key is not None else os.environ.get(_KEY_VARIABLE)
    if key is None:
        key = secrets.token_urlsafe(24)
        say(f"key      {key}")
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise UsageError("the API key: expected printable ASCII characters, at least one, no spaces around them")
    return key


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: expected a number between 0 and 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ResourceError(f"--host {host} --port {port}: cannot be listened at ({error.strerror})") from None


def serve(options: argparse.Namespace, words: WishWords, key: str, listener: socket.socket) -> None:
    """Load, print the plan, and answer until a signal; then let what runs end, for `options.grace` seconds at most."""
    import uvicorn

    from offload.formats.convert import opened
    from offload.limit import measure_links
    from offload.memory import trim_memory
    from offload.planning.words import describe
    from offload.serving.app import Service
    from offload.serving.metrics import Metrics
    from offload.serving.prefixes import Prefixes
    from offload.serving.request import Bounds
    from offload.serving.rounds import Rounds
    from offload.session import Prompts, Session

    trim_memory()
    prompts = Prompts(opened(options.model, plain=True))
    context = min(options.context, prompts.longest_tokens)
    if context < options.context:
        say(f"context  {context} tokens, all that this model takes")
    kept_tokens = Prefixes.useful_tokens(options.prefix_tokens, context)
    session = Session(prompts, context, words, options.exact, options.parallel, kept_tokens)
    say(describe(session.executor.placement))
    say(_predicted(session, options.parallel))
    links = measure_links(session.executor)
    rounds = Rounds(session.model, options.parallel)
    try:
        service = Service(
            session=session,
            rounds=rounds,
            metrics=Metrics(rounds, session.executor, links),
            bounds=Bounds(context, options.max_new_tokens),
            name=options.name or options.model.resolve().name,
            most=options.parallel + options.queue,
            prefixes=_prefixes(session, kept_tokens),
        )
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        config = uvicorn.Config(
            service.application(key),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=options.grace,
        )
        host, port = listener.getsockname()[:2]
        say(f"serving  {service.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        uvicorn.Server(config).run([listener])
    finally:
        rounds.close()
        session.close()


def _predicted(session: "Session", parallel: int) -> str:
    """Say what the placement was chosen for: the speed of a round that is full."""
    found = session.predicted_tokens_per_second
    if found is None:
        return "decode   not predicted; `python -m offload.plan` rehearses it"
    return f"decode   {found:.1f} tokens/s predicted, of {parallel} requests together"


def _prefixes(session: "Session", tokens: int) -> "Prefixes | None":
    from offload.serving.prefixes import Prefixes

    if not tokens:
        return None
    if not Prefixes.fit(session.new_cache()):
        say("prompts  each is read anew: the layers of this model do not keep their whole past")
        return None
    return Prefixes(tokens)


if __name__ == "__main__":
    sys.exit(main())
