"""The Beam job chooses what the in-memory path chooses: the same rows in the same order, with the same reasons and scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from benchmarks.pools import make_pool
from pipelines import select_beam, selection_write
from pipelines.options import Execution
from pipelines.select import run_select
from pipelines.select_beam import choose_engine, refuse_unsupported, run_select_beam
from schemas.errors import InputError, LehrError
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Part, read_footer, read_table, write_table
from schemas.run import Run
from selection_ops.selectors import Budget, SelectorSettings, guesses

IN_PROCESS = Execution(workers=1)
SAMPLES, TOKENS = Budget(samples=40), Budget(tokens=9_000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_pool(tmp_path_factory.mktemp("pool") / "run", rows=900, k=64, part_rows=160)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, histograms and ranges so small that a few hundred rows need all that many millions do."""
    monkeypatch.setattr(guesses, "SAMPLE_ROWS", 128)
    monkeypatch.setattr(guesses, "EDGES", 16)
    monkeypatch.setattr(selection_write, "RANGE_ROWS", 15)


def selection(run: Run, name: str) -> pa.Table:
    listed = [part for part in run.manifest("select", name).parts if part.path.endswith(".parquet")]
    return pa.concat_tables([read_table(run.path(part.path), schema="selection") for part in listed])


def solution(run: Run, name: str) -> dict[str, Any]:
    return orjson.loads(Path(run.path(f"{run.selection_folder(name)}/solution.json")).read_bytes())


def scores(table: pa.Table, without: tuple[str, ...] = ()) -> list[dict[str, float]]:
    return [{name: value for name, value in row if name not in without} for row in table["scores"].to_pylist()]


def assert_alike(
    run: Run, budget: Budget, settings: SelectorSettings, *, name: str, rounds: int = 2, **options: Any
) -> None:
    """Both engines on the same settings; everything in the parts and the certificate agrees."""
    run_select(run, f"{name}-memory", "base", "target", budget, settings, **options)
    run_select_beam(run, f"{name}-beam", "base", "target", budget, settings, IN_PROCESS, rounds=rounds, **options)
    memory, beam = selection(run, f"{name}-memory"), selection(run, f"{name}-beam")
    for column in memory.column_names:
        if column in ("score", "scores"):
            continue
        if pa.types.is_floating(memory[column].type):
            # Not a number equals itself here.
            np.testing.assert_array_equal(memory[column].to_numpy(), beam[column].to_numpy(), column)
        else:
            assert memory[column].equals(beam[column]), column
    # Prices are quotients of sums over the pool, in another order: some hundred roundings.
    left = memory["score"].to_numpy(zero_copy_only=False).astype(float)
    right = beam["score"].to_numpy(zero_copy_only=False).astype(float)
    np.testing.assert_allclose(right, left, rtol=1e-10, atol=1e-12)
    for one, other in zip(scores(memory, ("relaxed_weight",)), scores(beam), strict=True):
        assert one == pytest.approx(other, rel=1e-10)
    here, there = solution(run, f"{name}-memory"), solution(run, f"{name}-beam")
    assert here["counts"] == there["counts"]
    shared = set(here["certificate"]) & set(there["certificate"]) - {"objective_per_iteration", "bound"}
    for key in shared:
        found, expected = there["certificate"][key], here["certificate"][key]
        assert found == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected), key
    for key in ("candidates", "pool", "selected", "selected_tokens", "weight_sum", "duplicates_dropped", "non_finite"):
        assert here["diagnostics"][key] == pytest.approx(there["diagnostics"][key]), key
    assert there["diagnostics"].get("outlier_caps") == here["diagnostics"].get("outlier_caps")
    for domain, held in here["diagnostics"]["domains"].items():
        assert held == pytest.approx(there["diagnostics"]["domains"][domain], rel=1e-12)
    if not options.get("columns_only"):
        for key in ("set_cosine", "set_cosine_evaluation", "effective_rank"):
            # Sums of float32 blocks of other rows.
            assert there["diagnostics"][key] == pytest.approx(here["diagnostics"][key], abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "selector", ["random", "loss", "grad-norm", "target-cosine", "target-dot", "influence", "influence-cos"]
)
def test_rankings(run: Run, selector: str) -> None:
    assert_alike(run, SAMPLES, SelectorSettings(selector=selector), name=f"r-{selector}")


