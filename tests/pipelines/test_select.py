"""Selection on storage: one row per candidate, reasons, refusals, and what stands beside every selection."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.select import candidate_set, run_select
from schemas.errors import InputError
from schemas.parquet import read_table
from schemas.run import Run
from selection_ops.selectors import Budget, SelectorSettings
from tests.pipelines.worlds import World, make_world


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    first = json.loads(world.target.read_text().splitlines()[0])["text"]
    with (world.corpus / "b.jsonl").open("a") as handle:
        handle.write(json.dumps({"name": "copy", "topic": "web", "clean": True, "text": first}) + "\n")
    world.plan(extend=True)
    world.describe()
    world.score()
    return world


@pytest.fixture
def world(scored: World, tmp_path: Path) -> World:
    shutil.copytree(scored.folder / "run", tmp_path / "run")
    return dataclasses.replace(scored, folder=tmp_path, run=Run.open(str(tmp_path / "run")))


def selection(run: Run, name: str) -> pa.Table:
    parts = [part for part in run.manifest("select", name).parts if part.path.endswith(".parquet")]
    return pa.concat_tables([read_table(run.path(part.path), schema="selection") for part in parts])


@pytest.mark.parametrize(
    "selector", ["match", "random", "loss", "grad-norm", "target-cosine", "target-dot", "influence", "influence-cos"]
)
def test_one_row_per_candidate_with_everything_that_decided(world: World, selector: str) -> None:
    report = run_select(world.run, selector, "base", "target", Budget(samples=10), SelectorSettings(selector=selector))
    table = selection(world.run, selector)
    assert table.num_rows == world.run.manifest("score", "base").summary["samples"]
    assert report.selected == 10
    chosen = table.filter(table["selected"])
    assert sorted(chosen["rank"].to_pylist()) == list(range(10))
    assert set(chosen["reason"].to_pylist()) == {"selected"}
    left = table.filter(pc.invert(table["selected"]))
    assert set(left["selection_weight"].to_pylist()) == {0.0}
    assert "" not in left["reason"].to_pylist()
    assert "overlap" in left["reason"].to_pylist()
    assert any(reason.startswith("duplicate_of") for reason in left["reason"].to_pylist())


def test_diagnostics_stand_beside_every_selection(world: World) -> None:
    for selector in ("random", "match"):
        run_select(world.run, selector, "base", "target", Budget(samples=10), SelectorSettings(selector=selector))
        record = orjson.loads((world.folder / "run/selections" / selector / "solution.json").read_bytes())
        assert {"certificate", "diagnostics", "counts", "warnings", "settings", "budget"} <= record.keys()
        assert -1 <= record["diagnostics"]["set_cosine_evaluation"] <= 1
    solutions = [
        orjson.loads((world.folder / "run/selections" / name / "solution.json").read_bytes())["diagnostics"]
        for name in ("random", "match")
    ]
    assert solutions[1]["set_cosine_evaluation"] > solutions[0]["set_cosine_evaluation"]


def test_overlapping_candidates_stay_on_request(world: World) -> None:
    run_select(
        world.run,
        "kept",
        "base",
        "target",
        Budget(samples=10),
        SelectorSettings(selector="target-cosine"),
        keep_overlapping=True,
    )
    table = selection(world.run, "kept")
    assert True in table["overlapping"].to_pylist()
    assert "overlap" not in table["reason"].to_pylist()


def test_losses_and_gradients_of_means_are_brought_back_to_sums(world: World) -> None:
    parts = [part for part in world.run.manifest("score", "base").parts if part.path.startswith("features/")]
    features = read_table(world.run.path(parts[0].path), schema="features")
    mean = features
    for name in ("loss", "grad_norm"):
        values = features[name].to_numpy() / features["loss_tokens"].to_numpy()
        mean = mean.set_column(mean.column_names.index(name), name, pa.array(values, pa.float32()))
    of_sums, of_means = candidate_set(features), candidate_set(mean, loss="mean")
    for name in ("loss_N", "grad_norm_N"):
        assert getattr(of_means, name) == pytest.approx(getattr(of_sums, name), rel=1e-6)  # one rounding to float32
        assert getattr(candidate_set(mean), name) != pytest.approx(getattr(of_sums, name), rel=0.1)


def test_token_budget_is_not_exceeded(world: World) -> None:
    report = run_select(world.run, "t", "base", "target", Budget(tokens=200), SelectorSettings())
    assert 150 < report.tokens <= 200


def test_same_selection_again_is_the_same_bytes(world: World) -> None:
    settings = SelectorSettings()
    run_select(world.run, "m", "base", "target", Budget(samples=10), settings)
    before = {path: path.read_bytes() for path in (world.folder / "run/selections/m").iterdir()}
    run_select(world.run, "m", "base", "target", Budget(samples=10), settings)
    assert {path: path.read_bytes() for path in (world.folder / "run/selections/m").iterdir()} == before


def test_a_selection_never_changes(world: World) -> None:
    run_select(world.run, "m", "base", "target", Budget(samples=10), SelectorSettings())
    with pytest.raises(InputError, match="other budget"):
        run_select(world.run, "m", "base", "target", Budget(samples=11), SelectorSettings())


def test_unknown_target_lists_those_there_are(world: World) -> None:
    with pytest.raises(InputError, match=r"finished: target\.base"):
        run_select(world.run, "m", "base", "nothing", Budget(samples=10), SelectorSettings())


def test_ten_targets_are_too_few_for_direct(world: World) -> None:
    world.describe("few", data=str(world.evaluation), eval="")
    world.score()
    with pytest.raises(InputError, match="few"):
        run_select(world.run, "d", "base", "few", Budget(samples=10), SelectorSettings(selector="direct"))
