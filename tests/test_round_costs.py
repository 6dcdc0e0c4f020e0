"""What a round of several sequences costs, and that a server is planned for a full one: against what is reckoned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_machine import FIGURES, GPU, SHAPE

from offload.errors import ResourceError
from offload.planning.choice import plan
from offload.planning.costs import Overheads, decode_costs, round_costs
from offload.planning.needs import Needs
from offload.planning.predict import Costs
from offload.planning.wishes import Wishes
from offload.serve import main
from offload.session import Prompts, Session

MIB = 1 << 20
MANY = 16
BLOCKS = replace(SHAPE, head_blocks_bytes=(100_000_000,) * 4)
KNOWN = Overheads(
    layer_seconds=1e-3,
    streamed_seconds=1.2e-3,
    outside_seconds=3e-3,
    context_seconds=1e-6,
    reading_share=0.8,
    joint=True,
)
MACHINE = replace(GPU, joint_operations_per_second=5e11)


def test_a_round_of_one_is_a_token() -> None:
    for shape in (SHAPE, BLOCKS):
        assert round_costs(shape, MACHINE, KNOWN, 1000, 1) == decode_costs(shape, MACHINE, KNOWN, 1000)


def test_layers_that_are_joint_take_one_product_for_all_and_what_surrounds_it_for_each() -> None:
    alone, found = decode_costs(BLOCKS, MACHINE, KNOWN, 1000), round_costs(BLOCKS, MACHINE, KNOWN, 1000, MANY)
    product = 2 * 320e6 * MANY / 5e11  # of two operations for a weight and token; bytes take 0.010
    assert found.host_seconds == pytest.approx((product + MANY * (1e-3 + 1e-3),) * 2)
    assert found.head_seconds == pytest.approx((max(0.005, 2 * 1e8 * MANY / 5e11),) * 4)
    assert found.outside_seconds == pytest.approx(sum(found.head_seconds) + MANY * 3e-3)
    assert found.streamed_seconds == pytest.approx(MANY * 2e-4)
    assert found.read_seconds == alone.read_seconds
    assert found.head_read_seconds == alone.head_read_seconds
    few = round_costs(BLOCKS, replace(MACHINE, joint_operations_per_second=0.0), KNOWN, 1000, 2)
    assert few.host_seconds == pytest.approx((0.010 + 2 * 2e-3,) * 2)  # bound by its bytes, at the rate of prompts


def test_others_are_computed_one_after_the_other() -> None:
    apart = replace(KNOWN, joint=False)
    alone, found = decode_costs(SHAPE, MACHINE, apart, 1000), round_costs(SHAPE, MACHINE, apart, 1000, MANY)
    for name in ("host_seconds", "device_seconds"):
        assert getattr(found, name) == pytest.approx([MANY * one for one in getattr(alone, name)])
    assert found.outside_seconds == pytest.approx(MANY * alone.outside_seconds)  # the head is not packed
    assert found.outside_device_seconds == pytest.approx(MANY * alone.outside_device_seconds)
    assert found.copy_seconds == alone.copy_seconds
    crossing = zip(alone.copy_seconds, found.device_seconds, strict=True)
    assert found.mapped_seconds == pytest.approx([copy + computing for copy, computing in crossing])


COUNT = 12
LAYERS = replace(SHAPE, layers_bytes=(160_000_000,) * COUNT, layers_weights=(320_000_000,) * COUNT)
NEEDS = Needs(400 * MIB, 50 * MIB, 36 * MIB, 30 * MIB, LAYERS.layers_bytes, 300 * MIB)
HOST_LAYERS_BYTES = 5 * LAYERS.layers_bytes[0]


@pytest.mark.parametrize(
    ("machine", "wishes", "alone_is", "round_is"),
    [
        (
            FIGURES,
            Wishes(cpu_bytes=NEEDS.around_bytes + HOST_LAYERS_BYTES),
            lambda placement: placement.depth == 1,  # the disk bounds it: every layer that is kept saves a read
            lambda placement: placement.depth > 1,  # computing is as long as reading, and can be done meanwhile
        ),
        (
            replace(GPU, copy_bytes_per_second=1.25e9, mapped_bytes_per_second=1.25e9),
            Wishes(gpu_bytes=430 * MIB + 4 * LAYERS.layers_bytes[0]),
            lambda placement: set(placement.tiers) == {"resident", "host"},
            lambda placement: "staged" in placement.tiers,  # what crosses, does so for all
        ),
    ],
    ids=["without a GPU", "with one"],
)
def test_the_tiers_are_those_of_a_full_round(machine: Any, wishes: Wishes, alone_is: Any, round_is: Any) -> None:
    known = replace(KNOWN, joint=not machine.has_device)
    alone, full = decode_costs(LAYERS, machine, known, 100), round_costs(LAYERS, machine, known, 100, MANY)
    for_one, for_all = plan(NEEDS, wishes, alone), plan(NEEDS, wishes, full)
    assert alone_is(for_one)
    assert round_is(for_all)
    assert for_one.seconds(alone) < for_all.seconds(alone)
    assert for_all.seconds(full) < for_one.seconds(full)


def test_a_server_is_planned_for_the_round_that_it_says(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def recall(directory: Path, context: int, wishes: Wishes, parallel: int) -> Costs | None:
        asked.append(parallel)
        return Costs((0.01,) * 3, (0.1,) * 3, 0.02) if parallel == 8 else None

    def refuse(*_: Any) -> Any:
        raise ResourceError("the plan is said")

    monkeypatch.setattr("offload.session.recall_costs", recall)
    monkeypatch.setattr("offload.limit.measure_links", refuse)
    flags = ["--model", str(tiny_checkpoint), "--port", "0", "--api-key", "key", "--context", "64"]
    assert main([*flags, "--parallel", "8"]) == 4
    assert "decode   160.0 tokens/s predicted, of 8 requests together\n" in capsys.readouterr().err
    assert main([*flags, "--parallel", "7"]) == 4
    assert "decode   not predicted; `python -m offload.plan` rehearses it\n" in capsys.readouterr().err
    session = Session(Prompts(tiny_checkpoint), 64, {})
    assert session.predicted_tokens_per_second is None
    session.close()
    assert asked == [8, 7, 1]
