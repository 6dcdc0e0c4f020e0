"""The server, by the real `openai` client: answers, streams, what it refuses, who leaves, and how it ends."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from directories import rewritten
from starlette.requests import Request as HttpRequest
from transformers import LlamaConfig

from offload.errors import ResourceError
from offload.sampling import Sampling
from offload.serve import main
from offload.serving.answer import TextFeed
from offload.serving.app import _json
from offload.serving.request import Bounds, RequestError
from offload.session import Prompts, Session

ROOT = Path(__file__).parent.parent
KEY = "a key of the test"
PROMPTS = [f"{text} {number}" for number, text in enumerate(["The quick", "brown fox", "jumps over", "lazy dogs"] * 4)]


@dataclass
class Server:
    process: "subprocess.Popen[str]"
    port: int
    said: list[str]
    reader: threading.Thread
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY) -> openai.OpenAI:
        if key not in self.clients:
            self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        return self.clients[key]

    def get(self, route: str) -> httpx.Response:
        return httpx.get(self.url + route, headers={"Authorization": f"Bearer {KEY}"})

    def running(self) -> int:
        return int(self.get("/health").json()["running"])


def start(checkpoint: Path, *flags: str, key: str | None = KEY) -> Server:
    environment = {name: value for name, value in os.environ.items() if name != "OFFLOAD_API_KEY"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if key is None else {"OFFLOAD_API_KEY": key})
    command = [sys.executable, "-m", "offload.serve", "--model", str(checkpoint), "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(
        [*command, "--context", "512", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    said: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"serving  tiny at http://127.0.0.1:(\d+)/v1", line):
            reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
            reader.start()
            return Server(process, int(found[1]), said, reader)
    raise AssertionError("".join(said))


def stop(server: Server) -> None:
    server.process.kill()
    server.process.wait()
    server.reader.join()
    assert server.process.stderr is not None
    server.process.stderr.close()
    for client in server.clients.values():
        client.close()


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    """All layers from disk; 16 at once, 4 more in line; answers of 400 tokens at most."""
    server = start(tiny_checkpoint, "--device-map", "disk", "--queue", "4", "--max-new-tokens", "400")
    yield server
    stop(server)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path) -> Iterator[Session]:
    session = Session(Prompts(tiny_checkpoint), 512, {"device_map": "disk"})
    yield session
    session.executor.close()


def expected(alone: Session, prompt: str, sampling: Sampling, new_tokens: int = 12) -> str:
    return alone.prompts.text(alone.generate(alone.prompts.plain(prompt), new_tokens, sampling))


def test_a_completion_is_what_the_command_line_says(
    server: Server, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from offload.generate import main

    flags = ["--prompt", "The quick brown fox", "--no-chat", "--max-new-tokens", "12", "--json"]
    assert main(["--model", str(tiny_checkpoint), "--device-map", "disk", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    answer = server.client().completions.create(
        model="tiny", prompt="The quick brown fox", max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == report["text"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == report["new_tokens"]
    assert answer.usage.prompt_tokens == report["prompt_tokens"]
    assert answer.usage.total_tokens == report["new_tokens"] + report["prompt_tokens"]
    assert answer.choices[0].finish_reason == ("length" if report["new_tokens"] == 12 else "stop")
    assert answer.object == "text_completion"


def test_a_chat_is_answered_and_streamed_alike(server: Server, alone: Session) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "The fox?"}]},
    ]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 12, "temperature": 0.8, "seed": 5}
    create: Any = server.client().chat.completions.create
    whole = create(**asked)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox?"}]
    tokens = alone.generate(alone.prompts.chat(plain), 12, Sampling(0.8, seed=5))
    assert whole.choices[0].message.content == alone.prompts.text(tokens)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert len(chunks) > 4  # as it comes, not at the end
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_completion_and_tokens_as_a_prompt(server: Server, alone: Session) -> None:
    text = expected(alone, PROMPTS[0], Sampling())
    create: Any = server.client().completions.create
    prompt = alone.prompts.plain(PROMPTS[0])
    chunks = list(create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].usage is None


def test_a_stop_string_ends_the_text_before_it(server: Server, alone: Session) -> None:
    sampling = Sampling(1.0, seed=3)
    text = expected(alone, PROMPTS[1], sampling, 40)
    stop = next(text[at : at + 2] for at in range(10, len(text)) if text[at : at + 2].isascii())
    create: Any = server.client().completions.create
    asked = {
        "model": "tiny",
        "prompt": PROMPTS[1],
        "max_tokens": 40,
        "temperature": 1,
        "seed": 3,
        "stop": ["@@@", stop],
    }
    whole = create(**asked)
    assert whole.choices[0].text == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens < 40
    assert "".join(chunk.choices[0].text for chunk in create(**asked, stream=True)) == whole.choices[0].text


def test_sixteen_clients_get_what_each_gets_alone_for_the_reads_of_few_rounds(server: Server, alone: Session) -> None:
    samplings = [Sampling(temperature=number % 2, seed=number) for number in range(16)]
    expectations = [expected(alone, *pair) for pair in zip(PROMPTS, samplings, strict=True)]
    before = measured(server)

    def ask(number: int) -> str:
        answer = server.client().completions.create(
            model="tiny", prompt=PROMPTS[number], max_tokens=12, temperature=number % 2, seed=number
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as clients:
        texts = list(clients.map(ask, range(16)))
    assert texts == expectations
    after = measured(server)
    assert after["offload_new_tokens_total"] - before["offload_new_tokens_total"] <= 16 * 12
    rounds = after["offload_rounds_total"] - before["offload_rounds_total"]
    assert rounds < 16 * 12 / 2  # how many shared one is the machine's matter; alone they would take 192
    assert after["offload_queue_length"] == 0
    layers = sum(blob.nbytes for blob in alone.executor.streamed_blobs)
    read = after["offload_read_bytes_total"] - before["offload_read_bytes_total"]
    assert abs(read - rounds * layers) <= 2 * layers  # read ahead, or not yet


def measured(server: Server) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_health_and_models(server: Server) -> None:
    with server.client().completions.create(model="tiny", prompt="The", max_tokens=300, stream=True, seed=1) as stream:
        for number, _ in enumerate(stream):
            if number == 20:
                found = measured(server)
                break
    assert found["offload_tokens_per_second"] > 0
    assert found['offload_link_fraction{link="disk"}'] > 0
    assert found["offload_running"] == 1
    assert found["offload_prompt_tokens_total"] >= 3
    assert server.get("/health").json()["status"] == "ok"
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no such model here"):
        server.client().models.retrieve("other/model")


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "tiny", "prompt": "x"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ([], 400, "expected a JSON object"),
        ({}, 404, "the model None does not exist; this server has 'tiny'"),
        (TEXT | {"model": "gpt"}, 404, "the model 'gpt' does not exist; this server has 'tiny'"),
        ({"model": "tiny"}, 400, "prompt: expected text"),
        (TEXT | {"prompt": ""}, 400, "the prompt is empty"),
        (TEXT | {"prompt": ["a", "b"]}, 400, "prompt: expected one text, or tokens from 0 to 256"),
        (TEXT | {"prompt": [1, 999]}, 400, "prompt: expected one text, or tokens from 0 to 256"),
        (TEXT | {"prompt": [True]}, 400, "prompt: expected one text, or tokens from 0 to 256"),
        (TEXT | {"prompt": "x" * 600}, 400, "the prompt has 600 tokens, the context only 512"),
        (TEXT | {"prompt": "\ud800"}, 400, "prompt: half of a surrogate pair is no text"),
        (
            TEXT | {"prompt": "x" * 300, "max_tokens": 300},
            400,
            "max_tokens 300: with the prompt's 300 tokens more than",
        ),
        (TEXT | {"max_tokens": -5}, 400, "max_tokens: expected a whole number between 1 and 400"),
        (TEXT | {"max_tokens": int("9" * 30)}, 400, "max_tokens: expected a whole number between 1 and 400"),
        (TEXT | {"max_tokens": 1.5}, 400, "max_tokens: expected a whole number between 1 and 400"),
        (TEXT | {"temperature": 3}, 400, "temperature: expected a number between 0 and 2"),
        (TEXT | {"temperature": float("nan")}, 400, "temperature: expected a number between 0 and 2"),
        (TEXT | {"temperature": True}, 400, "temperature: expected a number between 0 and 2"),
        (TEXT | {"top_p": 0}, 400, "top_p: expected a number between 1e-06 and 1"),
        (TEXT | {"top_k": -1}, 400, "top_k: expected a whole number between 0 and"),
        (TEXT | {"seed": "1"}, 400, "seed: expected a whole number between"),
        (TEXT | {"stop": ["a"] * 5}, 400, "stop: expected a text or a list of at most 4"),
        (TEXT | {"stop": ""}, 400, "stop: expected texts of 1 to 256 characters"),
        (TEXT | {"stream": "yes"}, 400, "stream: expected true or false"),
        (TEXT | {"stream_options": {"x": 1}}, 400, "stream_options: expected"),
        (TEXT | {"n": 5}, 400, "n: not supported by this server"),
        (TEXT | {"logprobs": 1}, 400, "logprobs: not supported by this server"),
        (TEXT | {"messages": []}, 400, "unrecognized request argument supplied: 'messages'"),
        (CHAT | {"messages": "x"}, 400, "messages: expected a list of at least one message"),
        (CHAT | {"messages": []}, 400, "messages: expected a list of at least one message"),
        (CHAT | {"messages": [1]}, 400, "messages[0]: expected an object with role and content"),
        (CHAT | {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role: expected one of system,"),
        (CHAT | {"messages": [{"role": ["user"], "content": "x"}]}, 400, "messages[0].role: expected one of system,"),
        (CHAT | {"messages": [{"role": "user", "content": 1}]}, 400, "messages[0].content: expected text"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content: exp"),
        (CHAT | {"max_tokens": 1, "max_completion_tokens": 1}, 400, "max_tokens and max_completion_tokens: give one"),
        (CHAT | {"tools": [{"type": "function"}]}, 400, "tools: not supported by this server"),
        (CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format: not supported by this server"),
        (b"{", 400, "the body is not valid JSON"),
        (b"\xff", 400, "the body is not valid JSON"),
        (b"[" * 100_000, 400, "the body is not valid JSON"),
        (b" " * (2 << 20), 413, "a body of more than 1048576 bytes"),
    ],
)
def test_bad_input_is_refused_with_an_error_object(server: Server, body: Any, status: int, message: str) -> None:
    route = (
        "/v1/chat/completions"
        if isinstance(body, dict) and "prompt" not in body and len(body) > 1
        else "/v1/completions"
    )
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = httpx.post(server.url + route, content=content, headers={"Authorization": f"Bearer {KEY}"})
    assert found.status_code == status, found.text
    assert found.json()["error"]["message"].startswith(message)
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_neutral_parameters_are_taken(server: Server) -> None:
    create: Any = server.client().chat.completions.create
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": False, "user": "me", "tools": []}
    found = create(**CHAT, **neutral, max_tokens=2, response_format={"type": "text"}, seed=None)
    assert found.usage.completion_tokens == 2


def test_nothing_is_there_without_the_key(server: Server) -> None:
    for key in ("another", KEY + "x", "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        headers = {b"Authorization": f"Bearer {key}".encode("latin-1")}
        for route in ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/nothing"):
            for found in (httpx.get(server.url + route, headers=headers), httpx.post(server.url + route)):
                assert found.status_code == 401
                assert found.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError, match="no API key, or a wrong one"):
        server.client("wrong").models.list()
    assert server.get("/nothing").json()["error"]["message"] == "GET /nothing: Not Found"
    assert server.get("/v1/completions").status_code == 405


def test_headers_without_an_end_are_refused_and_hurt_nobody(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * (1 << 20))
        answer = connection.recv(64)
    assert answer.startswith(b"HTTP/1.1 4")
    assert server.get("/health").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def receive() -> Any:
        await asyncio.sleep(60)

    http = HttpRequest({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(RequestError, match=r"the body was not there after 0\.05 seconds") as raised:
        asyncio.run(_json(http, Bounds(512, 400, body_seconds=0.05)))
    assert raised.value.status == 408


def test_what_breaks_inside_is_a_number_for_the_client_and_a_reason_in_the_log(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def change(tensors: Any) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][0] = float("nan")

    server = start(rewritten(tiny_checkpoint, tmp_path / "broken", change))
    try:
        headers = {"Authorization": f"Bearer {KEY}"}
        found = httpx.post(f"{server.url}/v1/completions", json=TEXT, headers=headers)
        assert found.status_code == 500
        told = re.fullmatch(
            r"the server failed; its log says why under ([0-9a-f]{8})", found.json()["error"]["message"]
        )
        assert told is not None
        assert eventually(lambda: "model.layers.1 is the first layer whose output is" in "".join(server.said))
        assert f"error {told[1]}" in "".join(server.said)
        events = httpx.post(f"{server.url}/v1/completions", json=TEXT | {"stream": True}, headers=headers).text
        assert "the server failed; its log says why under" in events
        assert "[DONE]" not in events
    finally:
        stop(server)


def test_a_prompt_that_begins_like_another_is_computed_from_where_they_part(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "long")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    start_of_all = [1 + place % 250 for place in range(600)]
    asked = [{"prompt": start_of_all + [end] * 9, "temperature": 0.8, "seed": 4} for end in (7, 7, 8)]
    answers = {}
    for kept_tokens in (1024, 0):
        server = start(directory, "--context", "1024", "--parallel", "2", "--prefix-tokens", str(kept_tokens))
        try:
            create: Any = server.client().completions.create
            found = [create(model="tiny", max_tokens=8, **one) for one in asked]
            text = server.get("/metrics").text
        finally:
            stop(server)
        answers[kept_tokens] = [one.choices[0].text for one in found]
        reused = [one.usage.prompt_tokens_details.cached_tokens for one in found]
        assert reused == ([0, 512, 512] if kept_tokens else [0, 0, 0])
        assert f"offload_reused_tokens_total {sum(reused):.1f}" in text
    assert answers[1024] == answers[0]


def eventually(condition: Any) -> bool:
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_computed_for(server: Server, stream: bool) -> None:
    body = TEXT | {"max_tokens": 400, "stream": stream, "seed": 1, "stop": "@" * 200}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n"
    )
    before = measured(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"\r\n" + content)
        assert eventually(lambda: server.running() == 1)
        assert eventually(lambda: measured(server)["offload_rounds_total"] > before["offload_rounds_total"] + 1)
    assert eventually(lambda: server.running() == 0)
    assert eventually(lambda: measured(server)["offload_new_tokens_total"] > before["offload_new_tokens_total"])
    assert measured(server)["offload_new_tokens_total"] - before["offload_new_tokens_total"] < 400


def test_more_than_may_wait_are_told_to_come_later(server: Server) -> None:
    client, body = server.client(), TEXT | {"max_tokens": 60, "temperature": 0}

    def ask(number: int) -> httpx.Response:
        return httpx.post(
            f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )

    with ThreadPoolExecutor(40) as clients:
        found = list(clients.map(ask, range(40)))
    later = [answer for answer in found if answer.status_code == 429]
    assert 1 <= len(later) <= 20
    assert sum(answer.status_code == 200 for answer in found) == 40 - len(later)
    assert later[0].headers["retry-after"] == "1"
    assert later[0].json()["error"]["message"] == "too many requests are waiting; try again later"
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


def test_told_to_end_it_finishes_what_runs_and_takes_no_more(tiny_checkpoint: Path) -> None:
    server = start(tiny_checkpoint, "--parallel", "2")
    try:
        create: Any = server.client().completions.create
        stream = iter(create(model="tiny", prompt="The", max_tokens=200, temperature=0, stream=True))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
        assert server.process.wait(30) == 143
        with pytest.raises(openai.APIConnectionError):
            create(model="tiny", prompt="The", max_tokens=1)
    finally:
        stop(server)
    assert "Traceback" not in "".join(server.said)


def test_past_its_grace_what_runs_is_cut_and_a_made_key_works(tiny_checkpoint: Path) -> None:
    server = start(tiny_checkpoint, "--grace", "0", "--device-map", "disk", key=None)
    try:
        key = next(line.split()[1] for line in server.said if line.startswith("key "))
        create: Any = server.client(key).completions.create
        stream = iter(create(model="tiny", prompt="The", max_tokens=500, temperature=0, stream=True))
        next(stream)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 130
    finally:
        stop(server)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--context", "1"], 2, "--context 1: expected at least 2"),
        (
            ["--kv", "int8", "--kv-memory", "1GiB", "--n-gpu-layers", "-1"],
            2,
            "keys and values beyond memory: the budget is one request's, and a server has many; use --kv int8 alone",
        ),
        (["--parallel", "0"], 2, "--parallel 0: expected at least 1"),
        (["--port", "70000"], 2, "--port 70000: expected a number between 0 and 65535"),
        (["--api-key", ""], 2, "the API key: expected printable ASCII characters, at least one, no spaces around them"),
        (["--host", "192.0.2.1"], 4, "--host 192.0.2.1 --port 8000: cannot be listened at ("),
        (["--model", "nowhere"], 3, "nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny_checkpoint: Path, flags: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tiny_checkpoint), *flags]) == status
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(("context", "planned"), [("513", 0), ("514", 1024)])
def test_no_memory_is_planned_for_beginnings_that_no_prompt_goes_on_from(
    context: str, planned: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def session(*arguments: Any) -> Session:
        kept.append(arguments[-1])
        raise ResourceError("no session is needed")

    monkeypatch.setattr("offload.session.Session", session)
    monkeypatch.setattr("offload.session.read_config", lambda _: LlamaConfig(max_position_embeddings=2048))
    flags = ["--model", str(tiny_checkpoint), "--port", "0", "--api-key", KEY]
    assert main([*flags, "--context", context, "--prefix-tokens", "1500"]) == 4
    assert kept == [planned]


def fed(prompts: Prompts, stops: tuple[str, ...], text: str) -> tuple[list[str], TextFeed]:
    import torch

    pieces: list[str] = []
    feed = TextFeed(prompts, stops, pieces.append)
    feed.put(torch.tensor([1, 2, 3]))
    for token in prompts.plain(text):
        feed.put(torch.tensor([token]))
        if bool(feed(torch.tensor([[0]]), None)):
            break
    feed.end()
    return pieces, feed


def test_text_is_passed_on_only_when_it_is_certain(tiny_checkpoint: Path) -> None:
    prompts = Prompts(tiny_checkpoint)
    assert fed(prompts, (), "a\N{EURO SIGN}b")[0] == ["a", "\N{EURO SIGN}", "b"]
    assert fed(prompts, ("xyz",), "abxyc")[0] == ["a", "b", "xyc"]
    pieces, feed = fed(prompts, ("xyz", "bx"), "abxyzc")
    assert (pieces, feed.text, feed.stopped) == (["a"], "a", True)
    assert fed(prompts, ("q",), "abx")[1].stopped is False


def test_answers_over_8_bit_keys_are_what_the_command_line_says(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each request has a cache of its own, although they share the passes."""
    from offload.generate import main

    flags = ["--kv", "int8", "--device-map", "disk"]
    texts = []
    for prompt in PROMPTS[:4]:
        words = ["--prompt", prompt, "--no-chat", "--max-new-tokens", "80", "--json"]
        assert main(["--model", str(tiny_checkpoint), *flags, *words]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    server = start(tiny_checkpoint, *flags)
    try:
        complete = server.client().completions.create
        with ThreadPoolExecutor(4) as pool:
            ask = [pool.submit(complete, model="tiny", prompt=p, max_tokens=80, temperature=0) for p in PROMPTS[:4]]
            assert [one.result().choices[0].text for one in ask] == texts
    finally:
        stop(server)
