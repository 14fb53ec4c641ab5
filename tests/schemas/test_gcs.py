"""Whole writes and plain reads on `gs://`: gcsfs over HTTP against a server in another process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pytest

from schemas.errors import CorruptFile, InputError
from schemas.manifest import read_manifest
from schemas.parquet import Footer, read_footer, read_table, write_table
from schemas.ranged import open_ranged
from schemas.run import Run
from schemas.storage import exists, join, list_folders, list_names, read_bytes, remove, write_whole
from schemas.tables import table_schema
from tests.gcs import BUCKET, ROOT, Gcs


def put(gcs: Gcs, url: str, data: bytes) -> None:
    """Upload past this process's client, as another machine would."""
    name = url.removeprefix(f"gs://{BUCKET}/")
    query = f"uploadType=media&name={quote(name, safe='')}"
    request = urllib.request.Request(f"{gcs.host}/upload/storage/v1/b/{BUCKET}/o?{query}", data, method="POST")
    urllib.request.urlopen(request, timeout=30).close()


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`; fails, instead of hanging, where it takes longer."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, f"not done within {seconds} s"
    return done[0]


def test_written_is_read(bucket: str) -> None:
    url = join(bucket, "a", "b.bin")
    assert not exists(url) and not exists(bucket)
    write_whole(url, b"one")
    assert exists(url) and exists(bucket) and read_bytes(url) == b"one"
    write_whole(url, b"one")
    write_whole(url, b"two")
    assert read_bytes(url) == b"two"
    write_whole(join(bucket, "empty"), b"")
    assert read_bytes(join(bucket, "empty")) == b""


def test_equal_content_is_one_conditional_upload(bucket: str, gcs: Gcs) -> None:
    for data in (b"one", b"one", b"two"):
        write_whole(join(bucket, "a"), data)
    uploads = [request["line"] for request in gcs.requests("^POST /upload/")]
    assert ["ifGenerationMatch=0" in line for line in uploads] == [True, True, True, False]


def test_create_only_leaves_what_stands(bucket: str) -> None:
    url = join(bucket, "a.bin")
    write_whole(url, b"one", create_only=True)
    for data in (b"one", b"two"):
        with pytest.raises(FileExistsError):
            write_whole(url, data, create_only=True)
    assert read_bytes(url) == b"one"


def test_of_many_creators_one_succeeds(bucket: str) -> None:
    def create(number: int) -> bool:
        try:
            write_whole(join(bucket, "a"), b"%d" % number, create_only=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(16)))
    assert created.count(True) == 1
    assert read_bytes(join(bucket, "a")) == b"%d" % created.index(True)


@pytest.mark.parametrize("size", [100, 300_000])
@pytest.mark.parametrize("line", [b"--==0==", b"--==0==--"])
def test_content_that_holds_the_client_s_own_separator_is_stored_whole(bucket: str, size: int, line: bytes) -> None:
    """gcsfs marks the end of an upload with a fixed line, which a document may hold as well."""
    data = b"before\n" + line + b"\nafter".ljust(size, b".")
    write_whole(join(bucket, "a"), b"something else")
    write_whole(join(bucket, "a"), data)
    write_whole(join(bucket, "b"), data, create_only=True)
    assert read_bytes(join(bucket, "a")) == read_bytes(join(bucket, "b")) == data
    with pytest.raises(FileExistsError):
        write_whole(join(bucket, "b"), data, create_only=True)


def test_large_content_goes_up_in_chunks(bucket: str, gcs: Gcs) -> None:
    data = os.urandom(1 << 20) * 51 + b"end"
    write_whole(join(bucket, "a"), data, create_only=True)
    assert len(gcs.requests("upload_id=")) == 2
    assert read_bytes(join(bucket, "a")) == data
    for forgotten in (False, True):
        if forgotten:  # the upload that was refused, when it is cancelled
            gcs.fail("^DELETE /upload", status=404)
        with pytest.raises(FileExistsError):
            write_whole(join(bucket, "a"), data, create_only=True)
    gcs.fail("^DELETE /upload", status=404)
    write_whole(join(bucket, "a"), data + b"more")
    assert read_bytes(join(bucket, "a")) == data + b"more"


def test_missing_is_missing_and_named(bucket: str) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        read_bytes(join(bucket, "nothing"))
    assert missing.value.filename == join(bucket, "nothing")
    assert list_names(join(bucket, "nowhere")) == [] and list_folders(join(bucket, "nowhere")) == []
    with pytest.raises(InputError, match=r"gs://nobucket/run/run.json: there is no such bucket"):
        write_whole("gs://nobucket/run/run.json", b"x")


def test_removed_is_gone_and_removing_nothing_is_no_error(bucket: str) -> None:
    for name in ("a", "folder/b", "folder/deep/c", "folder-2/d"):
        write_whole(join(bucket, name), b"x")
    remove(join(bucket, "a"))
    remove(join(bucket, "a"))
    remove(join(bucket, "folder"), recursive=True)
    remove(join(bucket, "folder"), recursive=True)
    assert list_names(bucket) == [] and list_folders(bucket) == ["folder-2"]
    assert read_bytes(join(bucket, "folder-2/d")) == b"x"


def test_listing_knows_files_from_folders_over_many_pages(bucket: str) -> None:
    names = [f"{number:02d}.parquet" for number in range(30)]
    for name in (*names, "x.json", "folder/x.parquet", "other/deep/x.parquet"):
        write_whole(join(bucket, name), b"x")
    assert list_names(bucket) == [*names, "x.json"]
    assert list_names(bucket, ".parquet") == names
    assert list_folders(bucket) == ["folder", "other"]
    assert list_names(join(bucket, "x.json")) == []  # a file is no folder


def test_listing_leaves_out_the_object_that_a_console_marks_a_folder_with(bucket: str, gcs: Gcs) -> None:
    for name in ("folder/", "folder/inner/", "folder/a"):
        put(gcs, join(bucket, name), b"")
    assert list_names(join(bucket, "folder")) == ["a"]
    assert list_folders(join(bucket, "folder")) == ["inner"]


def test_names_with_signs_that_mean_something_in_urls(bucket: str) -> None:
    for name in ("a #1.bin", "50%.bin", "q?x=1.bin", "ü ñ.bin", "a+b&c.bin", "{0}.bin"):
        write_whole(join(bucket, name), name.encode())
        assert read_bytes(join(bucket, name)) == name.encode()
    assert len(list_names(bucket)) == 6


def test_what_another_process_changes_is_seen(bucket: str, gcs: Gcs) -> None:
    write_whole(join(bucket, "a"), b"x")
    assert list_names(bucket) == ["a"] and not exists(join(bucket, "b"))
    put(gcs, join(bucket, "b"), b"y")
    assert exists(join(bucket, "b")) and list_names(bucket) == ["a", "b"]


def table(rows: int) -> pa.Table:
    """A journal table with made-up numbers."""
    schema = table_schema("spectrum", 4)
    columns = []
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            values = pa.array([0.5] * (rows * 4), field.type.value_type)
            columns.append(pa.FixedSizeListArray.from_arrays(values, 4).cast(field.type))
        elif pa.types.is_string(field.type):
            columns.append(pa.array(["x"] * rows))
        else:
            columns.append(pa.array(range(rows)).cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def test_a_table_that_another_process_replaced_is_read_anew(
    bucket: str, gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ranges of our own: the client's file object would fetch ahead in the background."""
    from gcsfs import GCSFileSystem

    monkeypatch.setattr(GCSFileSystem, "_open", lambda *_, **__: pytest.fail("a file object of the client"))
    footer = Footer(schema="spectrum", spec="s")
    write_table(bucket, "t/a.parquet", table(3), footer)
    write_table(bucket, "t/longer.parquet", table(300), footer)
    assert list_names(join(bucket, "t")) == ["a.parquet", "longer.parquet"]
    assert read_table(join(bucket, "t/a.parquet"), schema="spectrum").num_rows == 3
    put(gcs, join(bucket, "t/a.parquet"), read_bytes(join(bucket, "t/longer.parquet")))
    assert read_footer(join(bucket, "t/a.parquet"))[1] == 300
    assert read_table(join(bucket, "t/a.parquet"), schema="spectrum").equals(table(300))
    with pytest.raises(CorruptFile, match=r"t/none.parquet is missing"):
        read_table(join(bucket, "t/none.parquet"), schema="spectrum")


def test_one_answer_of_503_or_a_broken_connection_is_tried_again(bucket: str, gcs: Gcs, impatient: None) -> None:
    """Early, late (done, but the answer lost) or in the middle of the body: the content is right all the same."""
    faults: list[dict[str, Any]] = [
        {"status": 503}, {"status": 503, "late": True}, {"status": 429}, {"drop": True}, {"drop": True, "late": True}
    ]  # fmt: skip
    data = os.urandom(100_000)
    for number, fault in enumerate(faults):
        url = join(bucket, f"{number}")
        gcs.fail("^POST /upload", **fault)
        write_whole(url, data)
        gcs.fail("^POST /upload.*uploadType=multipart$", **fault)
        write_whole(url, data[::-1])
        for way in ({"cut": 50_000}, {"cut": 0}, *faults):
            gcs.fail("^GET /download", **way)
            assert read_bytes(url) == data[::-1]
        gcs.fail("^GET /storage", **fault)
        assert list_names(bucket) == [str(other) for other in range(number + 1)]
        gcs.fail("^GET /storage/v1/b/lehr/o/", **fault)
        assert exists(url)
        gcs.fail("^DELETE", **fault)
        remove(join(bucket, str(number)))
        assert not exists(url)
        write_whole(url, b"")
    assert sum(request["fault"] for request in gcs.requests()) == 5 * (2 + 7 + 3)


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}, {"cut": 50_000}, {"status": 403}, {"status": 401}])
def test_what_goes_on_failing_is_an_error_that_names_the_object(
    bucket: str, gcs: Gcs, impatient: None, fault: dict[str, Any]
) -> None:
    url = join(bucket, "a.bin")
    write_whole(url, bytes(100_000))
    gcs.fail("", count=1000, **fault)
    with pytest.raises(InputError, match=r"cannot read .*a\.bin"):
        read_bytes(url)
    with pytest.raises(InputError, match=r"cannot read .*a\.bin"):
        open_ranged(url).read()
    if "cut" not in fault:
        with pytest.raises(InputError, match="cannot list gs://"):
            list_names(bucket)
        with pytest.raises(InputError, match=r"cannot read gs://.*a\.bin"):
            exists(url)
        with pytest.raises(InputError, match=r"cannot write .*b\.bin"):
            write_whole(join(bucket, "b.bin"), b"x")
        with pytest.raises(InputError, match=r"cannot delete .*a\.bin"):
            remove(url)
        with pytest.raises(InputError, match=r"cannot read .*run\.json"):
            Run.open(bucket)


@pytest.mark.parametrize("left", [1 << 20, 3 << 19])
def test_an_object_shorter_than_its_listing_is_not_taken_for_whole(bucket: str, gcs: Gcs, left: int) -> None:
    """Replaced by a shorter one between the question for its size and the reading."""
    url = join(bucket, "a.bin")
    write_whole(url, bytes(3 << 20))
    with open_ranged(url, block_bytes=1 << 20) as handle:
        assert len(handle.read(100)) == 100
        put(gcs, url, bytes(left))
        with pytest.raises(InputError, match=r"a\.bin.*(changed|satisf)"):
            handle.read()


def test_small_reads_in_a_row_end_and_are_few_requests(bucket: str, gcs: Gcs) -> None:
    """20 KiB at a time from 20 MB: gcsfs's own file object makes one request of every few and then waits for ever."""
    url = join(bucket, "a.bin")
    data = os.urandom(1 << 20) * 20
    write_whole(url, data)
    gcs.clear()

    def read() -> bytes:
        with open_ranged(url) as handle:
            return b"".join(iter(lambda: handle.read(20_480), b""))

    assert within(20, read) == data
    assert len(gcs.requests("^GET /download")) == 20  # blocks of 1 MiB


def test_reader_seeks_like_a_file(bucket: str) -> None:
    data = os.urandom(10_000)
    write_whole(join(bucket, "a"), data)
    with open_ranged(join(bucket, "a"), block_bytes=1000) as handle:
        assert handle.seek(-5, os.SEEK_END) == 9995 and handle.read() == data[-5:] and handle.read() == b""
        assert handle.seek(3000) == 3000 and handle.read(2500) == data[3000:5500] and handle.tell() == 5500
        assert handle.seek(20_000) == 20_000 and handle.read(1) == b""
    with pytest.raises(FileNotFoundError):
        open_ranged(join(bucket, "nothing"))


def test_missing_manifest_names_its_url(bucket: str) -> None:
    with pytest.raises(InputError, match=rf"{bucket}/stages/score/base.json does not exist: way out"):
        read_manifest(join(bucket, "stages/score/base.json"), "way out")


def test_run_that_was_created_although_the_answer_was_lost_is_opened(bucket: str, gcs: Gcs, impatient: None) -> None:
    """The second try is told that the object stands: it is its own."""
    gcs.fail("^POST /upload", status=503, late=True)
    run = Run.create(bucket, corpus="c", root="r")
    assert run == Run.open(bucket)
    assert [request["fault"] for request in gcs.requests("^POST /upload")] == [True, False]


_CREATE = """
import sys
from schemas.run import Run
print(Run.create(sys.argv[1], corpus="c", root="r").run_id)
"""


def test_processes_that_create_a_run_at_once_agree_on_it(bucket: str, gcs: Gcs) -> None:
    command = [sys.executable, "-c", _CREATE, bucket]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=gcs.environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = {process.communicate(timeout=60)[0] for process in processes}
    assert len(found) == 1 and found == {f"{Run.open(bucket).run_id}\n"}


def test_google_s_own_client_finds_the_server_as_it_expects_one(gcs: Gcs, bucket: str) -> None:
    """Conditions, pages, checksums of downloads and chunked uploads: a check of the server, not of Lehr."""
    from google.api_core.exceptions import NotFound, PreconditionFailed
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    client = Client(project="test", credentials=AnonymousCredentials())
    place, prefix = client.bucket(BUCKET), bucket.removeprefix(f"gs://{BUCKET}/")
    for number in range(10):
        place.blob(f"{prefix}/{number}/x").upload_from_string(b"x" * number, if_generation_match=0)
    with pytest.raises(PreconditionFailed):
        place.blob(f"{prefix}/0/x").upload_from_string(b"y", if_generation_match=0)
    assert len(list(client.list_blobs(BUCKET, prefix=f"{prefix}/"))) == 10
    listing = client.list_blobs(BUCKET, prefix=f"{prefix}/", delimiter="/")
    assert list(listing) == [] and listing.prefixes == {f"{prefix}/{number}/" for number in range(10)}
    data = os.urandom(3 << 20)
    blob = place.blob(f"{prefix}/large", chunk_size=1 << 20)
    blob.upload_from_string(data, if_generation_match=0)
    assert place.blob(f"{prefix}/large").download_as_bytes(checksum="crc32c") == data
    assert blob.download_as_bytes(start=10, end=19) == data[10:20]
    assert read_bytes(f"{bucket}/large") == data
    blob.delete()
    with pytest.raises(NotFound):
        blob.download_as_bytes()
