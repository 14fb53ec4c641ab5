"""Files that are damaged after they were written: by a disk, a copy that broke off, a person."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from schemas.errors import LehrError
from schemas.shards import read_index, read_shard
from tests.faults.trial import Trial
from tests.faults.world import MANIFESTS

Harm = Callable[[Trial, Path], bool]
"""Damages a file; whether it is another one now."""

_MADE_BY = {
    "plan.parquet": "plan", "targets": "target", "features": "score", "rejects": "score", "curvature": "score",
    "selections": "select", "streams": "export",
}  # fmt: skip
_READ_BY = {
    "plan.parquet": "score", "targets": "select", "features": "select", "curvature": "select", "selections": "export",
}  # fmt: skip
"""A command that reads files of a folder and does not make them; `lehr verify` reads them all."""


def truncated(trial: Trial, path: Path) -> bool:
    """The file ends early."""
    size = path.stat().st_size
    # A record ends in a newline that says nothing.
    last = 2 if path.suffix == ".json" else 1
    with path.open("r+b") as handle:
        handle.truncate(min(trial.rng.choice([0, size, int(trial.rng.random() * size)]), size - last))
    return path.stat().st_size < size


def flipped(trial: Trial, path: Path) -> bool:
    """One bit is another; every other time near the end, where footers and indexes are."""
    data = bytearray(path.read_bytes())
    if not data:
        return False
    place = trial.rng.randrange(len(data))
    if trial.rng.random() < 0.5:
        place = len(data) - 1 - trial.rng.randrange(min(len(data), 600))
    data[place] ^= 1 << trial.rng.randrange(8)
    path.write_bytes(data)
    return True


def shard_truncated(trial: Trial) -> None:
    """A shard, or any other listed file, is cut."""
    _shard(trial, truncated)


def shard_bit_flipped(trial: Trial) -> None:
    """One bit of a shard, of any other listed file, or of a manifest is another."""
    if trial.rng.random() < 0.2:
        _record(trial, trial.rng.choice([name for name in sorted(_RECORDS) if name != "run.json"]), flipped)
    else:
        _shard(trial, flipped)


def _shard(trial: Trial, harm: Harm) -> None:
    if trial.rng.random() < 0.35:
        _unfinished(trial, harm)
    else:
        _finished(trial, harm)


def _finished(trial: Trial, harm: Harm) -> None:
    """Of a finished run: everybody who reads the file refuses it by name, and its stage makes it again."""
    trial.copy("done")
    folder = trial.rng.choice([name for name in _MADE_BY if name != "plan.parquet"] * 3 + ["plan.parquet"])
    listed = [part for path in trial.run.glob("stages/*/*.json") for part in json.loads(path.read_text())["parts"]]
    path = trial.run / trial.rng.choice(sorted(p["path"] for p in listed if p["path"].split("/")[0] == folder))
    trial.verdict.injected = int(harm(trial, path))
    if not trial.verdict.injected:
        return
    trial.note(f"{harm.__name__} {path.relative_to(trial.run)}")
    trial.refused(trial.zygote.run("verify", str(trial.run), "--show", "1000"), [path.name])
    reader = _READ_BY.get(folder)
    if reader and path.name != "solution.json":
        trial.refused(trial.start(reader).wait(), [path.name])
    if folder == "streams":
        _refused_by_trainer(trial)
    if trial.rng.random() < 0.5:
        path.unlink()
    stage = _MADE_BY[folder]
    _repair(trial, stage)
    trial.judge("export")


def _refused_by_trainer(trial: Trial) -> None:
    """What the trainer reads shards with."""
    url = str(trial.run / "streams/match/gen-000001")
    try:
        index = read_index(url)
        for folder, entries in (("", index.shards), ("/target", index.target), ("/eval", index.evaluation)):
            for entry in entries:
                list(read_shard(url + folder, entry))
    except LehrError:
        return
    trial.verdict.unnoticed += 1
    trial.note("the stream is read without a word")


def _repair(trial: Trial, stage: str) -> None:
    """The stage's command again, as the messages say; a damaged plan wants --extend."""
    if stage != "plan":
        trial.resume(stage)
        return
    ended = trial.start("plan", "--extend").wait()
    if ended.status:
        trial.verdict.unfinished += 1
        trial.note(f"plan --extend: {ended.output[-1500:]}")


def _unfinished(trial: Trial, harm: Harm) -> None:
    """Of a stage that was stopped before its manifest: the same command finds the damage and makes the file again."""
    stage = trial.rng.choice(["target", "score", "score"])
    trial.copy(stage)
    done = trial.world.before("done")
    folders = ["targets/target/base/chunks"] if stage == "target" else ["features", "rejects", "curvature"]
    for folder in folders:
        shutil.copytree(done / folder, trial.run / folder)
    if stage == "target":  # a target is scored under a declared scoring
        (trial.run / "stages/scoring").mkdir()
        shutil.copy(done / "stages/scoring/base.json", trial.run / "stages/scoring/base.json")
    candidates = sorted(path for folder in folders for path in (trial.run / folder).rglob("*.parquet"))
    path = trial.rng.choice(candidates)
    trial.verdict.injected = int(harm(trial, path))
    trial.note(f"{harm.__name__} {path.relative_to(trial.run)}, stage {stage} unfinished")
    for other in candidates:
        if other != path and trial.rng.random() < 0.2:
            other.unlink()
    trial.resume(stage, naming=[path.name])
    trial.judge(stage)


_RECORDS = {
    "run.json": ("score", "plan"),
    MANIFESTS["plan"]: ("score", "plan"),
    "stages/scoring/base.json": ("score", "target"),
    MANIFESTS["target"]: ("select", "target"),
    "stages/score/base.json": ("select", "score"),
    MANIFESTS["score"]: ("select", "score"),
    MANIFESTS["select"]: ("export", "select"),
    MANIFESTS["export"]: ("verify", "export"),
    "streams/match/gen-000001/index.json": ("verify", "export"),
}
"""Every record, a command that reads it, and the stage that makes it."""


def manifest_half_written(trial: Trial) -> None:
    """A manifest that a broken copy left half there: whoever reads it says which and what to do, which then is enough."""
    _record(trial, trial.rng.choice(sorted(_RECORDS)), truncated)


def _record(trial: Trial, name: str, harm: Harm) -> None:
    trial.copy("done")
    reader, stage = _RECORDS[name]
    path = trial.run / name
    sound = path.read_bytes()
    harm(trial, path)
    trial.note(f"{harm.__name__} {name}")
    if path.read_bytes().split() == sound.split():
        return  # a blank that is another blank says the same
    trial.verdict.injected = 1
    ended = trial.start(reader).wait()
    trial.refused(ended, [f"{path.parent.name}/{path.name}"])
    if "delete it" in ended.output.lower() or stage == "plan":
        path.unlink()
    again = trial.start(stage).wait()
    if stage == "plan" and again.status and "--extend" in again.output:
        again = trial.start(stage, "--extend").wait()
    trial.resume(stage, ended=again)
    trial.judge("export")
