"""Talk to a checkpoint in a terminal, inside a memory budget. `python -m offload.chat --cpu-memory 8GiB`"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from offload.chat_input import MessageReader
from offload.command import Parser, run, say
from offload.errors import ToolkitError, UsageError
from offload.planning.wishes import Wishes, WishWords, add_wish_flags, words_of
from offload.source import DEFAULT_OUTPUT, cache_directory, check_made

if TYPE_CHECKING:
    from offload.conversation import Conversation
    from offload.limit import Limit
    from offload.session import Session

_HELP = '''\
/help                 this list
/system TEXT          begin anew under a system message; without TEXT, under none
/reset                forget the conversation, keep the system message
/retry                answer the last question again, with the next seed
/undo                 forget the last question and its answer
/save FILE, /load FILE   the conversation, as JSON
/set NAME VALUE       temperature, top_p, top_k, seed or max_new_tokens; without NAME, show them
/stats                tokens, speed and share of the link
/exit                 leave; so does Ctrl-D. Ctrl-C stops an answer and keeps what there is of it
A line that ends in \\ goes on in the next; """ begins and ends a text of several lines.'''


@dataclass(frozen=True, slots=True)
class Settings:
    """What `/set` changes. max_new_tokens: of an answer; for the others see `Sampling`."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_new_tokens: int

    def changed(self, name: str, value: str) -> "Settings":
        """Return them with one changed. Raises UsageError for what is none, or no value of it."""
        kinds = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        if name not in kinds:
            raise UsageError(f"/set {name}: expected one of {', '.join(kinds)}")
        try:
            return replace(self, **{name: kinds[name](value)})
        except ValueError:
            expected = "a whole number" if kinds[name] is int else "a number"
            raise UsageError(f"/set {name} {value!r}: expected {expected}") from None

    def in_words(self) -> str:
        """Return them as a line."""
        return "  ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    for word in ("context", "max_new_tokens"):
        if getattr(options, word) < 1:
            raise UsageError(f"--{word.replace('_', '-')} {getattr(options, word)}: expected at least 1")
    words = words_of(options)
    Wishes.of(words)  # what contradicts itself is refused before seconds of imports
    check_made(options.model)
    chat = _open(options, words)
    say("/help lists the commands")
    with closing(chat):
        chat.run()


def _parser() -> argparse.ArgumentParser:
    parser = Parser("offload.chat", "Talk to a quantized checkpoint in a terminal, inside a memory budget.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    add("--system", help="system message of the chat")
    add("--context", type=int, default=4096, help="tokens to leave room for, the whole conversation")
    add("--max-new-tokens", type=int, default=1024, help="tokens of an answer at most")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    add("--top-p", type=float, default=0.95, help="sample among the likeliest tokens of this total probability")
    add("--top-k", type=int, default=0, help="sample among this many likeliest tokens; 0 for all")
    add("--seed", type=int, default=0, help="of the sampling")
    add_wish_flags(parser)
    return parser


def _open(options: argparse.Namespace, words: WishWords) -> "Chat":
    from offload.conversation import Conversation
    from offload.formats.convert import opened
    from offload.limit import measure_links
    from offload.memory import trim_memory
    from offload.planning.words import describe
    from offload.sampling import Sampling
    from offload.session import Prompts, Session

    trim_memory()
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    prompts = Prompts(opened(options.model, plain=True))
    session = Session(prompts, min(options.context, prompts.longest_tokens), words)
    say(describe(session.executor.placement))
    if not prompts.has_template:
        say("this model has no chat template: it continues text, and was not made to answer")
    settings = Settings(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, options.max_new_tokens)
    conversation = Conversation(session, options.context, options.system)
    return Chat(session, conversation, settings, measure_links(session.executor))


class Chat:
    """The loop: a message in, an answer or what a command says out. Ends at /exit and at the end of the input."""

    def __init__(
        self, session: "Session", conversation: "Conversation", settings: Settings, links: "Sequence[Limit]"
    ) -> None:
        self._session, self._conversation, self._settings, self._links = session, conversation, settings, links
        self._stats = "no answer yet"
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: say(_HELP),
            "/system": lambda rest: conversation.set_system(rest or None),
            "/reset": lambda rest: conversation.set_system(conversation.system),
            "/retry": self._retry,
            "/undo": self._undo,
            "/save": lambda rest: conversation.save(_path("/save", rest)),
            "/load": lambda rest: conversation.load(_path("/load", rest)),
            "/set": self._set,
            "/stats": lambda rest: say(self._stats),
        }

    def close(self) -> None:
        """Stop reading and close the files of the model."""
        self._session.close()

    def run(self) -> None:
        """Read and answer until there is no more."""
        reader = MessageReader(cache_directory() / "chat_history", [*self._commands, "/exit"])
        while (text := reader.read()) is not None:
            name, _, rest = text.partition(" ")
            if name in ("/exit", "/quit"):
                return
            try:
                if name in self._commands:
                    self._commands[name](rest.strip())
                elif text.startswith("/"):
                    say(f"{name}: no such command; /help lists them")
                elif text:
                    self._ask(text)
            except ToolkitError as error:
                say(f"error: {error}")

    def _ask(self, text: str) -> None:
        from transformers import TextStreamer

        from offload.clock import Clock
        from offload.live import Meter, StatusLine
        from offload.sampling import Sampling

        settings = self._settings
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.seed)
        streamer = TextStreamer(self._session.prompts.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with StatusLine() as line:
            meter = Meter(line, self._links, self._session.executor)
            clock = Clock(streamer, meter)
            reply = self._conversation.ask(text, sampling, settings.max_new_tokens, clock)
        if reply.interrupted:
            say("interrupted; what there is was kept" if clock.tokens else "interrupted; the question was not kept")
        self._stats = (
            f"{reply.prompt_tokens} tokens before, {reply.reused_tokens} of them read already; first token after "
            f"{clock.prompt_seconds:.2f} s; {meter.describe(len(clock.tokens), clock.tokens_per_second)}"
        )
        say(self._stats)

    def _retry(self, rest: str) -> None:
        question = self._conversation.undo()
        if question is None:
            raise UsageError("/retry: nothing was asked yet")
        self._settings = replace(self._settings, seed=self._settings.seed + 1)
        self._ask(question)

    def _undo(self, rest: str) -> None:
        question = self._conversation.undo()
        say("nothing to undo" if question is None else f"forgotten: {shorten(question, 60, placeholder=' ...')}")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.partition(" ")
            self._settings = self._settings.changed(name, value.strip())
        say(self._settings.in_words())


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise UsageError(f"{command}: expected the name of a file")
    return Path(rest).expanduser()


if __name__ == "__main__":
    sys.exit(main())
