"""One fault from its injection to the verdict: a copy of the run, the commands a user would type, what was found wrong."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from schemas.storage import TEMPORARY_PREFIX
from tests.faults.world import MANIFESTS, STAGES, World
from tests.faults.zygote import Ended, Process, Zygote
from tests.pipelines.worlds import tree_hashes

ERROR, INCOMPLETE, FAILED_CHECKS = 2, 75, 1
"""Exit statuses of errors that a message explains; the last is `lehr verify`'s alone."""
TRIES = 6
"""Times that a user repeats a command before giving up."""
_KILLED = -9


@dataclasses.dataclass
class Verdict:
    """What one fault did. Everything but `injected` should be zero."""

    injected: int = 0
    lost_rows: int = 0
    """Rows of the plan in neither features nor rejects."""
    doubled_rows: int = 0
    """Rows and windows that stand more than once."""
    differing_bytes: int = 0
    """Bytes of files that differ from the undisturbed run's, are missing, or are too many."""
    orphans: int = 0
    """Unfinished or foreign files that a manifest lists, and manifests of unfinished stages."""
    unnoticed: int = 0
    """Damaged files that a command read, or `lehr verify` passed, without a word."""
    unclear_errors: int = 0
    """Commands that ended badly without a message that says what and where, or with a traceback."""
    unfinished: int = 0
    """Runs that did not complete by the commands their messages named."""
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        return any(getattr(self, name) for name in COUNTS if name != "injected")


COUNTS = tuple(field.name for field in dataclasses.fields(Verdict) if field.name not in ("notes", "seconds"))


@dataclasses.dataclass(frozen=True)
class Lane:
    """Where faults happen one after another."""

    world: World
    zygote: Zygote
    folder: Path
    other: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What kinds of faults keep between their trials."""


class Trial:
    """One fault in a copy of a run."""

    def __init__(self, lane: Lane, kind: str, seed: int) -> None:
        self.lane, self.world, self.zygote = lane, lane.world, lane.zygote
        self.rng = random.Random(f"{kind} {seed}")
        self.verdict = Verdict()
        self.folder = lane.folder / f"{kind}-{seed}"
        self.run = self.folder / "run"

    def note(self, text: str) -> None:
        """Something worth reading where the fault went wrong."""
        self.verdict.notes.append(text)

    def copy(self, stage: str, to: Path | None = None) -> Path:
        """The run as it stands before a stage; before `plan` there is none."""
        run = to or self.run
        run.parent.mkdir(parents=True, exist_ok=True)
        if stage != "plan":
            shutil.copytree(self.world.before(stage), run, dirs_exist_ok=True)
        return run

    def again(self) -> None:
        """Away with the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # Commands.

    def start(self, stage: str, *more: str, **how: Any) -> Process:
        return self.zygote.start(*self.world.command(stage, self.run), *more, **how)

    def check_error(self, ended: Ended, naming: Sequence[str] = ()) -> None:
        """A command that ended badly has to say why, in one of our errors; `naming` are words one of which it must hold."""
        problem = ""
        said = re.search(rf"^lehr {ended.verb}: \S", ended.output, re.MULTILINE)
        flat = "".join(ended.output.split())
        if ended.status == 0 or "Traceback" in ended.output:
            problem = "a traceback"
        elif ended.verb == "verify":
            problem = "" if ended.status == FAILED_CHECKS and "FAILED" in ended.output else "no failed check"
        elif ended.status not in (ERROR, INCOMPLETE) or not said:
            problem = "no message"
        if not problem and naming and not any("".join(word.split()) in flat for word in naming):
            problem = f"nothing about {', '.join(naming)}"
        if problem:
            self.verdict.unclear_errors += 1
            self.note(f"{ended.verb} ended with {ended.status} and {problem}: {ended.output[-1500:]}")

    def refused(self, ended: Ended, naming: Sequence[str]) -> None:
        """A command that read damaged files must have said so."""
        if ended.status == 0:
            self.verdict.unnoticed += 1
            self.note(f"{ended.verb} noticed nothing: {naming}")
        else:
            self.check_error(ended, naming)

    def resume(self, stage: str, *, ended: Ended | None = None, naming: Sequence[str] = (), **how: Any) -> None:
        """Run a stage's command again until it is done."""
        for _ in range(TRIES):
            if ended is not None:
                if ended.status == 0:
                    return
                if ended.status != _KILLED:
                    self.check_error(ended, naming)
            ended = self.zygote.run(*self.world.command(stage, self.run), **how)
        if ended is None or ended.status:
            self.verdict.unfinished += 1
            self.note(f"{stage} does not finish: {ended.output[-1500:] if ended else ''}")

    # Judgement.

    def check_unfinished(self, stage: str) -> None:
        """After a kill: the manifest of a stage stands only where everything that it should list does."""
        manifest = self.run / MANIFESTS[stage]
        if not manifest.exists():
            return
        found = tree_hashes(self.run)
        if any(found.get(path) != digest for path, digest in self.world.expected[stage].items()):
            self.verdict.orphans += 1
            self.note(f"{manifest} stands beside unfinished results")

    def judge(self, stage: str, expected: dict[str, str] | None = None) -> None:
        """Files and rows of a run whose stages up to `stage` have finished, against the undisturbed one."""
        wanted = self.world.expected[stage] if expected is None else expected
        found = {
            path: digest
            for path, digest in tree_hashes(self.run).items()
            if not Path(path).name.startswith(TEMPORARY_PREFIX)
        }
        for path in sorted({*wanted, *found}):
            if found.get(path) != wanted.get(path):
                other = self.world.before("done") / path
                sizes = [place.stat().st_size for place in (self.run / path, other) if place.exists()]
                self.verdict.differing_bytes += max(sizes, default=1)
                self.note(f"differs: {path}, {'found' if path in found else 'missing'}")
        self.check_listed()
        if STAGES.index(stage) >= STAGES.index("score"):
            self.count_rows()

    def check_listed(self) -> None:
        """Nothing that a killed process left is listed by a manifest."""
        for path in self.run.glob("stages/*/*.json"):
            for part in json.loads(path.read_text()).get("parts", ()):
                name = Path(part["path"]).name
                if name.startswith(TEMPORARY_PREFIX) or not (self.run / part["path"]).exists():
                    self.verdict.orphans += 1
                    self.note(f"{path} lists {part['path']}")

    def count_rows(self) -> None:
        """Rows of features and rejects against the plan, with pyarrow alone."""
        planned: Counter[tuple[str, int]] = Counter()
        for unit in pq.read_table(self.run / "plan.parquet").to_pylist():
            planned.update((unit["path"], unit["row_start"] + row) for row in range(unit["row_count"]))
        manifest = json.loads((self.run / "stages/score/base.json").read_text())
        windows: Counter[tuple[str, int, int]] = Counter()
        for part in manifest["parts"]:
            table = pq.read_table(self.run / part["path"], columns=["path", "row", "window"], partitioning=None)
            windows.update(zip(*(table[name].to_pylist() for name in ("path", "row", "window"))))
        held = {(path, row) for path, row, _ in windows}
        self.verdict.lost_rows += len(set(planned) - held)
        self.verdict.doubled_rows += sum(count - 1 for count in windows.values() if count > 1)
        self.verdict.doubled_rows += sum(count - 1 for count in planned.values() if count > 1) + len(
            held - set(planned)
        )


def total(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Sums over many."""
    sums = dict.fromkeys(COUNTS, 0)
    for verdict in verdicts:
        for name in COUNTS:
            sums[name] += getattr(verdict, name)
    return sums
