"""`lehr check` on a small run: sound, damaged, scored with other signs, from changed texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from lehr.cli import main
from pipelines.check import CheckCost, check
from pipelines.check_rows import draw_rows
from pipelines.geometry import unit_sketches
from pipelines.options import CheckOptions
from pipelines.scorer import load_encoder
from pipelines.scoring import ModelLocation
from schemas.errors import InputError, SourceChanged
from schemas.manifest import write_manifest
from schemas.parquet import Part, decode_table, read_part, write_table
from tests.pipelines.worlds import World, copy_world, make_world
from tests.reference.gradients import dense_gradients

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("check") / "world", rows=30)
    world.describe()
    world.score()
    return world


def tamper(world: World, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite the first features part, and list it in the manifest as if it had been made so."""
    run = world.run
    manifest = run.manifest("score", "base")
    old = next(part for part in manifest.parts if part.path.startswith("features/") and part.rows > 3)
    table, footer = decode_table(read_part(run.url, old), old.path, schema="features")
    (Path(run.url) / old.path).unlink()
    new = write_table(run.url, old.path, change(table), footer)
    parts: tuple[Part, ...] = tuple(new if part is old else part for part in manifest.parts)
    (Path(run.url) / run.manifest_path("score", "base")).unlink()
    write_manifest(run.path(run.manifest_path("score", "base")), dataclasses.replace(manifest, parts=parts))


def with_column(table: pa.Table, name: str, values: object) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))


EVERY = CheckOptions(rows=1000, target_rows=4)


def test_a_sound_run_is_intact_and_as_theory_says(scored: World) -> None:
    costs: list[CheckCost] = []
    ticks: list[int] = []
    report = check(scored.run, "base", CheckOptions(rows=20, target_rows=10), on_start=costs.append, tick=ticks.append)
    assert report.intact and report.faithful and not report.failures
    assert sum(ticks) == costs[0].tokens_run  # the cost that is printed is the cost
    errors = report.record["errors"]
    assert report.record["cost"]["rows"] == 20 and report.record["cost"]["target_rows"] == 10
    # Rank 4 on each side of 14 sites, folded to 64: a tenth to a third of the norms, and of what is predicted a third to three.
    for name in ("projection", "fold", "stored", "norm"):
        assert 1 / 3 < errors[name]["ratio"] < 3, name
    assert 0 < errors["storage"]["ratio"] < 2 and errors["arithmetic"]["observed"] < 1e-6
    decisions = report.record["decisions"]
    assert decisions["spearman_gain"] > 0.3 and 0 <= decisions["match_half_overlap"] <= 1
    assert json.loads(json.dumps(report.record)) == report.record


def test_everything_that_is_attributed_is_in_the_exact_gradient(tmp_path: Path) -> None:
    """Embeddings, norms and biases too, where the scoring attributes them."""
    from pipelines.score import score
    from tests.pipelines.worlds import IN_PROCESS

    world = make_world(tmp_path / "world", rows=14, kind="qwen2")
    options = dataclasses.replace(world.scoring_options, attribute="all")
    score(world.run, "base", options, IN_PROCESS)
    report = check(world.run, "base", CheckOptions(rows=6))
    declared = world.run.manifest("scoring", "base").summary
    assert report.record["cost"]["numbers"] == declared["attributed_parameters"]
    assert report.intact and report.faithful
    assert 1 / 3 < report.record["errors"]["projection"]["ratio"] < 3


def test_norm_errors_are_against_dense_gradients(scored: World) -> None:
    options = CheckOptions(rows=3, target_rows=2)
    report = check(scored.run, "base", options)
    spec = scored.run.scoring("base")
    encoder = load_encoder(spec, ModelLocation(model=str(scored.model)))
    rows = draw_rows(scored.run, "base", spec, encoder, options)
    model = AutoModelForCausalLM.from_pretrained(scored.model, dtype=torch.float32)
    sites = [site for group in spec.input_groups for site in group.sites]
    shares = []
    for row in rows:
        item = encoder.encode(row.sample.text, row.sample.loss_spans)
        dense = dense_gradients(model, item.ids, item.loss_mask)
        shares.append(row.norm / np.sqrt(sum((dense[f"{site}.weight"] ** 2).sum() for site in sites)) - 1)
    # float32 gradients on both sides, 1e-5 of the norm; the shares are of order 0.1.
    assert report.record["errors"]["norm"]["observed"] == pytest.approx(np.sqrt(np.mean(np.square(shares))), rel=1e-3)
    assert report.record["errors"]["norm"]["largest"] == pytest.approx(np.abs(shares).max(), rel=1e-3)


