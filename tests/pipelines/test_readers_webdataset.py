"""WebDataset: grouping, hostile members, broken tars."""

from __future__ import annotations

import json
import pickle
import tarfile
import uuid
from pathlib import Path

import pytest

from pipelines.readers import read_unit
from schemas.errors import InputError, SourceChanged
from schemas.spec import CorpusColumns
from tests.pipelines.reading import outcome, put, read, scan, scan_and_read, spec, tar_bytes


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def samples(count: int) -> list[tuple[str, bytes]]:
    return [(f"{number:06d}.json", b'{"text": "row %d"}' % number) for number in range(count)]


def member(kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = kind
    info.linkname = link
    return info


def test_adjacent_members_of_a_key_are_a_sample(root: str) -> None:
    members = [
        ("a/000.txt", b" from txt "),
        ("a/000.cls", b"3"),
        ("a/000.JSON", b'{"domain": "d"}'),
        ("b/000.json", b'{"text": "wins", "id": 4}'),
        ("b/000.txt", b"loses"),
        ("README", b"no sample"),
        (".hidden", b"no sample"),
        ("c.en.txt", b"not a body"),
        ("c.txt", b"caption"),
    ]
    put(root, "a.tar", tar_bytes(members))
    columns = CorpusColumns(id="__key__", domain="domain", keep=("id",))
    items = scan_and_read(root, "a.tar", spec(columns=columns))
    assert [(item.text, item.source_id, item.domain, item.extra) for item in items] == [
        (" from txt ", "a/000", "d", '{"id":null}'),
        ("wins", "b/000", "", '{"id":4}'),
        ("caption", "c", "", '{"id":null}'),
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(root: str, format: int) -> None:
    folder = "x" * 90 if format == tarfile.USTAR_FORMAT else "y" * 300
    names = [f"{folder}/{'k' * 60}", "ключ" if format != tarfile.USTAR_FORMAT else "key"]
    put(root, "a.tar", tar_bytes([(f"{name}.txt", b"t") for name in names], format))
    items = scan_and_read(root, "a.tar", spec(columns=CorpusColumns(id="__key__")))
    assert [item.source_id for item in items] == names


def test_units_are_whole_samples_and_agree_with_one_unit(root: str) -> None:
    body = [(f"{n}.{kind}", b"x" * 40) for n in range(200) for kind in ("txt", "cls")]
    put(root, "a.tar", tar_bytes(body))
    whole = scan_and_read(root, "a.tar", spec())
    plan = spec(unit_tokens=35)
    units, _ = scan(root, "a.tar", plan)
    assert [unit.row_count for unit in units] == [3] * 66 + [2]
    assert {unit.estimated_tokens for unit in units} == {30, 20}
    assert read(root, units, plan) == whole
    assert len(whole) == 200
    for unit in reversed(units):
        assert list(read_unit(root, unit, plan)) == whole[unit.row_start : unit.row_start + unit.row_count]


def test_hostile_members_are_rejects_and_never_opened(root: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("a pickle was opened",))

    cases: list[tuple[str, bytes | tarfile.TarInfo, str | None]] = [
        ("good.txt", b"good", "good"),
        ("../../etc/x.txt", b"t", "!bad_member_name"),
        ("a/../b.txt", b"t", "!bad_member_name"),
        ("/etc/passwd.txt", b"t", "!bad_member_name"),
        ("/README", b"t", "!bad_member_name"),
        ("C:/x.txt", b"t", "!bad_member_name"),
        ("..\\x.txt", b"t", "!bad_member_name"),
        ("\x1b[31m.txt", b"t", "!bad_member_name"),
        ("link.json", member(tarfile.SYMTYPE, "/etc/passwd"), "!missing_column"),
        ("hard.json", member(tarfile.LNKTYPE, "good.txt"), "!missing_column"),
        ("pipe.txt", member(tarfile.FIFOTYPE), "!missing_column"),
        ("device.txt", member(tarfile.CHRTYPE), "!missing_column"),
        ("folder", member(tarfile.DIRTYPE), None),
        ("p.pkl", pickle.dumps(Bomb()), "!missing_column"),
        ("q.pth", pickle.dumps(Bomb()), "!missing_column"),
        ("deep.json", b'{"text":' + b"[" * 2000, "!too_deep"),
        ("bad.json", b"{", "!invalid_json"),
        ("utf.json", b'{"text": "\xff"}', "!invalid_utf8"),
        ("utf.2.txt", b"other extension", None),
        ("utf8.txt", b"\xff", "!invalid_utf8"),
        ("list.json", b"[]", "!not_an_object"),
        ("type.json", b'{"text": 1}', "!wrong_type"),
        ("large.txt", b"x" * 9000, "!row_too_large"),
        ("empty.txt", b"", ""),
    ]
    put(root, "a.tar", tar_bytes([(name, content) for name, content, _ in cases]))
    items = scan_and_read(root, "a.tar", spec(max_row_bytes=8000))
    assert [outcome(item) for item in items] == [expected for _, _, expected in cases if expected is not None]


def test_one_hostile_member_rejects_its_sample_and_a_repeated_one_too(root: str) -> None:
    put(
        root,
        "a.tar",
        tar_bytes([("a.txt", b"1"), ("a.txt", b"2"), ("../b.txt", b"3"), ("../b.cls", b"4"), ("a.txt", b"5")]),
    )
    assert [outcome(item) for item in scan_and_read(root, "a.tar", spec())] == [
        "!duplicate_member",
        "!bad_member_name",
        "5",
    ]


def test_a_broken_header_in_mid_file_is_a_reject_and_a_warning(root: str) -> None:
    data = bytearray(tar_bytes(samples(100)))
    data[50 * 1024 + 5] ^= 1
    put(root, "a.tar", bytes(data))
    for size in (65536, 20):
        plan = spec(unit_tokens=size)
        units, warnings = scan(root, "a.tar", plan)
        assert "corrupt behind 50 samples" in warnings[0]
        items = read(root, units, plan)
        assert [outcome(item) for item in items] == [f"row {n}" for n in range(50)] + ["!corrupt"]
        assert units[-1].byte_end == len(data)


def test_every_truncation_is_seen(root: str) -> None:
    data = tar_bytes([(f"{n}.{kind}", b"%d" % n) for n in range(3) for kind in ("txt", "cls")])
    assert len(data) == tarfile.RECORDSIZE
    for keep in [*range(0, 6 * 1024 + 1, 128), 6 * 1024 + 100]:
        put(root, "a.tar", data[:keep])
        units, warnings = scan(root, "a.tar", spec(unit_tokens=1))
        items = read(root, units, spec(unit_tokens=1))
        # A sample is two members of 1024 bytes. One that breaks off inside a member is lost whole; one that breaks off
        # behind its first member, or inside the header of its second, has what it needs.
        expected = keep // 2048 + (1024 <= keep % 2048 < 1536)
        assert [outcome(item) for item in items[:-1]] == [str(n) for n in range(expected)]
        assert outcome(items[-1]) == "!truncated"
        assert "truncated" in warnings[0]
    put(root, "a.tar", data[: 6 * 1024 + 512])
    assert [outcome(item) for item in scan_and_read(root, "a.tar", spec())] == ["0", "1", "2"]


def test_tars_one_behind_the_other_are_read_to_the_end(root: str) -> None:
    put(root, "a.tar", tar_bytes(samples(3)) + tar_bytes([("x.txt", b"more")]))
    assert [outcome(item) for item in scan_and_read(root, "a.tar", spec())] == ["row 0", "row 1", "row 2", "more"]
    put(root, "a.tar", tar_bytes(samples(3)) + b"garbage" * 100)
    assert [outcome(item) for item in scan_and_read(root, "a.tar", spec())][3:] in (["!corrupt"], ["!truncated"])


def test_a_file_that_is_no_tar_is_one_reject_of_all_its_bytes(root: str) -> None:
    body = b"this is no tar\n" * 100
    put(root, "a.tar", body)
    units, warnings = scan(root, "a.tar", spec())
    assert [(unit.byte_start, unit.byte_end, unit.row_count) for unit in units] == [(0, len(body), 1)]
    assert "corrupt behind 0 samples" in warnings[0]
    assert [outcome(item) for item in read(root, units, spec())] == ["!corrupt"]
    put(root, "a.tar", body.upper())
    with pytest.raises(SourceChanged):
        list(read_unit(root, units[0], spec()))


def test_limit_columns_and_changes(root: str) -> None:
    put(root, "a.tar", tar_bytes(samples(20)))
    assert len(scan_and_read(root, "a.tar", spec(limit=7, unit_tokens=10))) == 7
    with pytest.raises(InputError, match="no column 'topic'; it has: __key__, text"):
        scan(root, "a.tar", spec(columns=CorpusColumns(domain="topic")))
    units, _ = scan(root, "a.tar", spec(unit_tokens=20))
    changed = samples(20)
    changed[-1] = ("last.json", json.dumps({"text": "other"}).encode())
    put(root, "a.tar", tar_bytes(changed))
    list(read_unit(root, units[0], spec()))
    with pytest.raises(SourceChanged, match=r"a\.tar differs from the plan"):
        list(read_unit(root, units[-1], spec()))


def test_an_archive_without_samples(root: str) -> None:
    put(root, "a.tar", tar_bytes([("README", b"x")]))
    units, warnings = scan(root, "a.tar", spec())
    assert units == []
    assert "holds no sample" in warnings[0]
