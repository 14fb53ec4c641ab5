"""The plan: listing, writing, extending, estimating."""

from __future__ import annotations

import gzip
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import listing as listing_module
from pipelines import plan as plan_module
from pipelines.listing import CorpusFile, list_corpus
from pipelines.plan import DEFAULT_TOKENS_PER_SECOND, PlanReport, corpus_files, estimate_cost, make_plan
from pipelines.readers import file_format, get_reader, read_unit, reader_names
from schemas.errors import CorruptFile, InputError, LehrError, SourceChanged
from schemas.fingerprint import hash128
from schemas.parquet import Footer, encode_table
from schemas.run import Run
from schemas.spec import CorpusColumns
from schemas.tables import table_schema
from schemas.units import read_plan
from tests.pipelines.reading import outcome, put, spec, tar_bytes


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "corpus") if request.param == "local" else f"memory://{uuid.uuid4().hex}/corpus"


@pytest.fixture
def run(root: str) -> str:
    return f"{root.removesuffix('/corpus')}/run"


def rows_of(count: int, word: str = "row") -> bytes:
    return b"".join(b'{"text": "%s %d", "topic": "t"}\n' % (word.encode(), row) for row in range(count))


def fill(root: str) -> None:
    put(root, "b.jsonl", rows_of(100))
    put(root, "a/c.jsonl.gz", gzip.compress(rows_of(10), mtime=0))
    put(root, "a/d.tar", tar_bytes([("x.txt", b"from a tar")]))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["p", "q"]}), sink)
    put(root, "e.parquet", sink.getvalue().to_pybytes())


def snapshot(report: PlanReport) -> tuple[bytes, bytes]:
    from schemas.storage import read_bytes

    run = report.run
    return read_bytes(run.path("plan.parquet")), read_bytes(run.path("stages/plan/corpus.json"))


# Listing.


def test_a_folder_lists_known_files_and_says_what_it_passed_over(root: str) -> None:
    fill(root)
    for path in ("README.md", "_delta_log/0.json", ".cache/x.jsonl", "archive.tar.gz"):
        put(root, path, b"{}")
    listing = list_corpus(root)
    assert [file.path for file in listing.files] == ["a/c.jsonl.gz", "a/d.tar", "b.jsonl", "e.parquet"]
    assert len(listing.warnings) == 2
    assert "2 files passed over, the path begins a name" in listing.warnings[0]
    assert "2 files passed over, unknown suffix: README.md, archive.tar.gz" in listing.warnings[1]
    assert corpus_files(root) == (root, ["a/c.jsonl.gz", "a/d.tar", "b.jsonl", "e.parquet"])


def test_files_globs_and_several_of_them(root: str) -> None:
    fill(root)
    assert corpus_files(f"{root}/b.jsonl") == (root, ["b.jsonl"])
    assert corpus_files(f"{root}/*.jsonl") == (root, ["b.jsonl"])
    assert corpus_files(f"{root}/*/*") == (root, ["a/c.jsonl.gz", "a/d.tar"])
    assert corpus_files(f"{root}/**/*.jsonl*") == (root, ["a/c.jsonl.gz", "b.jsonl"])
    assert corpus_files([f"{root}/a/d.tar", f"{root}/b.jsonl", f"{root}/*.jsonl"]) == (root, ["a/d.tar", "b.jsonl"])
    assert corpus_files([f"{root}/b.jsonl", f"{root}/e.parquet"]) == (root, ["b.jsonl", "e.parquet"])


def test_nothing_found_names_the_corpus_and_the_suffixes(root: str) -> None:
    put(root, "x/README.md", b"")
    for corpus in (f"{root}/x", f"{root}/x/*", f"{root}/x/README.md"):
        with pytest.raises(InputError, match=r"README\.md.*Supported suffixes: .*\.jsonl.*\.parquet.*\.tar.*--format"):
            corpus_files(corpus)
    with pytest.raises(InputError, match=r"no/where' does not exist"):
        corpus_files(f"{root}/no/where")
    with pytest.raises(InputError, match=r"nothing\*' holds no file"):
        corpus_files(f"{root}/nothing*")
    with pytest.raises(InputError, match="name a corpus"):
        corpus_files([])
    with pytest.raises(LehrError, match="nosuchscheme"):
        corpus_files("nosuchscheme://a/b")


def test_relative_paths_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path / "blobs"), "data", rows_of(3))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a [1].jsonl").symlink_to(tmp_path / "blobs" / "data")
    (tmp_path / "corpus" / "gone.jsonl").symlink_to(tmp_path / "blobs" / "none")
    monkeypatch.chdir(tmp_path)
    expected = (str(tmp_path / "corpus"), ["a [1].jsonl"])
    for corpus in ("corpus", "./corpus/", "corpus/../corpus", "corpus/a [1].jsonl"):
        assert corpus_files(corpus) == expected
    assert make_plan("run", "corpus", spec()).rows == 3


