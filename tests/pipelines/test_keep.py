"""`lehr score --keep scalars`: the same numbers without their sketches, and what works on them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from lehr.cli import main
from lehr.verify import verify
from pipelines.check import check
from pipelines.options import CheckOptions
from pipelines.select import run_select
from pipelines.select_beam import run_select_beam
from schemas.errors import CorruptFile, InputError, LehrError
from schemas.manifest import write_manifest
from schemas.parquet import decode_table, read_columns, read_footer, read_part, read_table, write_table
from schemas.tables import MEASURE_COLUMNS, PLACE_COLUMNS
from selection_ops.selectors import Budget, SelectorSettings
from tests.pipelines.worlds import IN_PROCESS, World, copy_world, make_world, tree_hashes

SETTINGS = {
    "target-cosine": SelectorSettings(selector="target-cosine", two_fold=False, bound=False),
    "direct-signed": SelectorSettings(
        selector="direct-signed", stiff_limit=0.8, stiff_limit_kind="pool", two_fold=False, bound=False
    ),
}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("keep") / "world", rows=30)
    world.describe()
    return world


@pytest.fixture(scope="module")
def whole(described: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = copy_world(described, tmp_path_factory.mktemp("keep-all") / "world")
    world.score()
    return world


@pytest.fixture(scope="module")
def scalars(described: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = copy_world(described, tmp_path_factory.mktemp("keep-scalars") / "world")
    world.score(keep="scalars")
    return world


def parts(world: World, stage: str, name: str, folder: str) -> list[str]:
    return [part.path for part in world.run.manifest(stage, name).parts if part.path.startswith(folder)]


def read(world: World, path: str, schema: str) -> pa.Table:
    return read_table(world.run.path(path), schema=schema)


def rows(world: World, name: str) -> pa.Table:
    listed = [path for path in parts(world, "select", name, "selections/") if path.endswith(".parquet")]
    return pa.concat_tables([read(world, path, "selection") for path in listed])


def test_every_number_is_that_of_a_run_with_sketches(whole: World, scalars: World) -> None:
    assert whole.run.scoring("base").fingerprint == scalars.run.scoring("base").fingerprint
    features = parts(whole, "score", "base", "features/")
    assert features == parts(scalars, "score", "base", "features/") and len(features) > 5
    for path in features:
        narrow, wide = read(scalars, path, "features"), read(whole, path, "features")
        assert narrow.column_names == [*PLACE_COLUMNS, *MEASURE_COLUMNS]
        assert narrow.equals(wide.drop_columns(["sketch"]))
        footer, other = read_footer(scalars.run.path(path))[0], read_footer(whole.run.path(path))[0]
        assert footer.spec == other.spec and footer.inputs["unit"] == other.inputs["unit"]
    for path in parts(whole, "curvature", "target.base", "curvature/"):
        assert read(scalars, path, "curvature").equals(read(whole, path, "curvature"))
    for path in parts(whole, "score", "base", "rejects/"):
        assert read(scalars, path, "rejects").equals(read(whole, path, "rejects"))


@pytest.mark.parametrize("selector", list(SETTINGS))
def test_rankings_and_direct_signed_choose_as_with_sketches_by_both_engines(
    whole: World, scalars: World, selector: str
) -> None:
    common = ("base", "target", Budget(samples=12), SETTINGS[selector])
    run_select(whole.run, selector, *common)
    # No option is needed: that there are no sketches is known.
    report = run_select(scalars.run, selector, *common)
    run_select_beam(scalars.run, f"{selector}-beam", *common, IN_PROCESS)
    assert report.selected == 12
    assert any("only scalar columns" in warning or "sketches" in warning for warning in report.solution["warnings"])
    expected = rows(whole, selector)
    for name in (selector, f"{selector}-beam"):
        found = rows(scalars, name)
        for column in ("sample_id", "rank", "reason", "selection_weight", "score", "alignment"):
            assert found[column].equals(expected[column]), (name, column)
        assert scalars.run.manifest("select", name).spec["columns_only"] is True


@pytest.mark.parametrize("selector", ["match", "direct"])
def test_what_reads_sketches_says_what_is_missing(scalars: World, selector: str) -> None:
    settings = SelectorSettings(selector=selector)
    for select in (
        lambda: run_select(scalars.run, "no", "base", "target", Budget(samples=5), settings),
        lambda: run_select_beam(
            scalars.run,
            "no",
            "base",
            "target",
            Budget(samples=5),
            dataclasses.replace(SETTINGS["direct-signed"], gain="damped"),
            IN_PROCESS,
        ),
    ):
        with pytest.raises(InputError, match=r"reads sketches.*--keep scalars.*target-cosine.*another --scoring"):
            select()
    with pytest.raises(InputError, match="sketches"):
        run_select(
            scalars.run, "no", "base", "target", Budget(samples=5), dataclasses.replace(SETTINGS["direct-signed"], gain="damped")
        )  # fmt: skip
    priced = dataclasses.replace(SETTINGS["direct-signed"], redundancy=0.5)
    with pytest.raises(InputError, match=r"redundancy reads sketches.*--keep scalars"):
        run_select(scalars.run, "no", "base", "target", Budget(samples=5), priced)
    with pytest.raises(InputError, match=r"redundancy reads sketches.*--keep scalars"):
        run_select_beam(scalars.run, "no", "base", "target", Budget(samples=5), priced, IN_PROCESS)
    assert not (Path(scalars.run.url) / "selections/no").exists()


def test_every_verb_reads_it(scalars: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = scalars.run.url
    assert main(["select", run, "--selector", "target-cosine", "--samples", "8", "--name", "verbs"]) == 0
    assert main(["export", run, "--selection", "verbs"]) == 0
    assert [check for check in verify(scalars.run) if not check.ok] == []
    for verb in ("verify", "status", "report", "audit"):
        assert main([verb, run]) == 0, verb
    capsys.readouterr()
    query = "SELECT count(*) AS n, count(sketch) AS sketches, count(sketch_norm) AS norms FROM features"
    assert main(["audit", run, "--sql", query, "--format", "csv"]) == 0
    count = sum(part.rows for part in scalars.run.manifest("score", "base").parts if "features/" in part.path)
    assert capsys.readouterr().out.split()[1:] == [f"{count},0,{count}"]
    assert main(["check", run, "--rows", "8", "--target-rows", "4"]) == 0
    assert "sketches not kept" in capsys.readouterr().out


def test_check_finds_columns_of_other_texts(scalars: World, tmp_path: Path) -> None:
    assert check(scalars.run, "base", CheckOptions(rows=1000, target_rows=2)).intact
    world = copy_world(scalars, tmp_path / "copy")
    run, manifest = world.run, world.run.manifest("curvature", "target.base")
    old = next(part for part in manifest.parts if part.rows > 3)
    table, footer = decode_table(read_part(run.url, old), old.path, schema="curvature")
    (Path(run.url) / old.path).unlink()
    index, field = table.schema.get_field_index("alignment"), table.schema.field("alignment")
    new = write_table(run.url, old.path, table.set_column(index, field, table["alignment"].take([1, 0, *range(2, len(table))])), footer)  # fmt: skip
    place = run.path(run.manifest_path("curvature", "target.base"))
    Path(place).unlink()
    write_manifest(place, dataclasses.replace(manifest, parts=tuple(new if p is old else p for p in manifest.parts)))
    found = check(run, "base", CheckOptions(rows=1000, target_rows=2))
    assert not found.intact and "alignment" in found.failures[0]


def test_what_is_stored_is_declared_once(described: World, whole: World, scalars: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stored with their sketches already"):
        whole.score(keep="scalars")
    with pytest.raises(InputError, match=r"declared with --keep scalars.*another name with --scoring"):
        scalars.score(keep="all")
    before = tree_hashes(Path(scalars.run.url))
    scalars.score()  # left out, it is what was declared
    assert tree_hashes(Path(scalars.run.url)) == before
    bare = make_world(tmp_path / "bare", rows=14)
    with pytest.raises(InputError, match="describe every target first"):
        bare.score(keep="scalars")


def test_parts_of_both_kinds_are_refused(whole: World, scalars: World, tmp_path: Path) -> None:
    """Two commands that began at once, one with sketches and one without, cannot finish one scoring together."""
    for mine, other in ((whole, scalars), (scalars, whole)):
        world = copy_world(mine, tmp_path / mine.folder.parent.name)
        (Path(world.run.url) / world.run.manifest_path("score", "base")).unlink()
        path = parts(mine, "score", "base", "features/")[0]
        shutil.copy(other.run.path(path), world.run.path(path))
        with pytest.raises(LehrError, match=r"was made from .*'keep'"):
            world.score()


def test_a_target_described_later_is_refused_before_the_model_runs(scalars: World) -> None:
    with pytest.raises(InputError, match=r"stored without sketches.*'late'.*need the model again.*another --scoring"):
        scalars.describe("late")
    assert not (Path(scalars.run.url) / "targets/late").exists()
    scalars.describe()  # the same once more


@pytest.mark.parametrize("lost", ["features", "rejects", "curvature/target"])
def test_a_lost_part_is_made_again_as_it_was(scalars: World, tmp_path: Path, lost: str) -> None:
    world = copy_world(scalars, tmp_path / "copy")
    before = tree_hashes(Path(world.run.url))
    path = sorted((Path(world.run.url) / lost / "base").glob("part-*"))[1]
    path.unlink()
    world.score()
    assert tree_hashes(Path(world.run.url)) == before


def test_damage_in_scalars_is_found_by_selecting(scalars: World, tmp_path: Path) -> None:
    """Nothing is left unread, so the hash of every part is verified."""
    world = copy_world(scalars, tmp_path / "copy")
    path = Path(world.run.path(parts(world, "score", "base", "features/")[0]))
    data = bytearray(path.read_bytes())
    data[len(data) - 40] ^= 1  # in the footer, which page checksums do not cover
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptFile, match="differs from its manifest"):
        run_select(world.run, "s", "base", "target", Budget(samples=5), SETTINGS["target-cosine"])


def test_verify_holds_parts_to_the_declaration(scalars: World, tmp_path: Path) -> None:
    world = copy_world(scalars, tmp_path / "copy")
    place = Path(world.run.path(world.run.manifest_path("keep", "base")))
    held = world.run.keep("base")
    assert held is not None
    place.unlink()
    write_manifest(str(place), dataclasses.replace(held, spec={**held.spec, "targets": {"target": "0" * 32}}))
    failed = {check.subject for check in verify(world.run) if not check.ok}
    assert {"lineage of keep/base", "lineage of score/base"} <= failed


def test_narrow_reads_take_nothing_that_is_not_there(whole: World, scalars: World) -> None:
    for world in (whole, scalars):
        part = next(part for part in world.run.manifest("score", "base").parts if part.path.startswith("features/"))
        assert read_columns(world.run.url, part, ["loss"], schema="features").num_rows == part.rows
