"""Sequences that share the passes of a model: tokens, reads, and what one of them does to the others."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from test_architectures import FAMILIES, SHARED
from transformers import AutoModelForCausalLM, MixtralConfig

from eval.speed.random_model import SHAPES, write_checkpoint
from offload.errors import CheckpointError
from offload.executor import executor_of, load
from offload.fused import FusedLayer
from offload.linear import JointProduct
from offload.planning.choice import plan
from offload.sampling import Sampling
from offload.serving.rounds import Cancelled, Rounds, Sequence
from offload.session import Prompts, Session
from quant import rtn

TEXTS = ["The quick brown fox", "and", "the dog, being lazy, lets it. " * 20, "Why is the sky blue?"] * 4
SHORT = ["The quick brown fox", "the lazy dog", "Why is the sky blue?"]
NEW_TOKENS = 6


@pytest.fixture(scope="module", params=["disk", "auto"])
def session(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[Session]:
    session = Session(Prompts(tiny_checkpoint), 16 * 512, {"device_map": request.param})
    yield session
    session.executor.close()


class Asked:
    """A sequence of a session, with what became of it."""

    def __init__(self, session: Session, text: str, sampling: Sampling, streamer: Any = None) -> None:
        self.session, self.text, self.sampling, self.streamer = session, text, sampling, streamer
        self.tokens: list[int] | None = None
        self.error: BaseException | None = None
        self.done = Event()
        self.sequence = Sequence(self.run, self.end)

    def alone(self) -> list[int]:
        return self.session.generate(self.session.prompts.plain(self.text), NEW_TOKENS, self.sampling)

    def run(self) -> None:
        tokens = self.session.prompts.plain(self.text)
        self.tokens = self.session.generate(tokens, NEW_TOKENS, self.sampling, self.streamer)

    def end(self, error: BaseException | None) -> None:
        self.error = error
        self.done.set()


def sampling(number: int) -> Sampling:
    return Sampling() if number % 2 else Sampling(temperature=1.0, seed=number)


def test_sixteen_get_the_tokens_that_each_gets_alone_for_the_reads_of_one(session: Session) -> None:
    asked = [Asked(session, text, sampling(number)) for number, text in enumerate(TEXTS)]
    expected = [one.alone() for one in asked]
    rounds = Rounds(session.model, 16)
    with rounds._change:  # all of them are there before the first round
        for one in asked:
            rounds._waiting.append(one.sequence)
        before = session.executor.stats.layer_reads
        rounds._change.notify_all()
    for one in asked:
        assert one.done.wait(60)
    rounds.close()
    assert [one.error for one in asked] == [None] * 16
    assert [one.tokens for one in asked] == expected
    longest = max(len(session.prompts.plain(text)) for text in TEXTS)
    passes = NEW_TOKENS + (longest - 1) // 512
    assert rounds.rounds == passes
    slots = session.executor.slots
    if slots is not None:
        read = session.executor.stats.layer_reads - before
        units = len(session.executor.streamed_blobs)
        assert units * passes - len(slots.arenas) <= read <= units * passes + len(slots.arenas)
    assert asked[0].alone() == expected[0]  # the model is what it was


def test_sequences_that_came_to_one_place_are_computed_together(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer once a pass for all; a prompt of several tokens goes through alone."""
    sizes = counted(FusedLayer, monkeypatch)
    asked = [Asked(session, text, Sampling()) for text in SHORT]
    rounds = Rounds(session.model, 3)
    with rounds._change:
        rounds._waiting.extend(one.sequence for one in asked)
        rounds._change.notify_all()
    for one in asked:
        assert one.done.wait(60)
    rounds.close()
    layers = len(session.executor.layers)
    assert sizes == [3] * layers * (NEW_TOKENS - 1)
    sizes.clear()
    assert [one.tokens for one in asked] == [one.alone() for one in asked]
    assert sizes == [1] * layers * (NEW_TOKENS - 1) * 3


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_packed_head_is_multiplied_with_all_who_came_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, in_blocks: bool
) -> None:
    write_checkpoint(SHAPES["tiny"], tmp_path / "out")
    if in_blocks:
        request.getfixturevalue("head_apart")
    model = load(tmp_path / "out", device_map="disk", poison=True)
    blocks = len(executor_of(model).placement.head_tiers) or 1
    assert (blocks > 1) == in_blocks

    @torch.inference_mode()
    def generate(number: int) -> list[list[float]]:
        tokens = torch.arange(1 + number, 5 + 2 * number)[None]
        options = {"attention_mask": torch.ones_like(tokens), "output_logits": True, "return_dict_in_generate": True}
        output = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)
        return [logits[0].tolist() for logits in output.logits]

    expected, found = [generate(number) for number in range(7)], {}
    sizes, ends, errors = counted(JointProduct, monkeypatch), [Event() for _ in range(7)], []

    def asked(number: int) -> Sequence:
        def end(error: BaseException | None) -> None:
            errors.append(error)
            ends[number].set()

        return Sequence(lambda: found.update({number: generate(number)}), end)

    rounds = Rounds(model, 7)
    with rounds._change:
        rounds._waiting.extend(map(asked, range(7)))
        rounds._change.notify_all()
    assert all(end.wait(60) for end in ends)
    rounds.close()
    assert errors == [None] * 7
    assert [found[number] for number in range(7)] == expected
    assert sizes == [7] * blocks * 4
    executor_of(model).close()


