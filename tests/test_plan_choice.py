"""Whatever the sizes and the speed of the links: budgets are kept, the GPU is filled first, more is never slower."""

import dataclasses
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.command import parse_bytes
from offload.errors import ResourceError
from offload.planning.choice import plan
from offload.planning.device_needs import SplitNeeds
from offload.planning.needs import Needs
from offload.planning.placement import Placement
from offload.planning.predict import Costs
from offload.planning.wishes import Wishes, WishWords
from offload.planning.words import describe

MIB = 1 << 20
LAYER = 20 * MIB
COUNT = 12
NEEDS = Needs(400 * MIB, 50 * MIB, 36 * MIB, 30 * MIB, (LAYER,) * COUNT, 300 * MIB)
IN_PARTS = dataclasses.replace(
    NEEDS,
    split=SplitNeeds(
        parts_bytes=((4 * MIB, 5 * MIB, 5 * MIB, 6 * MIB),) * COUNT,
        rest_bytes=(MIB // 8,) * COUNT,
        converted_bytes=(0,) * COUNT,
        rest_converted_bytes=(0,) * COUNT,
    ),
)
HOST_AROUND = NEEDS.around_bytes
DEVICE_AROUND = (300 + 50 + 36 + 30 + 8) * MIB
HOST_BESIDE_DEVICE = (400 + 30 + 8) * MIB

SECONDS = st.floats(1e-4, 1e-2)
MACHINES = st.builds(
    lambda host, read, outside, streamed, computing, copy, mapped, device: Costs(
        host_seconds=(host,) * COUNT,
        read_seconds=(read,) * COUNT,
        outside_seconds=outside,
        streamed_seconds=streamed,
        computing_beside=computing,
        device_seconds=(host * device,) * COUNT,
        mapped_seconds=(max(mapped, host * device),) * COUNT,
        copy_seconds=(copy,) * COUNT,
        outside_device_seconds=outside * device,
    ),
    SECONDS,
    SECONDS,
    SECONDS,
    st.floats(0, 1e-3),
    st.floats(0.5, 1.0),
    SECONDS,
    SECONDS,
    st.floats(0.01, 1.0),
)
DESKTOP = Costs(
    host_seconds=(1e-3,) * COUNT,
    read_seconds=(8e-3,) * COUNT,
    outside_seconds=2e-3,
    device_seconds=(2e-5,) * COUNT,
    mapped_seconds=(1.2e-3,) * COUNT,
    copy_seconds=(8e-4,) * COUNT,
    outside_device_seconds=1e-4,
)


def host_budget(layers: float) -> int:
    return HOST_AROUND + int(layers * LAYER)


@given(MACHINES, st.integers(1, COUNT + 2), st.integers(1, COUNT + 2))
def test_more_memory_is_never_slower(costs: Costs, one: int, other: int) -> None:
    less, more = sorted((one, other))
    slower, faster = (plan(NEEDS, host_budget(layers), costs) for layers in (less, more))
    assert slower.expected_bytes <= host_budget(less)
    assert faster.expected_bytes <= host_budget(more)
    assert faster.seconds(costs) <= slower.seconds(costs) * (1 + 1e-9)


@given(MACHINES, st.integers(1, COUNT - 1))
def test_as_many_layers_are_kept_as_the_ring_leaves_room_for(costs: Costs, layers: int) -> None:
    placement = plan(NEEDS, host_budget(layers), costs)
    assert placement.tiers.count("host") == layers - placement.depth
    assert 1 <= placement.depth <= 3


@given(MACHINES)
def test_what_fits_is_not_streamed_however_fast_the_disk(costs: Costs) -> None:
    assert set(plan(NEEDS, host_budget(COUNT), costs).tiers) == {"host"}
    assert set(plan(NEEDS, None, costs).tiers) == {"host"}


def test_the_depth_of_the_ring_is_chosen() -> None:
    slow_disk = Costs((1e-3,) * COUNT, (5e-2,) * COUNT)
    assert plan(NEEDS, host_budget(6), slow_disk).depth == 1  # two more layers kept save two reads
    slow_processor = Costs((1e-2,) * COUNT, (8e-3,) * COUNT, streamed_seconds=1e-9)
    assert plan(NEEDS, host_budget(2), slow_processor).depth == 2  # with one slot nothing hides the reads
    assert plan(NEEDS, Wishes(cpu_bytes=host_budget(6), slots=3), slow_disk).depth == 3


@settings(deadline=None, max_examples=40)
@given(MACHINES, st.integers(0, COUNT + 3), st.integers(1, COUNT + 3))
@example(DESKTOP, 5, 12)
def test_budgets_are_kept_and_the_gpu_is_filled_before_a_byte_is_streamed(costs: Costs, gpu: int, cpu: int) -> None:
    wishes = Wishes(cpu_bytes=HOST_BESIDE_DEVICE + (cpu + 4) * LAYER, gpu_bytes=DEVICE_AROUND + gpu * LAYER)
    placement = plan(NEEDS, wishes, costs)
    assert placement.fits
    assert placement.device_bytes <= DEVICE_AROUND + gpu * LAYER
    resident = placement.tiers.count("resident")
    free = DEVICE_AROUND + gpu * LAYER - placement.device_bytes
    assert resident == COUNT or free < LAYER + NEEDS.cache_bytes // COUNT + COUNT  # and its keys and values
    if gpu >= COUNT:
        assert resident == COUNT


@settings(deadline=None, max_examples=40)
@given(MACHINES, st.integers(0, COUNT), st.integers(0, COUNT))
def test_more_gpu_memory_is_never_slower(costs: Costs, one: int, other: int) -> None:
    less, more = sorted((one, other))
    seconds = [plan(NEEDS, Wishes(gpu_bytes=DEVICE_AROUND + n * LAYER), costs).seconds(costs) for n in (less, more)]
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("changes", "tier"),
    [
        ({"copy_seconds": (1e-4,) * COUNT}, "staged"),
        ({"mapped_seconds": (1e-4,) * COUNT, "copy_seconds": (1e-3,) * COUNT}, "mapped"),
        ({"host_seconds": (1e-5,) * COUNT}, "host"),
    ],
)
def test_computing_streaming_and_mapping_are_weighed(changes: dict[str, tuple[float, ...]], tier: str) -> None:
    costs = dataclasses.replace(DESKTOP, **changes)
    placement = plan(NEEDS, Wishes(gpu_bytes=DEVICE_AROUND + 4 * LAYER), costs)
    assert set(placement.tiers) == {"resident", tier}


