"""Where the seconds of a selection go: named clocks that stand where the work is, and cost nothing that could be measured.

    with counted() as seconds:
        select(...)
    seconds["product"]

A clock inside another one takes its time off the outer one's, so the named seconds add up to what was clocked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class _Count:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = [0.0]


_count: ContextVar[_Count | None] = ContextVar("lehr_seconds", default=None)


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Wall seconds by name of everything that runs inside."""
    count = _Count()
    token = _count.set(count)
    try:
        yield count.seconds
    finally:
        _count.reset(token)


@contextmanager
def spent(name: str) -> Iterator[None]:
    """Adds what runs inside (or, as a decorator, the function) to the seconds of `name`, where anybody counts."""
    count = _count.get()
    if count is None:
        yield
        return
    count.inner.append(0.0)
    started = time.perf_counter()
    try:
        yield
    finally:
        total = time.perf_counter() - started
        count.seconds[name] = count.seconds.get(name, 0.0) + total - count.inner.pop()
        count.inner[-1] += total
