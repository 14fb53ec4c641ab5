"""`lehr schema`: the columns of a table, for people."""

from __future__ import annotations

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Print the columns of a table that Lehr writes: name, type, unit, meaning. Without a name: list the tables."""

    name: tyro.conf.Positional[str] = ""
    """Table to print."""

    def run(self) -> int:
        """Print and return 0."""
        from rich.console import Console
        from rich.table import Table

        from schemas.tables import describe_fields, schema_names

        console = Console()
        if not self.name:
            console.print("\n".join(schema_names()))
            return 0
        table = Table("column", "type", "unit", "may be null", "meaning", title=f"{self.name}", title_justify="left")
        for name, kind, unit, nullable, doc in describe_fields(self.name):
            table.add_row(name, kind, unit, "yes" if nullable else "", doc)
        console.print(table)
        return 0
