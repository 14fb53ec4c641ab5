"""Out of memory in a batch: the kernel refuses an allocation."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq

from tests.faults.trial import Trial
from tests.pipelines.worlds import tree_hashes

_TOLERANCE = 2e-3
"""Of a unit-norm row in float16: its numbers are rounded to 2^-11 of themselves, 5e-4, once in each run, and float32 sums in
batches of other sizes differ by less."""


def out_of_memory(trial: Trial) -> None:
    """Some batches of a scoring do not fit: they are halved, which the footer says, and every sample is scored as ever.

    Halved batches are added up in another order, so rows are compared by value and only other files by their bytes.
    """
    trial.copy("score")
    batches = sorted(trial.rng.sample(range(1, 40), trial.rng.randint(1, 5)))
    arm = ("little_memory", {"batches": batches, "spare_mb": trial.rng.choice([64, 256])})
    ended = trial.start("score", arms=[arm]).wait()
    trial.resume("score", ended=ended)
    expected = trial.world.before("done")
    halvings = 0
    for path in sorted((trial.run / "features/base").glob("*.parquet")):
        notes = json.loads(pq.read_metadata(path).metadata[b"lehr.notes"])
        halvings += notes["batch_halvings"]
        found, wanted = (
            pq.read_table(place, partitioning=None) for place in (path, expected / path.relative_to(trial.run))
        )
        for name in wanted.column_names:
            if name == "sketch":
                one, other = (np.stack(table[name].to_pylist()).astype(float) for table in (found, wanted))
                same = one.shape == other.shape and float(np.abs(one - other).max(initial=0)) < _TOLERANCE
            elif name in ("loss", "grad_norm", "sketch_norm"):
                one, other = (table[name].to_numpy().astype(float) for table in (found, wanted))
                same = one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-4))
            else:
                same = found[name].equals(wanted[name])
            if not same:
                trial.verdict.differing_bytes += path.stat().st_size
                trial.note(f"differs: {name} of {path}")
    trial.verdict.injected = int(halvings > 0)
    if not halvings:
        trial.note(f"no batch was halved: {batches}")
    for name, digest in tree_hashes(trial.run).items():
        if name.startswith(("rejects", "plan")) and digest != trial.world.expected["score"].get(name):
            trial.verdict.differing_bytes += (trial.run / name).stat().st_size
            trial.note(f"differs: {name}")
    trial.check_listed()
    trial.count_rows()
    checked = trial.zygote.run("verify", str(trial.run))
    if checked.status:
        trial.verdict.orphans += 1
        trial.note(checked.output[-1500:])
