"""The token budget of a scoring: searched for once, when it is declared, then fixed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lehr.cli import main
from pipelines import scoring
from pipelines.scoring import scoring_spec
from schemas.errors import InputError
from schemas.manifest import Manifest, read_manifest, write_manifest
from selection_ops import batch_budget
from selection_ops.batch_budget import BudgetSearch, BudgetTry
from tests.pipelines.worlds import SCORING, World, make_world, tree_hashes

TRIED = BudgetTry(batch_tokens=2048, tokens=2048, tokens_per_second=9.0, peak_bytes=5)
FOUND = BudgetSearch(batch_tokens=2048, tries=(TRIED,), stopped="memory")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path, rows=12)


def test_the_command_searches_once_and_keeps_what_it_found(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "score", world.run.url, "--model", str(world.model), "--batch-tokens", "0", "--dtype", "float32", "--k", "64", "--proj-rank", "4",
        "--min-tokens", "4", "--max-tokens", "200", "--workers", "1",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    assert main(command) == 0
    assert torch.get_num_threads() in (1, threads)  # a worker in this process takes one
    printed = " ".join(capsys.readouterr().out.split())
    manifest = world.run.manifest("scoring", "base")
    noted = manifest.summary["batch_tokens"]
    assert noted["found"] == manifest.spec["batch_tokens"] in noted["tried"]
    assert f"batch tokens {noted['found']:,} (tried 512, 1,024" in printed
    timed = json.loads((world.folder / "run/timings/scoring/base/batch_tokens.json").read_text())
    assert [tried["batch_tokens"] for tried in timed["tries"]] == noted["tried"]
    assert timed["stopped"] == noted["stopped"]
    assert all(tried["tokens_per_second"] > 0 and tried["peak_bytes"] > 0 for tried in timed["tries"])
    assert "per_second" not in (world.folder / "run/stages/scoring/base.json").read_text()
    before = tree_hashes(world.folder / "run")
    assert main(command) == 0  # the same command again asks for no other search
    assert tree_hashes(world.folder / "run") == before
    assert main([*command, "--batch-tokens", "7"]) == 2
    assert f"declared with batch_tokens = {noted['found']}, not 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("accelerator", "asked", "wanted"),
    [(True, None, 2048), (True, 0, 2048), (True, 640, 640), (False, 0, 2048), (False, None, 512), (False, 640, 640)],
)
def test_an_accelerator_is_searched_by_default_and_a_cpu_when_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, accelerator: bool, asked: int | None, wanted: int
) -> None:
    asked_for: list[str] = []

    def search(model: Any, spec: Any, device: str) -> BudgetSearch:
        asked_for.append(device)
        return FOUND

    monkeypatch.setattr(scoring, "_search", search)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: accelerator)
    options = dataclasses.replace(SCORING, model=str(world.model), batch_tokens=asked)
    spec, _ = scoring_spec(world.run, "base", options)
    assert spec.batch_tokens == wanted
    assert asked_for == ([] if wanted != 2048 else ["cuda" if accelerator else "cpu"])
    assert ("batch_tokens" in world.run.manifest("scoring", "base").summary) == (wanted == 2048)


def test_the_search_packs_as_the_scoring_will(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[str] = []

    def search(engine: Any, *, max_tokens: int, layout: str) -> BudgetSearch:
        layouts.append(layout)
        return FOUND

    monkeypatch.setattr(batch_budget, "find_batch_tokens", search)
    options = dataclasses.replace(SCORING, model=str(world.model), batch_tokens=0, layout="packed")
    assert scoring_spec(world.run, "base", options)[0].batch_tokens == 2048
    assert layouts == ["packed"]


def test_of_two_processes_that_declare_at_once_the_first_ones_budget_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(SCORING, model=str(world.model), batch_tokens=0)

    def search(model: Any, spec: Any, device: str) -> BudgetSearch:
        other = dataclasses.asdict(spec) | {"batch_tokens": 4096}
        url = world.run.path(world.run.manifest_path("scoring", "base"))
        write_manifest(url, Manifest(stage="scoring", name="base", spec=other, inputs={}))
        return FOUND

    monkeypatch.setattr(scoring, "_search", search)
    spec, _ = scoring_spec(world.run, "base", options)
    assert spec.batch_tokens == 4096
    assert not (world.folder / "run/timings/scoring/base/batch_tokens.json").exists()


def test_a_process_that_declares_another_scoring_under_the_name_at_once_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(model: Any, spec: Any, device: str) -> BudgetSearch:
        other = dataclasses.asdict(spec) | {"seed": 5}
        url = world.run.path(world.run.manifest_path("scoring", "base"))
        write_manifest(url, Manifest(stage="scoring", name="base", spec=other, inputs={}))
        return FOUND

    monkeypatch.setattr(scoring, "_search", search)
    options = dataclasses.replace(SCORING, model=str(world.model), batch_tokens=0, seed=4)
    with pytest.raises(InputError, match="declared with seed = 5, not 4"):
        scoring_spec(world.run, "base", options)


def test_a_manifest_that_stands_is_not_replaced_where_it_must_be_new(tmp_path: Path) -> None:
    url = str(tmp_path / "one.json")
    write_manifest(url, Manifest(stage="score", name="a", spec={}, inputs={}), create_only=True)
    with pytest.raises(FileExistsError):
        write_manifest(url, Manifest(stage="score", name="b", spec={}, inputs={}), create_only=True)
    assert read_manifest(url, "").name == "a"