def test_a_format_by_name_takes_files_of_any_suffix(root: str, run: str) -> None:
    put(root, "part-00000", rows_of(3))
    put(root, "_SUCCESS", b"")
    with pytest.raises(InputError, match="holds no file of a known kind"):
        make_plan(run, root, spec())
    assert make_plan(run, root, spec(format="jsonl")).rows == 3


def test_the_registry_lists_what_it_knows() -> None:
    assert reader_names() == ["jsonl", "parquet", "webdataset"]
    with pytest.raises(InputError, match="unknown corpus format 'csv': choose one of jsonl, parquet, webdataset"):
        get_reader("csv")
    formats = {
        "a.PARQUET": "parquet",
        "a.jsonl.ZST": "jsonl",
        "b.ndjson": "jsonl",
        "c.json.gz": "jsonl",
        "d.tar": "webdataset",
    }
    assert {path: file_format(path, spec()) for path in formats} == formats
    assert file_format("a.tar", spec(format="jsonl")) == "jsonl"
    with pytest.raises(InputError, match=r"a\.csv: its name does not say its format\. Known suffixes: \.json"):
        file_format("a.csv", spec())


# Planning.


def test_a_plan_holds_every_row_and_its_manifest_is_the_summary(root: str, run: str) -> None:
    fill(root)
    report = make_plan(run, root, spec(unit_tokens=200))
    plan = read_plan(Run.open(run))
    assert (report.rows, report.files, report.written) == (113, 4, True)
    assert (plan.rows, len(plan.units), plan.tokens) == (report.rows, report.units, report.tokens)
    assert plan.fingerprint == report.fingerprint
    assert plan.spec == spec(unit_tokens=200)
    paths = [unit.path for unit in plan.units]
    assert paths == sorted(paths)
    items = [item for unit in plan.units for item in read_unit(root, unit, plan.spec)]
    assert {outcome(item) for item in items} == {f"row {n}" for n in range(100)} | {"from a tar", "p", "q"}
    fs_size = sum(unit.byte_end - unit.byte_start for unit in plan.units)
    assert report.bytes == fs_size


def test_the_same_corpus_again_gives_the_same_bytes(root: str, run: str) -> None:
    fill(root)
    first = make_plan(run, root, spec())
    before = snapshot(first)
    for extend in (False, True):
        again = make_plan(run, root, spec(), extend=extend)
        assert not again.written
        assert again.fingerprint == first.fingerprint
        assert (again.rows, again.units, again.warnings) == (first.rows, first.units, first.warnings)
    other = make_plan(f"{run}-2", root, spec())
    assert snapshot(other) == snapshot(first) == before


def test_untouched_files_are_not_read_again_and_touched_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = str(tmp_path / "corpus"), str(tmp_path / "run")
    fill(root)
    broken = gzip.compress(rows_of(1000), mtime=0)[:-20]
    put(root, "z.jsonl.gz", broken)
    old = time.time() - 60
    for path in Path(root).rglob("*.*"):
        os.utime(path, (old, old))
    first = make_plan(run, root, spec())
    assert len(first.warnings) == 1
    scanned: list[str] = []
    original = plan_module._scan_file

    def counted(root: str, file: CorpusFile, *rest: Any) -> Any:
        scanned.append(file.path)
        return original(root, file, *rest)

    monkeypatch.setattr(plan_module, "_scan_file", counted)
    make_plan(run, root, spec())
    assert scanned == []
    # The same size and another time: read, and found changed.
    put(root, "b.jsonl", rows_of(100).replace(b"row 7", b"row x"))
    with pytest.raises(SourceChanged, match=r"1 changed \(b\.jsonl\)"):
        make_plan(run, root, spec())
    assert scanned == ["b.jsonl"]
    extended = make_plan(run, root, spec(), extend=True)
    assert extended.warnings == first.warnings
    (tmp_path / "run" / "timings" / "plan" / "corpus" / "files.json").write_bytes(b"{broken")
    assert not make_plan(run, root, spec()).written


