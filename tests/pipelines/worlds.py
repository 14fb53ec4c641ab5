"""Small worlds for pipeline tests: a corpus of real files, a target, a tiny model, a run directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.options import Execution, ScoringOptions, TargetOptions
from pipelines.plan import make_plan
from pipelines.score import ScoreReport, score
from pipelines.target import TargetReport, describe
from schemas.run import Run
from schemas.spec import CorpusColumns, PlanSpec
from tests.tiny import save_tiny_model

WORDS = [
    "glass",
    "heat",
    "slow",
    "cool",
    "stress",
    "furnace",
    "sand",
    "lime",
    "soda",
    "bubble",
    "colour",
    "blow",
    "mould",
    "press",
    "sheet",
    "bottle",
    "window",
    "lens",
    "anneal",
    "temper",
    "crack",
    "edge",
    "cut",
    "polish",
    "light",
    "clear",
    "thick",
    "thin",
    "batch",
    "melt",
    "flow",
    "draw",
    "float",
    "tin",
    "roller",
    "kiln",
    "lehr",
]
COLUMNS = CorpusColumns(id="name", domain="topic", keep=("clean",))
IN_PROCESS = Execution(workers=1)
SCORING = ScoringOptions(max_tokens=200, min_tokens=4, k=64, proj_rank=4, dtype="float32", batch_tokens=512)


def sentence(rng: random.Random, low: int = 6, high: int = 40) -> str:
    """Random words of the tiny world."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def corpus_rows(count: int, seed: int) -> list[dict[str, object]]:
    """Rows with an id, a domain and a carried column."""
    rng = random.Random(seed)
    return [
        {
            "name": f"r{seed}-{index}",
            "topic": rng.choice(["math", "web"]),
            "clean": index % 3 > 0,
            "text": sentence(rng),
        }
        for index in range(count)
    ]


def write_corpus(folder: Path, *, rows: int = 60) -> Path:
    """A folder with a Parquet file, a JSONL file and a few rows that cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(corpus_rows(rows, 1)), folder / "a.parquet", row_group_size=20)
    lines = [json.dumps(row) for row in corpus_rows(rows, 2)]
    lines[3] = '{"text": '
    lines[7] = json.dumps({"name": "empty", "topic": "web", "clean": True, "text": ""})
    lines[11] = lines[10]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_target(path: Path, *, rows: int = 60, seed: int = 5) -> Path:
    """A target file of plain text."""
    rng = random.Random(seed)
    path.write_text("".join(json.dumps({"text": sentence(rng, 10, 30)}) + "\n" for _ in range(rows)))
    return path


@dataclasses.dataclass(frozen=True)
class World:
    """Where everything of one test lies."""

    folder: Path
    corpus: Path
    target: Path
    evaluation: Path
    model: Path
    run: Run

    def plan(self, *, extend: bool = False) -> None:
        make_plan(
            self.run.url,
            str(self.corpus),
            PlanSpec(corpus="tiny", columns=COLUMNS, unit_tokens=400),
            extend=extend,
        )

    def describe(self, name: str = "target", **changes: object) -> TargetReport:
        options = TargetOptions(data=str(self.target), eval=str(self.evaluation))
        options = dataclasses.replace(options, **changes)  # type: ignore[arg-type]
        return describe(self.run, name, "base", options, self.scoring_options, IN_PROCESS)

    @property
    def scoring_options(self) -> ScoringOptions:
        return dataclasses.replace(SCORING, model=str(self.model))

    def score(self, execution: Execution = IN_PROCESS, **changes: object) -> ScoreReport:
        return score(self.run, "base", self.scoring_options, execution, **changes)  # type: ignore[arg-type]


def make_world(folder: Path, *, rows: int = 60, kind: str = "llama", unit_tokens: int = 400) -> World:
    """Corpus, target, model and a planned run below `folder`."""
    corpus = write_corpus(folder / "corpus", rows=rows)
    target = write_target(folder / "target.jsonl")
    evaluation = write_target(folder / "eval.jsonl", rows=10, seed=6)
    model = folder / "model"
    save_tiny_model(model, kind)
    url = str(folder / "run")
    make_plan(url, str(corpus), PlanSpec(corpus="tiny", columns=COLUMNS, unit_tokens=unit_tokens))
    return World(folder, corpus, target, evaluation, model, Run.open(url))


def tree_hashes(folder: Path, *, without: tuple[str, ...] = ("timings", "chunks")) -> dict[str, str]:
    """SHA-256 of every file that is compared between runs, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not set(relative.parts) & set(without) and relative.name != "run.json":
            found[str(relative)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def copy_world(world: World, folder: Path) -> World:
    """A copy of a world, run and all, that a test may damage."""
    shutil.copytree(world.folder, folder)
    record = json.loads((folder / "run" / "run.json").read_text())
    record["root"] = str(folder / "corpus")
    (folder / "run" / "run.json").write_text(json.dumps(record))
    location = {"model": str(folder / "model"), "revision": None}
    (folder / "run/timings/scoring/base/model.json").write_text(json.dumps(location))
    run = Run.open(str(folder / "run"))
    return World(folder, folder / "corpus", folder / "target.jsonl", folder / "eval.jsonl", folder / "model", run)
