"""Counts of a selection: its candidates are the scored samples, its ranks are 0..n-1, its streams are what it chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from lehr.verify.files import Manifests
from lehr.verify.findings import Check
from schemas.parquet import read_table
from schemas.run import Run
from schemas.shards import ShardEntry, read_index, read_shard

_COLUMNS = ("sample_id", "rank", "selected", "selection_weight")


def _parts(manifests: Manifests, stage: str, name: str, folder: str) -> list[str]:
    return [p.path for p in manifests[stage, name].parts if p.path.startswith(folder) and p.path.endswith(".parquet")]


def read_selection(run: Run, manifests: Manifests, name: str) -> pa.Table:
    """Identity, rank and weight of every candidate of a selection."""
    paths = _parts(manifests, "select", name, f"{run.selection_folder(name)}/")
    tables = [read_table(run.path(path), schema="selection", columns=_COLUMNS) for path in paths]
    return pa.concat_tables(tables) if tables else pa.table({column: [] for column in _COLUMNS})


def check_selection(run: Run, manifests: Manifests, name: str) -> Iterator[Check]:
    """Candidates against the scored samples, then ranks, marks and weights."""
    where = run.path(run.selection_folder(name))
    scoring = str(manifests["select", name].spec.get("scoring", ""))
    candidates = Check(subject=f"candidates of {name}", promise="exactly the scored samples, each once", unit="samples")
    with candidates.guarded():
        table = read_selection(run, manifests, name)
        offered = table["sample_id"].to_pylist()
        candidates.count = len(offered)
        if len(set(offered)) != len(offered):
            candidates.fail(f"{where}: {len(offered) - len(set(offered))} samples are listed more than once")
        if ("score", scoring) in manifests:
            scored: set[str] = set()
            for path in _parts(manifests, "score", scoring, f"features/{scoring}/"):
                scored.update(
                    read_table(run.path(path), schema="features", columns=("sample_id",))["sample_id"].to_pylist()
                )
            for difference, words in (
                (scored - set(offered), "scored samples are not among the candidates"),
                (set(offered) - scored, "candidates were never scored"),
            ):
                if difference:
                    candidates.fail(f"{where}: {len(difference)} {words}, for example {min(difference)}")
    yield candidates
    ranks = Check(subject=f"ranks of {name}", promise="0..n-1, each once; weights on the selected only", unit="samples")
    with ranks.guarded():
        table = read_selection(run, manifests, name)
        _check_ranks(table.to_pylist(), where, ranks)
    yield ranks


def _check_ranks(rows: list[dict[str, Any]], where: str, check: Check) -> None:
    held = sorted(row["rank"] for row in rows if row["rank"] is not None)
    check.count = len(held)
    if held != list(range(len(held))):
        check.fail(f"{where}: ranks are not 0..{len(held) - 1}, each once")
    for row in rows:
        if row["selected"] != (row["rank"] is not None):
            check.fail(f"{where}: sample {row['sample_id']} has rank {row['rank']} but selected = {row['selected']}")
        if not row["selected"] and row["selection_weight"] != 0:
            check.fail(f"{where}: sample {row['sample_id']} is not selected but weighs {row['selection_weight']}")
        if row["selected"] and not row["selection_weight"] > 0:
            check.fail(f"{where}: sample {row['sample_id']} is selected but weighs {row['selection_weight']}")


def check_stream(run: Run, manifests: Manifests, folder: str, tick: Callable[[int], None]) -> Check:
    """One generation of a stream: its shards, their samples, and the selection they were made from."""
    check = Check(subject=f"stream {folder.removeprefix('streams/')}", promise="shards agree with index and selection")
    check.unit = "samples"
    with check.guarded():
        index = read_index(run.path(folder))
        chosen: dict[int, tuple[str, float]] | None = None
        if ("select", index.selection) in manifests:
            rows = read_selection(run, manifests, index.selection).to_pylist()
            chosen = {row["rank"]: (row["sample_id"], row["selection_weight"]) for row in rows if row["selected"]}
            if index.rows != len(chosen):
                check.fail(
                    f"{run.path(folder)}/index.json holds {index.rows} samples, selection {index.selection} has {len(chosen)}"
                )
        for below, shards in (("", index.shards), ("/target", index.target), ("/eval", index.evaluation)):
            expected = 0
            for shard in shards:
                url = f"{run.path(folder)}{below}"
                with check.guarded():
                    _check_shard(url, shard, expected, chosen if not below else None, check)
                expected += shard.rows
                tick(shard.bytes)
    return check


def _check_shard(
    url: str, shard: ShardEntry, first: int, chosen: dict[int, tuple[str, float]] | None, check: Check
) -> None:
    where = f"{url}/{shard.name}"
    tokens = rows = 0
    domains: dict[str, int] = {}
    if len(shard.offsets) != shard.rows:
        check.fail(f"{url}/index.json lists {len(shard.offsets)} members and {shard.rows} rows for {shard.name}")
    for ranked in read_shard(url, shard):
        if ranked.rank != first + rows:
            check.fail(f"{where}: member {rows} has rank {ranked.rank}, expected {first + rows}")
        if chosen is not None:
            identity, weight = chosen.get(ranked.rank, ("none", 0.0))
            if ranked.sample.sample_id != identity:
                check.fail(
                    f"{where}: rank {ranked.rank} is sample {ranked.sample.sample_id}, the selection has {identity}"
                )
            elif abs(ranked.selection_weight - weight) > 1e-6 * max(1.0, abs(weight)):
                check.fail(f"{where}: rank {ranked.rank} weighs {ranked.selection_weight}, the selection says {weight}")
        rows += 1
        tokens += ranked.tokens
        domains[ranked.sample.domain] = domains.get(ranked.sample.domain, 0) + 1
    check.count += rows
    if (rows, tokens, domains) != (shard.rows, shard.tokens, dict(shard.domains)):
        check.fail(f"{where}: rows, tokens or domains differ from the index")
    if (shard.rank_first, shard.rank_last) != (first, first + rows - 1):
        check.fail(
            f"{where}: the index gives ranks {shard.rank_first}..{shard.rank_last}, expected {first}..{first + rows - 1}"
        )
