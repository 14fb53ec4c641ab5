"""Scorings through an optimizer's preconditioner, by the whole path: a real training's state in, sketches, check and verify out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from lehr.cli import main
from lehr.verify import verify
from pipelines.check import check
from pipelines.geometry import full_sketches
from pipelines.options import CheckOptions, ScoringOptions, TargetOptions
from pipelines.score import score
from pipelines.scorer import load_encoder
from pipelines.scoring import ModelLocation, scoring_spec
from pipelines.target import describe
from schemas.errors import InputError
from schemas.parquet import decode_table, read_part
from tests.pipelines.worlds import IN_PROCESS, World, make_world
from tests.reference.gradients import dense_gradients, projection
from tests.reference.preconditioning import adamw, log_rank_one

BETAS, EPS, STEPS = (0.9, 0.98), 1e-8, 3


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """optimizer.pt of a few steps of the tiny model, as torch.save writes it."""
    folder = tmp_path_factory.mktemp("state")
    world = make_world(folder / "world", rows=14)
    model = AutoModelForCausalLM.from_pretrained(world.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=BETAS, eps=EPS)
    for seed in range(STEPS):
        ids = torch.randint(3, 400, (4, 20), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


def scored(folder: Path, state: Path, **changes: object) -> World:
    """A world whose target is described and whose corpus is scored through the preconditioner."""
    world = make_world(folder, rows=14)
    options = options_of(world, state, **changes)
    target = TargetOptions(data=str(world.target), eval=str(world.evaluation))
    describe(world.run, "target", "base", target, options, IN_PROCESS)
    score(world.run, "base", ScoringOptions(), IN_PROCESS)
    return world


def options_of(world: World, state: Path, **changes: object) -> ScoringOptions:
    options = dataclasses.replace(world.scoring_options, k=0, dtype="float64", optimizer_state=str(state))
    return dataclasses.replace(options, **changes)  # type: ignore[arg-type]


def factors(world: World, state: Path, form: str, power: float) -> dict[str, np.ndarray]:
    """P^power by site, from the file alone."""
    model = AutoModelForCausalLM.from_pretrained(world.model)
    held = torch.load(state, weights_only=True)["state"]
    names = [name for name, _ in model.named_parameters()]
    exact = {
        name: adamw(held[index]["exp_avg_sq"].numpy().astype(np.float64), STEPS, *BETAS, EPS) ** power
        for index, name in enumerate(names)
    }
    found: dict[str, np.ndarray] = {}
    for group in world.run.scoring("base").input_groups:
        matrices = [exact[f"{site}.weight"] for site in group.sites]
        found.update(zip(group.sites, log_rank_one(matrices) if form == "rank-one" else matrices))
    return found


@pytest.mark.parametrize("metric", ["natural", "target", "update", "opus"])
@pytest.mark.parametrize("form", ["rank-one", "exact"])
def test_invariant_3_stored_sketches_are_of_preconditioned_gradients(
    tmp_path: Path, state: Path, metric: str, form: str
) -> None:
    """P_out (P^a * G) P_in^T for candidates and P^b for the target, P from the file by numpy, G by autograd in float64.

    Targets are stored as float32 and factors too: 2e-7 relative, some of it kept; candidates as float16, 2^-11.
    """
    world = scored(tmp_path / "world", state, metric=metric, precondition=form)
    run, spec = world.run, world.run.scoring("base")
    powers = {"natural": (0.5, 0.5), "target": (0.0, 1.0), "update": (1.0, 1.0), "opus": (1.0, 0.0)}[metric]
    encoder = load_encoder(spec, ModelLocation(model=str(world.model)))
    model = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float64)
    target_part = next(p for p in run.manifest("target", "target.base").parts if p.path.endswith("samples.parquet"))
    score_part = next(p for p in run.manifest("score", "base").parts if p.path.startswith("features/") and p.rows > 2)
    texts = {row["text"] for row in _corpus(world)}
    for part, schema, power, tolerance in (
        (score_part, "features", powers[0], 2**-10),
        (target_part, "target_samples", powers[1], 1e-6),
    ):
        table, _ = decode_table(read_part(run.url, part), part.path, schema=schema)
        stored_NK = full_sketches(table).numpy()
        factor = factors(world, state, form, power)
        for row in range(0, table.num_rows, 5):
            record = {name: table[name][row].as_py() for name in table.column_names if name != "sketch"}
            text = (
                record["text"]
                if schema == "target_samples"
                else next(t for t in texts if t.startswith(record["preview"]))
            )
            item = encoder.encode(text, [(0, len(text))])
            dense = dense_gradients(model, item.ids, item.loss_mask)
            wanted = np.concatenate(
                [
                    (
                        projection(spec.seed, 1, site, "out", spec.proj_rank, dense[f"{site}.weight"].shape[0])
                        @ (dense[f"{site}.weight"] * (factor[site] if power else 1.0))
                        @ projection(spec.seed, 1, group.name, "in", spec.proj_rank, dense[f"{site}.weight"].shape[1]).T
                    ).ravel()
                    for group in spec.input_groups
                    for site in group.sites
                ]
            )
            assert np.linalg.norm(stored_NK[row] - wanted) < tolerance * np.linalg.norm(wanted), (schema, row)


def _corpus(world: World) -> list[dict[str, Any]]:
    lines = (world.corpus / "b.jsonl").read_text().splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [*pq.read_table(world.corpus / "a.parquet").to_pylist(), *whole]


@pytest.mark.parametrize("form", ["rank-one", "exact"])
def test_check_and_verify_hold(tmp_path: Path, state: Path, form: str) -> None:
    """`lehr check` multiplies its exact gradients the same way; a wrong factor is many times what theory allows."""
    world = scored(tmp_path / "world", state, metric="target", precondition=form, k=64, dtype="float32")
    report = check(world.run, "base", CheckOptions(rows=12, target_rows=8))
    assert report.intact and report.faithful and not report.failures
    for name in ("projection", "fold", "stored", "norm"):
        assert 1 / 3 < report.record["errors"][name]["ratio"] < 3, name
    assert not [problem for found in verify(world.run) for problem in found.problems]


def test_the_fit_is_stored_printed_and_can_be_audited(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path / "world", rows=14)
    run = str(world.run.url)
    command = ["target", run, "--data", str(world.target), "--model", str(world.model), "--optimizer-state", str(state)]
    assert main([*command, "--k", "64", "--proj-rank", "4", "--workers", "1", "--dtype", "float32"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "rank-one adamw after 3 steps, metric natural; correlation of the fit" in printed
    manifest = world.run.manifest("scoring", "base")
    held = manifest.summary["preconditioner"]
    assert 0.0 < held["correlation"]["lowest"] <= held["correlation"]["mean"] < 1.0
    assert [part.path for part in manifest.parts] == ["preconditioners/base/factors.parquet"]
    query = "SELECT avg(correlation) AS mean FROM preconditioners WHERE side = 'out'"
    assert main(["audit", run, "--sql", query]) == 0
    assert f"{held['correlation']['mean']:.4g}" in capsys.readouterr().out


def test_what_does_not_go_together_is_refused(tmp_path: Path, state: Path) -> None:
    world = make_world(tmp_path / "world", rows=14)
    for changes, message in (
        ({"metric": "update", "optimizer_state": None}, "needs the second moments.*--optimizer-state"),
        ({"metric": "sgd"}, "no use for --optimizer-state"),
        ({"precondition": "exact", "optimizer_state": None}, "no use for --precondition"),
    ):
        with pytest.raises(InputError, match=message):
            score(world.run, "base", options_of(world, state, **changes), IN_PROCESS)
    score(world.run, "base", options_of(world, state, precondition="exact"), IN_PROCESS)
    with pytest.raises(InputError, match="declared with metric = 'natural'"):
        score(world.run, "base", ScoringOptions(metric="opus"), IN_PROCESS)
    with pytest.raises(InputError, match="declared with precondition = 'exact'"):
        score(world.run, "base", ScoringOptions(precondition="rank-one"), IN_PROCESS)


def test_the_state_of_an_exact_form_must_be_the_declared_one(tmp_path: Path, state: Path) -> None:
    world = make_world(tmp_path / "world", rows=14)
    scoring_spec(world.run, "base", options_of(world, state, precondition="exact"))
    record = torch.load(state, weights_only=True)
    record["state"][3]["exp_avg_sq"] *= 1.5
    torch.save(record, tmp_path / "other.pt")
    with pytest.raises(Exception, match=r"has fingerprint.*declared with"):
        score(world.run, "base", ScoringOptions(optimizer_state=str(tmp_path / "other.pt")), IN_PROCESS)
    score(world.run, "base", ScoringOptions(optimizer_state=str(state)), IN_PROCESS)
