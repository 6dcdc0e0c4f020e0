"""Logits that are no numbers end a text of a GPU, and nothing is waited for to see it: on a faked GPU."""

import sys
from pathlib import Path
from typing import Any

import pytest
from directories import rewritten
from fake_device import FakeDevice, fake_gpu, watch_reads
from test_device import PLACEMENTS
from torch import Tensor, nn

from offload import generate as command
from offload.clock import Clock
from offload.errors import InputError
from offload.planning.needs import Needs
from offload.planning.placement import Placement
from offload.sampling import Sampling
from offload.session import Prompts, Session

pytestmark = pytest.mark.timeout(120)
PROMPT, NEW_TOKENS = [5, 77, 130], 6
NAMES = ["resident", "staged, 2 slots", "mapped", "disk into staged, 2 slots"]


@pytest.fixture(autouse=True)
def _modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused step rounds in another way than the modules of layers on a GPU."""
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)


def on_device(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str) -> Session:
    """A session whose layers are placed as PLACEMENTS says."""

    def plan(needs: Needs, *_: Any) -> Placement:
        return Placement(**{"depth": 0, "needs": needs, "budget_bytes": None, **PLACEMENTS[name]})

    monkeypatch.setattr("offload.executor.plan", plan)
    return Session(Prompts(directory), 64, {"n_gpu_layers": -1})


class Broken:
    """Gives no numbers from the nth pass of a layer on, from 1; passes: counted."""

    def __init__(self, layer: nn.Module, nth: int) -> None:
        self.passes, self.nth = 0, nth
        layer.register_forward_hook(self._left)

    def _left(self, layer: nn.Module, arguments: Any, output: Any) -> Any:
        self.passes += 1
        hidden = output if isinstance(output, Tensor) else output[0]
        if self.passes >= self.nth:
            hidden[..., 3] = float("nan")
        return output


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=1)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_waited_for_to_look_at_logits(
    name: str, sampling: Sampling, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Session(Prompts(tiny_checkpoint), 64, {}).generate(PROMPT, NEW_TOKENS, sampling)
    asked: list[str] = []
    truth = Tensor.__bool__

    def asking(tensor: Tensor) -> bool:
        asked.append(Path(sys._getframe(1).f_code.co_filename).name)
        return truth(tensor)

    with fake_gpu(monkeypatch) as device:
        session = on_device(monkeypatch, tiny_checkpoint, name)
        watch_reads(monkeypatch, device)
        monkeypatch.setattr(Tensor, "__bool__", asking)
        device.waited_in = []
        for streamer in (Clock(), None):
            device.read_laters = 0
            with monkeypatch.context() as patch:
                if streamer is None:  # generate() then reads whether it is at the end, for every token
                    patch.setattr(Tensor, "__bool__", lambda tensor: (device.read_back(), asking(tensor))[1])
                assert session.generate(PROMPT, NEW_TOKENS, sampling, streamer) == host
            assert device.read_laters == len(host)
        assert "MainThread" not in device.waited_in
        assert "finite.py" not in asked
        assert asked
        session.close()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("nth", [1, 3, NEW_TOKENS])
@pytest.mark.parametrize("name", NAMES)
def test_logits_that_are_no_numbers_end_the_text_and_name_the_layer(
    name: str, nth: int, streamed: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first token, in between, and at the last one, after which no other comes; an end would hide the rest."""
    with fake_gpu(monkeypatch, FakeDevice(eager=nth == 3)):
        session = on_device(monkeypatch, tiny_checkpoint, name)
        whole = session.generate(PROMPT, NEW_TOKENS, Sampling(), eos_token_id=None)
        assert len(whole) == NEW_TOKENS
        broken, clock = Broken(session.executor.layers[1], nth), Clock()
        message = (
            rf"after {len(PROMPT) + nth - 1} tokens the model's logits are NaN or infinite; "
            "model.layers.1 is the first layer whose output is; --exact computes"
        )
        with pytest.raises(InputError, match=message):
            session.generate(PROMPT, NEW_TOKENS, Sampling(), clock if streamed else None, eos_token_id=None)
        looking = 1
        assert broken.passes <= nth + looking + (not streamed)
        assert clock.tokens == (whole[: nth - 1] if streamed else [])
        session.close()


def test_a_text_after_one_that_ended_so_is_right(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch):
        session = on_device(monkeypatch, tiny_checkpoint, "staged, 2 slots")
        whole = session.generate(PROMPT, NEW_TOKENS, Sampling())
        broken = Broken(session.executor.layers[1], 2)
        with pytest.raises(InputError):
            session.generate(PROMPT, NEW_TOKENS, Sampling())
        broken.nth = 1 << 30
        assert session.generate(PROMPT, NEW_TOKENS, Sampling()) == whole
        session.close()


def test_the_command_shows_no_wrong_token(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][5] = float("nan")

    directory = rewritten(tiny_checkpoint, tmp_path / "copy", change)
    with fake_gpu(monkeypatch):
        assert command.main(["--model", str(directory), "--prompt", "The", "--no-chat", "--n-gpu-layers", "-1"]) == 3
    said = capsys.readouterr()
    assert said.out.strip() == ""
    assert "tokens the model's logits are NaN or infinite; model.layers.1 is the first layer whose" in said.err
