"""The world that faults happen in: a corpus of every format, a tiny model, and a run as it stands before and after each stage."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.zygote import Zygote
from tests.pipelines.worlds import corpus_rows, tree_hashes, write_target
from tests.tiny import save_tiny_model

STAGES = ("plan", "target", "score", "select", "export")
MANIFESTS = {
    "plan": "stages/plan/corpus.json",
    "target": "stages/target/target.base.json",
    "score": "stages/curvature/target.base.json",
    "select": "stages/select/match.json",
    "export": "stages/export/match.gen-000001.json",
}
"""What each stage writes last."""
_FEATURES = {
    "max-tokens": "120", "min-tokens": "4", "k": "64", "proj-rank": "4", "dtype": "float32", "batch-tokens": "512",
}  # fmt: skip
ROWS = 60
"""Rows of every file."""


def write_corpus(folder: Path, rows: int = ROWS) -> None:
    """A file of every format, each with rows that cannot be used among the others."""
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(corpus_rows(rows, 1)), folder / "a.parquet", row_group_size=20)
    for seed, name in ((2, "b.jsonl"), (3, "c.jsonl.gz")):
        lines = [json.dumps(row) for row in corpus_rows(rows, seed)]
        lines[3], lines[7] = '{"text": ', json.dumps({"name": "empty", "topic": "web", "clean": True, "text": ""})
        lines[11] = lines[10]
        data = ("\n".join(lines) + "\n").encode()
        (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    with tarfile.open(folder / "d.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, row in enumerate(corpus_rows(rows, 4)):
            body = b"{" if number == 5 else json.dumps(row).encode()
            info = tarfile.TarInfo(f"{number:05d}.json")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """A prepared world; nothing in it is changed by a fault, which works on copies."""

    folder: Path
    expected: dict[str, dict[str, str]]
    """Hashes of a run's files when a stage has finished undisturbed, by stage."""
    seconds: dict[str, float]
    """Seconds each stage takes in a forked process when nobody disturbs it."""

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    def before(self, stage: str) -> Path:
        """The run as it stands before a stage; `done` is the end."""
        return self.folder / "before" / stage

    def write_steps(self, stage: str) -> int:
        """About how many steps the writes of a stage have: a file is opened, renamed and looked for once more."""
        before = self.expected[STAGES[STAGES.index(stage) - 1]] if stage != STAGES[0] else {}
        files = len(self.expected[stage]) - len(before)
        chunks = 4 if stage == "target" else 0
        progress = {"plan": 2, "target": 7, "score": 23, "select": 0, "export": 20}[stage]
        return 3 * (files + chunks + progress)

    def sources(self, place: str | None = None) -> list[str]:
        """Options of `lehr target` that name its files, below another place than this folder if one is given."""
        place = place or str(self.folder)
        return ["--data", f"{place}/target.jsonl", "--eval", f"{place}/eval.jsonl"]

    def command(
        self, stage: str, run: str | Path, *, corpus: str | Path | None = None, place: str | None = None
    ) -> list[str]:
        """The command of a stage, as a user types it each time."""
        given = {"model": str(self.folder / "model"), **_FEATURES}
        features = [part for name, value in given.items() for part in (f"--{name}", value)]
        columns = ["--id-column", "name", "--domain-column", "topic", "--keep-columns", "clean"]
        options = {
            "plan": [str(corpus or self.corpus), "--name", "tiny", *columns, "--unit-tokens", "500"],
            "target": [*self.sources(place), *features, "--workers", "1"],
            "score": [*features, "--workers", "1"],
            "select": ["--samples", "60"],
            "export": ["--shard-samples", "10", "--workers", "1"],
            "verify": [],
            "status": [],
        }
        return [stage, str(run), *options[stage]]


def after(stage: str) -> str:
    """What follows a stage."""
    return [*STAGES, "done"][STAGES.index(stage) + 1]


def make_world(folder: Path, zygote: Zygote) -> World:
    """Write corpus, target and model, and run every stage once."""
    write_corpus(folder / "corpus")
    write_target(folder / "target.jsonl", rows=70)
    write_target(folder / "eval.jsonl", rows=12, seed=6)
    save_tiny_model(folder / "model")
    world = World(folder=folder, expected={}, seconds={})
    run = folder / "run"
    for stage in STAGES:
        if run.exists():
            shutil.copytree(run, world.before(stage))
        began = time.monotonic()
        ended = zygote.run(*world.command(stage, run))
        if ended.status:
            raise RuntimeError(f"{stage}: {ended.output}")
        if stage != "plan":
            world.seconds[stage] = time.monotonic() - began
        world.expected[stage] = tree_hashes(run)
    # The first command of all waits for pages to be read from the disk.
    began = time.monotonic()
    zygote.run(*world.command("plan", folder / "again"))
    world.seconds["plan"] = time.monotonic() - began
    shutil.rmtree(folder / "again")
    shutil.copytree(run, world.before("done"))
    return world
