"""`lehr verify`: a sound run passes, and every kind of damage is found and named."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lehr.cli import main
from lehr.verify import Check, verify
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, read_footer, read_table
from schemas.run import Run
from tests.fake_run import build_fake_run, replace_part


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build_fake_run(tmp_path_factory.mktemp("verify") / "run", scorings=("main", "other"), hostile=True)


@pytest.fixture
def run(sound: Run, tmp_path: Path) -> Run:
    """A copy of the sound run to damage."""
    shutil.copytree(sound.url, tmp_path / "run")
    return Run.open(str(tmp_path / "run"))


def failures(run: Run, *, quick: bool = False) -> dict[str, list[str]]:
    return {check.subject: check.problems for check in verify(run, quick=quick) if not check.ok}


def part(run: Run, folder: str, number: int = 1) -> Path:
    return sorted(Path(run.url, folder).glob("*.parquet"))[number]


def test_sound_run_passes(sound: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checks: list[Check] = list(verify(sound))
    assert [check for check in checks if not check.ok] == []
    counts = {check.subject: check.count for check in checks}
    assert counts["rows of main"] == 120 and counts["rows of other"] == 120
    assert counts["candidates of match"] == 112 and counts["ranks of match"] == 24
    assert counts["stream match/gen-000001"] == 24 + 40 + 10
    assert counts["checkpoints of full"] == 2
    assert main(["verify", sound.url]) == 0
    assert "All" in capsys.readouterr().out
    assert failures(sound, quick=True) == {}


def test_sound_run_passes_through_fsspec() -> None:
    assert failures(build_fake_run("memory://verify-run")) == {}


def test_unfinished_run_passes(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    Path(run.path(run.manifest_path("score", "main"))).unlink()
    assert failures(run) == {}


def test_not_a_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "subject"),
    [
        ("features/main", "files of score/main"),
        ("rejects/main", "files of score/main"),
        ("curvature/gsm/main", "files of curvature/gsm.main"),
        ("targets/gsm/main", "files of target/gsm.main"),
    ],
)
@pytest.mark.parametrize("where", [0.2, 0.5, 0.98])
def test_flipped_bit_is_named(
    run: Run, folder: str, subject: str, where: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = part(run, folder)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(bytes(data))
    found = failures(run)
    assert len(found[subject]) == 1 and str(path) in found[subject][0]
    assert main(["verify", run.url]) == 1
    assert path.name in capsys.readouterr().out


@pytest.mark.parametrize("quick", [False, True])
def test_truncated_part_is_named(run: Run, quick: bool) -> None:
    path = part(run, "features/main")
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in failures(run, quick=quick)["files of score/main"][0]


@pytest.mark.parametrize("quick", [False, True])
def test_missing_part_is_named(run: Run, quick: bool) -> None:
    path = part(run, "curvature/gsm/main")
    path.unlink()
    (problem,) = failures(run, quick=quick)["files of curvature/gsm.main"]
    assert str(path) in problem and "missing" in problem


@pytest.mark.parametrize("quick", [False, True])
def test_part_of_another_scoring_is_named(run: Run, quick: bool) -> None:
    path = part(run, "features/main")
    other = Path(run.url, "features/other", path.name)
    padding = path.stat().st_size - other.stat().st_size
    path.write_bytes(other.read_bytes())
    (problem,) = failures(run, quick=quick)["files of score/main"]
    assert str(path) in problem
    if quick and padding == 0:
        assert run.scoring("other").fingerprint in problem and run.scoring("main").fingerprint in problem


def test_listed_part_of_another_scoring_shows_both_fingerprints(run: Run) -> None:
    """Even where a manifest was written over the wrong file, the footer gives it away."""
    path = part(run, "features/main").name
    theirs = read_table(run.path(f"features/other/{path}"), schema="features")
    footer, _ = read_footer(run.path(f"features/other/{path}"))
    replace_part(run, "score", "main", f"features/main/{path}", theirs, footer)
    (problem,) = failures(run)["files of score/main"]
    assert run.scoring("other").fingerprint in problem and run.scoring("main").fingerprint in problem


def test_part_of_another_unit_is_named(run: Run) -> None:
    first, second = part(run, "features/main", 0), part(run, "features/main", 1)
    table = read_table(str(second), schema="features")
    replace_part(run, "score", "main", f"features/main/{first.name}", table, read_footer(str(second))[0])
    found = failures(run)
    assert first.name in found["files of score/main"][0] and "unit" in found["files of score/main"][0]
    assert any("neither in features nor in rejects" in problem for problem in found["rows of main"])


def change_features(run: Run, change: Callable[[pa.Table], pa.Table], folder: str = "features/main") -> str:
    """Write a part as a scorer with a bug would have: hash, footer and row count agree, the rows are wrong."""
    path = part(run, folder)
    schema = folder.split("/")[0]
    footer, _ = read_footer(str(path))
    table = change(read_table(str(path), schema=schema))
    replace_part(run, "score", "main", f"{folder}/{path.name}", table, footer)
    return path.name


def test_lost_row_is_named(run: Run) -> None:
    lost: list[int] = []

    def lose(table: pa.Table) -> pa.Table:
        lost.append(table["row"][3].as_py())
        return pa.concat_tables([table.slice(0, 3), table.slice(4)])

    name = change_features(run, lose)
    (problem,) = failures(run)["rows of main"]
    assert name in problem and problem.endswith(f"neither in features nor in rejects: {lost[0]}")


def test_lost_reject_is_named(run: Run) -> None:
    def lose(table: pa.Table) -> pa.Table:
        index = table["window"].to_pylist().index(0)
        return pa.concat_tables([table.slice(0, index), table.slice(index + 1)])

    name = change_features(run, lose, "rejects/main")
    problems = failures(run)["rows of main"]
    assert len(problems) == 1 and name in problems[0] and "neither in features nor in rejects" in problems[0]


def test_lost_window_is_named(run: Run) -> None:
    def lose(table: pa.Table) -> pa.Table:
        index = table["window"].to_pylist().index(1) - 1  # window 0 of a row that has a window 1
        return pa.concat_tables([table.slice(0, index), table.slice(index + 1)])

    change_features(run, lose)
    (problem,) = failures(run)["rows of main"]
    assert "windows [0]" in problem


def test_windows_lost_at_the_end_of_a_document_are_counted(run: Run) -> None:
    def lose_tail(table: pa.Table) -> pa.Table:
        index = table["window"].to_pylist().index(2)
        return pa.concat_tables([table.slice(0, index), table.slice(index + 1)])

    name = change_features(run, lose_tail, "rejects/main")
    (problem,) = failures(run)["rows of main"]
    assert "rows and windows" in problem and "were read" in problem and name.split("part-")[1] in problem


def test_windows_that_do_not_follow_one_another_are_named(run: Run) -> None:
    def shift(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index("char_start")
        starts = [s + (w == 1) for s, w in zip(table["char_start"].to_pylist(), table["window"].to_pylist())]
        return table.set_column(index, table.schema.field(index), pa.array(starts, pa.int64()))

    change_features(run, shift)
    problems = failures(run)["rows of main"]
    assert problems and all("does not begin where" in problem for problem in problems)


def test_doubled_row_is_named(run: Run) -> None:
    name = change_features(run, lambda table: pa.concat_tables([table, table.slice(2, 1)]))
    (problem,) = failures(run)["rows of main"]
    assert name in problem and "2 times" in problem


def test_row_in_features_and_rejects_is_named(run: Run) -> None:
    path = part(run, "features/main")
    row = read_table(str(path), schema="features")["row"][0].as_py()

    def add(table: pa.Table) -> pa.Table:
        extra = {**table.slice(0, 1).to_pylist()[0], "row": row, "window": 0}
        return pa.concat_tables([table, pa.Table.from_pylist([extra], schema=table.schema)])

    change_features(run, add, "rejects/main")
    (problem,) = failures(run)["rows of main"]
    assert f"row {row} is listed 2 times" in problem


def test_row_of_another_unit_is_named(run: Run) -> None:
    def move(table: pa.Table) -> pa.Table:
        rows = table["row"].to_pylist()
        rows[0] += 100_000
        return table.set_column(table.column_names.index("row"), table.schema.field("row"), pa.array(rows))

    change_features(run, move)
    problems = failures(run)["rows of main"]
    assert any("does not belong to this unit" in problem for problem in problems)
    assert any("is not that of" in problem for problem in problems)


def test_curvature_of_other_samples_is_named(run: Run) -> None:
    path = part(run, "curvature/gsm/main")
    table = read_table(str(path), schema="curvature")
    swapped = pa.concat_tables([table.slice(1, 1), table.slice(0, 1), table.slice(2)])
    footer, _ = read_footer(str(path))
    replace_part(run, "curvature", "gsm.main", f"curvature/gsm/main/{path.name}", swapped, footer)
    (problem,) = failures(run)["rows of gsm.main"]
    assert path.name in problem


def edit_manifest(run: Run, stage: str, name: str, **changes: object) -> None:
    manifest = dataclasses.replace(run.manifest(stage, name), **changes)  # type: ignore[arg-type]
    write_manifest(run.path(run.manifest_path(stage, name)), manifest)


def test_edited_manifest_is_named(run: Run) -> None:
    path = Path(run.path(run.manifest_path("score", "main")))
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert str(path) in failures(run)["manifests"][0]


def test_manifest_of_another_stage_is_named(run: Run) -> None:
    shutil.copy(run.path(run.manifest_path("score", "other")), run.path(run.manifest_path("score", "main")))
    (problem,) = failures(run)["manifests"]
    assert "score/other, not of score/main" in problem


def test_manifest_that_leaves_out_a_unit_is_named(run: Run) -> None:
    manifest: Manifest = run.manifest("score", "main")
    gone = next(p for p in manifest.parts if p.path.startswith("features/"))
    edit_manifest(run, "score", "main", parts=tuple(p for p in manifest.parts if p is not gone))
    unit = gone.path.rsplit("part-", 1)[1].removesuffix(".parquet")
    assert any(unit in problem for problem in failures(run)["units of main"])


def test_wrong_row_count_in_a_manifest_is_named(run: Run) -> None:
    manifest = run.manifest("score", "main")
    first = dataclasses.replace(manifest.parts[0], rows=manifest.parts[0].rows + 1)
    edit_manifest(run, "score", "main", parts=(first, *manifest.parts[1:]))
    (problem,) = failures(run, quick=True)["files of score/main"]
    assert first.path in problem and f"lists {first.rows}" in problem


@pytest.mark.parametrize(
    ("stage", "name", "later"),
    [
        ("plan", "corpus", "lineage of score/main"),
        ("scoring", "main", "lineage of target/gsm.main"),
        ("target", "gsm.main", "lineage of curvature/gsm.main"),
        ("score", "main", "lineage of select/match"),
        ("curvature", "gsm.main", "lineage of select/match"),
        ("select", "match", "lineage of export/match.gen-000001"),
    ],
)
def test_stage_made_again_breaks_the_lineage_of_the_next(run: Run, stage: str, name: str, later: str) -> None:
    before = run.manifest(stage, name)
    edit_manifest(run, stage, name, inputs={**before.inputs, "added": "0" * 32})
    problems = failures(run)[later]
    assert any(before.fingerprint in problem for problem in problems)


def test_stage_that_vanished_breaks_the_lineage_of_the_next(run: Run) -> None:
    Path(run.path(run.manifest_path("curvature", "gsm.main"))).unlink()
    assert any("no curvature stands" in problem for problem in failures(run)["lineage of select/match"])


def change_selection(run: Run, change: Callable[[list[dict]], None]) -> dict[str, list[str]]:
    path = f"{run.selection_folder('match')}/part-00000.parquet"
    table = read_table(run.path(path), schema="selection")
    rows = table.to_pylist()
    change(rows)
    footer: Footer = read_footer(run.path(path))[0]
    replace_part(run, "select", "match", path, pa.Table.from_pylist(rows, schema=table.schema), footer)
    return failures(run)


def ranked(rows: list[dict], rank: int) -> dict:
    return next(row for row in rows if row["rank"] == rank)


def test_candidate_left_out_is_found(run: Run) -> None:
    found = change_selection(run, lambda rows: rows.remove(next(row for row in rows if not row["selected"])))
    assert "1 scored samples are not among the candidates" in found["candidates of match"][0]


def test_candidate_listed_twice_is_found(run: Run) -> None:
    found = change_selection(run, lambda rows: rows.append(next(row for row in rows if not row["selected"])))
    assert "more than once" in found["candidates of match"][0]


def test_candidate_that_was_never_scored_is_found(run: Run) -> None:
    found = change_selection(run, lambda rows: rows[0].update(sample_id="f" * 32))
    assert any("never scored" in problem for problem in found["candidates of match"])


def test_gap_in_ranks_is_found(run: Run) -> None:
    found = change_selection(run, lambda rows: ranked(rows, 5).update(rank=99))
    assert "ranks are not 0..23" in found["ranks of match"][0]


def test_weight_on_the_left_out_is_found(run: Run) -> None:
    found = change_selection(run, lambda rows: next(r for r in rows if not r["selected"]).update(selection_weight=1.0))
    assert "not selected but weighs" in found["ranks of match"][0]


def test_stream_that_is_not_the_selection_is_found(run: Run) -> None:
    def exchange(rows: list[dict]) -> None:
        first, second = ranked(rows, 2), ranked(rows, 3)
        first["rank"], second["rank"] = 3, 2

    found = change_selection(run, exchange)
    assert any("rank 2 is sample" in problem for problem in found["stream match/gen-000001"])


@pytest.mark.parametrize("below", ["", "target/", "eval/"])
def test_damaged_shard_is_named(run: Run, below: str) -> None:
    shard = sorted(Path(run.url, "streams/match/gen-000001", below).glob("shard-*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(bytes(data))
    found = failures(run)
    assert str(shard) in found["files of export/match.gen-000001"][0]
    assert str(shard) in found["stream match/gen-000001"][0]


def test_edited_index_is_named(run: Run) -> None:
    index = Path(run.url, "streams/match/gen-000001/index.json")
    index.write_bytes(index.read_bytes().replace(b'"selection": "match"', b'"selection": "other"'))
    assert any(str(index) in problem for problem in failures(run)["stream indexes"])


def test_training_of_another_stream_is_found(run: Run) -> None:
    edit_manifest(run, "train", "full", inputs={"stream": "0" * 32})
    assert "no generation of any stream" in failures(run)["lineage of train/full"][0]


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ("steps", "step", "not 1..8"),
        ("steps", "total_trained_tokens", "not the sum"),
        ("decisions", "kept", "decisions"),
        ("decisions", "position", "decided 2 times"),
    ],
)
def test_journal_that_does_not_add_up_is_found(run: Run, table: str, column: str, message: str) -> None:
    path = part(run, f"trainings/full/{table}", 0)
    original = read_table(str(path), schema=table)
    values = original[column].to_pylist()
    values[1] = False if column == "kept" else values[0]
    changed = original.set_column(
        original.column_names.index(column), original.schema.field(column), pa.array(values, original[column].type)
    )
    footer, _ = read_footer(str(path))
    replace_part(run, "train", "full", f"trainings/full/{table}/{path.name}", changed, footer)
    assert any(message in problem for problem in failures(run)["journal of full"])


@pytest.mark.parametrize(
    ("file", "table", "column", "value", "message"),
    [
        ("trainings", "arm_trainings", "eval_loss", 1.0, "eval_loss is 1.0, the training says"),
        ("trainings", "arm_trainings", "seed", 7, "its trainings are not those that the comparison declares"),
        ("trainings", "arm_trainings", "guard_loss", 9.0, "guard_loss, guard_difference"),
        ("arms", "arms", "difference_low", -9.0, "difference_low do not follow from the trainings"),
        ("arms", "arms", "verdict", "reject", "its verdicts are not those of arms.parquet"),
    ],
)
def test_comparison_that_does_not_follow_from_its_trainings_is_found(
    run: Run, file: str, table: str, column: str, value: object, message: str
) -> None:
    path = f"comparisons/anneal/{file}.parquet"
    original = read_table(run.path(path), schema=table)
    values = original[column].to_pylist()
    where = next(i for i, row in enumerate(original.to_pylist()) if row["arm"] == "match:full")
    assert values[where] != value
    values[where] = value
    number = original.column_names.index(column)
    field = original.schema.field(column)
    changed = original.set_column(number, field, pa.array(values, field.type))
    footer, _ = read_footer(run.path(path))
    replace_part(run, "compare", "anneal", path, changed, footer)
    assert any(message in problem for problem in failures(run)["comparison anneal"])


def test_comparison_of_a_training_that_was_made_again_is_found(run: Run) -> None:
    edit_manifest(run, "train", "full", summary={**run.manifest("train", "full").summary, "eval_loss": 0.5})
    assert "the training says 0.5" in failures(run)["comparison anneal"][0]
    Path(run.path(run.manifest_path("train", "full"))).unlink()
    found = failures(run)
    assert "no train/full stands in this run" in found["lineage of compare/anneal"][0]


def test_damaged_checkpoint_is_named(run: Run) -> None:
    weights = next(Path(run.url, "trainings/full/checkpoints").rglob("model.safetensors"))
    weights.write_bytes(b"weights of a fake nodel")
    found = failures(run)
    assert str(weights) in found["checkpoints of full"][0]
    assert str(weights) in found["files of train/full"][0]


def test_edited_checkpoint_manifest_is_named(run: Run) -> None:
    manifest = next(Path(run.url, "trainings/full/checkpoints").rglob("manifest.json"))
    record = orjson.loads(manifest.read_bytes())
    record["step"] += 1
    manifest.write_bytes(orjson.dumps(record))
    assert any("does not match its fingerprint" in problem for problem in failures(run)["checkpoints of full"])


def test_one_damaged_file_hides_no_other(run: Run) -> None:
    first, second = part(run, "features/main", 0), part(run, "features/main", 2)
    first.write_bytes(b"")
    second.unlink()
    problems = failures(run)["files of score/main"]
    assert any(first.name in problem for problem in problems) and any(second.name in problem for problem in problems)


def test_quick_does_not_hash(run: Run) -> None:
    """A flipped bit inside a page changes neither size nor footer: only the full check sees it."""
    path = part(run, "features/main")
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(bytes(data))
    assert "files of score/main" not in failures(run, quick=True)
    assert "files of score/main" in failures(run)