CASES: dict[str, tuple[Budget, dict[str, Any]]] = {
    "tokens": (TOKENS, {"selector": "target-cosine"}),
    "lowest": (TOKENS, {"selector": "loss", "lowest": True}),
    "ranking-quotas": (
        SAMPLES,
        {"selector": "target-cosine", "quotas": {"math": 0.1}, "floors": {"web": 0.3, "noise": 0.2}},
    ),
    "ranking-token-quotas": (
        TOKENS,
        {"selector": "target-dot", "quotas": {"math": 0.1, "code": 0.2}, "floors": {"web": 0.3}},
    ),
    "ranking-short": (Budget(samples=700), {"selector": "target-cosine", "allow_short": True}),
    "caps": (SAMPLES, {"selector": "target-cosine", "max_loss_quantile": 0.8, "max_grad_norm_quantile": 0.7}),
    "signed": (SAMPLES, {"selector": "direct-signed"}),
    "signed-binding": (SAMPLES, {"selector": "direct-signed", "stiff_limit": 0.05, "if_infeasible": "raise"}),
    "signed-pool": (
        SAMPLES,
        {"selector": "direct-signed", "stiff_limit": 0.4, "stiff_limit_kind": "pool", "rows": "sum"},
    ),
    "signed-tokens": (TOKENS, {"selector": "direct-signed", "stiff_limit": 0.3, "stiff_limit_kind": "pool"}),
    "signed-quotas": (
        SAMPLES,
        {
            "selector": "direct-signed",
            "stiff_limit": 0.75,
            "stiff_limit_kind": "pool",
            "quotas": {"math": 0.1},
            "floors": {"web": 0.3, "noise": 0.2},
        },
    ),
    "signed-fractional": (
        SAMPLES,
        {"selector": "direct-signed", "stiff_limit": 0.7, "stiff_limit_kind": "pool", "fractional": True},
    ),
    "signed-damped": (SAMPLES, {"selector": "direct-signed", "gain": "damped", "max_loss_quantile": 0.9}),
    "match": (SAMPLES, {"selector": "match"}),
    "match-tokens": (TOKENS, {"selector": "match", "shortlist": 1.0, "rows": "unit"}),
    "match-flat": (SAMPLES, {"selector": "match", "gain": "flat+null", "max_grad_norm_quantile": 0.9}),
}


QUICK = ("ranking-token-quotas", "signed-binding", "match-tokens")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_settings(run: Run, case: str) -> None:
    budget, changes = CASES[case]
    assert_alike(run, budget, SelectorSettings(**changes), name=case)


@pytest.mark.slow
def test_columns_only_and_overlapping(run: Run) -> None:
    settings = SelectorSettings(selector="target-cosine")
    assert_alike(run, SAMPLES, settings, name="columns", columns_only=True)
    assert_alike(run, SAMPLES, settings, name="overlapping", keep_overlapping=True)


def test_a_limit_that_nothing_meets_names_the_smallest(run: Run) -> None:
    settings = SelectorSettings(selector="direct-signed", stiff_limit=1e-3)
    with pytest.raises(LehrError, match="smallest feasible limit is") as memory:
        run_select(run, "none", "base", "target", SAMPLES, settings)
    with pytest.raises(LehrError) as beam:
        run_select_beam(run, "none", "base", "target", SAMPLES, settings, IN_PROCESS, rounds=2)
    assert str(beam.value) == str(memory.value)


@pytest.mark.parametrize(
    ("budget", "changes"),
    [
        (Budget(samples=5_000), {"selector": "target-cosine"}),
        (
            SAMPLES,
            {
                "selector": "loss",
                "quotas": dict.fromkeys(("math", "code", "web", "news", "books", "forum", "lists", "noise"), 0.1),
            },
        ),
    ],
)
def test_budgets_that_cannot_be_spent_are_refused_alike(run: Run, budget: Budget, changes: dict[str, Any]) -> None:
    settings = SelectorSettings(**changes)
    with pytest.raises(LehrError) as memory:
        run_select(run, "none", "base", "target", budget, settings)
    with pytest.raises(LehrError) as beam:
        run_select_beam(run, "none", "base", "target", budget, settings, IN_PROCESS, rounds=2)
    assert str(beam.value) == str(memory.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"selector": "direct"}, "'direct'"),
        ({"selector": "direct-signed", "redundancy": 0.5}, "redundancy"),
        ({"selector": "match", "quotas": {"a": 0.5}}, "quotas"),
        ({"selector": "match", "stiff_limit": 1.0}, "stiff_limit"),
        ({"selector": "match", "shortlist": 0.0}, "shortlist"),
        ({"selector": "match", "floors": {"a": 0.5}, "fractional": True}, "floors, fractional"),
        ({"selector": "match", "greedy_rows": 50}, "greedy-rows"),
    ],
)
def test_what_the_job_does_not_do_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as refused:
        refuse_unsupported(SelectorSettings(**changes), SAMPLES)
    assert "--engine memory" in str(refused.value)