def test_rows_come_from_all_units_by_seed(scored: World) -> None:
    def ids(**changes: object) -> list[str]:
        report = check(scored.run, "base", dataclasses.replace(CheckOptions(rows=12, target_rows=2), **changes))  # type: ignore[arg-type]
        return [row["sample_id"] for row in report.record["rows"]]

    first = ids()
    assert first == ids() and first != ids(seed=1) and len(set(first)) == 12
    everything = check(scored.run, "base", EVERY).record
    stored = sum(part.rows for part in scored.run.manifest("score", "base").parts if part.path.startswith("features/"))
    assert everything["cost"]["rows"] == stored
    assert {row["place"].split(" ")[0] for row in everything["rows"]} == {"a.parquet", "b.jsonl"}
    assert check(scored.run, "base", CheckOptions(rows=2, target_rows=0)).record["cost"]["target_rows"] == 60


def test_less_memory_means_more_passes_and_the_same_numbers(scored: World) -> None:
    options = CheckOptions(rows=6, target_rows=4)
    whole, parts = (
        check(scored.run, "base", dataclasses.replace(options, memory_gb=memory)).record for memory in (1.0, 0.0003)
    )
    assert whole["cost"]["passes"] == 1 and parts["cost"]["passes"] > 1
    assert parts["cost"]["largest_pass"] <= 300_000
    assert whole["errors"]["norm"] == pytest.approx(parts["errors"]["norm"], rel=1e-5)  # another order of float64 sums
    with pytest.raises(InputError, match="at most 0 samples"):
        check(scored.run, "base", dataclasses.replace(options, memory_gb=1e-6))


@pytest.mark.parametrize("damage", ["sketch", "rows_exchanged", "norm", "loss"])
def test_damage_that_the_manifest_hides_is_found(scored: World, tmp_path: Path, damage: str) -> None:
    world = copy_world(scored, tmp_path / "copy")

    def change(table: pa.Table) -> pa.Table:
        if damage in ("norm", "loss"):
            name = {"norm": "sketch_norm", "loss": "loss"}[damage]
            values = table[name].to_numpy().copy()
            values[1] *= 1.01
            return with_column(table, name, values)
        unit = unit_sketches(table).copy()
        if damage == "sketch":
            unit[1, 5] += np.float16(0.02)  # one number of 64
        else:
            unit[[0, 1]] = unit[[1, 0]]
        return with_column(table, "sketch", list(unit))

    tamper(world, change)
    report = check(world.run, "base", EVERY)
    assert not report.intact
    assert len(report.failures) == (2 if damage == "rows_exchanged" else 1)
    assert (
        "row" in report.failures[0]
        and {"norm": "sketch_norm", "loss": "loss"}.get(damage, "sketch") in report.failures[0]
    )


def test_sketches_of_another_seed_are_found(scored: World, tmp_path: Path) -> None:
    world = copy_world(scored, tmp_path / "copy")
    other = make_world(tmp_path / "other", rows=30)
    options = dataclasses.replace(other.scoring_options, seed=1)
    from pipelines.score import score
    from tests.pipelines.worlds import IN_PROCESS

    score(other.run, "base", options, IN_PROCESS)
    theirs = {
        part.path: part for part in other.run.manifest("score", "base").parts if part.path.startswith("features/")
    }

    def change(table: pa.Table) -> pa.Table:
        for part in theirs.values():
            found, _ = decode_table(read_part(other.run.url, part), part.path, schema="features")
            if found["sample_id"].to_pylist() == table["sample_id"].to_pylist():
                return with_column(table, "sketch", list(unit_sketches(found)))
        raise AssertionError("no such part")

    tamper(world, change)
    report = check(world.run, "base", EVERY)
    assert not report.intact and "1." in report.failures[0]  # some sqrt(2) of the norm away


