"""Small disks, mounted in memory, that really fill."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system in memory of so many bytes, mounted at a new folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "lehr-test", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: str) -> None:
    """Give a mounted small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@functools.cache
def can_mount() -> bool:
    """Whether this process may make a real small disk."""
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk", "1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
