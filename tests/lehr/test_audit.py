"""`lehr audit`: what it answers, and that it can do nothing but answer."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from lehr.audit import Audit, ask, named_query
from lehr.cli import main
from lehr.queries import NAMED_QUERIES
from lehr.views import view_names, view_schema
from schemas.errors import CorruptFile, InputError, LehrError, MixedFingerprints
from schemas.run import Run
from tests.fake_run import build_fake_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build_fake_run(tmp_path_factory.mktemp("audit") / "run", hostile=True)


def rows(run: Run, sql: str) -> list[dict]:
    return ask(run, sql).table.to_pylist()


@pytest.mark.parametrize("name", NAMED_QUERIES)
def test_named_query_answers(run: Run, name: str) -> None:
    answer = ask(run, named_query(name))
    assert answer.table.num_rows > 0
    assert answer.notices == ()


@pytest.mark.parametrize("view", view_names())
def test_view_has_its_columns_and_rows(run: Run, view: str) -> None:
    table = ask(run, f"SELECT * FROM {view}").table
    assert table.column_names == view_schema(view).names
    assert table.num_rows > 0


@pytest.mark.parametrize("view", view_names())
def test_view_of_a_run_without_anything_is_empty(tmp_path: Path, view: str) -> None:
    empty = Run.create(str(tmp_path / "empty"), corpus="c", root="/r")
    answer = ask(empty, f"SELECT * FROM {view}")
    assert answer.table.num_rows == 0
    assert answer.table.column_names == view_schema(view).names


def test_views_join_across_artifacts(run: Run) -> None:
    found = rows(
        run,
        """SELECT e.rank, s.sample_id, f.preview = s.preview AS same FROM stream_entries e
        JOIN selections s ON s.selection = e.selection AND s.rank = e.rank
        JOIN features f USING (sample_id) WHERE e.part = 'ranked' ORDER BY e.rank""",
    )
    assert [row["rank"] for row in found] == list(range(24))
    assert all(row["same"] for row in found)


def test_counts_are_those_of_the_manifests(run: Run) -> None:
    (found,) = rows(run, "SELECT (SELECT count(*) FROM features) AS f, (SELECT sum(row_count) FROM plan) AS p")
    assert found["f"] == run.manifest("score", "main").summary["samples"]
    assert found["p"] == 120


def test_sketches_are_lists_of_numbers(run: Run) -> None:
    (found,) = rows(run, "SELECT min(list_dot_product(sketch, sketch)) AS least FROM features")
    # Unit rows in float16: each entry is off by at most 2^-11 of itself, so the squared norm by at most 2 * 2^-11.
    assert abs(found["least"] - 1) < 2 * 2**-11


def test_scorings_of_different_sketch_size_stand_in_one_view(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", scorings=("main", "other"), stages=("plan", "score"))
    found = rows(run, "SELECT scoring, count(*) AS n FROM features GROUP BY scoring ORDER BY scoring")
    assert [row["scoring"] for row in found] == ["main", "other"]
    filtered = rows(run, "SELECT DISTINCT scoring FROM features WHERE scoring = 'other'")
    assert filtered == [{"scoring": "other"}]


WRITES = [
    "COPY (SELECT 1) TO '{out}'",
    "COPY features TO '{out}' (FORMAT parquet)",
    "ATTACH '{out}' AS other",
    "EXPORT DATABASE '{out}'",
    "CREATE TABLE t AS SELECT 1",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE VIEW t AS SELECT 1",
    "INSERT INTO features VALUES (1)",
    "UPDATE features SET tokens = 0",
    "DELETE FROM features",
    "DROP VIEW features",
    "ALTER VIEW features RENAME TO g",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET threads = 1",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA enable_external_access = true",
    "PRAGMA database_list",
    "CALL pragma_version()",
    "CHECKPOINT",
    "BEGIN TRANSACTION",
    "USE memory",
    "EXPLAIN COPY (SELECT 1) TO '{out}'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "EXPLAIN ANALYZE INSERT INTO features VALUES (1)",
    "WITH i AS (INSERT INTO features VALUES (1) RETURNING 1) SELECT * FROM i",
    "WITH i AS (COPY (SELECT 1) TO '{out}') SELECT * FROM i",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("sql", WRITES)
def test_everything_but_one_reading_statement_is_refused(run: Run, tmp_path: Path, sql: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError):
        ask(run, sql.format(out=out))
    assert not out.exists()


READS = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_json('{own}')",
    "SELECT * FROM read_parquet('{own}')",
    "SELECT * FROM '{own}'",
    "SELECT * FROM parquet_metadata('{own}')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM glob('/*')",
    "SELECT (SELECT content FROM read_text('/etc/hostname'))",
    "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "SELECT * FROM 'https://localhost/x.csv'",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets()",
]


@pytest.mark.parametrize("sql", READS)
def test_no_other_file_can_be_read(run: Run, sql: str) -> None:
    with pytest.raises(InputError):
        ask(run, sql.format(own=Path(run.url) / "plan.parquet"))


def test_python_variables_are_out_of_reach(run: Run) -> None:
    import pyarrow as pa

    secret = pa.table({"a": [1]})
    with pytest.raises(InputError, match="no view is called secret"):
        ask(run, "SELECT * FROM secret")
    assert secret.num_rows == 1


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("WITH i AS (INSERT INTO features VALUES (1) RETURNING 1) SELECT * FROM i", "INSERT"),
        ("WITH i AS (COPY (SELECT 1) TO '/tmp/never') SELECT * FROM i", "COPY"),
        ("SELECT * FROM (WITH i AS (DELETE FROM features RETURNING 1) SELECT * FROM i)", "DELETE"),
        ("EXPLAIN WITH i AS (UPDATE features SET row = 1 RETURNING 1) SELECT * FROM i", "UPDATE"),
    ],
)
def test_writing_hidden_in_a_query_is_refused_by_its_name(run: Run, sql: str, word: str) -> None:
    with pytest.raises(InputError, match=f"{word} is refused inside a query"):
        ask(run, sql)


def test_engine_is_set_up_as_promised(run: Run) -> None:
    with Audit(run) as audit:
        names = "python_enable_replacements", "enable_external_access", "autoload_known_extensions", "temp_directory"
        values = [audit._connection.execute(f"SELECT current_setting('{name}')").fetchall()[0][0] for name in names]
    assert values == [False, False, False, ""]


def test_engine_alone_refuses_writing_and_reading(run: Run, tmp_path: Path) -> None:
    """Behind the check of the syntax tree stand the engine's own walls: they hold without it."""
    out = tmp_path / "out"
    with Audit(run) as audit:
        engine = audit._connection
        for sql in (f"COPY (SELECT 1) TO '{out}'", "SELECT * FROM read_text('/etc/passwd')", f"ATTACH '{out}'"):
            with pytest.raises(duckdb.PermissionException):
                engine.execute(sql).fetchall()
        for sql in ("SET enable_external_access = true", "SET threads = 1"):
            with pytest.raises(duckdb.Error, match="locked"):
                engine.execute(sql)
        engine.execute("BEGIN TRANSACTION READ ONLY")
        with pytest.raises(duckdb.Error, match="read-only"):
            engine.execute("CREATE TABLE t AS SELECT 1")
    assert not out.exists()


