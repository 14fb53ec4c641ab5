"""Files of a store on a local disk, by the SHA-256 of their content, within a bound of bytes.

Any number of processes may share a folder. What stands in it under its name is whole: a file is written under a temporary
name, in space that was reserved for it, and renamed. One process fetches a file, the others wait for it. Locks are the
operating system's, so that a killed process leaves none; a file that was evicted while another process reads it stays
readable to that process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from schemas.errors import InputError
from schemas.storage import TEMPORARY_PREFIX

log = logging.getLogger(__name__)

_FINISHED = re.compile(r"[0-9a-f]{64}")
_POLL_S = 0.05


class DiskCache:
    """Least recently used files go when a new one needs their room.

    `wait_s` bounds the wait for another process. Raises `InputError` for a folder that cannot be made.
    """

    def __init__(
        self, folder: str, limit_bytes: int, *, wait_s: float = 600.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        if limit_bytes < 0:
            raise InputError(f"cache_disk_bytes must be at least 0, not {limit_bytes}")
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._wait_s, self._sleep = wait_s, sleep
        self._sound: dict[str, int] = {}
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the cache folder {folder}: {error.strerror}; name another") from error

    def open(self, digest: str, size: int, fetch: Callable[[], bytes]) -> BinaryIO | None:
        """The file of that SHA-256 and size, from the folder, or fetched into it by `fetch`, whose bytes must be it.

        None where it has no room: it is longer than the bound, other processes are filling the rest, or the disk is full.
        """
        if size > self.limit_bytes:
            return None
        for _ in range(2):
            standing = self._standing(digest, size)
            if standing is not None:
                return standing
            try:
                place = self._claim(digest)
            except OSError as error:
                self._passed_over(error)
                return None
            if place is not None:
                return self._fill(place, digest, size, fetch)
        return None

    def forget(self, digest: str) -> None:
        """Delete a file that turned out to be damaged."""
        self._sound.pop(digest, None)
        with contextlib.suppress(OSError):
            (self.folder / digest).unlink()

    def _passed_over(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("cache folder %s is passed over: %s", self.folder, error.strerror or error)

    def _standing(self, digest: str, size: int) -> BinaryIO | None:
        path = self.folder / digest
        try:
            handle = open(path, "rb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            return None
        except OSError as error:
            self._passed_over(error)
            return None
        status = os.fstat(handle.fileno())
        if self._sound.get(digest) != status.st_ino or status.st_size != size:
            if status.st_size != size or hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                handle.close()
                log.warning("%s is damaged; it is fetched again", path)
                self.forget(digest)
                return None
            self._sound[digest] = status.st_ino
            handle.seek(0)
        with contextlib.suppress(OSError):
            os.utime(path)
        return handle

    def _claim(self, digest: str) -> int | None:
        """Descriptor of the temporary file, locked by this process alone; None where another has finished the file, or is still at it
        after `wait_s`."""
        temporary, waited = self.folder / f"{TEMPORARY_PREFIX}{digest}", 0.0
        while True:
            place = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if _lock(place):
                if _is_at(place, temporary) and not (self.folder / digest).exists():
                    return place
                if _is_at(place, temporary):
                    temporary.unlink(missing_ok=True)
                _release(place)
            else:
                os.close(place)
                if waited >= self._wait_s:
                    return None
                self._sleep(_POLL_S)
                waited += _POLL_S
            if (self.folder / digest).exists():
                return None

    def _fill(self, place: int, digest: str, size: int, fetch: Callable[[], bytes]) -> BinaryIO | None:
        temporary, kept = self.folder / f"{TEMPORARY_PREFIX}{digest}", False
        try:
            try:
                if not self._reserve(place, size):
                    return None
            except OSError as error:
                self._passed_over(error)
                return None
            data = fetch()
            try:
                with open(place, "wb", closefd=False) as handle:
                    handle.write(data)
                # Not synced: after a loss of power the hash is checked before the file is used.
                os.replace(temporary, self.folder / digest)
                kept = True
                self._sound[digest] = os.fstat(place).st_ino
                return open(self.folder / digest, "rb")
            except OSError as error:
                if not kept:
                    self._passed_over(error)
                return io.BytesIO(data)
        finally:
            if not kept:
                temporary.unlink(missing_ok=True)
            _release(place)

    def _reserve(self, place: int, size: int) -> bool:
        """Make room and take it, under the folder's lock; false where what others are writing leaves none."""
        with self._folder_lock() as locked:
            if not locked:
                return False
            used, finished = 0, []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if _FINISHED.fullmatch(entry.name):
                        finished.append((status.st_mtime_ns, entry.name, status.st_size))
                        used += status.st_size
                    elif entry.name.startswith(TEMPORARY_PREFIX) and status.st_ino != os.fstat(place).st_ino:
                        used += 0 if _swept(Path(entry.path)) else status.st_size
            for _, name, freed in sorted(finished):
                if used + size <= self.limit_bytes:
                    break
                self.forget(name)
                used -= freed
            if used + size > self.limit_bytes:
                return False
            if size:
                os.posix_fallocate(place, 0, size)
            return True

    @contextlib.contextmanager
    def _folder_lock(self) -> Iterator[bool]:
        place, waited = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), 0.0
        try:
            while not (locked := _lock(place)) and waited < self._wait_s:
                self._sleep(_POLL_S)
                waited += _POLL_S
            yield locked
        finally:
            _release(place)


def _lock(place: int) -> bool:
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(place: int) -> None:
    # Said outright: a forked process may hold a copy of the descriptor, and the lock with it.
    fcntl.flock(place, fcntl.LOCK_UN)
    os.close(place)


def _is_at(place: int, path: Path) -> bool:
    """Whether the file of a descriptor is the one that stands at a path now."""
    try:
        return os.stat(path).st_ino == os.fstat(place).st_ino
    except FileNotFoundError:
        return False


def _swept(path: Path) -> bool:
    """Delete a temporary file that no living process holds."""
    try:
        place = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _lock(place):
            return False
        if _is_at(place, path):
            path.unlink(missing_ok=True)
        return True
    finally:
        _release(place)
