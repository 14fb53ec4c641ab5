"""The demo over several seeds, by its real commands, on a tiny model and pool: what `make demo-full` does in hours."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lehr.demo import run as demo
from lehr.demo.pool import IN_DOMAIN, DemoCorpus
from schemas.run import Run
from tests.pipelines.worlds import sentence
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.slow


def tiny_corpus(folder: Path) -> DemoCorpus:
    """200 rows of two domains, half of the in-domain ones damaged; 60 target and 6 held-out rows."""
    rng = random.Random(0)
    pool = folder / "pool"
    pool.mkdir(parents=True)
    rows = []
    for number in range(200):
        inside = number % 2 == 0
        clean = number % 4 == 0
        domain = IN_DOMAIN if inside else "web"
        damage = "" if clean or not inside else "numbers"
        rows.append(
            {"id": f"r{number}", "domain": domain, "clean": clean, "corrupt": damage, "text": sentence(rng, 12)}
        )
    pq.write_table(pa.Table.from_pylist(rows), pool / "pool.parquet")
    files = []
    for name, count in (("target", 60), ("eval", 6)):
        files.append(folder / f"{name}.jsonl")
        lines = [json.dumps({"id": f"{name}{i}", "text": f"{name} {i}: {sentence(rng, 12)}"}) for i in range(count)]
        files[-1].write_text("\n".join(lines))
    return DemoCorpus(
        pool=pool, target=files[0], evaluation=files[1], pool_rows=200, target_rows=60, eval_rows=6, summary={}
    )


def test_two_seeds_give_a_row_an_arm_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, corpus = save_tiny_model(tmp_path / "model"), tiny_corpus(tmp_path / "corpus")
    monkeypatch.setattr(demo, "prepare_model", lambda cache: model)
    monkeypatch.setattr(demo, "build_demo", lambda folder, cache, size: corpus)
    kept = ("no training", "random", "match", "match + filter-then-weight")
    monkeypatch.setattr(demo, "ARMS", tuple(arm for arm in demo.ARMS if arm.name in kept))
    size = demo.DemoSize(size="full", steps=2, seeds=2, learning_rate=1e-2)
    monkeypatch.setitem(demo.SIZES, "full", size)
    folder = tmp_path / "run"
    record = demo.run_demo(folder, size="full", cache=tmp_path / "cache")
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(record))
    arms = record["arms"]
    names = [arm.name for arm in demo.ARMS if arm.selector]
    assert [(arm["name"], arm["seed"]) for arm in arms] == [
        (demo.ARMS[0].name, 0), *((name, seed) for seed in (0, 1) for name in names)
    ]  # fmt: skip
    for arm in arms[1:]:
        assert record["budget_tokens"] / 2 < arm["trained_tokens"] <= record["budget_tokens"]
        assert arm["target_loss"] != arms[0]["target_loss"] and arm["cpu_seconds"] > 0
    by_seed = {(arm["name"], arm["seed"]): arm for arm in arms}
    for name in names:
        first, second = by_seed[name, 0], by_seed[name, 1]
        assert first["training"] != second["training"]
        assert first["target_loss"] != second["target_loss"]  # another order, at least
        assert (first["selection"] == second["selection"]) == (name != "random")
    warm = Run.open(str(folder)).manifest("train", "warmup")
    assert {Run.open(str(folder)).manifest("train", arm["training"]).spec["optimizer_state"] for arm in arms[1:]} != {
        ""
    }
    assert warm.summary["eval_loss"] is None and warm.summary["steps"] == 4
    printed = capsys.readouterr().out
    assert "(seed 1)" in printed
