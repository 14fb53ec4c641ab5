"""Work units and the plan: slices of corpus files, each scored into one shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pyarrow as pa

from schemas.errors import CorruptFile
from schemas.fingerprint import fingerprint
from schemas.manifest import Manifest
from schemas.parquet import Footer, Part, decode_table, read_part, rows_to_table, write_table
from schemas.run import Run
from schemas.spec import PlanSpec, plan_spec_from_dict

PLAN_NAME = "corpus"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """A slice of one corpus file. Fields are those of the `plan` table."""

    unit_id: str
    path: str
    format: str
    byte_start: int
    byte_end: int
    row_start: int
    row_count: int
    source_fingerprint: str
    estimated_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The work units of a run, in corpus order, and how they were cut."""

    spec: PlanSpec
    units: tuple[WorkUnit, ...]
    fingerprint: str

    @property
    def rows(self) -> int:
        """Rows of the planned corpus, unreadable ones included."""
        return sum(unit.row_count for unit in self.units)

    @property
    def tokens(self) -> int:
        """Tokens expected in the planned corpus."""
        return sum(unit.estimated_tokens for unit in self.units)

    def share(self, index: int, count: int) -> tuple[WorkUnit, ...]:
        """Every `count`-th unit from `index` (from 0) on: a fixed share that neighbours in time do not crowd."""
        return self.units[index::count]


def write_plan_table(run: Run, spec: PlanSpec, units: Sequence[WorkUnit]) -> Part:
    """Write `plan.parquet`; its manifest is the stage's to write."""
    table = rows_to_table("plan", [dataclasses.asdict(unit) for unit in units])
    return write_table(run.url, run.plan_path, table, Footer(schema="plan", spec=fingerprint(spec)))


def read_plan(run: Run) -> Plan:
    """The finished plan of a run. Raises `CorruptFile` where the table is not the one its manifest lists."""
    manifest: Manifest = run.manifest("plan", PLAN_NAME)
    spec = plan_spec_from_dict(manifest.spec)
    url = run.path(run.plan_path)
    if [part.path for part in manifest.parts] != [run.plan_path]:
        raise CorruptFile(f"the manifest of the plan does not list {url}; run `lehr plan --extend`")
    table: pa.Table = decode_table(read_part(run.url, manifest.parts[0]), url, schema="plan", spec=fingerprint(spec))[0]
    units = tuple(WorkUnit(**record) for record in table.to_pylist())
    return Plan(spec=spec, units=units, fingerprint=manifest.fingerprint)