def test_a_mixture_uses_processor_and_bus_at_once() -> None:
    costs = dataclasses.replace(DESKTOP, host_seconds=(2e-3,) * COUNT, mapped_seconds=(4e-3,) * COUNT)
    costs = dataclasses.replace(costs, copy_seconds=(1.5e-3,) * COUNT)
    placement = plan(NEEDS, Wishes(gpu_bytes=DEVICE_AROUND + 4 * LAYER), costs)
    assert {"host", "staged"} <= set(placement.tiers)


@pytest.mark.parametrize(
    ("words", "resident"),
    [
        ({"n_gpu_layers": 5}, 5),
        ({"n_gpu_layers": -1}, 12),
        ({"n_gpu_layers": 99}, 12),
        ({"gpu_weights_percent": 50}, 6),
        ({"gpu_weights_percent": 20.0}, 2),
        ({"cpu_offload_gb": 90 / 1024}, 7),
        ({"cpu_offload_gb": 1000}, 0),
    ],
)
def test_shares_of_the_gpu_are_as_asked(words: WishWords, resident: int) -> None:
    assert plan(NEEDS, Wishes.of(words), DESKTOP).tiers.count("resident") == resident


def test_a_device_map_is_followed_to_the_letter() -> None:
    layers = [f"model.layers.{index}" for index in range(COUNT)]
    device_map = {"": "cpu", "model.layers.3": "disk", "model.layers.11": "disk"}
    placement = plan(NEEDS, Wishes.of({"device_map": device_map}).on(["model", *layers], layers), DESKTOP)
    assert [index for index, tier in enumerate(placement.tiers) if tier == "disk"] == [3, 11]
    device_map = {"model": 0, "model.layers.0": "cpu", "model.layers.3": "disk"}
    placement = plan(NEEDS, Wishes.of({"device_map": device_map}).on(["model", *layers], layers), DESKTOP)
    assert placement.tiers.count("resident") == 10
    assert placement.tiers[3] == "disk"
    assert placement.tiers[0] in ("host", "staged", "mapped")