def test_wrong_projection_is_not_as_theory_says(scored: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.check as module

    real = module._sketch

    def biased(*arguments: object) -> torch.Tensor:
        return 2.0 * real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_sketch", biased)
    report = check(scored.run, "base", CheckOptions(rows=8, target_rows=4))
    assert report.intact and not report.faithful and "theory" in report.failures[0]


def test_changed_and_missing_corpus_files_are_named(scored: World, tmp_path: Path) -> None:
    world = copy_world(scored, tmp_path / "copy")
    path = world.corpus / "b.jsonl"
    path.write_text(path.read_text().replace("glass", "grass"))
    with pytest.raises(SourceChanged, match=r"b\.jsonl"):
        check(world.run, "base", EVERY)
    path.unlink()
    with pytest.raises(SourceChanged, match=r"b\.jsonl is gone"):
        check(world.run, "base", EVERY)


def test_a_text_that_is_not_the_scored_one_is_named(scored: World, tmp_path: Path) -> None:
    """Parquet units are fingerprinted by size and footer, so that a page may change unseen; the text's hash tells."""
    for change, found in (
        (lambda table: with_column(table, "content_id", ["0" * 32] * table.num_rows), "has another text"),
        (lambda table: with_column(table, "sample_id", ["0" * 32] * table.num_rows), "is not there any more"),
    ):
        world = copy_world(scored, tmp_path / found.replace(" ", "-"))
        tamper(world, change)
        with pytest.raises(SourceChanged, match=f"parquet: the sample .* {found}"):
            check(world.run, "base", EVERY)


def test_what_cannot_be_checked_is_refused(scored: World, tmp_path: Path) -> None:
    fresh = make_world(tmp_path / "fresh", rows=14)
    with pytest.raises(InputError, match="lehr score"):
        check(fresh.run, "base", CheckOptions())
    fresh.describe()
    with pytest.raises(InputError, match="`lehr score` to its end"):
        check(fresh.run, "base", CheckOptions())
    from tests.tiny import save_tiny_model

    other = save_tiny_model(tmp_path / "other", seed=3)
    with pytest.raises(InputError, match="fingerprint"):
        check(scored.run, "base", CheckOptions(), model=str(other))
    with pytest.raises(InputError, match="rows must be at least 2"):
        CheckOptions(rows=1)
    with pytest.raises(InputError, match="target_rows"):
        CheckOptions(target_rows=-1)
    with pytest.raises(InputError, match="memory_gb"):
        CheckOptions(memory_gb=0.0)


def test_targets_none_one_and_several(scored: World, tmp_path: Path) -> None:
    bare = make_world(tmp_path / "bare", rows=14)
    bare.score()
    report = check(bare.run, "base", CheckOptions(rows=4))
    assert report.intact and report.record["target"] is None and report.record["decisions"] == {}
    bare.describe("one")
    bare.describe("two", energy=0.5)
    with pytest.raises(InputError, match="one, two"):
        check(bare.run, "base", CheckOptions(rows=4))
    one, two = (
        check(bare.run, "base", CheckOptions(rows=4, target=name)).record["decisions"]["k_star"]["exact"]
        for name in ("one", "two")
    )
    assert two < one  # the elbow is the target's own


def test_a_selection_is_repeated_among_its_rows(
    scored: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = copy_world(scored, tmp_path / "copy")
    assert main(["select", world.run.url, "--samples", "12"]) == 0
    report = check(world.run, "base", CheckOptions(rows=16, target_rows=0, selection="match"))
    found = report.record["decisions"]["selection"]
    assert sum(row["selected"] for row in report.record["rows"]) == found["selected"] == 8
    assert len(report.record["rows"]) == 16 and report.record["target"] == "target"
    assert 0 <= found["match_overlap"] <= 1
    with pytest.raises(InputError, match="nothing"):
        check(world.run, "base", CheckOptions(selection="nothing"))


def test_the_command_prints_writes_and_exits(scored: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "check.json"
    arguments = ["check", scored.run.url, "--rows", "500", "--target-rows", "4", "--out", str(out)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "passes" in text and "Against exact gradients" in text and "Spearman of gain" in text and "intact" in text
    assert "are all there are" in text
    assert json.loads(out.read_text())["integrity"]["intact"] is True
    world = copy_world(scored, tmp_path / "copy")
    tamper(world, lambda table: with_column(table, "sketch", list(-unit_sketches(table))))
    assert main(["check", world.run.url, "--rows", "500", "--target-rows", "4", "--show", "1"]) == 1
    text = capsys.readouterr().out
    assert "more (--show" in text and "not those of this model" in text
    assert main(["check", str(tmp_path / "nowhere")]) == 2