def test_a_file_that_was_just_written_is_always_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a file system that tells nothing but the time of writing, in a grain that hides the second of two writes.
    monkeypatch.setattr(listing_module, "_STAMPS", ("mtime",))
    root, run = str(tmp_path / "corpus"), str(tmp_path / "run")
    put(root, "a.jsonl", rows_of(5))
    stat = os.stat(f"{root}/a.jsonl")
    make_plan(run, root, spec())
    with open(f"{root}/a.jsonl", "r+b") as handle:
        handle.write(rows_of(5, "new"))
    os.utime(f"{root}/a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SourceChanged):
        make_plan(run, root, spec())


def test_a_changed_corpus_needs_extend_which_adds_replaces_and_drops(root: str, run: str) -> None:
    import fsspec

    fill(root)
    put(root, "f.jsonl", rows_of(5))
    plan = spec(unit_tokens=200)
    make_plan(run, root, plan)
    before = {unit.unit_id: unit for unit in read_plan(Run.open(run)).units}
    put(root, "b.jsonl", rows_of(101, "new"))
    put(root, "n.jsonl", rows_of(4))
    fs, base = fsspec.core.url_to_fs(root)
    fs.rm(f"{base}/f.jsonl")
    with pytest.raises(
        SourceChanged, match=r"1 changed \(b\.jsonl\); 1 new \(n\.jsonl\); 1 gone \(f\.jsonl\).*--extend"
    ):
        make_plan(run, root, plan)
    assert {unit.unit_id for unit in read_plan(Run.open(run)).units} == set(before)
    report = make_plan(run, root, plan, extend=True)
    assert (report.added, report.changed, report.removed) == (("n.jsonl",), ("b.jsonl",), ("f.jsonl",))
    assert report.rows == 113 + 1 + 4
    after = {unit.unit_id: unit for unit in read_plan(Run.open(run)).units}
    kept = {unit.path for unit in after.values() if unit.unit_id in before}
    assert kept == {"a/c.jsonl.gz", "a/d.tar", "e.parquet"}
    assert not {unit.path for unit in after.values() if unit.unit_id not in before} & kept
    assert snapshot(report) == snapshot(make_plan(f"{run}-fresh", root, plan))


def test_appending_keeps_the_units_before_the_last(root: str, run: str) -> None:
    put(root, "a.jsonl", rows_of(100))
    plan = spec(unit_tokens=100)
    make_plan(run, root, plan)
    before = [unit.unit_id for unit in read_plan(Run.open(run)).units]
    put(root, "a.jsonl", rows_of(150))
    make_plan(run, root, plan, extend=True)
    after = [unit.unit_id for unit in read_plan(Run.open(run)).units]
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) > len(before)


def test_extending_by_other_files_keeps_the_planned_ones(root: str, run: str) -> None:
    put(root, "a.jsonl", rows_of(5))
    put(root, "b.jsonl", rows_of(6))
    make_plan(run, f"{root}/a.jsonl", spec())
    report = make_plan(run, f"{root}/b.jsonl", spec(), extend=True)
    assert (report.rows, report.added, report.removed) == (11, ("b.jsonl",), ())


def test_equal_files_are_units_of_their_own(root: str, run: str) -> None:
    put(root, "a.jsonl", rows_of(5))
    put(root, "b.jsonl", rows_of(5))
    assert make_plan(run, root, spec()).rows == 10
    units = read_plan(Run.open(run)).units
    assert units[0].source_fingerprint == units[1].source_fingerprint
    assert units[0].unit_id != units[1].unit_id


def test_limit_plans_the_first_rows_and_may_be_extended(root: str, run: str) -> None:
    put(root, "a.jsonl", rows_of(10))
    put(root, "b.jsonl", rows_of(10))
    put(root, "c.jsonl", rows_of(10))
    assert make_plan(run, root, spec(limit=13)).rows == 13
    assert [unit.path for unit in read_plan(Run.open(run)).units] == ["a.jsonl", "b.jsonl"]
    first = read_plan(Run.open(run)).units[0]
    with pytest.raises(InputError, match="limit 13, now 0"):
        make_plan(run, root, spec())
    assert make_plan(run, root, spec(), extend=True).rows == 30
    assert read_plan(Run.open(run)).units[0] == first


def test_other_settings_or_another_corpus_are_refused(root: str, run: str) -> None:
    fill(root)
    make_plan(run, root, spec())
    for extend in (False, True):
        with pytest.raises(InputError, match=r"unit_tokens 65536, now 7; domain '', now 'topic'"):
            make_plan(run, root, spec(unit_tokens=7, columns=CorpusColumns(domain="topic")), extend=extend)
    with pytest.raises(InputError, match="is a run over corpus 'test'"):
        make_plan(run, root, spec(corpus="other"))
    with pytest.raises(InputError, match="is a run over corpus 'test'"):
        make_plan(run, f"{root}/a", spec())


