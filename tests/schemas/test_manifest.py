"""Manifests: written whole, read back, and refused where edited."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import orjson
import pytest

from schemas.errors import CorruptFile, InputError
from schemas.manifest import Manifest, read_manifest, write_manifest
from schemas.parquet import Part

PART = Part(path="features/main/part-1.parquet", rows=3, bytes=100, sha256="a" * 64)
MANIFEST = Manifest(
    stage="score",
    name="main",
    spec={"k": 8, "groups": [{"name": "a", "sites": ["a", "b"]}]},
    inputs={"plan": "b" * 32},
    parts=(PART,),
    summary={"samples": 3, "rejects": {"too_short": 1}},
)


def test_round_trip(tmp_path: Path) -> None:
    url = str(tmp_path / "main.json")
    write_manifest(url, MANIFEST)
    assert read_manifest(url, "") == MANIFEST
    record = orjson.loads(Path(url).read_bytes())
    assert record["fingerprint"] == MANIFEST.fingerprint


def test_equal_manifests_are_equal_bytes(tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "a"), MANIFEST)
    reordered = dataclasses.replace(MANIFEST, spec=dict(reversed(MANIFEST.spec.items())))
    write_manifest(str(tmp_path / "b"), reordered)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "target"},
        {"name": "other"},
        {"spec": {"k": 9}},
        {"inputs": {"plan": "c" * 32}},
        {"parts": ()},
        {"parts": (dataclasses.replace(PART, sha256="b" * 64),)},
        {"parts": (dataclasses.replace(PART, path="elsewhere"),)},
    ],
)
def test_fingerprint_follows_everything_a_later_stage_relies_on(changes: dict) -> None:
    assert dataclasses.replace(MANIFEST, **changes).fingerprint != MANIFEST.fingerprint


def test_findings_for_people_do_not_change_the_fingerprint() -> None:
    assert dataclasses.replace(MANIFEST, summary={}).fingerprint == MANIFEST.fingerprint


@pytest.mark.parametrize("old, new", [('"k": 8', '"k": 9'), ("a" * 64, "c" * 64), ("b" * 32, "d" * 32)])
def test_edited_manifest_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "main.json"
    write_manifest(str(path), MANIFEST)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CorruptFile, match=r"main\.json.*fingerprint"):
        read_manifest(str(path), "")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"fingerprint": 1, "parts": [1]}', b"\xff\xfe"])
def test_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "main.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"main\.json"):
        read_manifest(str(tmp_path / "main.json"), "")


def test_missing_manifest_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `lehr score` first"):
        read_manifest(str(tmp_path / "main.json"), "run `lehr score` first")


def test_every_bit_of_a_manifest_is_covered(tmp_path: Path) -> None:
    """Findings for people too, which the fingerprint leaves out. Only the newline at the end says nothing."""
    write_manifest(str(tmp_path / "main.json"), MANIFEST)
    sound = (tmp_path / "main.json").read_bytes()
    for bit in range(8 * (len(sound) - 1)):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.json").write_bytes(data)
        try:
            assert read_manifest(str(tmp_path / "flipped.json"), "") == MANIFEST, (
                bit
            )  # a blank became a tab, or the like
        except CorruptFile:
            continue
        assert bytes(data).split() == sound.split(), bit


def test_manifests_without_a_hash_are_read(tmp_path: Path) -> None:
    """Those written before there was one."""
    write_manifest(str(tmp_path / "main.json"), MANIFEST)
    record = orjson.loads((tmp_path / "main.json").read_bytes())
    del record["sha256"]
    (tmp_path / "main.json").write_bytes(orjson.dumps(record))
    assert read_manifest(str(tmp_path / "main.json"), "") == MANIFEST
