"""`lehr select`: what redundancy and the caps on outliers change, what is printed of them and what is stored."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lehr.cli import main
from schemas.parquet import read_table
from schemas.run import Run
from tests.pipelines.worlds import make_world


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    world.describe()
    world.score()
    return world.folder / "run"


@pytest.fixture
def run(scored: Path, tmp_path: Path) -> Run:
    shutil.copytree(scored, tmp_path / "run")
    return Run.open(str(tmp_path / "run"))


def lehr_select(run: Run, name: str, *options: str) -> tuple[pa.Table, dict[str, Any]]:
    assert main(["select", run.url, "--name", name, "--samples", "20", *options]) == 0
    folder = Path(run.url) / "selections" / name
    parts = [read_table(str(path), schema="selection") for path in sorted(folder.glob("part-*.parquet"))]
    return pa.concat_tables(parts), json.loads((folder / "solution.json").read_text())


def numbers(out: str) -> dict[str, str]:
    return {m[1].strip(): m[2].strip() for m in re.finditer(r"^(\w[\w, ]+?)  +(.*)$", out, re.MULTILINE)}


def test_outliers_are_left_out_listed_and_counted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    free, _ = lehr_select(run, "free")
    assert not any("outlier" in label for label in numbers(capsys.readouterr().out))
    reasons = np.array(free["reason"].to_pylist())
    pool = np.array([not reason.startswith(("overlap", "duplicate_of")) for reason in reasons])
    tokens = free["loss_tokens"].to_numpy().astype(float)
    caps = ("--max-loss-quantile", "0.8", "--max-grad-norm-quantile", "0.9")
    capped, solution = lehr_select(run, "capped", *caps)
    shown = numbers(capsys.readouterr().out)
    left_out = {}
    for reason, value, quantile in (
        ("loss_outlier", free["loss"].to_numpy() / tokens, 0.8),
        ("grad_norm_outlier", free["grad_norm"].to_numpy() / np.sqrt(tokens), 0.9),
    ):
        cap = np.sort(value[pool])[int(np.ceil(quantile * pool.sum())) - 1]
        left_out[reason] = pool & (value > cap)
        assert solution["diagnostics"]["outlier_caps"][reason]["cap"] == pytest.approx(cap, rel=1e-6)
    left_out["grad_norm_outlier"] &= ~left_out["loss_outlier"]
    stored = np.array(capped["reason"].to_pylist())
    for reason, rows in left_out.items():
        assert ((stored == reason) == rows).all() and rows.sum() > 3
        assert solution["counts"][reason] == rows.sum()
        assert shown[reason.replace("_", " ")] == str(rows.sum())
    assert solution["settings"]["max_loss_quantile"] == 0.8
    gone = left_out["loss_outlier"] | left_out["grad_norm_outlier"]
    assert not capped["selected"].to_numpy()[gone].any() and capped["selected"].to_numpy().sum() == 20
    assert free["selected"].to_numpy()[gone].any()


def test_redundancy_is_paid_for_and_certified(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    direct = ("--selector", "direct-signed", "--if-infeasible", "raise")
    plain_rows, plain = lehr_select(run, "plain", *direct)
    assert "frank wolfe gap share" not in numbers(capsys.readouterr().out)
    rows, solution = lehr_select(run, "varied", *direct, "--redundancy", "1")
    shown = numbers(capsys.readouterr().out)
    certificate = solution["certificate"]
    assert 0.0 <= certificate["frank_wolfe_gap_share"] < 0.05
    assert shown["frank wolfe gap share"] == f"{certificate['frank_wolfe_gap_share']:.4g}"
    assert certificate["cost"] <= certificate["limit"]
    assert certificate["objective"] > certificate["objective_without_redundancy"]
    assert rows["selected"].to_pylist() != plain_rows["selected"].to_pylist()
    assert solution["diagnostics"]["effective_rank"] > plain["diagnostics"]["effective_rank"]
    before = {path.name: path.read_bytes() for path in (Path(run.url) / "selections/varied").iterdir()}
    lehr_select(run, "varied", *direct, "--redundancy", "1")
    assert {path.name: path.read_bytes() for path in (Path(run.url) / "selections/varied").iterdir()} == before


def test_values_that_mean_nothing_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--redundancy", "-1"), ("--max-loss-quantile", "95"), ("--max-grad-norm-quantile", "0")):
        assert main(["select", run.url, "--samples", "20", option, value]) == 2
        assert option[2:].replace("-", "_") in capsys.readouterr().err
