"""Reading ahead in a thread: a bounded number of samples, in order, an error at the sample that it is of."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

_BLOCK = 16
"""Samples of one read, at most: ranges of one shard travel together."""
_LOOK_S = 1.0


class Prefetcher:
    """Samples `first`, `first + 1`, ... up to `end`, read ahead of `take`, at most `ahead` of them.

    `read` is a bound method and is not kept alive: with its object the thread ends too.
    """

    def __init__(self, read: Callable[[Sequence[int]], list[Any]], first: int, end: int, ahead: int) -> None:
        self.next = first
        self._read = weakref.WeakMethod(read)
        self._end, self._ahead = end, ahead
        self._ready: deque[Any] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._change = threading.Condition()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, args=(first,), daemon=True, name="lehr-prefetch")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still serves, in this process: a fork copies no threads."""
        return self._process == os.getpid() and not self._closed

    def take(self, count: int) -> list[Any]:
        """The next `count` samples. Raises what reading one of them raised; then nothing is taken, and the thread has ended."""
        with self._change:
            self._ahead = max(self._ahead, count)
            self._change.notify_all()
            self._change.wait_for(lambda: len(self._ready) >= count or self._closed or self._failure is not None)
            if len(self._ready) < count:
                raise self._failure or InterruptedError("the stream was closed while its next sample was waited for")
            self.next += count
            taken = [self._ready.popleft() for _ in range(count)]
            self._change.notify_all()
            return taken

    def close(self) -> None:
        """End the thread and wait for it: as long, at most, as the read it is at may take."""
        if self._process != os.getpid():  # a lock that was held at the fork is held for ever
            return
        with self._change:
            self._closed = True
            self._change.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self, number: int) -> None:
        single = 0
        try:
            while number < self._end:
                size = self._room()
                if not size:
                    return
                # After a failure one by one: what comes before the sample that cannot be read is still delivered.
                size = 1 if single else min(size, _BLOCK, self._end - number)
                read = self._read()
                if read is None:
                    return
                try:
                    samples = read(range(number, number + size))
                except Exception:
                    if size == 1:
                        raise
                    single = size
                    continue
                finally:
                    del read
                with self._change:
                    self._ready.extend(samples)
                    self._change.notify_all()
                number += size
                single = max(0, single - 1)
        except BaseException as error:
            with self._change:
                self._failure = error
                self._change.notify_all()

    def _room(self) -> int:
        """How many samples may be read now; waits for room, 0 where nobody wants any more."""
        with self._change:
            while len(self._ready) >= self._ahead and not self._closed and self._read() is not None:
                self._change.wait(_LOOK_S)
            return 0 if self._closed else self._ahead - len(self._ready)
