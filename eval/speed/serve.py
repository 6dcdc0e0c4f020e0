"""The server under load: one client, then many at once, over a model that is read from disk at every pass.

Clients are those of the `openai` package, in threads of this process; the server is one of its own. One and many take
turns, on prompts of their own; every answer of one client alone is compared with the same client's in company.
"""

import argparse
import re
import secrets
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.speed.random_model import MODELS, SHAPES, write_checkpoint
from eval.speed.report import Rows
from offload.command import Progress, format_bytes, parse_bytes
from offload.errors import ResourceError

_PROMPT_TOKENS = 8
_NAME = "random"


@dataclass(slots=True)
class Load:
    """What the turns gave. one, many: tokens a second of each turn; reads: bytes from disk for a pass of each turn.

    answers: texts by client, alone and in company; failed: requests that were not answered.
    """

    one: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    answers: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0


class ServeReport(Rows):
    """What one run measured, one row."""

    __slots__ = ()

    def table(self) -> str:
        """Return it as lines."""
        (row,) = self.measured
        return (
            f"{row['shape']} within {format_bytes(row['budget_bytes'])}, {format_bytes(row['disk_bytes_per_pass'])} "
            f"from disk a pass\n"
            f"  1 client   {row['one_tokens_per_s']:8.2f} tokens/s\n"
            f" {row['clients']:2} clients  {row['many_tokens_per_s']:8.2f} tokens/s, {row['many_x_one']:.2f} times as "
            f"many; {row['many_of_disk']:.0%} of the disk\n"
            f" {row['failed']} of {row['requests']} requests failed; {row['equal']} of {row['compared']} answers equal "
            f"those of the same client alone; peak {format_bytes(row['peak_bytes'])}"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subject."""
    add = parser.add_argument
    add("--shape", default="1b", choices=SHAPES, help="of the random model")
    add("--cpu-memory", default="700MiB", help="budget of the server")
    add("--clients", type=int, default=16, help="at once")
    add("--tokens", type=int, default=32, help="of each answer")
    add("--rounds", type=int, default=2, help="turns of one client and of all of them")
    add("--models", type=Path, default=MODELS, help="where the random models are kept")


def measure(options: argparse.Namespace) -> ServeReport:
    """Start the server and load it. Raises ResourceError without the `openai` client, or if the server ends."""
    budget_bytes = parse_bytes(options.cpu_memory, "--cpu-memory")
    try:
        from openai import OpenAI
    except ImportError:
        raise ResourceError("openai is not installed; `pip install openai`") from None
    model = options.models / f"{options.shape}.int4"
    write_checkpoint(SHAPES[options.shape], model)
    write_tokenizer(SHAPES[options.shape].vocabulary, model)
    key, found = secrets.token_hex(8), Load()
    with _server(model, key, options) as (url, process):
        with OpenAI(base_url=f"{url}/v1", api_key=key, timeout=600, max_retries=0) as client:
            progress = Progress("turns", options.rounds)
            for number in range(options.rounds):
                _take_turns(client, url, key, options, number % options.clients, found)
                progress.advance()
        peak_bytes = _peak_bytes(process.pid)
    return ServeReport((_row(options, budget_bytes, peak_bytes, found),))


def write_tokenizer(vocabulary: int, directory: Path) -> None:
    """Write a tokenizer whose words are the numbers of its tokens, unless there is one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (directory / "tokenizer.json").exists():
        return
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


@contextmanager
def _server(model: Path, key: str, options: argparse.Namespace) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    command = [sys.executable, "-m", "offload.serve", "--model", str(model), "--name", _NAME, "--port", "0"]
    command += ["--api-key", key, "--cpu-memory", options.cpu_memory, "--parallel", str(options.clients)]
    command += ["--context", str(_PROMPT_TOKENS + options.tokens)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield _address(process), process
    finally:
        process.terminate()
        process.communicate()


def _address(process: "subprocess.Popen[str]") -> str:
    said = []
    for line in process.stderr or ():
        said.append(line.strip())
        if found := re.search(r"^serving .* at (http://\S+)/v1$", said[-1]):
            return found[1]
    raise ResourceError(f"the server ended: {said[-1] if said else 'it said nothing'}")


def _take_turns(client: Any, url: str, key: str, options: argparse.Namespace, alone: int, found: Load) -> None:
    """Let client `alone` ask, then all of them at once."""
    found.one.append(0.0)
    found.many.append(0.0)
    texts: list[dict[int, str]] = []
    for rates, asking in ((found.one, [alone]), (found.many, list(range(options.clients)))):
        before, started = _metrics(url, key), time.perf_counter()
        with ThreadPoolExecutor(len(asking)) as pool:
            answers = list(pool.map(lambda number: _ask(client, number, options.tokens), asking))
        seconds, after = time.perf_counter() - started, _metrics(url, key)
        found.failed += answers.count(None)
        texts.append({number: text for number, text in zip(asking, answers, strict=True) if text is not None})
        rates[-1] = options.tokens * len(texts[-1]) / seconds
        read = after["offload_read_bytes_total"] - before["offload_read_bytes_total"]
        found.reads.append(read / (after["offload_rounds_total"] - before["offload_rounds_total"]))
    disk = after.get('offload_link_bytes_per_second{link="disk"}')
    found.shares.append(read / seconds / disk if disk else 0.0)
    if alone in texts[0] and alone in texts[1]:
        found.answers.append((texts[0][alone], texts[1][alone]))


def _ask(client: Any, number: int, new_tokens: int) -> str | None:
    from openai import OpenAIError

    prompt = [1 + number * _PROMPT_TOKENS + place for place in range(_PROMPT_TOKENS)]
    try:
        answer = client.completions.create(model=_NAME, prompt=prompt, max_tokens=new_tokens, temperature=0)
    except OpenAIError:
        return None
    text: str = answer.choices[0].text
    return text if answer.usage.completion_tokens == new_tokens else None


def _metrics(url: str, key: str) -> dict[str, float]:
    asked = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(asked) as response:
        lines = response.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def _peak_bytes(process: int) -> int:
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", text)
    assert found is not None, "Linux says this of every process"
    return int(found[1]) * 1024


def _row(options: argparse.Namespace, budget_bytes: int, peak_bytes: int, found: Load) -> dict[str, Any]:
    one, many = statistics.median(found.one), statistics.median(found.many)
    return {
        "shape": options.shape,
        "budget_bytes": budget_bytes,
        "peak_bytes": peak_bytes,
        "disk_bytes_per_pass": round(statistics.median(found.reads)),
        "clients": options.clients,
        "tokens": options.tokens,
        "one_tokens_per_s": round(one, 3),
        "many_tokens_per_s": round(many, 3),
        "many_x_one": round(many / one, 3) if one else "",
        "many_of_disk": round(statistics.median(found.shares), 3),
        "requests": options.rounds * (1 + options.clients),
        "failed": found.failed,
        "compared": len(found.answers),
        "equal": sum(alone == in_company for alone, in_company in found.answers),
    }