def test_sequential_keeps_the_first_layers() -> None:
    tiers = plan(NEEDS, Wishes(cpu_bytes=host_budget(8), sequential=True)).tiers
    assert tiers == ("host",) * 5 + ("disk",) * 7


@pytest.mark.parametrize("wishes", [Wishes(cpu_bytes=HOST_AROUND), Wishes(gpu_bytes=350 * MIB)])
def test_the_smallest_budget_that_is_named_works(wishes: Wishes) -> None:
    with pytest.raises(ResourceError) as caught:
        plan(NEEDS, wishes, DESKTOP)
    named = re.match(r"--(cpu|gpu)-memory .*too small for this model; at least (.+?) is needed: ", str(caught.value))
    assert named is not None
    budget = parse_bytes(named[2], "")
    enough = Wishes(cpu_bytes=budget) if named[1] == "cpu" else Wishes(gpu_bytes=budget)
    assert plan(NEEDS, enough, DESKTOP).fits


def test_a_plan_with_a_gpu_in_words() -> None:
    placement = Placement(
        ("resident", "staged", "host", "disk") * 3, 2, NEEDS, None, 2, DEVICE_AROUND + 5 * LAYER, "host"
    )
    assert describe(placement).splitlines() == [
        "plan",
        "   400.0 MiB  Python, torch, transformers",
        "    18.0 MiB  keys and values",
        "    38.0 MiB  activations and reserve",
        "    60.0 MiB  3 of 12 layers, kept in memory",
        "    60.0 MiB  3 of 12 layers, copied to the GPU",
        "    40.0 MiB  ring of 2 slots for the other 3, on disk",
        "   616.0 MiB  together",
        "on the GPU",
        "   300.0 MiB  driver",
        "    50.0 MiB  embeddings, norms, head",
        "    18.0 MiB  keys and values",
        "    38.0 MiB  activations and reserve",
        "    60.0 MiB  3 of 12 layers, on the GPU",
        "    40.0 MiB  ring of 2 slots",
        "   506.0 MiB  together, of a budget of 524.0 MiB",
        "    60.0 MiB  read from disk for every pass over the model",
    ]


def test_one_slot_on_the_gpu_where_two_do_not_fit_and_the_bus_is_fast() -> None:
    fast_bus = dataclasses.replace(DESKTOP, copy_seconds=(1e-5,) * COUNT)
    for slots, depth, words in ((1.5, 1, "one slot: no layer is copied while another is computed"), (2, 2, "2 slots")):
        wishes = Wishes(gpu_bytes=DEVICE_AROUND + int(slots * LAYER))
        found = plan(NEEDS, wishes, fast_bus)
        assert (found.tiers, found.device_depth) == (("staged",) * COUNT, depth)
        assert found.fits
        assert words in describe(found)
        other = plan(NEEDS, wishes)  # without costs there are layers that stay on the GPU, or two slots
        assert other.fits
        assert other.device_depth != 1
    with pytest.raises(ResourceError, match=r"--gpu-memory .* too small"):
        plan(NEEDS, Wishes(gpu_bytes=DEVICE_AROUND - NEEDS.cache_bytes), fast_bus)


