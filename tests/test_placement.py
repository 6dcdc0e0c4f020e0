"""A plan keeps its budget, streams nothing that fits, and says in words what it found; sizes in and out of words."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import LlamaConfig

from offload.checkpoint import Checkpoint
from offload.command import format_bytes, format_seconds, parse_bytes
from offload.errors import ResourceError, UsageError
from offload.planning.choice import plan
from offload.planning.needs import Needs, activation_bytes, cache_bytes, layer_bytes
from offload.planning.placement import Placement
from offload.planning.words import describe

MIB = 1 << 20
NEEDS = Needs(400 * MIB, 50 * MIB, 40 * MIB, 30 * MIB, (20 * MIB,) * 10)

SIZES = st.integers(0, 1 << 36)
PAGES = st.integers(1, 1 << 18).map(lambda pages: pages * 4096)
LAYERS = st.one_of(
    st.lists(PAGES, min_size=1, max_size=40),
    st.builds(lambda size, count: [size] * count, PAGES, st.integers(1, 100)),
)
RANDOM_NEEDS = st.builds(Needs, SIZES, SIZES, SIZES, SIZES, LAYERS.map(tuple))


def smallest_budget(needs: Needs) -> int:
    """What surrounds the layers and room for one of them."""
    return needs.around_bytes + max(needs.layers_bytes)


def all_kept(needs: Needs) -> int:
    return needs.around_bytes + sum(needs.layers_bytes)


@given(RANDOM_NEEDS, st.floats(0, 1))
@example(NEEDS, 0.5)
def test_a_plan_keeps_its_budget(needs: Needs, share: float) -> None:
    smallest, largest = smallest_budget(needs), all_kept(needs)
    budget = smallest + int(share * (largest - smallest))
    placement = plan(needs, budget)
    assert len(placement.tiers) == len(needs.layers_bytes)
    assert set(placement.tiers) <= {"host", "disk"}
    assert placement.expected_bytes <= budget
    held = sum(size for size, tier in zip(needs.layers_bytes, placement.tiers, strict=True) if tier == "host")
    ring = placement.depth * max(needs.layers_bytes) if placement.disk_bytes else 0
    assert placement.expected_bytes == needs.around_bytes + held + ring
    assert placement.disk_bytes == sum(needs.layers_bytes) - held
    if placement.disk_bytes:
        assert budget < largest, "streamed what fits"
        assert 1 <= placement.depth <= min(3, placement.tiers.count("disk"))


@given(RANDOM_NEEDS, st.integers(0, 1 << 40))
def test_all_layers_are_kept_when_they_fit(needs: Needs, spare: int) -> None:
    for budget in (None, all_kept(needs), all_kept(needs) + spare):
        placement = plan(needs, budget)
        assert set(placement.tiers) == {"host"}
        assert (placement.depth, placement.slots_bytes, placement.disk_bytes) == (0, 0, 0)
        assert placement.expected_bytes == all_kept(needs)
    if len(needs.layers_bytes) > 1:
        assert plan(needs, all_kept(needs) - 1).disk_bytes > 0


@given(RANDOM_NEEDS)
@example(NEEDS)
def test_the_smallest_budget_that_an_error_names_works_and_less_does_not(needs: Needs) -> None:
    smallest = smallest_budget(needs)
    assert plan(needs, smallest).expected_bytes <= smallest
    with pytest.raises(ResourceError) as caught:
        plan(needs, smallest - 1)
    named = re.search(r"at least (.+?) is needed", str(caught.value))
    assert named is not None
    budget = parse_bytes(named[1], "--cpu-memory")
    assert plan(needs, budget).expected_bytes <= budget
    assert budget - smallest < MIB


def test_the_error_lists_what_the_memory_is_for() -> None:
    with pytest.raises(ResourceError) as caught:
        plan(NEEDS, 300 * MIB)
    assert caught.value.exit_code == 4
    reserve = NEEDS.around_bytes - 520 * MIB
    assert str(caught.value) == (
        f"--cpu-memory 300.0 MiB: too small for this model; at least {(540 * MIB + reserve) // MIB} MiB is needed: "
        "400.0 MiB for Python, torch and transformers, 50.0 MiB for embeddings and head, "
        f"40.0 MiB for keys and values, {format_bytes(30 * MIB + reserve)} for activations and reserve, "
        "20.0 MiB for one layer"
    )


@pytest.mark.parametrize(
    ("room", "depth", "kept"), [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 3, 1), (8, 3, 5), (9, 3, 6), (10, 0, 10)]
)
def test_the_ring_comes_first_and_then_as_many_layers_as_fit(room: int, depth: int, kept: int) -> None:
    for spare in (0, 20 * MIB - 1):
        placement = plan(NEEDS, NEEDS.around_bytes + room * 20 * MIB + spare)
        assert placement.tiers.count("host") == kept
        assert placement.depth == depth


@given(st.integers(2, 80), st.integers(0, 80))
def test_kept_layers_are_spread_evenly(count: int, room: int) -> None:
    needs = Needs(0, 0, 0, 0, (4096,) * count)
    assume(3 <= room < count)
    tiers = plan(needs, needs.around_bytes + room * 4096).tiers
    kept = [index for index, tier in enumerate(tiers) if tier == "host"]
    assert len(kept) == room - 3
    gaps = [
        after - before for before, after in zip(kept, [*kept[1:], *(count + index for index in kept[:1])], strict=True)
    ]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_plan_in_words() -> None:
    placement = plan(NEEDS, NEEDS.around_bytes + 8 * 20 * MIB)
    lines = describe(placement).splitlines()
    reserve = NEEDS.around_bytes - 520 * MIB
    total = format_bytes(NEEDS.around_bytes + 160 * MIB)
    assert lines == [
        "plan",
        "   400.0 MiB  Python, torch, transformers",
        "    50.0 MiB  embeddings, norms, head",
        "    40.0 MiB  keys and values",
        f"  {format_bytes(30 * MIB + reserve):>10}  activations and reserve",
        "   100.0 MiB  5 of 10 layers, kept in memory",
        "    60.0 MiB  ring of 3 slots for the other 5, on disk",
        f"  {total:>10}  together, of a budget of {total}",
        "   100.0 MiB  read from disk for every pass over the model",
    ]


def test_the_plan_in_words_without_a_budget() -> None:
    lines = describe(plan(NEEDS, None)).splitlines()
    assert "   200.0 MiB  10 of 10 layers, kept in memory" in lines
    assert f"  {format_bytes(all_kept(NEEDS)):>10}  together" in lines
    assert lines[-1] == "         0 B  read from disk for every pass over the model"
    assert not any("ring" in line for line in lines)


def test_a_placement_is_frozen() -> None:
    placement = Placement(("host",), 0, NEEDS, None)
    with pytest.raises(AttributeError):
        placement.depth = 3  # type: ignore[misc]


def test_what_a_model_needs(tiny_checkpoint: Path) -> None:
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    keys = torch.empty(3, 2, 100, 16, dtype=torch.bfloat16)
    assert cache_bytes(config, 100, 2) == 2 * keys.nbytes
    assert activation_bytes(config, 10) == 10 * 4 * (4 * 128 + 4 * 64) + 4 * 4 * 264
    layers = layer_bytes(Checkpoint.open(tiny_checkpoint))
    blobs = [blob for blob in Checkpoint.open(tiny_checkpoint).blobs if blob.module]
    assert len(layers) == 3
    for size, blob in zip(layers, blobs, strict=True):
        assert size % 4096 == 0
        assert 0 <= size - blob.nbytes < 4096


UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@given(st.integers(1, 8000), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_whole_sizes_are_read_exactly(count: int, unit: str, space: str) -> None:
    assert parse_bytes(f" {count}{space}{unit} ", "--cpu-memory") == count * UNITS[unit]


@given(st.integers(1, 10**15 - 1))
def test_a_count_of_bytes_is_read_exactly_and_shown_within_a_twentieth(count: int) -> None:
    assert parse_bytes(str(count), "--x") == count
    assert abs(parse_bytes(format_bytes(count), "--x") - count) <= count / 20


@pytest.mark.parametrize(
    ("text", "expected"), [("1.5GiB", 3 << 29), ("0.5 KB", 500), ("540MiB", 540 << 20), ("10GB", 10**10), ("7", 7)]
)
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text, "--cpu-memory") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "8gib",
        "8gb",
        "8Gb",
        "8 G",
        "-1GiB",
        "1e9",
        "1,5GiB",
        "1.GiB",
        ".5GiB",
        "8GiB!",
        "8GiB 2",
        "inf",
        "nan",
        "9" * 16,
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text, "--cpu-memory")
    assert str(caught.value) == (
        f'--cpu-memory {text!r}: expected a size such as "540MiB", "8GiB" or "10GB" (powers of 1000)'
    )


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0 MiB", "0.4"])
def test_a_size_of_nothing(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--x {text!r}: expected a size above zero")):
        parse_bytes(text, "--x")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB - 1, "1.0 MiB"),
        (MIB, "1.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 41, "6.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (3700, "1:01:40"),
        (360_000, "100:00:00"),
    ],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
