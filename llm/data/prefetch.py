"""Prepare the next item in a thread while the caller works on the last one."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def prefetch(items: Iterable) -> Iterator:
    """Yield the same items in the same order. An error in the thread is raised to the caller."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        upcoming = thread.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, items, end)
            yield item
