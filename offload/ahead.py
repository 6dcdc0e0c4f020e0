"""Work that is done one step ahead: the next item is made in a thread while the one before is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items; each is asked for in a thread of its own while the one before it is in use.

    So two of them exist at a time, and an item may lie in memory that the item after the next is made in. What `items`
    raises is raised where that item would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        following = thread.submit(_next, items)
        while found := following.result():
            following = thread.submit(_next, items)
            yield found[0]


def _next(items: Iterator[Item]) -> tuple[Item] | None:
    for item in items:
        return (item,)
    return None
