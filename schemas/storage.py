"""Whole writes and plain reads on any fsspec URL.

A file is written once, whole. On a local file system: temporary name in the same folder, fsync, rename. On an object
store, where an object appears whole or not at all and rename is a copy: one upload conditional on absence.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import posixpath
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import InputError, LehrError

TEMPORARY_PREFIX = ".tmp-"
_UPLOAD_SEPARATOR = b"--==0=="
"""What gcsfs puts between the parts of a simple upload, whatever the content; the upload ends where it stands in a line."""


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it.

    Listings are not cached: several processes write below one run directory.
    """
    try:
        return fsspec.core.url_to_fs(str(url), use_listings_cache=False)
    except ImportError as error:
        package = (
            "pip install 'lehr[s3]'"
            if str(url).startswith("s3")
            else "Install the package that serves this kind of URL"
        )
        raise InputError(f"{url}: {error}. {package}") from error
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


def sha256(data: bytes | bytearray) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def _cannot(action: str, url: str, error: Exception) -> LehrError:
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return InputError(
        f"cannot {action} {url}: {reason}. Check that the place exists, has space left and may be used by you"
    )


def quiet_clients() -> None:
    """Keep what store clients log of a failed request, a traceback, off the terminal: `client_errors` says what failed.

    For commands; not where logging is set to INFO or below.
    """
    if logging.getLogger().getEffectiveLevel() > logging.INFO:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def client_errors(action: str, url: str) -> Iterator[None]:
    """Around one call of a store's client: what it raises becomes an `InputError` that names `url`.

    That something is missing or stands already stays `FileNotFoundError`, `NotADirectoryError` or `FileExistsError`.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except (NotADirectoryError, FileExistsError, LehrError):
        raise
    except Exception as error:  # a client raises much that is no OSError: statuses, broken connections, credentials
        raise _cannot(action, url, error) from error


def exists(url: str) -> bool:
    """Whether a file or folder stands at `url`."""
    fs, path = filesystem(url)
    with client_errors("read", url):
        return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    """The whole content of `url`. Raises `FileNotFoundError` where there is none."""
    fs, path = filesystem(url)
    with client_errors("read", url):
        return fs.cat_file(path)


def remove(url: str, *, recursive: bool = False) -> None:
    """Delete the file at `url`, or everything below the folder there; what is missing is deleted already."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError), client_errors("delete", url):
        if recursive:
            fs.rm(path, recursive=True)
        else:
            fs.rm_file(path)


def _names(url: str, kind: str) -> list[str]:
    fs, path = filesystem(url)
    try:
        with client_errors("list", url):
            entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # The entry of the place itself is a file that is no folder, or the empty object that marks a folder.
    own = path.rstrip("/")
    return sorted(
        {
            posixpath.basename(name)
            for entry in entries
            if entry["type"] == kind and (name := entry["name"].rstrip("/")) != own
        }
    )


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
        with client_errors("write", url):
            if isinstance(fs, LocalFileSystem):
                _write_local(Path(path), data, create_only)
            else:
                _write_object(fs, path, data, create_only)
    except FileNotFoundError as error:
        raise InputError(f"cannot write {url}: there is no such bucket or folder") from error
    except (FileExistsError, NotADirectoryError) as error:
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
    # One chunk as large as the content makes gcsfs send it by itself instead of between separators.
    options = {"chunksize": len(data)} if _UPLOAD_SEPARATOR in data else {}
    try:
        fs.pipe_file(path, data, mode="create", **options)
    except (FileExistsError, FileNotFoundError) as error:
        # A refused upload in chunks is then cancelled; one that the store has forgotten by itself is missing to gcsfs.
        if isinstance(error, FileNotFoundError) and not fs.exists(path):
            raise
        if create_only:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
        if fs.cat_file(path) != data:
            fs.pipe_file(path, data, mode="overwrite", **options)


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
