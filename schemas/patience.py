"""Reads of a store that may be slow or fail for a while: a time limit for every try, a bounded number of tries, growing pauses."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from schemas.errors import InputError
from schemas.storage import client_errors, filesystem

log = logging.getLogger(__name__)

_UNIT_BYTES = 8 << 20
_STATUSES = {408, 429, 500, 502, 503, 504}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a read is waited for and how often it is tried.

    Clients of object stores try again by themselves (gcsfs six times); what they have given up is not tried again here. What
    escapes them is: an answer that does not come, a connection that breaks outside of their care, and everything that passes
    where a client never tries twice, as fsspec's for HTTP.
    """

    attempts: int = 4
    """Tries of one read."""
    limit_s: float = 120.0
    """Seconds that a try may take, for every 8 MiB it asks for; above what gcsfs's own tries take. A local file system is not timed."""
    pause_s: float = 1.0
    """Seconds before the second try; they double from try to try."""
    sleep: Callable[[float], None] = time.sleep
    """What waits between tries."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InputError(f"read_attempts must be at least 1, not {self.attempts}")
        if self.limit_s <= 0:
            raise InputError(f"read_limit_s must be above 0, not {self.limit_s}")

    def whole(self, url: str, size: int = 0) -> bytes:
        """The whole file at `url`; `size` says how many bytes are expected. Raises `FileNotFoundError` where there is none."""
        return self._try(url, size, lambda path: ("cat_file", (path,), {}))

    def ranges(self, url: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The (start, size) ranges of the file at `url`, by one request each."""
        starts, ends = [start for start, _ in spans], [start + size for start, size in spans]
        asked = sum(size for _, size in spans)
        return self._try(
            url, asked, lambda path: ("cat_ranges", ([path] * len(spans), starts, ends), {"on_error": "raise"})
        )

    def _try(self, url: str, size: int, call: Callable[[str], tuple[str, tuple[Any, ...], dict[str, Any]]]) -> Any:
        fs, path = filesystem(url)
        name, arguments, options = call(path)
        limit, pause = self.limit_s * -(-max(size, 1) // _UNIT_BYTES), self.pause_s
        with client_errors("read", url):
            for left in reversed(range(self.attempts)):
                try:
                    return _limited(fs, name, arguments, options, limit)
                except Exception as error:
                    if not worth_another_try(error, fs):
                        raise
                    if not left:
                        raise _spent(error, self.attempts, limit) from error
                    log.warning("reading %s: %s; trying again in %g s", url, _said(error, limit), pause)
                self.sleep(pause)
                pause *= 2
        raise AssertionError("a read ends with bytes or an error")


def worth_another_try(error: BaseException, fs: Any) -> bool:
    """Whether a failed read may succeed a moment later, and the client has not found that out by itself."""
    if type(fs).__module__.partition(".")[0] == "gcsfs":
        from gcsfs.retry import is_retriable

        if is_retriable(error):
            return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    status = getattr(error, "status", getattr(error, "code", None))
    if status is not None:
        return status in _STATUSES
    return any(kind.__module__.startswith("aiohttp") for kind in type(error).__mro__)


def _said(error: BaseException, limit: float) -> str:
    timed = isinstance(error, TimeoutError) and not str(error)
    return f"no answer within {limit:g} s" if timed else f"{type(error).__name__}: {error}"


def _spent(error: BaseException, attempts: int, limit: float) -> OSError:
    return OSError(f"{_said(error, limit)}, at each of {attempts} tries")


def _limited(fs: Any, name: str, arguments: tuple[Any, ...], options: dict[str, Any], limit: float) -> Any:
    """`fs.name(*arguments)`, or `TimeoutError`. A client that works in the background is told to give up; any other call is
    left to itself in a thread, which ends when the call does."""
    method = getattr(fs, name)
    if isinstance(fs, LocalFileSystem):
        return method(*arguments, **options)
    if fs.async_impl:
        return method(*arguments, timeout=limit, **options)
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((method(*arguments, **options), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True, name="lehr-read")
    thread.start()
    thread.join(limit)
    if not outcome:
        raise TimeoutError
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result
