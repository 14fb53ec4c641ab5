"""What selecting costs on a pool that fits one machine: seconds and peak memory of `lehr select`, by selector.

    python benchmarks/selection.py --rows 1000000 --k 2048 --out selection.json

The pool is a scored run of synthetic sketches (`pools.py`), written once into `--folder`. Each case runs the function behind
`lehr select` from opening the run to the finished selection, in a process of its own, with the pool's files in the page cache:

    cosine_columns    target-cosine, a hundredth of the rows, from columns alone
    signed_columns    direct-signed, the same
    match_shortlist   match, a hundredth of the rows, shortlist 2: exact greedy
    match_whole       match, a tenth of the rows, over the whole pool: at most 20 Frank-Wolfe passes
    direct            direct, a tenth of the rows, at most 20 iterations

Of each stand the seconds of the choice itself (`--no-bound --no-two-fold`) in `seconds`, and in `seconds_default` those
with the diagnostics that are computed unless asked otherwise: the relaxed bound, and two selections more against the target's
halves. `parts` says where they went: `read` (files, hashes, decoding), `product` (sketches by vectors), `threshold` (linear
subproblems), `greedy`, `write` (the selection's own files), `other`. Medians over rounds, after a run by columns and one of sketches
that are not counted. `cpu_seconds` are those of all threads: on a machine that other work shares, wall seconds are larger than on a
free one and these are not. `peak_rss_gb` is the largest resident memory of the process, the sketches included.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.pools import SCORING, TARGET, make_pool, pool_folder
from pipelines.select import run_select
from schemas.run import Run
from selection_ops.selectors import Budget, SelectorSettings

CASES: dict[str, tuple[float, bool, dict[str, Any]]] = {
    "cosine_columns": (0.01, True, {"selector": "target-cosine"}),
    "signed_columns": (0.01, True, {"selector": "direct-signed"}),
    "match_shortlist": (0.01, False, {"selector": "match"}),
    "match_whole": (0.1, False, {"selector": "match", "shortlist": 0.0}),
    "direct": (0.1, False, {"selector": "direct"}),
}
"""Share of the rows that is the budget, whether columns suffice, settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    rows: int = 100_000
    """Candidates."""
    k: int = 2048
    """Sketch dimension."""
    part_rows: int = 10_000
    """Rows of a part; scoring writes one part per work unit of a plan (`lehr plan --unit-tokens`)."""
    cases: tuple[str, ...] = tuple(CASES)
    """Cases to run."""
    diagnostics: bool = True
    """Measure the default command too, with its diagnostics."""
    rounds: int = 1
    """Rounds; figures are medians."""
    threads: int = 2
    """Threads of reading and of products."""
    folder: Path = Path("/tmp/lehr-pools")
    """Where pools are kept between runs."""
    out: Path | None = None
    """Where the result is written; printed where not given."""


def run_case(run: Run, case: str, rows: int, diagnostics: bool) -> dict[str, Any]:
    """Select once; seconds by part, peak memory, and what was chosen."""
    share, columns_only, given = CASES[case]
    name = f"bench-{case}"
    # A selection of the same name with other settings would be refused.
    Path(run.path(run.manifest_path("select", name))).unlink(missing_ok=True)
    shutil.rmtree(run.path(run.selection_folder(name)), ignore_errors=True)
    settings = SelectorSettings(**given, bound=diagnostics, two_fold=diagnostics)
    budget = Budget(samples=max(1, round(share * rows)))
    started, cpu = time.perf_counter(), time.process_time()
    report = run_select(run, name, SCORING, TARGET, budget, settings, columns_only=columns_only)
    seconds = time.perf_counter() - started
    cpu = time.process_time() - cpu
    diagnosis = report.solution["diagnostics"]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parts": {name: round(value, 3) for name, value in report.seconds.items()},
        "peak_rss_gb": peak_rss_gb(),
        "selected": report.selected,
        "fingerprint": report.fingerprint,
        "iterations": len(report.solution["certificate"].get("objective_per_iteration", [])),
        "set_cosine": diagnosis.get("set_cosine"),
        "set_cosine_heldout": diagnosis.get("set_cosine_heldout"),
    }


def peak_rss_gb() -> float:
    """Largest resident memory of this process, files mapped into it included; not that of the one it was forked from."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return round(int(found[1]) * 1024 / 1e9, 3) if found else float("nan")


def in_process(settings: Settings, folder: Path, case: str, diagnostics: bool) -> dict[str, Any]:
    """`run_case` in a process of its own."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import torch; from benchmarks import selection; "
        f"torch.set_num_threads({settings.threads}); "
        f"run = selection.Run.open({str(folder)!r}); "
        f"print('RESULT', json.dumps(selection.run_case(run, {case!r}, {settings.rows}, {diagnostics})))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def warm(folder: Path) -> int:
    """Read every file of the scoring once, so that it lies in the page cache; bytes read."""
    total = 0
    for path in sorted(path for path in folder.rglob("*.parquet") if "selections" not in path.parts):
        with path.open("rb") as handle:
            while data := handle.read(1 << 24):
                total += len(data)
    return total


def measure(settings: Settings) -> dict[str, Any]:
    """All figures."""
    folder = pool_folder(settings.folder, rows=settings.rows, k=settings.k, part_rows=settings.part_rows)
    torch.set_num_threads(settings.threads)
    make_pool(folder, rows=settings.rows, k=settings.k, part_rows=settings.part_rows)
    pool_bytes = warm(folder)
    # The first processes after a pool was written pay for memory that the machine has to find: one by columns, one that holds sketches.
    for case in {CASES[case][1]: case for case in reversed(settings.cases)}.values():
        in_process(settings, folder, case, False)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(settings.rounds):
        for case in settings.cases:
            for diagnostics in (False, True) if settings.diagnostics else (False,):
                label = f"{case}_default" if diagnostics else case
                taken = in_process(settings, folder, case, diagnostics)
                print(f"{label}: {taken['seconds']:.2f} s, {taken['peak_rss_gb']:.2f} GB, {taken['parts']}", flush=True)
                runs.setdefault(label, []).append(taken)

    def median(label: str, key: str) -> float:
        return round(statistics.median(taken[key] for taken in runs[label]), 3)

    plain = [label for label in runs if not label.endswith("_default")]
    return {
        "seconds": {label: median(label, "seconds") for label in plain},
        "peak_rss_gb": {label: max(taken["peak_rss_gb"] for taken in runs[label]) for label in runs},
        "cpu_seconds": {label: median(label, "cpu_seconds") for label in runs},
        "seconds_default": {
            label.removesuffix("_default"): median(label, "seconds") for label in runs if label not in plain
        },
        "rows": settings.rows,
        "k": settings.k,
        "pool_bytes": pool_bytes,
        "runs": runs,
        "environment": common.environment(settings),
    }


if __name__ == "__main__":
    common.main(Settings, measure, __doc__)
