"""`lehr target --curvature` and `--damping`: what they change in a run, and what they leave."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pipelines.target
from lehr.cli import main
from pipelines.geometry import read_target, unit_sketches
from pipelines.options import TargetOptions
from pipelines.scorer import load_encoder
from pipelines.scoring import ModelLocation
from schemas.errors import InputError
from schemas.parquet import decode_table, read_part
from schemas.run import Run
from selection_ops.batching import collate
from selection_ops.engine import GradientEngine
from selection_ops.sampling import sampled_labels
from tests.pipelines.worlds import World, copy_world, make_world, tree_hashes, write_target

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Every kind of curvature of one target, and the corpus scored with all of them."""
    world = make_world(tmp_path_factory.mktemp("curvature") / "world", rows=14)
    write_target(world.target, rows=20)
    world.describe("plain")
    world.describe("raw", curvature="empirical")
    world.describe("gn", curvature="gauss-newton", draws=3)
    world.describe("damped", damping=0.1)
    world.score()
    return world


def columns(world: World, target: str) -> dict[str, np.ndarray]:
    """Curvature columns of the whole corpus, in order, and the unit sketches they are of."""
    run = world.run
    features = [p for p in run.manifest("score", "base").parts if p.path.startswith("features/")]
    parts = run.manifest("curvature", f"{target}.base").parts
    units = np.concatenate(
        [unit_sketches(decode_table(read_part(run.url, p), p.path, schema="features")[0]) for p in features]
    )
    tables = [decode_table(read_part(run.url, p), p.path, schema="curvature")[0] for p in parts]
    names = ("influence", "quad", "stiff_cost", "stiff_cost_empirical", "alignment")
    found = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in names}
    return {"unit": units.astype(np.float64), **found}


def test_gauss_newton_is_made_of_sketches_at_sampled_labels(described: World) -> None:
    run, spec = described.run, described.run.scoring("base")
    data = read_target(run, "gn", "base", spec)
    assert data.geometry.curvature == "gauss-newton" and data.geometry.spectrum.kind == "gauss-newton"
    model = AutoModelForCausalLM.from_pretrained(described.model, dtype=torch.float32)
    encoder = load_encoder(spec, ModelLocation(model=str(described.model)))
    rows = []
    with GradientEngine.from_spec(model, spec) as engine:
        for sample in data.samples["reference"]:
            item = encoder.encode(sample.text, sample.loss_spans)
            for labels in sampled_labels(model, item, seed=0, sample_id=sample.sample_id, draws=3):
                batch = dataclasses.replace(collate([item]), labels_BT=torch.tensor([labels]))
                rows.append(engine.features(batch).sketch_BK[0].double().numpy())
    z = np.stack(rows)
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    values, vectors = values[::-1], vectors[:, ::-1]
    # Sketches of a sample alone and in a batch differ by 1e-6 of their norm in float32; every spectrum moves by twice that.
    np.testing.assert_allclose(
        data.geometry.spectrum.values_J.numpy(), values[: data.geometry.spectrum.values_J.numel()], rtol=1e-4
    )
    found = columns(described, "gn")
    k_star = data.geometry.spectrum.k_star
    cost = (found["unit"] @ vectors[:, :k_star]) ** 2 @ (values[:k_star] * 64)
    np.testing.assert_allclose(found["stiff_cost"], cost, rtol=2e-3)
    assert np.abs(found["stiff_cost"] / columns(described, "plain")["stiff_cost"] - 1).max() > 0.05


def test_it_changes_what_it_should_and_nothing_else(described: World) -> None:
    run, spec = described.run, described.run.scoring("base")
    plain, gn = (read_target(run, name, "base", spec) for name in ("plain", "gn"))
    torch.testing.assert_close(gn.sketches["reference"], plain.sketches["reference"])
    assert gn.samples.keys() == plain.samples.keys() and len(gn.samples["reference"]) == 20
    assert run.manifest("target", "gn.base").summary["counts"] == run.manifest("target", "plain.base").summary["counts"]
    for name in ("alignment", "stiff_cost_empirical"):
        np.testing.assert_allclose(columns(described, "gn")[name], columns(described, "plain")[name], rtol=1e-5)
    np.testing.assert_allclose(
        columns(described, "raw")["stiff_cost"], columns(described, "plain")["stiff_cost_empirical"], rtol=1e-5
    )


