"""An adapter folder as --model: described, scored, checked, reported by the real commands; training it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lehr.cli import EXIT_ERROR, main
from pipelines.geometry import unit_sketches
from pipelines.scorer import SampleScorer
from schemas.parquet import read_table
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine, SampleFeatures
from tests.adapters import put_together, save_adapter
from tests.families import wide_arithmetic
from tests.pipelines.worlds import World, make_world
from tests.reference.gradients import fold_matrix, sample_loss, sketch

RANK, K = 4, 64
CHOICES = [
    "--dtype", "float64", "--attention", "sdpa", "--k", str(K), "--proj-rank", str(RANK), "--max-tokens", "200", "--min-tokens", "4",
    "--workers", "1",
]  # fmt: skip


@dataclasses.dataclass
class Described:
    """A world scored with an adapter folder, and every batch of features as the engine gave it."""

    world: World
    adapter: Path
    seen: list[tuple[list[Encoded], SampleFeatures]]


@contextlib.contextmanager
def wide_features() -> Iterator[list[tuple[list[Encoded], SampleFeatures]]]:
    """Features of float64 throughout, in the model and in nothing else; and every batch of them."""
    seen: list[tuple[list[Encoded], SampleFeatures]] = []
    original = SampleScorer._features

    def watched(self: SampleScorer, engine: GradientEngine, batch: list[Encoded], *others: Any) -> SampleFeatures:
        with wide_arithmetic():
            seen.append((batch, original(self, engine, batch, *others)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleScorer, "_features", watched)
        yield seen


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Described:
    world = make_world(tmp_path_factory.mktemp("world"), rows=12)
    adapter = save_adapter(tmp_path_factory.mktemp("model"))
    with wide_features() as seen:
        model = ["--model", str(adapter), *CHOICES]
        assert main(["target", world.run.url, "--data", str(world.target), *model]) == 0
        assert main(["score", world.run.url, "--workers", "1"]) == 0
    return Described(world, adapter, seen)


def test_sketches_through_target_and_score_are_the_adapters_projected_gradients(described: Described) -> None:
    """Invariant 3, 1e-10 in float64; a fold may cancel, twice that."""
    spec = described.world.run.scoring("base")
    model, trained = put_together(described.adapter, described.adapter.parent / "base")
    groups = [(group.name, list(group.sites)) for group in spec.input_groups]
    sites = [site for _, held in groups for site in held]
    assert {f"{site}.weight" for site in sites} == set(trained)
    fold = fold_matrix(0, 1, sites, RANK, K)
    rows = [(item, row_K) for batch, found in described.seen for item, row_K in zip(batch, found.sketch_BK)]
    assert len(rows) > 70  # 60 target samples, and the corpus
    with wide_arithmetic():
        for item, row_K in [*rows[:8], *rows[-8:]]:
            gradients = torch.autograd.grad(sample_loss(model, item.ids, item.loss_mask), list(trained.values()))
            dense = {name: gradient.numpy() for name, gradient in zip(trained, gradients)}
            wanted_K = fold @ sketch(dense, groups, set(), rank=RANK, seed=0, version=1)
            assert np.linalg.norm(row_K.numpy() - wanted_K) <= 2e-10 * np.linalg.norm(wanted_K) > 0


def test_what_is_stored_is_what_the_engine_gave(described: Described) -> None:
    """Rounded to float16: by at most 2^-11 of each number."""
    run = described.world.run
    parts = [part.path for part in run.manifest("score", "base").parts if part.path.startswith("features/")]
    given = np.concatenate([found.sketch_BK.numpy() for _, found in described.seen])
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    for path in parts:
        stored = unit_sketches(read_table(run.path(path), schema="features")).astype(np.float64)
        nearest = np.linalg.norm(stored[:, None] - given[None], axis=2).min(axis=1)
        assert (nearest <= 2**-10).all()


def test_the_scoring_attributes_the_adapter_and_lists_the_rest(described: Described) -> None:
    manifest = described.world.run.manifest("scoring", "base")
    assert manifest.spec["attribute"] == "adapters"
    assert manifest.summary["attributed_parameters"] == 2 * (4 * (32 + 32) + 4 * (48 + 32))
    rest = manifest.summary["not_attributed"]
    assert set(rest.values()) == {"not of the adapters"}
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in rest
    assert "lm_head.weight" in rest


def test_the_check_finds_the_rows_intact(described: Described, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    with wide_features():
        assert main(["check", described.world.run.url, "--rows", "6", "--target-rows", "6", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["integrity"]["intact"]
    assert record["cost"]["numbers"] == described.world.run.manifest("scoring", "base").summary["attributed_parameters"]


def test_another_choice_is_possible_and_a_model_without_adapters_has_none(
    described: Described, capsys: pytest.CaptureFixture[str]
) -> None:
    url, world = described.world.run.url, described.world
    chosen = ["--model", str(described.adapter), "--scoring", "blocks", "--attribute", "blocks", *CHOICES]
    assert main(["score", url, "--units", "1/50", *chosen]) == 0
    assert "model.layers.0.mlp.up_proj" in [s for g in world.run.scoring("blocks").input_groups for s in g.sites]
    capsys.readouterr()
    chosen = ["--model", str(world.model), "--scoring", "none", "--attribute", "adapters", *CHOICES]
    assert main(["score", url, *chosen]) == EXIT_ERROR
    said = capsys.readouterr().err
    assert "has no adapters" in said
    assert "Traceback" not in said
    assert not (world.folder / "run/stages/scoring/none.json").exists()


def test_the_report_marks_and_counts_the_adapter(
    described: Described, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert main(["model-report", str(described.adapter), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "--attribute adapters: " in printed
    assert "(adapter)" in " ".join(printed.split())
    record = json.loads(out.read_text())
    held = [p for p in record["parameters"] if p["adapter"]]
    assert {p["name"].split(".")[-2] for p in held} == {"default"}
    numbers = sum(p["numbers"] for p in held) / sum(p["numbers"] for p in record["parameters"])
    assert record["covered"]["adapters"] == [numbers, pytest.approx(sum(p["gradient_share"] for p in held))]
    assert 0 < numbers < record["covered"]["blocks"][0]
