"""Whole writes and plain reads on any fsspec URL.

A file is written once, whole. On a local file system: temporary name in the same folder, fsync, rename. On an object
store, where an object appears whole or not at all and rename is a copy: one upload conditional on absence.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import InputError, LehrError

TEMPORARY_PREFIX = ".tmp-"


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it."""
    try:
        return fsspec.core.url_to_fs(str(url))
    except ImportError as error:
        raise InputError(f"{url}: {error}. Install the package that serves this kind of URL") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error


def is_local(url: str) -> bool:
    """Whether `url` names a place on a local file system."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def normalise(url: str | os.PathLike[str]) -> str:
    """A URL without a trailing slash; local paths become absolute."""
    text = os.fspath(url)
    if "://" in text or "::" in text:
        return text if text.endswith("://") else text.rstrip("/")
    return str(Path(text).expanduser().absolute())


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended."""
    return posixpath.join(url, *parts)


def sha256(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def _cannot(action: str, url: str, error: OSError) -> LehrError:
    reason = error.strerror or str(error)
    return InputError(
        f"cannot {action} {url}: {reason}. Check that the place exists, has space left and may be used by you"
    )


def exists(url: str) -> bool:
    """Whether a file or folder stands at `url`."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    """The whole content of `url`. Raises `FileNotFoundError` where there is none."""
    fs, path = filesystem(url)
    try:
        return fs.cat_file(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _cannot("read", url, error) from error


def _names(url: str, kind: str) -> list[str]:
    fs, path = filesystem(url)
    fs.invalidate_cache(path)
    try:
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _cannot("list", url, error) from error
    return sorted({posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == kind})


def list_names(url: str, suffix: str = "") -> list[str]:
    """Sorted names of the finished files directly in folder `url`; empty where there is no such folder."""
    return [name for name in _names(url, "file") if name.endswith(suffix) and not name.startswith(TEMPORARY_PREFIX)]


def list_folders(url: str) -> list[str]:
    """Sorted names of the folders directly in folder `url`; empty where there is no such folder."""
    return _names(url, "directory")


def write_whole(url: str, data: bytes, *, create_only: bool = False) -> None:
    """Write `data` so that a reader sees all of it or none.

    With `create_only` a file that already stands is left alone and `FileExistsError` is raised; otherwise equal content
    is left alone and different content is replaced.
    """
    fs, path = filesystem(url)
    try:
        if isinstance(fs, LocalFileSystem):
            _write_local(Path(path), data, create_only)
        else:
            _write_object(fs, path, data, create_only)
    except OSError as error:
        if create_only and isinstance(error, FileExistsError):
            raise
        raise _cannot("write", url, error) from error


def _write_local(path: Path, data: bytes, create_only: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        if create_only:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_object(fs: Any, path: str, data: bytes, create_only: bool) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        if create_only:
            raise
        fs.invalidate_cache(path)
        if fs.cat_file(path) != data:
            fs.pipe_file(path, data, mode="overwrite")


def sweep_temporary(url: str, *, older_than_s: float = 24 * 3600, now: float | None = None) -> int:
    """Delete temporary files that a killed process left below local folder `url`; returns how many.

    Only files older than `older_than_s` go, so that another live process never loses the one it is writing.
    """
    if not is_local(url):
        return 0
    limit = (time.time() if now is None else now) - older_than_s
    count = 0
    for temporary in Path(filesystem(url)[1]).rglob(f"{TEMPORARY_PREFIX}*"):
        try:
            if temporary.is_file() and temporary.stat().st_mtime < limit:
                temporary.unlink()
                count += 1
        except FileNotFoundError:
            continue
    return count
