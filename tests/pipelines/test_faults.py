"""Faults injected into real processes: a few dozen over all kinds, and the judges, each of which is seen to judge.

`benchmarks/faults.py` runs as many as one likes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.kinds import KINDS, lane, run_fault, schedule
from tests.faults.trial import COUNTS, Lane, Trial
from tests.faults.world import make_world
from tests.faults.zygote import Ended, Zygote

pytestmark = pytest.mark.slow

FAULTS = schedule(sum(share for _, share in KINDS.values()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    folder = tmp_path_factory.mktemp("faults")
    zygote = Zygote(folder / "logs")
    with lane(make_world(folder / "world", zygote), folder, zygote=zygote) as made:
        yield made


@pytest.mark.parametrize("kind", list(KINDS))
def test_invariant_5_nothing_is_lost_or_doubled_or_left_unsaid(place: Lane, kind: str) -> None:
    verdicts = [run_fault(place, kind, seed) for of, seed in FAULTS if of == kind]
    for verdict in verdicts:
        found = {name: getattr(verdict, name) for name in COUNTS if name != "injected"}
        assert found == dict.fromkeys(found, 0), verdict.notes
    assert any(verdict.injected for verdict in verdicts), [verdict.notes for verdict in verdicts]


def edited(trial: Trial, edit: str) -> None:
    """A finished run in which the first part of features holds a row less, or twice."""
    trial.copy("done")
    path = min((trial.run / "features/base").glob("*.parquet"))
    table = pq.read_table(path, partitioning=None)
    row = table["row"][0].as_py()
    if edit == "lost":
        table = table.filter(pa.array([value != row for value in table["row"].to_pylist()]))
    else:
        table = pa.concat_tables([table, table.slice(0, 1)])
    pq.write_table(table, path)


def test_the_judges_see_rows(place: Lane) -> None:
    for edit in ("lost", "doubled"):
        trial = Trial(place, f"edited-{edit}", 0)
        edited(trial, edit)
        trial.judge("export")
        verdict = trial.verdict
        assert (verdict.lost_rows, verdict.doubled_rows) == ((1, 0) if edit == "lost" else (0, 1))
        assert verdict.differing_bytes > 0 and verdict.wrong
        trial.again()


def test_the_judges_see_files(place: Lane) -> None:
    trial = Trial(place, "foreign", 0)
    trial.copy("done")
    trial.judge("export")
    assert not trial.verdict.wrong
    (trial.run / "features/base/part-stray.parquet").write_bytes(b"12345")
    (trial.run / "features/base/.tmp-part").write_bytes(b"a killed process left it")
    trial.judge("export")
    assert trial.verdict.differing_bytes == 5 and trial.verdict.orphans == 0
    manifest = trial.run / "stages/select/match.json"
    record = json.loads(manifest.read_text())
    record["parts"][0]["path"] = "selections/match/gone.parquet"
    manifest.write_text(json.dumps(record))
    trial.check_listed()
    assert trial.verdict.orphans == 1
    trial.again()


def test_the_judges_see_a_manifest_beside_unfinished_results(place: Lane) -> None:
    trial = Trial(place, "early", 0)
    trial.copy("done")
    trial.check_unfinished("score")
    assert trial.verdict.orphans == 0
    min((trial.run / "curvature").rglob("*.parquet")).unlink()
    trial.check_unfinished("score")
    assert trial.verdict.orphans == 1
    trial.again()


@pytest.mark.parametrize(
    ("status", "output", "clear"),
    [
        (2, "lehr score: cannot write /x: No space left on device", True),
        (75, "lehr score: workers were killed; run the same command again", True),
        (2, "lehr score: cannot write /x: Permission denied", False),
        (2, "Killed", False),
        (1, "Traceback (most recent call last):\nlehr score: No space left", False),
        (2, "Traceback (most recent call last):\nlehr score: No space left", False),
        (139, "lehr score: No space left", False),
    ],
)
def test_the_judges_see_what_a_message_says(place: Lane, status: int, output: str, clear: bool) -> None:
    trial = Trial(place, "said", 0)
    trial.check_error(Ended("score", status, output), ["No space left", "run the same command again"])
    assert trial.verdict.unclear_errors == (0 if clear else 1)
    trial.refused(Ended("select", 0, "fine"), ["part-1"])
    assert trial.verdict.unnoticed == 1
