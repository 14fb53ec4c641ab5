"""An object store that answers with errors, breaks off, or is slow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.faults.trial import Trial
from tests.faults.world import World
from tests.gcs import BUCKET, Gcs

_WORLD = f"gs://{BUCKET}/world"


def prepare(gcs: Gcs, world: World, folder: Path) -> None:
    """Put corpus, target, evaluation set and the run before every stage into the server."""
    for name in ("corpus", "before"):
        shutil.copytree(world.folder / name, folder / name)
    for name in ("target.jsonl", "eval.jsonl"):
        shutil.copy(world.folder / name, folder / name)
    for path in folder.glob("before/*/run.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "root": f"{_WORLD}/corpus"}))
    gcs.load(str(folder), "world")


def store_errors(trial: Trial) -> None:
    """429, 5xx, connections closed before or after the request was carried out, bodies that break off, slow answers.

    Passing ones are lived through; where the store stays down the command says so, and works again when the store does.
    """
    rng = trial.rng
    gcs: Gcs = trial.lane.other["gcs"]
    stage = rng.choice(["plan", "target", "score", "score", "select", "export"])
    name = trial.folder.name
    run = f"gs://{BUCKET}/{name}"
    gcs.copy(f"world/before/{stage}", name)
    command = trial.world.command(stage, run, corpus=f"{_WORLD}/corpus", place=_WORLD)
    how: dict[str, Any] = {"env": {"STORAGE_EMULATOR_HOST": gcs.host}, "arms": [("patient_never", {})]}
    lasting = rng.random() < 0.3
    described: list[tuple[str, dict[str, Any]]] = []
    for _ in range(rng.randint(1, 3)):
        fault: dict[str, Any] = rng.choice(
            [
                *({"status": status} for status in (429, 500, 502, 503, 504)),
                {"status": 500, "late": True},
                {"drop": True},
                {"drop": True, "late": True},
                {"cut": rng.randrange(200)},
                {"sleep": rng.uniform(0.01, 0.2)},
            ]
        )
        match = rng.choice(["", "^GET", "^GET /download", "^POST", "alt=media", "/features", "/stages"])
        # Fewer than the client's six attempts in a row, so that it outlasts them.
        described.append((match, {"every": rng.randint(2, 9), "count": 400, **fault}))
    for match, settings in described:
        gcs.fail(match, **settings)
    if lasting:
        gcs.fail(rng.choice(["", "^GET /download", "^POST"]), status=503, count=1 << 20)
    trial.note(f"{stage}: {described}, lasting {lasting}")
    ended = trial.zygote.run(*command, **how)
    trial.verdict.injected = int(any(request["fault"] for request in gcs.requests()))
    if lasting:
        gcs.clear()
        for match, settings in described:
            gcs.fail(match, **settings)
    tries = 0
    while ended.status and tries < 4:
        trial.check_error(ended)
        tries += 1
        if tries == 3:
            gcs.clear()
        ended = trial.zygote.run(*command, **how)
    gcs.clear()
    if ended.status:
        trial.verdict.unfinished += 1
        trial.note(f"does not finish: {ended.output[-1500:]}")
    gcs.save(name, str(trial.run))
    gcs.remove(name)
    trial.judge(stage)
