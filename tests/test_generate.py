"""The generate command: what it says while and after it runs, and what an interrupt leaves."""

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload import live
from offload.clock import Clock
from offload.errors import UsageError
from offload.executor import executor_of, load, new_cache
from offload.generate import main
from offload.limit import Limit
from offload.live import Meter, StatusLine
from offload.planning.predict import Costs
from offload.sampling import Sampling
from offload.text import load_tokenizer

PROMPT = ["--prompt", "The quick brown fox", "--no-chat"]


@pytest.fixture
def flags(tiny_checkpoint: Path) -> list[str]:
    return ["--model", str(tiny_checkpoint), *PROMPT, "--max-new-tokens", "12"]


def test_tokens_are_those_of_transformers_generate(
    flags: list[str], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = load(tiny_checkpoint)
    tokenizer = load_tokenizer(tiny_checkpoint)
    tokens = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    assert report["text"] == tokenizer.decode(expected[0, tokens.shape[1] :], skip_special_tokens=True)
    assert report["new_tokens"] == expected.shape[1] - tokens.shape[1]
    assert report["limit"] == "memory"
    assert report["fraction"] > 0


def test_int8_keys_and_values_take_half_of_the_plan_and_an_unknown_format_is_refused(
    flags: list[str], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--json", "--kv", "int8"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = load(tiny_checkpoint, kv="int8")
    tokens = load_tokenizer(tiny_checkpoint)("The quick brown fox", return_tensors="pt").input_ids
    given = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(tokens, past_key_values=new_cache(model), **given)
    assert report["text"] == load_tokenizer(tiny_checkpoint).decode(expected[0, tokens.shape[1] :], True)
    wide, narrow = (load(tiny_checkpoint, context_tokens=512, kv=kv) for kv in (None, "int8"))
    cache_bytes = [executor_of(each).placement.needs.cache_bytes for each in (wide, narrow)]
    head_dim = model.config.head_dim
    assert cache_bytes[1] == cache_bytes[0] * (head_dim + 2) / (2 * head_dim)
    assert main([*flags, "--kv", "fp8"]) == 2
    assert capsys.readouterr().err.endswith("error: --kv fp8: expected int8\n")


def test_the_prediction_stands_beside_the_measurement(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(flags) == 0
    assert "tokens/s; not predicted; `python -m offload.plan` rehearses it\n" in capsys.readouterr().err
    costs = Costs(host_seconds=(0.01,) * 3, read_seconds=(0.0,) * 3, outside_seconds=0.01)
    monkeypatch.setattr("offload.session.recall_costs", lambda *_: costs)
    assert main(flags) == 0
    assert "tokens/s; 25.0 predicted\n" in capsys.readouterr().err


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_an_interrupt_prints_what_there_is(
    flags: list[str], json_flag: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*flags, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    put = Clock.put

    def interrupting(self: Clock, value: Any) -> None:
        put(self, value)
        if len(self.tokens) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Clock, "put", interrupting)
    monkeypatch.setattr("offload.limit.measure_links", lambda *_: pytest.fail("who interrupts does not wait for it"))
    assert main([*flags, *json_flag]) == 130
    shown = capsys.readouterr()
    assert shown.err.endswith("interrupted\n")
    assert "Traceback" not in shown.err
    part = json.loads(shown.out)["text"] if json_flag else shown.out.rstrip("\n")
    assert part
    assert part != whole
    assert whole.startswith(part)
    if not json_flag:
        assert "decode   5 tokens, " in shown.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_keeps_off_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr(live, "_terminal_size", lambda: os.terminal_size((40, 10)))
    with StatusLine() as line:
        line.show("x" * 100)
        line.show("too soon to be shown")
    shown = err.getvalue()
    assert "\x1b[1;9r" in shown  # the last of ten rows does not scroll
    assert f"\x1b[10;1H\x1b[2K\x1b[2m{'x' * 39}\x1b[0m" in shown
    assert shown.endswith("\x1b7\x1b[r\x1b[10;1H\x1b[2K\x1b8")
    assert "too soon" not in shown
    monkeypatch.setattr("sys.stdout", io.StringIO())
    err.truncate(0)
    with StatusLine() as line:
        line.show("alone")
    assert err.getvalue().strip("\0") == "\r\x1b[Kalone\r\x1b[K"


def test_the_meter_tells_rate_bytes_and_share_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    clock = Clock()
    model: Any = SimpleNamespace(bytes_per_token=80, stats=SimpleNamespace(bytes_read=0, cache_bytes_copied=0))
    meter = Meter(StatusLine(), [Limit("disk", 1000.0, 50), Limit("memory", 1e6, 80)], model)
    for second in (1.0, 1.5, 2.0):
        clock.times.append(second)
        meter(clock)
        model.stats.bytes_read += 50
    assert "2 tokens  2.0/s  80 B a token, 50 B from disk  10% of disk" in err.getvalue()
    assert meter.describe(7, 10.0) == "7 tokens  10.0/s  80 B a token, 50 B from disk  50% of disk"
    slow_memory = Meter(StatusLine(), [Limit("disk", 1000.0, 50), Limit("memory", 1000.0, 80)], model)
    assert slow_memory.describe(7, 10.0) == "7 tokens  10.0/s  80 B a token, 0 B from disk  80% of memory"
    in_memory = Meter(StatusLine(), [Limit("memory", 1000.0, 80)], model)
    assert in_memory.describe(7, 10.0) == "7 tokens  10.0/s  80 B a token  80% of memory"


def test_the_meter_counts_keys_and_values_that_cross_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    clock, stats = Clock(), SimpleNamespace(bytes_read=0, cache_bytes_copied=0)
    model: Any = SimpleNamespace(bytes_per_token=80, stats=stats)
    meter = Meter(StatusLine(), [Limit("bus", 1000.0, 30), Limit("device memory", 1e6, 80)], model)
    for second in (1.0, 2.0, 3.0):
        clock.times.append(second)
        meter(clock)
        stats.cache_bytes_copied += 20
    assert meter.describe(7, 10.0) == "7 tokens  10.0/s  80 B a token, 20 B of keys and values copied  50% of bus"


def test_the_line_is_silent_where_there_is_no_terminal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 0
    assert "\x1b" not in capsys.readouterr().err


def drawn(sampling: Sampling, logits: list[float], times: int) -> torch.Tensor:
    processors = sampling.arguments()["logits_processor"]
    scores = torch.tensor([logits])
    tokens = [int(processors(torch.tensor([[0]]), scores.clone()).argmax()) for _ in range(times)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / times


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = [2.0, 1.0, 0.5, -1.0]
    found = drawn(Sampling(temperature=0.7, seed=3), logits, 4000)
    expected = torch.softmax(torch.tensor(logits) / 0.7, 0)
    assert (found - expected).abs().max() < 0.03
    assert torch.equal(found, drawn(Sampling(temperature=0.7, seed=3), logits, 4000))
    assert drawn(Sampling(temperature=1.0, top_k=2), logits, 500)[2:].sum() == 0
    assert drawn(Sampling(temperature=1.0, top_p=0.5), logits, 500)[0] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: expected a number between 0 and 100"),
        ({"temperature": float("nan")}, "temperature nan: expected a number between 0 and 100"),
        ({"top_p": 0.0}, "top_p 0.0: expected a number above 0, at most 1"),
        ({"top_k": -1}, "top_k -1: expected 0 for all tokens, or how many"),
    ],
)
def test_what_is_no_way_to_sample_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        Sampling(**values)
    assert str(refused.value) == message