def test_an_error_leaves_no_run_behind(root: str, run: str) -> None:
    from schemas.storage import exists

    put(root, "a.jsonl", b"\n \n")
    with pytest.raises(InputError, match="no row to score in 1 files"):
        make_plan(run, root, spec())
    put(root, "a.jsonl", rows_of(2))
    with pytest.raises(InputError, match="no column 'body'"):
        make_plan(run, root, spec(columns=CorpusColumns(text="body")))
    assert not exists(run)


def test_a_plan_that_was_half_replaced_is_named_and_made_again(root: str, run: str) -> None:
    put(root, "a.jsonl", rows_of(5))
    report = make_plan(run, root, spec())
    expected = snapshot(report)
    put(run, "plan.parquet", b"damaged")
    with pytest.raises(CorruptFile, match=r"plan\.parquet differs from its manifest"):
        read_plan(Run.open(run))
    with pytest.raises(CorruptFile):
        make_plan(run, root, spec())
    assert snapshot(make_plan(run, root, spec(), extend=True)) == expected


def test_the_run_directory_is_no_part_of_the_corpus(root: str) -> None:
    put(root, "a.jsonl", rows_of(5))
    make_plan(f"{root}/run", root, spec())
    put(f"{root}/run", "streams/x.jsonl", rows_of(5))
    assert not make_plan(f"{root}/run", root, spec()).written
    with pytest.raises(InputError, match="lies in the run directory"):
        make_plan(f"{root}/run", f"{root}/run/streams", spec())


def test_warnings_name_files_below_the_root_alone(root: str, run: str) -> None:
    put(root, "a.jsonl.gz", gzip.compress(rows_of(100)))
    put(root, "b.parquet", b"")
    report = make_plan(run, root, spec(unit_tokens=100))
    assert len(report.warnings) == 2
    assert report.warnings[0].startswith("a.jsonl.gz is one work unit of about")
    assert report.warnings[1].startswith("b.parquet is not a readable Parquet file")
    assert root not in json.dumps(list(report.warnings))


def test_progress_grows_to_the_size_of_the_corpus(root: str, run: str) -> None:
    fill(root)
    calls: list[tuple[int, int]] = []
    make_plan(run, root, spec(unit_tokens=100), progress=lambda done, total: calls.append((done, total)))
    done = [entry[0] for entry in calls]
    assert done == sorted(done)
    assert len(done) > 4
    assert calls[-1][0] == calls[-1][1] == sum(file.size for file in list_corpus(root).files)


# The estimate.


def test_the_estimate_follows_tokens_speed_and_k() -> None:
    cost = estimate_cost(1000, 7_200_000, k=1024, tokens_per_second=1000)
    assert cost.hours == 2.0
    assert cost.samples == 1000 + 7_200_000 // 1024
    assert estimate_cost(1000, 7_200_000, k=1024, tokens_per_second=2000).hours == 1.0
    assert estimate_cost(1, 3600, k=1).hours == 1 / DEFAULT_TOKENS_PER_SECOND
    doubled = estimate_cost(1000, 7_200_000, k=2048, tokens_per_second=1000)
    # A number of a sketch takes 1.77 bytes.
    assert doubled.bytes - cost.bytes == pytest.approx(cost.samples * 1024 * 1.77, rel=1e-6)
    for values in ({"tokens_per_second": 0.0, "k": 1}, {"k": 0}):
        with pytest.raises(InputError, match="must be positive"):
            estimate_cost(1, 1, **values)  # type: ignore[arg-type]


def test_the_estimate_of_bytes_is_about_what_features_take() -> None:
    rows, k = 2000, 256
    rng = np.random.default_rng(0)
    schema = table_schema("features", k)
    words = np.array([f"w{n}" for n in range(5000)])
    columns: list[pa.Array] = []
    for field in schema:
        if field.name in ("sample_id", "content_id"):
            columns.append(pa.array([hash128(f"{field.name}{n}".encode()) for n in range(rows)]))
        elif field.name == "preview":
            columns.append(pa.array([" ".join(rng.choice(words, 40))[:200] for _ in range(rows)]))
        elif pa.types.is_string(field.type):
            columns.append(pa.array(["constant"] * rows))
        elif field.name == "sketch":
            z = rng.standard_normal((rows, k))
            z /= np.linalg.norm(z, axis=1, keepdims=True)
            flat = pa.array(z.astype(np.float16).ravel())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, k).cast(field.type))
        else:
            columns.append(pa.array(rng.random(rows) * 1000).cast(field.type, safe=False))
    written = len(encode_table(pa.table(columns, schema=schema), Footer(schema="features", spec="s")))
    # Curvature rows, about 50 bytes, come on top; these previews compress better than those of real text.
    assert estimate_cost(rows, 0, k=k).bytes == pytest.approx(written + 50 * rows, rel=0.15)
