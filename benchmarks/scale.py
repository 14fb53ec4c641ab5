"""Time and memory of selecting against the number of rows, and what follows for a pool that no machine holds.

    python benchmarks/scale.py --sizes 100000 300000 1000000 --k 2048 --out scale.json
    python benchmarks/scale.py --sizes 100000 300000 1000000 10000000 --k 256 --part-rows 50000 --cases cosine_columns signed_columns --out scale-256.json

Every size is a pool of `pools.py` and every figure a `lehr select` of `selection.py` in a process of its own, the one with the
median of CPU seconds over rounds. The budget is a fixed share of the rows, so a case whose work is linear in rows has an `exponent`
of 1: the slope of log CPU seconds (all threads; other work on the machine counts little) over log rows. Wall seconds stand beside.

`plan` costs one selection of `--rows-planned` rows from the fit: bytes, passes, workers, hours. Every row count that was not run is
marked `extrapolated`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.pools import make_pool, pool_folder
from benchmarks.selection import Settings as SelectionSettings
from benchmarks.selection import in_process, warm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    sizes: tuple[int, ...] = (100_000, 300_000, 1_000_000)
    """Rows of the pools."""
    k: int = 2048
    """Sketch dimension."""
    part_rows: int = 10_000
    """Rows of a part."""
    cases: tuple[str, ...] = ("cosine_columns", "direct")
    """Cases of `selection.py`."""
    rounds: int = 3
    """Rounds; figures are medians. The first after a pool was written is often the slowest."""
    threads: int = 2
    """Threads of reading and of products."""
    rows_planned: int = 1_000_000_000
    """Rows of the costed plan."""
    workers: int = 100
    """Workers of two cores in the costed plan."""
    passes: int = 20
    """Passes over sketches in the costed plan."""
    folder: Path = Path("/tmp/lehr-pools")
    """Where pools are kept between runs."""
    out: Path | None = None
    """Where the result is written; printed where not given."""


def exponent(rows: list[int], values: list[float]) -> float | None:
    """Slope of log values over log rows, by least squares; None for a single size."""
    if len(rows) < 2:
        return None
    return round(float(np.polyfit(np.log(rows), np.log(values), 1)[0]), 3)


def costed_plan(settings: Settings, size: int, pool_bytes: int, taken: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One selection of `rows_planned` rows, linear in what was measured at `size` rows."""
    factor = settings.rows_planned / size
    plan: dict[str, Any] = {
        "rows": settings.rows_planned,
        "extrapolated": settings.rows_planned not in settings.sizes,
        "from_rows": size,
        "stored_bytes": int(pool_bytes * factor),
        "sketch_bytes_decoded": 2 * settings.k * settings.rows_planned,
        "workers": settings.workers,
        "passes": settings.passes,
    }
    for case, found in taken.items():
        parts = found["parts"]
        cpu = found["cpu_seconds"] * factor
        plan[case] = {
            "cpu_hours": round(cpu / 3600, 2),
            "hours_on_workers": round(cpu / 3600 / (2 * settings.workers), 3),
            "one_machine_gb": round(found["peak_rss_gb"] * factor, 1),
            "read_share": round(parts["read"] / parts["total"], 3),
        }
    return plan


def measure(settings: Settings) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(settings.threads)
    runs: dict[str, dict[int, dict[str, Any]]] = {case: {} for case in settings.cases}
    pool_bytes: dict[int, int] = {}
    for rows in settings.sizes:
        folder = pool_folder(settings.folder, rows=rows, k=settings.k, part_rows=settings.part_rows)
        make_pool(folder, rows=rows, k=settings.k, part_rows=settings.part_rows)
        pool_bytes[rows] = warm(folder)
        given = SelectionSettings(rows=rows, k=settings.k, part_rows=settings.part_rows, threads=settings.threads)
        for case in settings.cases:
            rounds = [in_process(given, folder, case, False) for _ in range(settings.rounds)]
            found = sorted(rounds, key=lambda taken: taken["cpu_seconds"])[(len(rounds) - 1) // 2]
            runs[case][rows] = found
            print(
                f"{rows} rows, {case}: {found['seconds']:.2f} s, {found['cpu_seconds']:.2f} CPU s, {found['peak_rss_gb']:.2f} GB",
                flush=True,
            )
    sizes = list(settings.sizes)
    largest = max(sizes)
    plan = costed_plan(settings, largest, pool_bytes[largest], {case: runs[case][largest] for case in runs})
    print(f"{settings.rows_planned} rows ({'extrapolated' if plan['extrapolated'] else 'run'}): {json.dumps(plan)}")
    return {
        "exponent": {
            case: exponent(sizes, [runs[case][rows]["cpu_seconds"] for rows in sizes]) for case in settings.cases
        },
        "memory_exponent": {
            case: exponent(sizes, [runs[case][rows]["peak_rss_gb"] for rows in sizes]) for case in settings.cases
        },
        "seconds": {case: {str(rows): runs[case][rows]["seconds"] for rows in sizes} for case in settings.cases},
        "cpu_seconds": {
            case: {str(rows): runs[case][rows]["cpu_seconds"] for rows in sizes} for case in settings.cases
        },
        "peak_rss_gb": {
            case: {str(rows): runs[case][rows]["peak_rss_gb"] for rows in sizes} for case in settings.cases
        },
        "bytes_per_million_rows": {str(rows): round(pool_bytes[rows] * 1e6 / rows) for rows in sizes},
        "k": settings.k,
        "plan": plan,
        "environment": common.environment(settings),
    }


if __name__ == "__main__":
    common.main(Settings, measure, __doc__)
