"""A chat reads only what is new, keeps what an interrupt leaves, and does what its commands say."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from offload.chat import Settings, main
from offload.clock import Clock
from offload.conversation import Conversation, _complete_tokens
from offload.errors import InputError, UsageError
from offload.executor import executor_of
from offload.sampling import Sampling
from offload.session import Prompts, Session

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREEDY = Sampling()


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Iterator[Session]:
    """All layers from disk; the template ends a turn as no answer of the model would."""
    prompts = Prompts(tiny_checkpoint)
    prompts.tokenizer.chat_template = TEMPLATE
    session = Session(prompts, 512, {"device_map": "disk"}, exact=True)
    yield session
    executor_of(session.model).close()


def ask(conversation: Conversation, text: str, tokens: int = 8) -> tuple[Any, list[int]]:
    clock = Clock()
    return conversation.ask(text, GREEDY, tokens, clock), clock.tokens


def test_turns_reuse_what_was_read_and_say_what_a_fresh_model_says(session: Session) -> None:
    conversation = Conversation(session, 512, "Be brief.")
    reused = []
    for question in ("The fox?", "And the dog, being lazy?", "Why"):
        reply, tokens = ask(conversation, question)
        prompt = session.prompts.chat(conversation.messages[:-1])
        assert tokens == session.generate(prompt, 8, GREEDY)
        assert conversation.messages[-1] == {"role": "assistant", "content": session.prompts.text(tokens)}
        reused.append((reply.reused_tokens, reply.prompt_tokens))
    assert reused[0][0] == 0
    assert all(kept >= before for (_, before), (kept, _) in pairwise(reused))
    assert conversation.undo() == "Why"
    reply, tokens = ask(conversation, "Why")
    assert reply.reused_tokens == reply.prompt_tokens - 1
    assert tokens == session.generate(session.prompts.chat(conversation.messages[:-1]), 8, GREEDY)


def test_an_interrupt_anywhere_keeps_the_part_and_the_next_answer_is_right(session: Session) -> None:
    for place in (1, 5, 7, 8, 10, 12):
        conversation = Conversation(session, 512)
        ask(conversation, "The fox?")
        calls = 0

        def interrupt(*arguments: Any, place: int = place) -> None:
            nonlocal calls
            calls += 1
            if calls == place:
                os.kill(os.getpid(), signal.SIGINT)

        handles = [layer.register_forward_pre_hook(interrupt) for layer in executor_of(session.model).layers]
        reply, tokens = ask(conversation, "And the dog?")
        for handle in handles:
            handle.remove()
        assert reply.interrupted
        assert len(tokens) == (place - 1) // 3
        last = {"role": "assistant", "content": session.prompts.text(tokens)} if tokens else conversation.messages[1]
        assert conversation.messages[-1] == last
        _, tokens = ask(conversation, "Why?")
        assert tokens == session.generate(session.prompts.chat(conversation.messages[:-1]), 8, GREEDY)


def test_of_a_pass_that_was_interrupted_only_whole_tokens_are_kept() -> None:
    def cache(*lengths: tuple[int, int]) -> DynamicCache:
        made = DynamicCache()
        for index, (keys, values) in enumerate(lengths):
            made.update(torch.zeros(1, 1, keys, 4), torch.zeros(1, 1, keys, 4), index)
            made.layers[index].values = torch.zeros(1, 1, values, 4)
        return made

    assert _complete_tokens(cache((6, 6), (5, 5)), True) == 5
    assert _complete_tokens(cache((6, 5), (5, 5)), True) == 0  # a key without its value
    assert _complete_tokens(None, True) == 0


def test_a_conversation_that_is_too_long_is_refused_and_lives(session: Session) -> None:
    conversation = Conversation(session, 40)
    ask(conversation, "Hi")
    before = list(conversation.messages)
    with pytest.raises(InputError, match=r"the conversation has \d+ tokens, the context only 40: /undo or /reset"):
        ask(conversation, "x" * 60)
    assert conversation.messages == before


def test_what_is_no_conversation_is_refused(session: Session, tmp_path: Path) -> None:
    conversation = Conversation(session, 512)
    ask(conversation, "Hi")
    before = list(conversation.messages)
    for content in ('{"messages": [{"role": "god", "content": "x"}]}', "[]", "no JSON"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=r"bad\.json: (expected|cannot be read as a conversation)"):
            conversation.load(tmp_path / "bad.json")
    assert conversation.messages == before


def talk(
    directory: Path, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, ""])))
    flags = ["--model", str(directory), "--max-new-tokens", "6", "--temperature", "0", "--context", "400"]
    assert main(flags) == 0
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err


def test_commands(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.json"
    lines = ["Hi", "/undo", "Hi", "/save", f"/save {path}", "/reset", f"/load {path}", "/retry", "/set top_k 3"]
    lines += [
        "/set seed x",
        "/stats",
        "/nonsense",
        "/help",
        '"""one',
        'two"""',
        "three \\",
        "four",
        "/system Be brief.",
    ]
    lines += [f"/save {tmp_path / 'last.json'}", "/exit", "never read"]
    out, err = talk(tiny_checkpoint, lines, capsys, monkeypatch)
    saved = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert "forgotten: Hi\n" in err
    assert "error: /save: expected the name of a file\n" in err
    assert "temperature 0.0  top_p 0.95  top_k 3  seed 1  max_new_tokens 6\n" in err
    assert "error: /set seed 'x': expected a whole number\n" in err
    assert "/nonsense: no such command; /help lists them\n" in err
    assert "/undo                 forget the last question and its answer\n" in err
    assert err.count(" of them read already; first token after ") == 6  # five answers, and /stats
    assert json.loads((tmp_path / "last.json").read_text())["messages"] == [{"role": "system", "content": "Be brief."}]
    assert len(out) >= 5