def test_damping_divides_as_the_formula_says(described: World) -> None:
    run, spec = described.run, described.run.scoring("base")
    plain, damped = (read_target(run, name, "base", spec).geometry for name in ("plain", "damped"))
    assert damped.damping == pytest.approx(0.1 * plain.damping)
    z = plain.target_MK.numpy()
    c = np.cov(z.T, bias=True)
    for name, geometry in (("plain", plain), ("damped", damped)):
        found = columns(described, name)
        expected = found["unit"] @ np.linalg.inv(c + geometry.damping * np.eye(64)) @ z.mean(0)
        np.testing.assert_allclose(found["influence"], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_manifests_name_the_choice_and_targets_of_the_defaults_stay_as_they_were(described: World) -> None:
    spec = described.run.manifest("target", "plain.base").spec
    assert not {"curvature", "draws", "damping"} & set(spec)
    assert described.run.manifest("target", "gn.base").spec.items() >= {"curvature": "gauss-newton", "draws": 3}.items()
    assert described.run.manifest("target", "damped.base").spec["damping"] == 0.1
    report = described.run.manifest("target", "plain.base").summary["damping"]
    assert len(report["rows"]) >= 9 and report["reason"]
    with pytest.raises(InputError, match="other curvature, draws"):
        described.describe("plain", curvature="gauss-newton")
    with pytest.raises(InputError, match="other draws"):
        described.describe("gn", curvature="gauss-newton", draws=2)
    with pytest.raises(InputError, match="other curvature, draws"):
        described.describe("gn")
    with pytest.raises(InputError, match="draws must be"):
        TargetOptions(data="x", draws=0)
    with pytest.raises(InputError, match="damping"):
        TargetOptions(data="x", damping=-1.0)


def test_draws_are_rows_of_the_spectrum(described: World, tmp_path: Path) -> None:
    world = copy_world(described, tmp_path / "copy")
    run, spec = world.run, world.run.scoring("base")
    counts = {3: read_target(run, "gn", "base", spec).geometry.spectrum.values_J.numel()}
    world.describe("once", curvature="gauss-newton", draws=1)
    counts[1] = read_target(run, "once", "base", spec).geometry.spectrum.values_J.numel()
    # 20 samples, none of whose mean is taken off: as many directions as rows, below 64 of the sketch.
    assert counts == {1: 20, 3: 60}


def test_the_same_target_in_other_chunks_has_the_same_spectrum(
    described: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = copy_world(described, tmp_path / "copy")
    run, spec = world.run, world.run.scoring("base")
    before = read_target(run, "gn", "base", spec).geometry.spectrum
    (Path(run.url) / run.manifest_path("target", "gn.base")).unlink()
    monkeypatch.setattr(pipelines.target, "CHUNK_SAMPLES", 7)
    world.describe("gn", curvature="gauss-newton", draws=3)
    after = read_target(run, "gn", "base", spec).geometry.spectrum
    torch.testing.assert_close(
        after.values_J, before.values_J, rtol=1e-4, atol=0.0
    )  # float32 sketches in other batches


def test_describing_again_gives_the_same_bytes(described: World, tmp_path: Path) -> None:
    world = copy_world(described, tmp_path / "copy")
    before = tree_hashes(Path(world.run.url) / "targets" / "gn")
    for path in (Path(world.run.url) / "targets" / "gn" / "base").rglob("*.parquet"):
        path.unlink()
    (Path(world.run.url) / world.run.manifest_path("target", "gn.base")).unlink()
    world.describe("gn", curvature="gauss-newton", draws=3)
    assert tree_hashes(Path(world.run.url) / "targets" / "gn") == before


def test_selection_audit_verify_and_report_take_it(
    described: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = copy_world(described, tmp_path / "copy")
    run: Run = world.run
    select = ["select", run.url, "--target", "gn", "--samples", "5", "--selector", "influence", "--name", "gn"]
    assert main(select) == 0
    assert main(["verify", run.url]) == 0
    assert main(["report", run.url]) == 0
    assert "Gauss-Newton" in next((Path(run.url) / "reports").glob("*.html")).read_text()
    capsys.readouterr()
    assert main(["audit", run.url, "--sql", "SELECT DISTINCT fisher FROM spectrum ORDER BY 1", "--format", "csv"]) == 0
    assert capsys.readouterr().out.replace('"', "").split() == ["fisher", "centred", "empirical", "gauss-newton"]


def test_the_command_prints_which_damping_to_trust(
    described: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = copy_world(described, tmp_path / "copy")
    arguments = [
        "target",
        world.run.url,
        "--name",
        "shown",
        "--data",
        str(world.target),
        "--workers",
        "1",
        "--damping",
        "3",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "gain kept" in text and "damping: " in text and "3 x mean" in text