def counted(joint: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many sequences each computation of a kind was, from now on."""
    sizes: list[int] = []
    compute = joint.compute

    def counting(self: Any, jobs: Any) -> None:
        sizes.append(len(jobs))
        compute(self, jobs)

    monkeypatch.setattr(joint, "compute", counting)
    return sizes


def test_a_computation_that_fails_ends_who_wanted_it_and_the_next_one_runs(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, left = FusedLayer.compute, [4]

    def failing(self: FusedLayer, jobs: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no room for the step")
        compute(self, jobs)

    monkeypatch.setattr(FusedLayer, "compute", failing)
    asked = [Asked(session, text, Sampling()) for text in SHORT]
    later = Asked(session, TEXTS[3], Sampling())
    rounds = Rounds(session.model, 3)
    with rounds._change:
        rounds._waiting.extend(one.sequence for one in asked)
        rounds._change.notify_all()
    for one in asked:
        assert one.done.wait(60)
    rounds.add(later.sequence)
    assert later.done.wait(60)
    rounds.close()
    assert [str(one.error) for one in asked] == ["no room for the step"] * 3
    assert later.tokens == later.alone()


def test_more_than_may_run_wait_in_line(session: Session) -> None:
    asked = [Asked(session, text, sampling(number)) for number, text in enumerate(TEXTS)]
    rounds = Rounds(session.model, 3)
    most = 0
    for one in asked:
        rounds.add(one.sequence)
    for one in asked:
        most = max(most, rounds.running)
        assert one.done.wait(60)
    rounds.close()
    assert most <= 3
    assert max(r.sequences for r in rounds.recent) == 3
    assert [one.tokens for one in asked] == [one.alone() for one in asked]


def test_without_a_thread_left_one_is_refused_and_the_next_one_runs(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, taken = (Asked(session, "The fox", Sampling()) for _ in range(2))

    def start() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(refused.sequence._thread, "start", start)
    rounds = Rounds(session.model, 2)
    for one in (refused, taken):
        rounds.add(one.sequence)
        assert one.done.wait(60)
    assert rounds.alive
    rounds.close()
    assert not rounds.alive
    assert str(refused.error) == "can't start new thread"
    assert taken.tokens == taken.alone()


class Failing:
    """A streamer that fails, or does something else, at a token."""

    def __init__(self, token: int, act: Any) -> None:
        self.left, self.act = token, act

    def put(self, value: Any) -> None:
        if self.left == 0:
            self.act()
        self.left -= 1

    def end(self) -> None:
        pass


def test_one_that_fails_or_is_cancelled_leaves_the_others_alone(session: Session) -> None:
    def fail() -> None:
        raise RuntimeError("mine alone")

    asked = [Asked(session, text, sampling(number)) for number, text in enumerate(TEXTS[:6])]
    rounds = Rounds(session.model, 4)
    asked[1].streamer = Failing(3, fail)
    asked[2].streamer = Failing(2, lambda: rounds.cancel(asked[2].sequence))
    asked[5].streamer = Failing(0, lambda: None)
    for one in asked:
        rounds.add(one.sequence)
    rounds.cancel(asked[5].sequence)
    for one in asked:
        assert one.done.wait(60)
    rounds.close()
    assert str(asked[1].error) == "mine alone"
    assert isinstance(asked[2].error, Cancelled)
    assert isinstance(asked[5].error, Cancelled)
    for number in (0, 3, 4):
        assert asked[number].tokens == asked[number].alone()


def test_a_read_that_fails_ends_who_needs_it_and_the_next_one_runs(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    if session.executor.slots is None:
        pytest.skip("nothing is read")
    rounds = Rounds(session.model, 4)
    read_into, left = type(session.executor.reader).read_into, [9]

    def failing(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise CheckpointError("the disk is gone")
        read_into(*arguments)

    monkeypatch.setattr(type(session.executor.reader), "read_into", failing)
    asked = [Asked(session, text, sampling(number)) for number, text in enumerate(TEXTS[:4])]
    for one in asked:
        rounds.add(one.sequence)
    for one in asked:
        assert one.done.wait(60)
    rounds.close()
    failed = [one for one in asked if one.error is not None]
    assert [str(one.error) for one in failed] == ["the disk is gone"]
    assert all(one.tokens == one.alone() for one in asked if one.error is None)


def test_closing_ends_what_runs_and_what_comes(session: Session) -> None:
    running = Event()
    asked = [Asked(session, text, sampling(number)) for number, text in enumerate(TEXTS[:3])]
    asked[0].streamer = Failing(1, running.set)
    rounds = Rounds(session.model, 1)
    for one in asked[:2]:
        rounds.add(one.sequence)
    assert running.wait(60)
    rounds.close()
    rounds.add(asked[2].sequence)
    assert all(one.done.is_set() for one in asked)
    assert isinstance(asked[1].error, Cancelled)
    assert isinstance(asked[2].error, Cancelled)
    assert asked[2].alone() == asked[2].alone()
    assert executor_of(session.model).slots is None or executor_of(session.model).slots.gate is None


def test_experts_that_are_fetched_serve_whoever_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MixtralConfig(**{**SHARED, **FAMILIES["Mixtral"]})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--group-size", "32"]
    assert rtn.main(flags) == 0
    monkeypatch.setattr("offload.executor.plan", lambda *arguments: replace(plan(*arguments), expert_slots=3))
    model = load(tmp_path / "out", device_map="disk", poison=True)

    @torch.inference_mode()
    def generate(number: int) -> list[int]:
        tokens = torch.arange(1 + number, 5 + 2 * number)[None]
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        found: list[int] = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()
        return found

    expected = [generate(number) for number in range(5)]
    found: dict[int, list[int]] = {}
    ends = [Event() for _ in expected]
    rounds = Rounds(model, 4)

    def asked(number: int) -> Sequence:
        return Sequence(
            lambda: found.update({number: generate(number)}),
            lambda error: ends[number].set(),
        )

    for number in range(5):
        rounds.add(asked(number))
    assert all(end.wait(60) for end in ends)
    rounds.close()
    assert [found[number] for number in range(5)] == expected
    executor_of(model).close()
