"""The files of a corpus: a file, a folder, a glob, or several of these, on any file system."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import posixpath
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.readers import format_by_suffix, suffixes
from schemas.errors import InputError
from schemas.storage import client_errors, filesystem, is_local, join, normalise

_MAGIC = frozenset("*?[")
_STAMPS = (
    "mtime",
    "ino",
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "generation",
    "LastModified",
    "last_modified",
    "created",
)
_SETTLED_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One file as its file system lists it."""

    path: str
    """Relative to the corpus root."""
    size: int
    stamp: str
    """Changes whenever the file is written; empty where the file system says nothing that does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What a corpus consists of."""

    root: str
    files: tuple[CorpusFile, ...]
    """Ordered by path."""
    warnings: tuple[str, ...]
    """Which files were passed over, and why."""


def list_corpus(corpus: str | Sequence[str], *, any_suffix: bool = False) -> Listing:
    """Files of a corpus, below the folder that they share.

    Of folders and globs, the files with a known suffix (with `any_suffix`: all) whose path does not begin a name with '.'
    or '_'; a file that is named itself is always taken. Raises `InputError` where nothing is found.
    """
    named = [corpus] if isinstance(corpus, str) else list(corpus)
    if not named:
        raise InputError("name a corpus: files, folders or globs")
    found: dict[str, Mapping[str, Any]] = {}
    roots = []
    passed: list[str] = []
    for name in named:
        root, entries, explicit = _entries(name)
        roots.append(root)
        taken = entries if explicit else {path: info for path, info in entries.items() if _taken(path, any_suffix)}
        passed += [join(root, path) for path in entries.keys() - taken.keys()]
        if not taken:
            raise InputError(_nothing(name, list(entries)))
        for path, info in taken.items():
            if explicit and not any_suffix and format_by_suffix(path) is None:
                raise InputError(_nothing(name, [path]))
            found[join(root, path)] = info
    root = _common(roots)
    local = is_local(root)
    files = [_corpus_file(url[len(root) :].lstrip("/"), info, local) for url, info in found.items()]
    return Listing(
        root=root, files=tuple(sorted(files, key=lambda file: file.path)), warnings=_passed_over(sorted(set(passed)))
    )


def corpus_files(corpus: str | Sequence[str]) -> tuple[str, list[str]]:
    """(root URL, sorted paths relative to it) of a file, a folder (recursively, known suffixes) or a glob."""
    listing = list_corpus(corpus)
    return listing.root, [file.path for file in listing.files]


def _parent(url: str) -> str:
    scheme, separator, path = url.rpartition("://")
    return f"{scheme}{separator}{path.rpartition('/')[0]}" or "/"


def _entries(corpus: str) -> tuple[str, dict[str, Mapping[str, Any]], bool]:
    """(root, listed files by path below it, whether the corpus names one file)."""
    url = normalise(corpus)
    if is_local(url) and "://" not in url:
        url = os.path.abspath(url)
    try:
        with client_errors("list", corpus):
            return _listed(corpus, url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"cannot list corpus {corpus!r}: {error.strerror or error}") from error


def _listed(corpus: str, url: str) -> tuple[str, dict[str, Mapping[str, Any]], bool]:
    fs, path = filesystem(url)
    if not is_local(url):
        with contextlib.suppress(FileNotFoundError):
            fs.info(path)  # what is refused or fails here is, to `isfile` and `isdir`, merely not there
    if fs.isfile(path):
        return _parent(url), {posixpath.basename(path): fs.info(path)}, True
    if fs.isdir(path):
        root, listed = url, fs.find(path, detail=True)
    elif _MAGIC & set(path):
        root = url
        while _MAGIC & set(root):
            root = _parent(root)
        listed = fs.glob(path, detail=True)
    else:
        raise InputError(f"corpus {corpus!r} does not exist: name a file, a folder or a glob")
    base = filesystem(root)[1].rstrip("/")
    return (
        root,
        {
            name[len(base) :].lstrip("/"): info
            for name, info in listed.items()
            if info["type"] == "file" or (info["type"] != "directory" and fs.isfile(name))
        },
        False,
    )


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _taken(path: str, any_suffix: bool) -> bool:
    return not _hidden(path) and (any_suffix or format_by_suffix(path) is not None)


def _nothing(corpus: str, entries: list[str]) -> str:
    known = f"Supported suffixes: {', '.join(sorted(suffixes()))}; name another format with --format"
    if not entries:
        return f"corpus {corpus!r} holds no file. {known}"
    return f"corpus {corpus!r} holds no file of a known kind (there is, for example, {sorted(entries)[0]!r}). {known}"


def _passed_over(urls: list[str]) -> tuple[str, ...]:
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for url in urls:
        name = posixpath.basename(url)
        known = format_by_suffix(name) is not None
        groups["the path begins a name with '.' or '_'" if known else "unknown suffix"].append(name)
    return tuple(
        f"{len(names):,} file{'s' * (len(names) > 1)} passed over, {why}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        for why, names in sorted(groups.items())
    )


def _common(roots: list[str]) -> str:
    if len(set(roots)) == 1:
        return roots[0]
    schemes = {root.rpartition("://")[0] for root in roots}
    if len(schemes) > 1:
        raise InputError(f"the parts of a corpus lie on one file system, not on {', '.join(sorted(schemes))}")
    scheme, separator, _ = roots[0].rpartition("://")
    return f"{scheme}{separator}{posixpath.commonpath([root.rpartition('://')[2] for root in roots])}"


def _corpus_file(path: str, info: Mapping[str, Any], local: bool) -> CorpusFile:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"file name {path!r} is not valid UTF-8; rename the file") from error
    size = int(info.get("size") or 0)
    marks = [f"{name}={info[name]}" for name in _STAMPS if info.get(name) is not None]
    if local and time.time() - float(info.get("mtime", 0.0)) < _SETTLED_S:
        # Another write within the clock's grain would leave no trace: such a file is read again next time.
        marks = []
    return CorpusFile(path=path, size=size, stamp=f"size={size} {' '.join(marks)}" if marks else "")