def test_settings_refuse_what_they_do_not_know() -> None:
    settings = Settings(0.7, 0.95, 0, 0, 100)
    assert settings.changed("temperature", "1").temperature == 1.0
    with pytest.raises(UsageError) as refused:
        settings.changed("warmth", "1")
    assert str(refused.value) == "/set warmth: expected one of temperature, top_p, top_k, seed, max_new_tokens"


# 20 ms between two tokens, so that the answer cannot be over before the interrupt comes.
SLOW_CHAT = """
import sys, time
from offload import chat, clock
put = clock.Clock.put
clock.Clock.put = lambda self, value: (put(self, value), time.sleep(0.02))[0]
sys.exit(chat.main())
"""


@pytest.mark.timeout(200)
def test_on_a_terminal_an_interrupt_keeps_the_chat(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A real terminal: a prompt, an answer that is stopped by Ctrl-C, another that is not, and the history file."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SLOW_CHAT, "--model", str(tiny_checkpoint), "--temperature", "0"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "400", "--device-map", "disk"],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        screen = Screen(ours)
        screen.type("Tell me about the fox\r", after=">>> ")
        screen.type("\x03", after=" a token, ")  # the live line: it has begun to answer
        screen.type("/stats\r", after="what there is was kept")
        screen.type("/exit\r", after=" of them read already")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "Tell me about the fox" in (tmp_path / "int4-offload" / "chat_history").read_text()
    assert "Traceback" not in screen.text


class Screen:
    """What a terminal shows, read until something is there to type after."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.text, self._seen = descriptor, "", 0
        self._poll = select.poll()  # select() takes no descriptor above 1023
        self._poll.register(descriptor, select.POLLIN)

    def type(self, keys: str, after: str) -> None:
        deadline = time.monotonic() + 60
        while (found := self.text.find(after, self._seen)) < 0:
            left_ms = max(0.0, deadline - time.monotonic()) * 1000
            assert self._poll.poll(left_ms), f"{after!r} did not come: {self.text!r}"
            self.text += os.read(self._descriptor, 1 << 16).decode(errors="replace")
        self._seen = found + len(after)
        os.write(self._descriptor, keys.encode())
