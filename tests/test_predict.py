"""The walk through a pass against what can be reckoned by hand, and against limits that hold for any sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.planning.predict import Costs, Tier, walk

SECONDS = st.floats(1e-4, 1e-2)
SHARES = st.floats(0.5, 1.0)


def costs(count: int, compute: float, read: float, outside: float = 0.0, **others: float) -> Costs:
    return Costs((compute,) * count, (read,) * count, outside, **others)


def test_layers_in_memory_take_what_they_compute() -> None:
    assert walk(["host"] * 10, costs(10, 2.0, 100.0, 3.0), 0).seconds == pytest.approx(23.0)


def test_one_slot_overlaps_nothing_but_what_lies_between_passes() -> None:
    found = walk(["disk"] * 10, costs(10, 2.0, 5.0, 3.0), 1)
    assert found.seconds == pytest.approx(10 * (2.0 + 5.0))  # the first read hides behind the 3 seconds outside
    assert found.wait_seconds == pytest.approx(10 * 5.0 - 3.0)


@pytest.mark.parametrize(("compute", "read", "expected"), [(2.0, 5.0, 50.0), (5.0, 2.0, 50.0), (5.0, 5.0, 50.0)])
def test_two_slots_take_the_longer_of_reading_and_computing(compute: float, read: float, expected: float) -> None:
    assert walk(["disk"] * 10, costs(10, compute, read), 2).seconds == pytest.approx(expected)


def test_layers_that_are_kept_give_the_disk_time_even_with_one_slot() -> None:
    tiers: list[Tier] = ["host", "host", "disk"] * 4
    assert walk(tiers, costs(12, 3.0, 6.0), 1).seconds == pytest.approx(36.0)
    assert walk(tiers, costs(12, 3.0, 9.0), 1).seconds == pytest.approx(4 * (3.0 + 9.0))
    unspread: list[Tier] = ["host"] * 8 + ["disk"] * 4
    assert walk(unspread, costs(12, 3.0, 6.0), 1).seconds == pytest.approx(36.0 + 3 * 6.0)


def test_streaming_costs_a_layer_something_beside_the_wait() -> None:
    assert walk(["disk"] * 4, costs(4, 2.0, 1.0, streamed_seconds=0.5), 2).seconds == pytest.approx(4 * 2.5)


def test_reading_slows_computing() -> None:
    # while a read of 1 lasts 0.8 of 4 are computed, the rest after it
    shared = costs(8, 4.0, 1.0, computing_beside=0.8)
    assert walk(["disk"] * 8, shared, 2).seconds == pytest.approx(8 * (1.0 + 3.2))
    assert walk(["host"] * 8, shared, 0).seconds == pytest.approx(32.0)


def test_the_bus_and_the_disk_work_at_once() -> None:
    device = Costs(
        host_seconds=(9.0,) * 6,
        read_seconds=(4.0,) * 6,
        device_seconds=(1.0,) * 6,
        mapped_seconds=(3.0,) * 6,
        copy_seconds=(2.0,) * 6,
    )
    assert walk(["resident"] * 6, device, 0).seconds == pytest.approx(6.0)
    assert walk(["mapped"] * 6, device, 0).seconds == pytest.approx(18.0)
    assert walk(["staged"] * 6, device, 0, 2).seconds == pytest.approx(12.0)
    assert walk(["disk"] * 6, device, 3, 2, "staged").seconds == pytest.approx(24.0)
    assert walk(["disk"] * 6, device, 1, 2, "staged").seconds == pytest.approx(36.0)  # one slot: read, then copy
    assert walk(["disk"] * 6, device, 2, 0, "mapped").seconds == pytest.approx(24.0)
    mixed: list[Tier] = ["staged", "host"] * 3
    assert walk(mixed, device, 0, 2).seconds == pytest.approx(3 * (1.0 + 9.0))


def test_layers_in_parts_overlap_within_a_layer() -> None:
    device = Costs((), (9.0,) * 4, device_seconds=(3.0,) * 4, copy_seconds=(6.0,) * 4)
    whole, parted = (1.0,), (0.5, 0.25, 0.25)
    in_parts = device.in_parts([parted] * 4)
    assert in_parts.copy_seconds == (3.0, 1.5, 1.5) * 4
    assert in_parts.read_seconds == (4.5, 2.25, 2.25) * 4
    assert in_parts.host_seconds == ()
    assert walk(["staged"] * 12, in_parts, 0, 1).seconds == pytest.approx(36.0)  # one slot overlaps nothing
    assert walk(["staged"] * 12, in_parts, 0, 2).seconds == pytest.approx(24.0)
    some = device.in_parts([whole, parted] * 2)
    assert some.device_seconds == (3.0, 1.5, 0.75, 0.75) * 2


@given(st.lists(st.sampled_from(["host", "disk"]), min_size=2, max_size=30), SECONDS, SECONDS, SHARES)
def test_no_pass_is_faster_than_its_slowest_part_or_slower_than_all_in_turn(
    tiers: list[Tier], compute: float, read: float, computing: float
) -> None:
    reads = tiers.count("disk") * read
    for depth in range(1, min(3, tiers.count("disk")) + 1):
        found = walk(tiers, costs(len(tiers), compute, read, computing_beside=computing), depth)
        busy = len(tiers) * compute
        assert found.seconds >= max(busy, reads) * (1 - 1e-9)
        assert found.seconds <= (busy + reads) * (1 + 1e-9)
        assert 0 <= found.wait_seconds <= reads * (1 + 1e-9)
