"""A corpus file that changes between two runs."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.trial import Trial
from tests.pipelines.worlds import corpus_rows, tree_hashes

_FILES = ("a.parquet", "b.jsonl", "c.jsonl.gz", "d.tar")


def _rewritten(path: Path) -> None:
    """Other rows under the old name."""
    rows = corpus_rows(45, 77)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
        return
    lines = [json.dumps(row).encode() for row in rows]
    if path.suffix == ".tar":
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, body in enumerate(lines):
                info = tarfile.TarInfo(f"{number:05d}.json")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
        return
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _one_letter(path: Path) -> None:
    """A letter of a text, in a file that stays as long and may keep its time: a word the first row holds."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(gzip.decompress(data).replace(b"glass", b"grass", 1), mtime=0))
    elif path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        rows[-1]["text"] = rows[-1]["text"][::-1]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    else:
        path.write_bytes(data.replace(b"glass", b"grass", 1))


def _longer(path: Path) -> None:
    """A row more at the end."""
    row = {"name": "late", "topic": "web", "clean": True, "text": "late glass " * 8}
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        pq.write_table(pa.Table.from_pylist([*rows, row]), path, row_group_size=20)
    elif path.suffix == ".tar":
        body = json.dumps(row).encode()
        with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as archive:
            info = tarfile.TarInfo("99999.json")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    else:
        data = json.dumps(row).encode() + b"\n"
        old = path.read_bytes()
        path.write_bytes(gzip.compress(gzip.decompress(old) + data, mtime=0) if path.suffix == ".gz" else old + data)


def _shorter(path: Path) -> None:
    """Its second half gone."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _gone(path: Path) -> None:
    path.unlink()


_EDITS: dict[str, Callable[[Path], None]] = {
    "rewritten": _rewritten, "one letter": _one_letter, "longer": _longer, "shorter": _shorter, "gone": _gone,
}  # fmt: skip


def _expected(trial: Trial, file: str, edit: str, corpus: Path) -> dict[str, str]:
    """Files of an undisturbed run over the changed corpus, made at the first use; the target is the same as ever."""
    known = trial.lane.other.setdefault("changed", {})
    if (file, edit) not in known:
        run, done = trial.folder / "fresh", trial.world.before("score")
        planned = trial.zygote.run(*trial.world.command("plan", run, corpus=corpus))
        for folder in ("targets", "stages/scoring", "stages/target"):
            shutil.copytree(done / folder, run / folder)
        scored = trial.zygote.run(*trial.world.command("score", run, corpus=corpus))
        if planned.status or scored.status:
            raise RuntimeError(planned.output + scored.output)
        known[file, edit] = tree_hashes(run)
    return known[file, edit]


def corpus_changed(trial: Trial) -> None:
    """A planned file is changed before scoring, in the middle of it, or before export.

    The next command that reads the changed part names the file, `lehr plan --extend` is the way out, and then the run is
    that of the changed corpus. A command whose rows are as planned may finish as ever.
    """
    rng = trial.rng
    file, edit = rng.choice(_FILES), rng.choice(sorted(_EDITS))
    stage = rng.choice(["score", "score half", "score half", "export"])
    trial.copy(stage.split(" ")[0])
    corpus = trial.folder / "corpus"
    shutil.copytree(trial.world.corpus, corpus)
    record = json.loads((trial.run / "run.json").read_text())
    (trial.run / "run.json").write_text(json.dumps({**record, "root": str(corpus)}))
    if stage == "score half":
        done = trial.world.before("done")
        for path in sorted((done / "features/base").glob("*.parquet")):
            if rng.random() < 0.5:
                for folder in ("features/base", "rejects/base", "curvature/target/base"):
                    (trial.run / folder).mkdir(parents=True, exist_ok=True)
                    shutil.copy(done / folder / path.name, trial.run / folder / path.name)
    _EDITS[edit](corpus / file)
    trial.verdict.injected = 1
    trial.note(f"{file} {edit}, before {stage}")
    ended = trial.start(stage.split(" ")[0]).wait()
    if ended.status:
        trial.check_error(ended, [file])
        if "--extend" not in ended.output:
            trial.verdict.unclear_errors += 1
            trial.note(f"no way out: {ended.output[-1500:]}")
    else:
        # What the command read is as it was planned: its results are those of the planned corpus.
        trial.judge("score" if stage != "export" else "export")
    command = trial.world.command("plan", trial.run, corpus=corpus)
    refused = trial.zygote.run(*command)
    trial.refused(refused, [file])
    extended = trial.zygote.run(*command, "--extend")
    if extended.status:
        trial.verdict.unfinished += 1
        trial.note(f"plan --extend: {extended.output[-1500:]}")
        return
    trial.resume("score")
    listed = _expected(trial, file, edit, corpus)
    found = tree_hashes(trial.run)
    for name, digest in listed.items():
        if found.get(name) != digest:
            trial.verdict.differing_bytes += (trial.run / name).stat().st_size if name in found else 1
            trial.note(f"differs: {name}")
    trial.check_listed()
    trial.count_rows()
