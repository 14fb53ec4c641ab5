"""Scoring: one unit to one shard, nothing lost, nothing twice, a bad sample costs itself."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import scorer as scorer_module
from pipelines.geometry import read_target, unit_sketches
from pipelines.options import Execution, ScoringOptions
from pipelines.score import score
from schemas.errors import InputError, LehrError
from schemas.parquet import decode_table, read_part, read_table
from schemas.run import Run
from schemas.units import read_plan
from tests.pipelines.worlds import IN_PROCESS, World, copy_world, make_world, tree_hashes


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    world.describe()
    world.score()
    return world


@pytest.fixture
def world(scored: World, tmp_path: Path) -> World:
    """A copy of the scored world that a test may damage."""
    return copy_world(scored, tmp_path / "w")


def features_of(run: Run) -> pa.Table:
    manifest = run.manifest("score", "base")
    parts = [part for part in manifest.parts if part.path.startswith("features/")]
    return pa.concat_tables([decode_table(read_part(run.url, part), part.path, schema="features")[0] for part in parts])


def rejects_of(run: Run) -> pa.Table:
    manifest = run.manifest("score", "base")
    parts = [part for part in manifest.parts if part.path.startswith("rejects/")]
    return pa.concat_tables([decode_table(read_part(run.url, part), part.path, schema="rejects")[0] for part in parts])


def test_invariant_5_every_row_ends_in_features_or_rejects_exactly_once(scored: World) -> None:
    plan = read_plan(scored.run)
    planned = {
        (unit.path, row) for unit in plan.units for row in range(unit.row_start, unit.row_start + unit.row_count)
    }
    features, rejects = features_of(scored.run), rejects_of(scored.run)
    ends = collections.Counter(
        zip(features["path"].to_pylist(), features["row"].to_pylist(), features["window"].to_pylist())
    )
    ends.update(zip(rejects["path"].to_pylist(), rejects["row"].to_pylist(), rejects["window"].to_pylist()))
    assert set(ends.values()) == {1}
    assert {(path, row) for path, row, _ in ends} == planned
    reasons = dict(zip(rejects["row"].to_pylist(), rejects["reason"].to_pylist()))
    assert reasons[3] == "invalid_json"
    assert reasons[7] == "empty_text"


def test_rows_carry_domain_id_and_extra_columns(scored: World) -> None:
    row = (
        features_of(scored.run)
        .filter(pc.equal(features_of(scored.run)["path"], "a.parquet"))
        .slice(0, 1)
        .to_pylist()[0]
    )
    assert row["source_id"] == "r1-0"
    assert row["domain"] in ("math", "web")
    assert json.loads(row["extra"]) == {"clean": False}


def test_sketches_have_unit_norm_and_keep_the_norm_beside_them(scored: World) -> None:
    features = features_of(scored.run)
    norms = np.linalg.norm(unit_sketches(features).astype(np.float64), axis=1)
    # float16 rounds each of 64 numbers by at most 2^-11 of itself, so the norm by at most 2^-11.
    assert np.abs(norms - 1).max() < 2**-11
    assert (features["sketch_norm"].to_numpy() > 0).all()


def test_invariant_1_features_do_not_depend_on_units_or_batches(scored: World, tmp_path: Path) -> None:
    other = make_world(tmp_path / "other", unit_tokens=100_000)
    options = dataclasses.replace(other.scoring_options, batch_tokens=2048)

    score(other.run, "base", options, IN_PROCESS)
    first = {row["sample_id"]: row for row in features_of(scored.run).to_pylist()}
    second = {row["sample_id"]: row for row in features_of(other.run).to_pylist()}
    assert first.keys() == second.keys()
    for sample_id, row in first.items():
        left, right = np.array(row["sketch"], np.float64), np.array(second[sample_id]["sketch"], np.float64)
        # float32 gradients agree to 1e-5; storage as float16 rounds each side by 2^-11 of a number, 2^-10 together.
        assert np.linalg.norm(left - right) < 2**-10
        assert row["loss"] == pytest.approx(second[sample_id]["loss"], rel=1e-5)


def test_second_run_does_only_what_is_missing_and_gives_the_same_bytes(world: World) -> None:
    folder = world.folder / "run"
    before = tree_hashes(folder)
    part = next(iter(sorted((folder / "features" / "base").glob("*.parquet"))))
    untouched = {
        path: path.stat().st_mtime_ns for path in (folder / "features" / "base").glob("*.parquet") if path != part
    }
    part.unlink()
    world.score()
    assert tree_hashes(folder) == before
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_part_is_made_again(world: World, damage: str) -> None:
    folder = world.folder / "run"
    before = tree_hashes(folder)
    part = sorted((folder / "features" / "base").glob("*.parquet"))[0]
    data = bytearray(part.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 0x10
    part.write_bytes({"truncate": bytes(data[: len(data) // 2]), "flip": bytes(data), "empty": b""}[damage])
    world.score()
    assert tree_hashes(folder) == before


def test_later_target_gets_its_columns_without_the_model(world: World) -> None:
    world.describe("second", data=str(world.evaluation), eval="")
    (world.model / "model.safetensors").unlink()
    report = score(world.run, "base", ScoringOptions(), IN_PROCESS)
    assert set(report.targets) == {"target", "second"}
    manifest = world.run.manifest("curvature", "second.base")
    rows = sum(part.rows for part in manifest.parts)
    assert rows == features_of(world.run).num_rows


def test_curvature_made_later_is_that_made_in_the_scoring_pass(scored: World, world: World) -> None:
    shutil.rmtree(world.folder / "run" / "curvature")
    world.score()
    assert tree_hashes(world.folder / "run") == tree_hashes(scored.folder / "run")


def test_shares_of_the_plan_add_up_to_the_whole(scored: World, world: World) -> None:
    folder = world.folder / "run"
    for name in ("features", "rejects", "curvature"):
        shutil.rmtree(folder / name)
    for stage in ("score", "curvature"):
        shutil.rmtree(folder / "stages" / stage)
    first = world.score(share=(0, 2))
    assert not first.complete
    assert not (folder / "stages" / "score").exists()
    second = world.score(share=(1, 2))
    assert second.complete
    assert tree_hashes(folder) == tree_hashes(scored.folder / "run")


def test_invariant_6_out_of_memory_halves_the_batch_and_the_footer_says_so(
    scored: World, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(world.folder / "run" / "features")
    original = scorer_module.SampleScorer._features

    def greedy(self, engine, batch):
        if len(batch) > 2:
            raise MemoryError("no room")
        return original(self, engine, batch)

    monkeypatch.setattr(scorer_module.SampleScorer, "_features", greedy)
    world.score()
    part = world.run.manifest("score", "base").parts[0]
    footer = decode_table(read_part(world.run.url, part), part.path, schema="features")[1]
    assert footer.notes["batch_halvings"] > 0
    left, right = unit_sketches(features_of(scored.run)), unit_sketches(features_of(world.run))
    assert np.abs(left.astype(np.float64) - right).max() < 2**-10


def test_invariant_6_a_sample_that_breaks_the_model_costs_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(world.folder / "run" / "features")
    original = scorer_module.SampleScorer._features
    lengths: collections.Counter[int] = collections.Counter()

    def picky(self, engine, batch):
        lengths.update(len(item.ids) for item in batch)
        if any(len(item.ids) == max(len(other.ids) for other in batch) > 150 for item in batch):
            raise RuntimeError("index out of range")
        return original(self, engine, batch)

    monkeypatch.setattr(scorer_module.SampleScorer, "_features", picky)
    report = world.score()
    assert report.rejects["model_error"] > 0
    assert report.samples > 0
    assert (
        report.samples + sum(report.rejects.values())
        == features_of(world.run).num_rows + rejects_of(world.run).num_rows
    )


def test_model_that_produces_nan_rejects_every_sample_and_says_so(world: World) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(world.model / "model.safetensors")
    name = sorted(name for name in weights if "q_proj" in name or "norm" in name)[0]
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, world.model / "model.safetensors", metadata={"format": "pt"})

    report = score(world.run, "broken", world.scoring_options, IN_PROCESS)
    assert report.samples == 0
    assert report.rejects["non_finite"] > 0


def test_changed_corpus_file_is_an_error_that_names_it(world: World) -> None:
    text = (world.corpus / "b.jsonl").read_text()
    (world.corpus / "b.jsonl").write_text(text.replace("glass", "grass", 1))
    shutil.rmtree(world.folder / "run" / "features")
    with pytest.raises(LehrError, match=r"b\.jsonl"):
        world.score()


def test_a_scoring_never_changes(world: World) -> None:

    with pytest.raises(InputError, match="k = 64, not 32"):
        score(world.run, "base", ScoringOptions(k=32), IN_PROCESS)


def test_model_of_other_weights_is_refused(world: World, tmp_path: Path) -> None:
    from tests.tiny import save_tiny_model

    save_tiny_model(tmp_path / "other", "gpt2")
    with pytest.raises(InputError, match="fingerprint"):
        score(world.run, "base", ScoringOptions(model=str(tmp_path / "other")), IN_PROCESS)


def test_overlapping_candidates_are_marked(world: World) -> None:
    first = json.loads(world.target.read_text().splitlines()[0])["text"]
    with (world.corpus / "b.jsonl").open("a") as handle:
        handle.write(json.dumps({"name": "copy", "topic": "web", "clean": True, "text": first}) + "\n")
        handle.write(json.dumps({"name": "near", "topic": "web", "clean": True, "text": first + " end"}) + "\n")
    world.plan(extend=True)
    report = world.score()
    assert report.overlapping["target"] >= 2
    tables = [
        read_table(world.run.path(part.path), schema="curvature")
        for part in world.run.manifest("curvature", "target.base").parts
    ]
    marked = pa.concat_tables(tables)
    marked = marked.filter(marked["overlapping"])
    assert 1.0 in marked["overlap"].to_pylist()
    assert "reference" in marked["overlap_with"].to_pylist()


def test_evaluation_set_that_overlaps_the_target_is_an_error(world: World) -> None:
    shutil.copy(world.target, world.evaluation)
    with pytest.raises(InputError, match=r"60 of 60 evaluation samples overlap .*row \d+"):
        world.describe("again")


def test_target_is_described_in_parts(scored: World) -> None:
    spec = scored.run.scoring("base")
    data = read_target(scored.run, "target", "base", spec)
    assert len(data.samples["reference"]) == 60
    assert len(data.samples["evaluation"]) == 10
    assert data.geometry.sample_count == 60
    again = Run.open(scored.run.url).manifest("target", "target.base").summary["geometry"]
    assert again["k_star"] == data.geometry.centred.k_star


@pytest.mark.slow
def test_invariant_5_worker_count_changes_no_byte(scored: World, world: World) -> None:
    folder = world.folder / "run"
    for name in ("features", "rejects", "curvature"):
        shutil.rmtree(folder / name)
    world.score(Execution(workers=2))
    assert tree_hashes(folder) == tree_hashes(scored.folder / "run")
