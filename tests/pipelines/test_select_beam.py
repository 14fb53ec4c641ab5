"""The Beam job chooses what the in-memory path chooses: the same rows in the same order, with the same reasons and scores."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from benchmarks.pools import make_pool
from pipelines import select_beam
from pipelines.beam_selection import write
from pipelines.options import Execution
from pipelines.select import run_select
from pipelines.select_beam import choose_engine, refuse_unsupported, run_select_beam
from schemas.errors import InputError, LehrError
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Part, read_footer, read_table, write_table
from schemas.run import Run
from selection_ops.selectors import Budget, SelectorSettings, base, guesses
from selection_ops.selectors.base import Selector

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
    monkeypatch.setattr(write, "RANGE_ROWS", 15)


def selection(run: Run, name: str) -> pa.Table:
    listed = [part for part in run.manifest("select", name).parts if part.path.endswith(".parquet")]
    return pa.concat_tables([read_table(run.path(part.path), schema="selection") for part in listed])


def solution(run: Run, name: str) -> dict[str, Any]:
    return orjson.loads(Path(run.path(f"{run.selection_folder(name)}/solution.json")).read_bytes())


def scores(table: pa.Table) -> dict[str, np.ndarray]:
    """Every score by name, not a number where a row has none; `score` among them."""
    rows = [dict(row) for row in table["scores"].to_pylist()]
    names = {name for row in rows for name in row}
    found = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    return found | {"score": table["score"].to_numpy(zero_copy_only=False).astype(float)}


def assert_alike(
    run: Run, budget: Budget, settings: SelectorSettings, *, name: str, rounds: int = 2, **options: Any
) -> None:
    """Both engines on the same settings; everything in the parts and the certificate agrees."""
    run_select(run, f"{name}-memory", "base", "target", budget, settings, **options)
    run_select_beam(run, f"{name}-beam", "base", "target", budget, settings, IN_PROCESS, rounds=rounds, **options)
    memory, beam = selection(run, f"{name}-memory"), selection(run, f"{name}-beam")
    # Prices that come from sketches are float32 products, of blocks of other rows.
    passes = settings.selector in ("match", "direct") or settings.redundancy > 0.0
    for column in memory.column_names:
        if column in ("score", "scores"):
            continue
        if column == "selection_weight" and passes:
            np.testing.assert_allclose(beam[column].to_numpy(), memory[column].to_numpy(), atol=1e-5)
        elif pa.types.is_floating(memory[column].type):
            # Not a number equals itself here.
            np.testing.assert_array_equal(memory[column].to_numpy(), beam[column].to_numpy(), column)
        else:
            assert memory[column].equals(beam[column]), column
    # Prices are quotients of sums over the pool, in another order: some hundred roundings.
    expected_scores, found_scores = scores(memory), scores(beam)
    if not relaxes(settings, solution(run, f"{name}-memory")["certificate"]):
        expected_scores.pop("relaxed_weight", None)
    assert set(expected_scores) == set(found_scores)
    for key, left in expected_scores.items():
        near = 1e-5 * max(1.0, float(np.nanmax(np.abs(left)))) if passes else 1e-12
        np.testing.assert_allclose(found_scores[key], left, rtol=1e-5 if passes else 1e-10, atol=near, err_msg=key)
    here, there = solution(run, f"{name}-memory"), solution(run, f"{name}-beam")
    assert here["counts"] == there["counts"]
    shared = set(here["certificate"]) & set(there["certificate"]) - {"bound"}
    if not passes:
        shared -= {"objective_per_iteration"}
    assert {"objective", "threshold"} & shared
    for key in shared:
        found, expected = there["certificate"][key], here["certificate"][key]
        if isinstance(expected, float | list):
            expected = pytest.approx(expected, rel=1e-5 if passes else 1e-9, abs=1e-6 if passes else 1e-12)
        assert found == expected, key
    for key in ("candidates", "pool", "selected", "selected_tokens", "weight_sum", "duplicates_dropped", "non_finite"):
        assert here["diagnostics"][key] == pytest.approx(there["diagnostics"][key]), key
    assert there["diagnostics"].get("outlier_caps") == here["diagnostics"].get("outlier_caps")
    for domain, held in here["diagnostics"]["domains"].items():
        assert held == pytest.approx(there["diagnostics"]["domains"][domain], rel=1e-12)
    if not options.get("columns_only"):
        for key in ("set_cosine", "set_cosine_evaluation", "effective_rank"):
            # Sums of float32 blocks of other rows.
            assert there["diagnostics"][key] == pytest.approx(here["diagnostics"][key], abs=1e-5), key


def relaxes(settings: SelectorSettings, certificate: dict[str, Any]) -> bool:
    """Whether relaxed weights are needed to choose, and not only for a bound."""
    long = certificate.get("shortlist", 0) > settings.greedy_rows
    return settings.redundancy > 0.0 or (settings.selector == "match" and (settings.fractional or long))


@pytest.mark.slow
@pytest.mark.parametrize(
    "selector", ["random", "loss", "grad-norm", "target-cosine", "target-dot", "influence", "influence-cos"]
)
def test_rankings(run: Run, selector: str) -> None:
    assert_alike(run, SAMPLES, SelectorSettings(selector=selector), name=f"r-{selector}")


QUOTAS: dict[str, Any] = {"quotas": {"math": 0.1}, "floors": {"web": 0.3, "noise": 0.2}}
POOL: dict[str, Any] = {"shortlist": 0.0, "greedy_rows": 100, "max_iterations": 3}
"""The whole pool, of which greedy sees a part."""

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
    "match-quotas": (SAMPLES, {"selector": "match", **QUOTAS}),
    "match-limit": (SAMPLES, {"selector": "match", "stiff_limit": 0.6, "stiff_limit_kind": "pool"}),
    "match-tight-limit": (SAMPLES, {"selector": "match", "stiff_limit": 0.05, "if_infeasible": "raise"}),
    "match-limit-quotas": (SAMPLES, {"selector": "match", "stiff_limit": 0.8, "stiff_limit_kind": "pool", **QUOTAS}),
    "match-fractional": (SAMPLES, {"selector": "match", "fractional": True, "max_iterations": 4}),
    "match-fractional-tokens": (TOKENS, {"selector": "match", "fractional": True, "max_iterations": 4, **QUOTAS}),
    "match-pool": (SAMPLES, {"selector": "match", **POOL}),
    "match-pool-tokens": (TOKENS, {"selector": "match", **POOL}),
    "match-pool-short": (Budget(samples=200), {"selector": "match", "allow_short": True, **POOL}),
    "match-pool-limit": (TOKENS, {"selector": "match", "stiff_limit": 0.5, "stiff_limit_kind": "pool", **POOL}),
    "match-nearly-all": (Budget(tokens=225_000), {"selector": "match", **POOL}),
    "match-long": (Budget(samples=120), {"selector": "match", "greedy_rows": 150, "max_iterations": 3}),
    "match-blocks": (Budget(samples=200), {"selector": "match", **POOL}),
    "direct": (SAMPLES, {"selector": "direct", "stiff_limit": 0.6, "max_iterations": 2}),
    "direct-to-the-end": (SAMPLES, {"selector": "direct", "stiff_limit": 0.6, "max_iterations": 12}),
    "direct-target": (
        SAMPLES,
        {"selector": "direct", "stiff_limit": 0.5, "stiff_limit_kind": "target", "max_iterations": 2},
    ),
    "direct-raised": (SAMPLES, {"selector": "direct", "if_infeasible": "raise", "max_iterations": 4}),
    "direct-fractional": (SAMPLES, {"selector": "direct", "stiff_limit": 0.6, "fractional": True, "max_iterations": 9}),
    "direct-restarts": (
        TOKENS,
        {"selector": "direct", "stiff_limit": 0.75, "restarts": 2, "max_iterations": 4, "seed": 3, **QUOTAS},
    ),
    "redundancy": (SAMPLES, {"selector": "direct-signed", "redundancy": 0.7, "max_iterations": 4}),
    "redundancy-to-the-end": (SAMPLES, {"selector": "direct-signed", "redundancy": 0.2, "max_iterations": 25}),
    "redundancy-tokens": (TOKENS, {"selector": "direct-signed", "redundancy": 1.0, "max_iterations": 4, **QUOTAS}),
    "redundancy-limit": (
        SAMPLES,
        {
            "selector": "direct-signed", "redundancy": 0.7, "stiff_limit": 0.7, "stiff_limit_kind": "pool",
            "rows": "sum", "max_iterations": 4,
        },
    ),
    "redundancy-short": (
        SAMPLES,
        {"selector": "direct-signed", "redundancy": 3.0, "allow_short": True, "greedy_rows": 50, "max_iterations": 6},
    ),
    "redundancy-fractional": (
        SAMPLES,
        {"selector": "direct-signed", "redundancy": 0.7, "fractional": True, "max_iterations": 4},
    ),
}  # fmt: skip


QUICK = ("ranking-token-quotas", "signed-binding", "match-tokens", "match-pool", "direct")


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


def drawn(seed: int) -> tuple[Budget, dict[str, Any]]:
    """A budget and settings, any of those that a selection with prices may have together."""
    draw = random.Random(seed)
    selector = ("match", "direct", "direct-signed")[seed % 3]
    samples = draw.random() < 0.5
    budget = Budget(samples=draw.randint(5, 150)) if samples else Budget(tokens=draw.randint(1_000, 30_000))
    changes: dict[str, Any] = {
        "selector": selector,
        "rows": draw.choice(["sum", "unit"]),
        "fractional": draw.random() < 0.25,
        "allow_short": draw.random() < 0.25,
        "if_infeasible": draw.choice(["error", "raise"]),
        "greedy_rows": draw.choice([20, 100, 1_000]),
        "max_iterations": draw.choice([1, 2, 4]),
        "shortlist": draw.choice([0.0, 1.0, 2.5]),
        "bound": False,
        "two_fold": False,
    }
    if draw.random() < 0.6 or selector == "direct":
        changes |= {"stiff_limit": draw.uniform(0.2, 1.2), "stiff_limit_kind": "pool"}
    if draw.random() < 0.5:
        changes["quotas"] = {"math": draw.uniform(0.05, 0.5), "web": draw.uniform(0.05, 0.5)}
    if draw.random() < 0.5:
        changes["floors"] = {"noise": draw.uniform(0.0, 0.3), "web": draw.uniform(0.0, 0.05)}
    if draw.random() < 0.3:
        changes["max_grad_norm_quantile"] = draw.uniform(0.6, 1.0)
    if selector == "direct":
        changes["restarts"] = draw.randint(0, 1)
    if selector == "direct-signed" and draw.random() < 0.7:
        changes["redundancy"] = draw.choice([0.3, 1.0, 3.0])
    return budget, changes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_any_settings_together(run: Run, seed: int) -> None:
    budget, changes = drawn(seed)
    settings = SelectorSettings(**changes)
    try:
        run_select(run, f"drawn-{seed}-memory", "base", "target", budget, settings)
    except LehrError as memory:
        with pytest.raises(LehrError) as beam:
            run_select_beam(run, "none", "base", "target", budget, settings, IN_PROCESS, rounds=seed % 2)
        # Limits are sums over the pool, in another order.
        number = re.compile(r"[0-9.e+-]+")
        assert number.sub("", str(beam.value)) == number.sub("", str(memory))
    else:
        assert_alike(run, budget, settings, name=f"drawn-{seed}", rounds=seed % 2)


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


def test_a_selector_that_the_job_does_not_know_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Selector):
        pass

    monkeypatch.setitem(base._SELECTORS, "own", Own)
    with pytest.raises(InputError, match=r"'own'.*--engine memory"):
        refuse_unsupported(SelectorSettings(selector="own"))


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
@pytest.mark.parametrize("case", ["signed-pool", "match-fractional", "direct-to-the-end"])
def test_bytes_do_not_depend_on_workers(run: Run, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """All with the samples and edges of real work, because those of this process alone could be others."""
    monkeypatch.undo()
    budget, changes = CASES[case]
    settings, name = SelectorSettings(**changes), f"workers-{case}"
    folder = Path(run.path(run.selection_folder(name)))
    seen = []
    for workers in (1, 2, 3):
        run_select_beam(run, name, "base", "target", budget, settings, Execution(workers=workers), rounds=1)
        seen.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(seen[0]) == 7 and seen[0] == seen[1] == seen[2]
