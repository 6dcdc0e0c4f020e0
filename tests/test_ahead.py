"""One step ahead: the same items in order, each made while the one before is used, what is raised where it is due."""

from collections.abc import Iterator
from threading import Event, active_count, get_ident

import pytest

from offload.ahead import ahead


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_the_items_are_the_same(count: int) -> None:
    assert list(ahead(iter(range(count)))) == list(range(count))
    assert list(ahead(iter([None] * count))) == [None] * count


def test_the_next_is_made_while_one_is_used_and_no_more_than_that() -> None:
    made = [Event() for _ in range(5)]
    threads = set()

    def items() -> Iterator[int]:
        for index, event in enumerate(made):
            threads.add(get_ident())
            event.set()
            yield index

    for index in ahead(items()):
        if index + 1 < len(made):
            assert made[index + 1].wait(10)  # without it being asked for
        assert not any(event.wait(0.05) for event in made[index + 2 :])
    assert len(threads) == 1
    assert get_ident() not in threads


def test_what_the_items_raise_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise KeyboardInterrupt

    seen: list[int] = []
    before = active_count()
    with pytest.raises(KeyboardInterrupt):
        seen.extend(ahead(items()))
    assert seen == [1, 2]
    assert active_count() == before


def test_it_can_be_left_in_the_middle() -> None:
    before, items = active_count(), ahead(iter(range(10)))
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert active_count() == before