@settings(deadline=None, max_examples=40)
@given(MACHINES, st.booleans(), st.integers(-40, 8 * LAYER // MIB), st.integers(0, COUNT), st.integers(0, 2))
def test_what_fits_whole_is_planned_as_if_there_were_no_parts(
    costs: Costs, measured: bool, gpu_mib: int, cpu: int, resident: int
) -> None:
    wishes = Wishes(
        cpu_bytes=HOST_BESIDE_DEVICE + (cpu + 1) * LAYER,
        gpu_bytes=DEVICE_AROUND + gpu_mib * MIB,
        gpu_layers=resident or None,
    )
    try:
        whole = plan(NEEDS, wishes, costs if measured else None)
    except ResourceError:
        try:
            assert plan(IN_PARTS, wishes, costs if measured else None).split
        except ResourceError:
            return
    else:
        assert plan(IN_PARTS, wishes, costs if measured else None) == dataclasses.replace(whole, needs=IN_PARTS)


@pytest.mark.parametrize("costs", [None, DESKTOP])
def test_parts_find_room_where_no_layer_does_and_the_refusal_counts_on_them(costs: Costs | None) -> None:
    with pytest.raises(ResourceError) as refused:
        plan(IN_PARTS, Wishes(gpu_bytes=350 * MIB), costs)
    named = re.search(r"at least (.+?) is needed: .*, 6.2 MiB for layers, copied in parts$", str(refused.value))
    assert named is not None
    smallest = plan(IN_PARTS, Wishes(gpu_bytes=parse_bytes(named[1], "")), costs)
    assert (smallest.split, smallest.device_depth, smallest.tiers.count("staged")) == (True, 1, 2)
    with pytest.raises(ResourceError):
        plan(IN_PARTS, Wishes(gpu_bytes=parse_bytes(named[1], "") - MIB), costs)
    with pytest.raises(ResourceError):
        plan(NEEDS, Wishes(gpu_bytes=parse_bytes(named[1], "")), costs)


def test_layers_in_parts_in_words() -> None:
    rest, slot, held = COUNT * MIB // 8, 6 * MIB, 36 * MIB
    for slots, said in (
        (2, "ring of 2 slots for layers in 4 parts"),
        (1, "one slot: no part of a layer is copied while another is computed"),
    ):
        budget = DEVICE_AROUND - held + rest + slots * slot
        without_cache = dataclasses.replace(IN_PARTS, cache_bytes=0)
        found = plan(without_cache, Wishes(gpu_bytes=budget))
        assert (found.split, found.device_depth, found.device_bytes) == (True, slots, budget)
        assert found.tiers == ("staged",) * COUNT
        lines = [line.strip() for line in describe(found).splitlines()]
        assert "1.5 MiB  norms and the like of layers that are copied in parts" in lines
        assert f"{slots * 6}.0 MiB  {said}" in lines


def test_what_stays_of_layers_in_parts_has_room_on_its_way() -> None:
    assert IN_PARTS.split is not None
    large = dataclasses.replace(IN_PARTS.split, rest_bytes=(60 * MIB,) * COUNT)
    needs = dataclasses.replace(IN_PARTS, split=large)
    placement = Placement(("disk",) * COUNT, 2, needs, None, 2, None, "staged", split=True)
    assert placement.host_loading_bytes == 60 * MIB - NEEDS.working_bytes
    assert placement.device_bytes == DEVICE_AROUND + COUNT * 60 * MIB + 2 * 6 * MIB


def test_parts_are_weighed_by_what_they_take() -> None:
    """Copies through two slots hide most of what is computed; through one they are added to it."""
    costs = dataclasses.replace(DESKTOP, device_seconds=(8e-4,) * COUNT)
    placement = Placement(("staged",) * COUNT, 0, IN_PARTS, None, 2, DEVICE_AROUND, split=True)
    assert COUNT * 8e-4 < placement.seconds(costs) < COUNT * 16e-4 * 0.6
    one_slot = dataclasses.replace(placement, device_depth=1)
    assert one_slot.seconds(costs) == pytest.approx(COUNT * 16e-4, rel=0.05)
