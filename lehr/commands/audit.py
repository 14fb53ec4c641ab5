"""`lehr audit`: questions about a run, in SQL."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

import tyro

from lehr.options import RunDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Ask a question about a run in SQL (DuckDB's dialect), or one of the named questions. Reads; never writes to the run.

    `lehr audit RUN` lists the views; `lehr audit RUN --sql "DESCRIBE selections"` lists the columns of one.
    """

    run_dir: RunDir = ""
    """Run directory: a path or any fsspec URL."""
    sql: str = ""
    """One SELECT, WITH, DESCRIBE, SUMMARIZE, SHOW TABLES or EXPLAIN statement over the views."""
    query: str = ""
    """Name of a question to run instead of --sql."""
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the named questions and what they answer."""
    format: Literal["table", "json", "csv", "parquet"] = "table"
    """How the rows are written; json is one array of objects. Parquet needs --out."""
    out: str = ""
    """File to write to instead of the terminal."""
    limit: int = 0
    """At most this many rows; 0 means 100 for tables on the terminal and all rows otherwise."""

    def run(self) -> int:
        """Print the answer and return 0."""
        from lehr.audit import ask, named_query
        from lehr.queries import NAMED_QUERIES
        from lehr.rendering import print_pairs, write_rows
        from lehr.views import describe_view, view_names
        from schemas.errors import InputError
        from schemas.run import Run

        if self.list:
            print_pairs({name: query.answers for name, query in NAMED_QUERIES.items()})
            return 0
        if not self.run_dir:
            raise InputError("name a run directory: lehr audit RUN --sql '...' (or --list for the named questions)")
        if self.sql and self.query:
            raise InputError("give --sql or --query, not both")
        if self.limit < 0:
            raise InputError(f"limit must be 0 (the default) or positive, not {self.limit}")
        if self.format == "parquet" and not self.out:
            raise InputError("--format parquet needs --out FILE")
        run = Run.open(self.run_dir)
        if not self.sql and not self.query:
            print_pairs({view: describe_view(view) for view in view_names()})
            return 0
        on_screen = self.format == "table" and not self.out
        limit = self.limit or (100 if on_screen else None)
        answer = ask(run, self.sql or named_query(self.query), limit)
        for notice in answer.notices:
            print(f"lehr audit: {notice}", file=sys.stderr)
        write_rows(answer.table, self.format, self.out)
        if answer.truncated:
            print(f"lehr audit: first {limit} rows; --limit N shows more", file=sys.stderr)
        return 0
