"""A run directory: created once, opened anywhere, every path in one place."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import orjson
import pytest

from schemas.errors import CorruptFile, InputError
from schemas.run import Run, check_name
from schemas.units import read_plan
from tests.fake_run import build_fake_run


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_created_then_opened(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "run") if kind == "local" else f"memory://{tmp_path.name}/run"
    run = Run.create(url, corpus="c", root="/data")
    assert Run.open(url) == run == Run.open(url + "/") == Run.create(url, corpus="c", root="/data")


def test_two_creators_make_one_run(tmp_path: Path) -> None:
    found: list[Run] = []
    threads = [
        threading.Thread(target=lambda: found.append(Run.create(str(tmp_path / "run"), corpus="c", root="/data")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({run.run_id for run in found}) == 1


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    Run.create(str(tmp_path), corpus="c", root="/data")
    for corpus, root in (("d", "/data"), ("c", "/other")):
        with pytest.raises(InputError, match="is a run over corpus 'c' at /data"):
            Run.create(str(tmp_path), corpus=corpus, root=root)


def test_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for url in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(InputError, match="is not a run directory"):
            Run.open(str(url))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run_id": "x"}'])
def test_damaged_record_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"run\.json is damaged"):
        Run.open(str(tmp_path))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    Run.create(str(tmp_path), corpus="c", root="/data")
    record = orjson.loads((tmp_path / "run.json").read_bytes())
    (tmp_path / "run.json").write_bytes(orjson.dumps({**record, "layout_version": 99}))
    with pytest.raises(InputError, match="layout version 99"):
        Run.open(str(tmp_path))


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "-x", "a.b", "a b", "ä", "x" * 101, "a\n"])
def test_names_that_cannot_name_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    run = Run.create(str(tmp_path), corpus="c", root="/data")
    for use in (
        lambda: check_name("scoring", name),
        lambda: run.features_path(name, "u"),
        lambda: run.curvature_path("t", name, "u"),
        lambda: run.curvature_path(name, "s", "u"),
        lambda: run.selection_folder(name),
        lambda: run.stream_folder(name, 1),
        lambda: run.training_folder(name),
        lambda: run.report_path(name),
    ):
        with pytest.raises(InputError, match="is not usable"):
            use()


def test_missing_stage_says_what_to_run(tmp_path: Path) -> None:
    run = Run.create(str(tmp_path), corpus="c", root="/data")
    for stage, command in (("plan", "plan"), ("target", "target"), ("select", "select"), ("export", "export")):
        with pytest.raises(InputError, match=f"run `lehr {command}` first"):
            run.manifest(stage, "x")
    build_fake_run(tmp_path / "full", stages=("plan", "score"))
    with pytest.raises(InputError, match="finished: main"):
        Run.open(str(tmp_path / "full")).manifest("score", "nope")


def test_full_run_is_found_again(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", scorings=("main", "other"))
    assert [m.name for m in run.manifests("select")] == ["match", "random", "target-cosine"]
    assert [m.name for m in run.targets("other")] == ["gsm.other"]
    assert run.generations("match") == [1] and run.generations("nothing") == []
    assert run.scoring("main").k == 16 and run.scoring("main").fingerprint != run.scoring("other").fingerprint
    plan = read_plan(run)
    assert plan.rows == 120 and plan.fingerprint == run.manifest("plan", "corpus").fingerprint


def test_shares_of_a_plan_are_the_plan(tmp_path: Path) -> None:
    plan = read_plan(build_fake_run(tmp_path / "run", stages=("plan",)))
    for count in (1, 2, 3, 7):
        shares = [plan.share(index, count) for index in range(count)]
        assert sorted(u.unit_id for s in shares for u in s) == sorted(u.unit_id for u in plan.units)


def test_damaged_plan_is_named(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan",))
    Path(run.url, "plan.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CorruptFile, match=r"plan\.parquet"):
        read_plan(run)


def test_paths_of_the_design(tmp_path: Path) -> None:
    run = Run.create(str(tmp_path), corpus="c", root="/data")
    assert run.features_path("s", "u") == "features/s/part-u.parquet"
    assert run.rejects_path("s", "u") == "rejects/s/part-u.parquet"
    assert run.curvature_path("t", "s", "u") == "curvature/t/s/part-u.parquet"
    assert run.target_folder("t", "s") == "targets/t/s"
    assert run.stream_folder("x", 1) == "streams/x/gen-000001"
    assert run.manifest_path("score", "s") == "stages/score/s.json"
    assert dataclasses.astuple(run)[0] == str(tmp_path)
