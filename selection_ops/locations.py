"""Where a model lies: a folder, a .gguf file, any fsspec URL of one, or a hub id, each as a folder on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from schemas.errors import InputError
from schemas.fingerprint import hash128
from schemas.storage import client_errors, filesystem

_FETCHED = (".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja")


def local_folder(location: str, revision: str | None = None) -> Path:
    """Folder of a model on this machine; URLs and hub ids are fetched into a cache first.

    Raises `InputError` where there is no such folder, URL or hub id.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{location} is a file; name the model's folder, or a .gguf file")
        return path.parent
    if "://" in location:
        return _fetched(location)
    if location.count("/") != 1 or location.startswith((".", "/", "~")):
        raise InputError(f"{location}: no such folder or .gguf file, and no hub id of the form owner/name")
    return from_hub(location, revision)


@lru_cache(maxsize=8)
def from_hub(name: str, revision: str | None) -> Path:
    """Folder of a hub id in the hub's own cache, fetched if need be. Raises `InputError` where it cannot be."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[f"*{end}" for end in _FETCHED]))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"{name}: no such folder here, and it could not be fetched from the hub ({type(error).__name__}: {reason})"
        ) from error


@lru_cache(maxsize=8)
def _fetched(url: str) -> Path:
    """Folder with a copy of the model at `url`; the copy is found again as long as the listing there is unchanged."""
    fs, root = filesystem(url)
    try:
        with client_errors("list", url):
            names = [name for name in sorted(fs.find(root)) if name.endswith(_FETCHED)]
            state = [(name, str(fs.ukey(name))) for name in names]
    except OSError as error:
        raise InputError(f"{url}: the model's files cannot be listed ({error})") from error
    if not names:
        raise InputError(f"{url}: there is no model here (no {', '.join(_FETCHED[:3])} files)")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lehr" / "models"
    target = cache / hash128(url.encode(), repr(state).encode())
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix="part-", dir=cache))
    except OSError as error:
        raise InputError(f"{url}: cannot write the copy into {cache} ({error}); set XDG_CACHE_HOME") from error
    try:
        for name in names:
            relative = Path(name).name if name == root else os.path.relpath(name, root)
            local = (part / relative).resolve()
            if not local.is_relative_to(part.resolve()):
                raise InputError(f"{url}: the listing holds {name}, which lies outside of it")
            local.parent.mkdir(parents=True, exist_ok=True)
            with client_errors("read", f"{url}: {relative}"):
                fs.get_file(name, str(local))
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same files
                raise
    except OSError as error:
        raise InputError(f"{url}: the model could not be fetched ({type(error).__name__}: {error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
