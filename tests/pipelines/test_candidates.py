"""Reading candidates: columns alone or with sketches, the same choice either way, in memory or on scratch, and no damage unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.pools import make_pool
from pipelines import candidates as reading
from pipelines.candidates import read_pool, sketch_array
from pipelines.geometry import unit_sketches
from pipelines.select import run_select
from schemas.errors import CorruptFile, InputError
from schemas.parquet import read_table
from schemas.run import Run
from selection_ops.selectors import Budget, SelectorSettings

BUDGET = Budget(samples=12)


def selection(run: Run, name: str) -> pa.Table:
    listed = [part for part in run.manifest("select", name).parts if part.path.endswith(".parquet")]
    return pa.concat_tables([read_table(run.path(part.path), schema="selection") for part in listed])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_pool(tmp_path / "run", rows=600, k=64, part_rows=160)


def pool(run: Run, **options: Any) -> reading.Pool:
    score, curvature = run.manifest("score", "base"), run.manifest("curvature", "target.base")
    return read_pool(run, score, curvature, run.scoring("base"), **options)


def parts(run: Run) -> list[str]:
    return [run.path(part.path) for part in run.manifest("score", "base").parts if part.path.startswith("features/")]


def test_sketches_lie_in_the_rows_of_their_samples(run: Run) -> None:
    expected = np.concatenate([unit_sketches(read_table(url, schema="features")) for url in parts(run)])
    found = pool(run)
    assert found.unit_NK is not None and found.unit_NK.dtype == torch.float16
    assert np.array_equal(found.unit_NK.numpy(), expected)
    alone = pool(run, columns_only=True)
    assert alone.unit_NK is None and alone.columns.equals(found.columns)


@pytest.mark.parametrize("selector", ["target-cosine", "target-dot", "influence", "loss", "random"])
def test_columns_alone_choose_the_same(run: Run, selector: str) -> None:
    settings = SelectorSettings(selector=selector)
    whole = run_select(run, "whole", "base", "target", BUDGET, settings)
    alone = run_select(run, "alone", "base", "target", BUDGET, settings, columns_only=True)
    assert selection(run, "whole").equals(selection(run, "alone"))
    assert "set_cosine" in whole.solution["diagnostics"] and "set_cosine" not in alone.solution["diagnostics"]
    assert any("sketches" in warning for warning in alone.solution["warnings"])
    assert {"read", "write", "total"} <= alone.seconds.keys()
    assert sum(alone.seconds.values()) == pytest.approx(2 * alone.seconds["total"])


def test_a_selector_of_sets_refuses_columns_alone(run: Run) -> None:
    with pytest.raises(InputError, match=r"'match' reads sketches.*target-cosine"):
        run_select(run, "m", "base", "target", BUDGET, SelectorSettings(), columns_only=True)


def test_the_same_name_with_and_without_columns_alone_is_refused(run: Run) -> None:
    settings = SelectorSettings(selector="target-cosine")
    run_select(run, "c", "base", "target", BUDGET, settings)
    with pytest.raises(InputError, match="columns_only"):
        run_select(run, "c", "base", "target", BUDGET, settings, columns_only=True)


def test_scratch_and_memory_hold_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pool(run).unit_NK
    monkeypatch.setattr(reading, "MEMORY_SHARE", 0.0)
    after = pool(run).unit_NK
    assert isinstance(sketch_array(3, 4), np.memmap)
    assert before is not None and after is not None and torch.equal(before, after)


def test_scratch_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MEMORY_SHARE", 0.0)
    with pytest.raises(InputError, match=r"take .* GB.*TMPDIR"):
        sketch_array(1 << 40, 2048)


@pytest.mark.parametrize("columns_only", [False, True])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other rows"])
def test_a_damaged_part_is_refused(run: Run, columns_only: bool, damage: str) -> None:
    url = Path(parts(run)[1])
    data = bytearray(url.read_bytes())
    if damage == "gone":
        url.unlink()
    elif damage == "other rows":
        url.write_bytes(Path(parts(run)[2]).read_bytes())
    else:
        # The first page is that of the ids, which every selector reads.
        data[200] ^= 0x40
        url.write_bytes(bytes(data[: -40 if damage == "cut" else None]))
    with pytest.raises(CorruptFile, match=url.name):
        pool(run, columns_only=columns_only)


def test_a_damaged_sketch_is_refused_where_sketches_are_read(run: Run) -> None:
    url = Path(parts(run)[1])
    data = bytearray(url.read_bytes())
    data[len(data) // 2] ^= 0x40
    url.write_bytes(bytes(data))
    with pytest.raises(CorruptFile, match=rf"{url.name} differs from its manifest.*run its stage again"):
        pool(run)


def test_number_of_threads_changes_no_choice(run: Run) -> None:
    before = torch.get_num_threads()
    tables, records = [], []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            name = f"m{threads}"
            records.append(run_select(run, name, "base", "target", BUDGET, SelectorSettings()).solution)
            tables.append(selection(run, name))
    finally:
        torch.set_num_threads(before)
    for column in ("sample_id", "rank", "selected", "selection_weight", "score", "reason"):
        assert tables[0][column].equals(tables[1][column])
    # Spectra of the target's halves and products of blocks of greedy may be rounded otherwise.
    for key in ("set_cosine", "set_cosine_heldout", "set_cosine_bound"):
        assert records[0]["diagnostics"][key] == pytest.approx(records[1]["diagnostics"][key], rel=1e-5)
