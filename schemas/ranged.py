"""Files on any fsspec URL as seekable Python files over explicit ranged reads.

A file object of a store's own client may fetch ahead in the background. With gcsfs small reads in a row then become one
request each, and some never return; blocks of a fixed size by explicit ranges do neither.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from schemas.errors import InputError
from schemas.storage import client_errors, filesystem, is_local

BLOCK_BYTES = 1 << 20


class SeekableRanges(io.RawIOBase):
    """A seekable raw file over something that gives ranges of bytes."""

    def __init__(self) -> None:
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        raise NotImplementedError

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer only where the file ends earlier."""
        raise NotImplementedError

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set where the next read begins."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readall(self) -> bytes:
        """The rest of the file, as one range."""
        return self._take(self.size)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or as much of it as the file still has."""
        data = self._take(self._position + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _take(self, end: int) -> bytes:
        data = self.read_range(self._position, end) if end > self._position else b""
        self._position += len(data)
        return data


class _StoredRanges(SeekableRanges):
    def __init__(self, fs: Any, path: str, url: str) -> None:
        super().__init__()
        self._fs, self._path, self._url = fs, path, url
        with client_errors("read", url):
            self._size = int(self._fs.info(self._path)["size"])

    @property
    def size(self) -> int:
        return self._size

    def read_range(self, start: int, end: int) -> bytes:
        end = min(end, self._size)
        if end <= start:
            return b""
        with client_errors("read", self._url):
            data = self._fs.cat_file(self._path, start=start, end=end)
        if len(data) != end - start:
            raise InputError(f"cannot read {self._url}: it changed while it was read; run the command again")
        return data


def open_ranged(url: str, *, block_bytes: int = BLOCK_BYTES) -> io.BufferedIOBase:
    """The file at `url` for reading: a local one as it is, any other in blocks of `block_bytes`.

    Raises `FileNotFoundError` where there is none, `InputError` naming `url` where it cannot be read.
    """
    fs, path = filesystem(url)
    if is_local(url):
        return open(path, "rb")
    return io.BufferedReader(_StoredRanges(fs, path, url), block_bytes)


class _Handler(pafs.FSSpecHandler):
    """Arrow's view of an fsspec file system, with reads by ranges."""

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        ranges = _StoredRanges(self.fs, path, self.fs.unstrip_protocol(path))
        return pa.PythonFile(io.BufferedReader(ranges, BLOCK_BYTES), mode="r")


def arrow_filesystem(url: str) -> tuple[pafs.FileSystem, str]:
    """Arrow's file system for `url` and the path inside it."""
    fs, path = filesystem(url)
    if is_local(url):
        return pafs.LocalFileSystem(), path
    return pafs.PyFileSystem(_Handler(fs)), path
