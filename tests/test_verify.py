"""`offload.verify` passes a good checkpoint, and names what a damaged file or a wrong executor got wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice, fake_gpu

from offload.checkpoint import Checkpoint
from offload.transfer import Slots
from offload.verify import main, offers

FLAGS = ("--prompt-tokens", "12", "--new-tokens", "3")


def test_a_good_checkpoint(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_checkpoint), *FLAGS]) == 0
    output = capsys.readouterr()
    assert "checksums 5/5" in output.err
    assert "no GPU: its placements are not tried" in output.err
    lines = [line.split("  ") for line in output.out.splitlines()]
    assert [line[0].strip() for line in lines] == ["ok"] * 5
    names = [next(part for part in line[1:] if part.strip()).strip() for line in lines]
    assert names == [
        "all layers in memory",
        "all layers on disk, 1 slot",
        "all layers on disk, 2 slots",
        "all layers on disk, 3 slots",
        "every second layer on disk",
    ]
    assert all(line[-1].endswith(" tokens/s") for line in lines)


def test_as_json_and_exactly(tiny_asymmetric: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_asymmetric), *FLAGS, "--exact", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nbytes"] == Checkpoint.open(tiny_asymmetric).nbytes
    assert [outcome["differs"] for outcome in report["placements"]] == [None] * 5


def test_a_damaged_checkpoint(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    blob = Checkpoint.open(directory).blobs[2]
    spec = blob.tensors[f"{blob.module}.mlp.up_proj.weight_packed"]
    content = bytearray(blob.path.read_bytes())
    content[blob.offset + spec.offset + 7] ^= 16
    blob.path.write_bytes(content)
    assert main(["--model", str(directory), *FLAGS]) == 3
    output = capsys.readouterr()
    assert "tensor 'model.layers.1.mlp.up_proj.weight_packed' is damaged" in output.err
    assert output.out == ""


def test_an_executor_that_takes_the_wrong_slot(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Slots.wait

    def wrong(slots: Slots, position: int) -> int:
        return (wait(slots, position) + 1) % len(slots.arenas)

    monkeypatch.setattr(Slots, "wait", wrong)
    assert main(["--model", str(tiny_checkpoint), *FLAGS]) == 3
    output = capsys.readouterr()
    states = [line.split()[0] for line in output.out.splitlines()]
    assert states == ["ok", "ok", "DIFFERS", "DIFFERS", "DIFFERS"]  # in a ring of one slot there is no other
    assert output.err.splitlines()[-1] == (
        f"error: {tiny_checkpoint}: other logits than all layers in memory: all layers on disk, 2 slots (in the "
        "prompt); all layers on disk, 3 slots (in the prompt); every second layer on disk (in the prompt); no token of "
        "these placements can be trusted: report it with the output of this command"
    )


def test_a_fault_in_a_later_token_is_placed(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Slots.wait
    waits: list[int] = []

    def flipping(slots: Slots, position: int) -> int:
        slot = wait(slots, position)
        waits.append(position)
        if len(waits) == 8:  # three layers in the prompt, three in the first token after it
            slots.arenas[slot].bytes[: slots.blobs[position].nbytes] ^= 1
        return slot

    monkeypatch.setattr(Slots, "wait", flipping)
    assert main(["--model", str(tiny_checkpoint), *FLAGS]) == 3
    assert "all layers on disk, 1 slot (in token 2 after the prompt)" in capsys.readouterr().err


def test_a_model_larger_than_memory_is_compared_with_itself_streamed(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.verify.available_bytes", lambda: 1000)
    assert main(["--model", str(tiny_checkpoint), *FLAGS]) == 0
    output = capsys.readouterr()
    assert "do not fit into the 1000 B that are free: the reference is all layers on disk, 1 slot" in output.err
    assert len(output.out.splitlines()) == 3


PARTS = ["staged in parts", "disk to staged in parts"]
MAPPED = ["mapped", "disk to mapped"]


@pytest.mark.parametrize(
    ("nbytes", "names"),
    [
        (1 << 30, ["resident", "half staged", "staged", "disk to staged"]),
        (9 << 30, ["staged", "disk to staged"]),
    ],
)
def test_every_placement_of_a_gpu_is_compared(
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nbytes: int,
    names: list[str],
) -> None:
    """On a device that is faked, of 8 GiB, which a checkpoint may not fit."""
    monkeypatch.setattr("offload.verify.available_bytes", lambda: 10 << 30)
    monkeypatch.setattr(Checkpoint, "nbytes", property(lambda checkpoint: nbytes))
    with fake_gpu(monkeypatch) as device:
        monkeypatch.setattr("offload.gpu.device.find_device", lambda: device)
        assert main(["--model", str(tiny_checkpoint), *FLAGS, "--json"]) == 0
    placements = json.loads(capsys.readouterr().out)["placements"]
    of_device = [one for one in placements if one["placement"].startswith("GPU: ")]
    kinds = [(names, names[0]), ([f"{names[0]}, modules", *PARTS], f"{names[0]}, modules"), (MAPPED, "mapped")]
    expected = [(f"GPU: {name}", f"GPU: {first}") for kind, first in kinds for name in kind]
    assert [(one["placement"], one["reference"]) for one in of_device] == expected
    assert [one["differs"] for one in placements] == [None] * len(placements)


def test_a_copy_that_goes_wrong_is_found(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = FakeDevice.copy

    def short(device: FakeDevice, target: Any, source: Any) -> None:
        copy(device, target[target.nbytes // 2 :], source[source.nbytes // 2 :])

    monkeypatch.setattr(FakeDevice, "copy", short)
    with fake_gpu(monkeypatch) as device:
        monkeypatch.setattr("offload.gpu.device.find_device", lambda: device)
        assert main(["--model", str(tiny_checkpoint), *FLAGS]) == 3
    told = capsys.readouterr().err
    assert "other logits than GPU: resident, GPU: resident, modules: GPU: half staged (in the prompt); " in told


def test_offers_of_a_single_layer() -> None:
    class OneLayer:
        nbytes = 10
        blobs: tuple[Any, ...] = (type("Blob", (), {"module": "layers.0"}),)

    names = [offer.name for offer in offers(OneLayer(), 100)]  # type: ignore[arg-type]
    assert names == ["all layers in memory", "all layers on disk, 1 slot"]


def test_flags_that_cannot_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--new-tokens", "0"]) == 2
    assert capsys.readouterr().err == "error: --new-tokens 0: expected at least 1\n"
