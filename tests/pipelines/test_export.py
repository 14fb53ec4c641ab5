"""Export: ranked shards, byte-identical on a re-run, readable by webdataset, never a text that was not scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import webdataset

from pipelines.export import export
from pipelines.select import run_select
from schemas.errors import CorruptFile, SourceChanged
from schemas.shards import read_index, read_shard
from selection_ops.selectors import Budget, SelectorSettings
from tests.pipelines.test_select import selection
from tests.pipelines.worlds import IN_PROCESS, World, copy_world, make_world, tree_hashes


@pytest.fixture
def world(selected: World, tmp_path: Path) -> World:
    return copy_world(selected, tmp_path / "w")


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    world.describe()
    world.score()
    run_select(world.run, "match", "base", "target", Budget(samples=25), SelectorSettings())
    return world


def test_shards_are_ranked_and_stream_with_webdataset(world: World) -> None:
    report = export(world.run, "match", IN_PROCESS, shard_samples=10)
    assert [shard.rows for shard in report.index.shards] == [10, 10, 5]
    urls = [f"{report.url}/{shard.name}" for shard in report.index.shards]
    records = [json.loads(sample["json"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert [record["rank"] for record in records] == list(range(25))
    table = selection(world.run, "match")
    chosen = table.filter(table["selected"]).sort_by("rank")
    assert [record["sample_id"] for record in records] == chosen["sample_id"].to_pylist()
    assert records[0]["extra"].keys() == {"clean"}
    assert sum(shard.tokens for shard in report.index.shards) == sum(chosen["tokens"].to_pylist())


def test_target_and_evaluation_set_lie_beside(world: World) -> None:
    report = export(world.run, "match", IN_PROCESS)
    index = read_index(report.url)
    texts = [json.loads(line)["text"] for line in world.target.read_text().splitlines()]
    assert [
        ranked.sample.text for entry in index.target for ranked in read_shard(f"{report.url}/target", entry)
    ] == texts
    assert sum(entry.rows for entry in index.evaluation) == 10


def test_re_run_is_byte_identical_and_the_same_generation(world: World) -> None:
    first = export(world.run, "match", IN_PROCESS, shard_samples=10)
    before = tree_hashes(world.folder / "run")
    shutil.rmtree(first.url)
    again = export(world.run, "match", IN_PROCESS, shard_samples=10)
    assert again.generation == first.generation == 1
    assert tree_hashes(world.folder / "run") == before


def test_another_selection_is_the_next_generation(world: World) -> None:
    export(world.run, "match", IN_PROCESS, stream="s")
    run_select(world.run, "random", "base", "target", Budget(samples=5), SelectorSettings(selector="random"))
    report = export(world.run, "random", IN_PROCESS, stream="s")
    assert report.generation == 2
    assert world.run.generations("s") == [1, 2]


def test_shard_size_changes_the_shards(world: World) -> None:
    assert len(export(world.run, "match", IN_PROCESS, stream="a", shard_samples=5).index.shards) == 5
    assert len(export(world.run, "match", IN_PROCESS, stream="b", shard_samples=25).index.shards) == 1


def test_text_that_is_not_the_scored_one_names_file_and_row(world: World) -> None:
    lines = (world.corpus / "b.jsonl").read_text().splitlines()
    table = selection(world.run, "match")
    chosen = next(r for r in table.filter(table["selected"]).to_pylist() if r["path"] == "b.jsonl")
    record = json.loads(lines[chosen["row"]])
    record["text"] = record["text"] + " more"
    lines[chosen["row"]] = json.dumps(record)
    (world.corpus / "b.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(SourceChanged, match=r"b\.jsonl"):
        export(world.run, "match", IN_PROCESS)
    world.plan(extend=True)
    with pytest.raises(SourceChanged, match=rf"b\.jsonl row {chosen['row']}"):
        export(world.run, "match", IN_PROCESS)


def test_truncated_shard_is_refused(world: World) -> None:
    report = export(world.run, "match", IN_PROCESS)
    shard = Path(report.url) / report.index.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-2048])
    with pytest.raises(CorruptFile, match="truncated or damaged"):
        list(read_shard(report.url, report.index.shards[0]))