@pytest.mark.parametrize(
    "sql",
    [
        "DESCRIBE features",
        "SHOW TABLES",
        "SUMMARIZE steps",
        "EXPLAIN SELECT * FROM features",
        "EXPLAIN ANALYZE SELECT count(*) FROM features",
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a",
        "FROM steps",
        "VALUES (1)",
        "SELECT 1 UNION ALL SELECT 2;",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT * FROM r",
    ],
)
def test_reading_statements_are_answered(run: Run, sql: str) -> None:
    assert ask(run, sql).table.num_rows > 0


def test_show_tables_lists_every_view(run: Run) -> None:
    assert {row["name"] for row in rows(run, "SHOW TABLES")} == set(view_names())


def test_only_mentioned_views_are_opened(run: Run) -> None:
    with Audit(run) as audit:
        audit.query("SELECT count(*) FROM plan")
        assert set(audit._views) == {"plan"}
        audit.query("SELECT count(*) FROM (SELECT * FROM Features) JOIN rejects USING (path)")
        assert set(audit._views) == {"plan", "features", "rejects"}


def test_wrong_names_are_answered_with_the_right_ones(run: Run) -> None:
    with pytest.raises(InputError, match=r"no view is called selection\. Did you mean selections\?.*decisions"):
        ask(run, "SELECT * FROM selection")
    with pytest.raises(InputError, match=r"(?s)tokenz.*Columns: features \(scoring, sample_id.*tokens"):
        ask(run, "SELECT tokenz FROM features")
    with pytest.raises(InputError, match="unknown query 'nope': choose one of lineage"):
        named_query("nope")
    with pytest.raises(InputError, match="syntax error"):
        ask(run, "SELEC 1")