def test_a_selection_of_the_other_engine_is_not_replaced(run: Run) -> None:
    settings = SelectorSettings(selector="loss")
    run_select(run, "kept", "base", "target", SAMPLES, settings)
    with pytest.raises(InputError, match="other engine"):
        run_select_beam(run, "kept", "base", "target", SAMPLES, settings, IN_PROCESS)


def test_memory_where_columns_fit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine(run, "base")[0] == "memory"
    monkeypatch.setattr(select_beam, "available_bytes", lambda: 2 * 900 * select_beam.COLUMN_BYTES - 1)
    assert choose_engine(run, "base")[0] == "beam"


def thinned(source: Run, folder: Path, changes: Any) -> Run:
    """A copy of a pool whose features and curvature tables went through `changes(kind, number, table)`."""
    import shutil

    shutil.copytree(source.url, folder)
    run = Run.open(str(folder))
    made: dict[str, Manifest] = {}
    for stage, name, schema in (("score", "base", "features"), ("curvature", "target.base", "curvature")):
        before = run.manifest(stage, name)
        parts: list[Part] = []
        for number, part in enumerate(before.parts):
            table = read_table(run.path(part.path), schema=schema)
            parts.append(
                write_table(run.url, part.path, changes(schema, number, table), read_footer(run.path(part.path))[0])
            )
        inputs = dict(before.inputs)
        if stage == "curvature":
            inputs["score"] = made["score"].fingerprint
        made[stage] = dataclasses.replace(before, parts=tuple(parts), inputs=inputs)
        write_manifest(run.path(run.manifest_path(stage, name)), made[stage])
    return run


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


def awkward(schema: str, number: int, table: pa.Table) -> pa.Table:
    """Ties by the dozen, heavy tails, broken values, contents repeated across units, and a unit without any row."""
    if number == 2:
        return table.slice(0, 0)
    rng = np.random.default_rng(number)
    count = table.num_rows
    if schema == "curvature":
        cosine = np.round(table["alignment"].to_numpy().astype(float), 1)
        cosine[rng.integers(0, count, 3)] = np.nan
        cost = table["stiff_cost"].to_numpy() * np.exp(rng.standard_normal(count) * 3)
        return replaced(replaced(table, "alignment", cosine), "stiff_cost", np.round(cost, 1))
    table = replaced(table, "content_id", [f"text-{value:04d}" for value in rng.integers(0, 300, count)])
    return replaced(table, "tokens", np.where(rng.random(count) < 0.02, 0, table["tokens"].to_numpy()))


@pytest.mark.parametrize(
    ("case", "rounds"), [("ranking-token-quotas", 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("tokens", 0), ("ranking-quotas", 3), ("caps", 2), ("signed-pool", 3), ("signed-tokens", 2), ("match-tokens", 1),
    ))]
)  # fmt: skip
def test_ties_copies_across_units_broken_values_and_empty_units(
    run: Run, tmp_path: Path, case: str, rounds: int
) -> None:
    changed = thinned(run, tmp_path / "run", awkward)
    budget, changes = CASES[case]
    assert_alike(changed, budget, SelectorSettings(**changes), name=f"awkward-{case}", rounds=rounds)
    counts = solution(changed, f"awkward-{case}-beam")["counts"]
    assert counts["duplicate_of"] > 200 and counts["non_finite"] > 0
    assert ("no_tokens" in counts) == (budget.unit == "tokens")


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """All with the samples and edges of real work, because those of this process alone could be others."""
    monkeypatch.undo()
    budget, changes = CASES["signed-pool"]
    settings = SelectorSettings(**changes)
    folder = Path(run.path(run.selection_folder("workers")))
    seen = []
    for workers in (1, 2, 3):
        run_select_beam(run, "workers", "base", "target", budget, settings, Execution(workers=workers), rounds=1)
        seen.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(seen[0]) == 7 and seen[0] == seen[1] == seen[2]