def test_unfinished_stage_is_read_from_its_files_and_said(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    Path(run.path(run.manifest_path("score", "main"))).unlink()
    parts = sorted(Path(run.url, "features/main").iterdir())
    parts[0].unlink()
    (parts[0].parent / ".tmp-part-x.parquet-123").write_bytes(b"half a file")
    answer = ask(run, "SELECT count(*) AS n FROM features")
    assert 0 < answer.table["n"][0].as_py() < 112
    assert "features of main" in answer.notices[0] and "has not finished" in answer.notices[0]


def test_files_that_no_manifest_lists_are_no_results(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    before = rows(run, "SELECT count(*) AS n FROM features")
    part = next(Path(run.url, "features/main").iterdir())
    (part.parent / "part-stray.parquet").write_bytes(part.read_bytes())
    assert rows(run, "SELECT count(*) AS n FROM features") == before


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def test_flipped_bit_in_a_page_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    part = sorted(Path(run.url, "features/main").iterdir())[1]
    column = pq.ParquetFile(part).metadata.row_group(0).column(0)
    flip(part, column.data_page_offset + column.total_compressed_size // 2)
    with pytest.raises(CorruptFile, match=part.name):
        ask(run, "SELECT * FROM features")


def test_missing_part_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    part = sorted(Path(run.url, "features/main").iterdir())[1]
    part.unlink()
    with pytest.raises(CorruptFile, match=part.name):
        ask(run, "SELECT count(*) FROM features")


def test_file_of_another_scoring_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", scorings=("main", "other"), stages=("plan", "score"))
    name = sorted(Path(run.url, "features/main").iterdir())[1].name
    Path(run.url, "features/main", name).write_bytes(Path(run.url, "features/other", name).read_bytes())
    with pytest.raises(MixedFingerprints) as error:
        ask(run, "SELECT count(*) FROM features")
    assert run.scoring("main").fingerprint in str(error.value)
    assert run.scoring("other").fingerprint in str(error.value)


def test_damaged_manifest_is_a_clear_error(tmp_path: Path) -> None:
    other = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    path = Path(other.path(other.manifest_path("score", "main")))
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(LehrError, match=r"main\.json"):
        ask(other, "SELECT * FROM features")


def test_limit_and_formats(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT scoring, row, domain, loss FROM features ORDER BY sample_id"
    assert ask(run, sql, 7).truncated and ask(run, sql, 7).table.num_rows == 7
    assert not ask(run, sql, 112).truncated
    base = ["audit", run.url, "--sql", sql, "--limit", "3"]
    assert main([*base, "--format", "json"]) == 0
    records = json.loads(capfd.readouterr().out)
    assert [list(record) for record in records] == [["scoring", "row", "domain", "loss"]] * 3
    assert main([*base, "--format", "csv"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 4
    out = tmp_path / "rows.parquet"
    assert main([*base, "--format", "parquet", "--out", str(out)]) == 0
    assert pq.read_table(out).to_pylist() == records
    assert main([*base, "--format", "parquet"]) == 2
    assert "--out" in capfd.readouterr().err
    assert main([*base]) == 0
    shown = capfd.readouterr()
    assert "scoring" in shown.out and "first 3 rows" in shown.err
    assert main(["audit", run.url, "--sql", "SELECT scores FROM selections", "--limit", "1", "--format", "csv"]) == 0
    assert "redundancy" in capfd.readouterr().out


def test_sums_of_integers_are_integers(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT sum(row_count) AS n, 2::HUGEINT ** 100 > 0 AS huge, 170141183460469231731687303715884105727 AS most FROM plan"
    assert rows(run, sql)[0]["n"] == 120
    assert main(["audit", run.url, "--sql", sql, "--format", "json"]) == 0
    assert json.loads(capfd.readouterr().out) == [{"n": 120, "huge": True, "most": str(2**127 - 1)}]


def test_terminal_table_shows_controls_instead_of_obeying_them(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT DISTINCT preview FROM features WHERE preview LIKE 'control%' OR preview LIKE '%override%'"
    assert main(["audit", run.url, "--sql", sql]) == 0
    out = capfd.readouterr().out
    assert "control" in out and "\\u202e" in out
    assert not {"\x1b", "\x00", "\x07", "\u202e"} & set(out)


def test_command_lists_views_and_queries(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMED_QUERIES)
    assert main(["audit", run.url]) == 0
    listed = capsys.readouterr().out
    assert all(view in listed for view in view_names())
    assert main(["audit", run.url, "--query", "lineage", "--sql", "SELECT 1"]) == 2
    assert "not both" in capsys.readouterr().err


def test_audit_reads_through_fsspec() -> None:
    run = build_fake_run("memory://audit-run", stages=("plan", "score", "target", "curvature", "select"))
    found = rows(run, "SELECT count(*) AS n FROM features JOIN curvature USING (scoring, sample_id)")
    assert found == [{"n": 112}]
    assert rows(run, "SELECT count(*) AS n FROM solutions")[0]["n"] > 0
