"""`lehr schema`: every table can be printed, with a doc for every field."""

from __future__ import annotations

import pytest

from lehr.cli import main
from schemas.tables import describe_fields, schema_names, table_schema


def test_without_a_name_the_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out.split() == schema_names()


@pytest.mark.parametrize("name", schema_names())
def test_table_is_printed_with_every_column(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", name]) == 0
    out = capsys.readouterr().out
    assert all(field[0][:12] in out for field in describe_fields(name))


@pytest.mark.parametrize("name", schema_names())
def test_every_field_has_a_doc_and_numbers_have_a_unit(name: str) -> None:
    for field, kind, unit, _, doc in describe_fields(name):
        assert len(doc) > 4, f"{name}.{field} needs a doc"
        if kind in ("float", "double", "int64") and field not in ("rank", "row", "position", "generation"):
            assert unit, f"{name}.{field} needs a unit"


def test_unknown_table_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "nope"]) == 2
    err = capsys.readouterr().err
    assert "unknown schema 'nope'" in err and "features" in err and "selection" in err


def test_sketch_tables_follow_k() -> None:
    assert table_schema("features", 64).field("sketch").type.list_size == 64
    assert table_schema("spectrum", 3).field("vector").type.list_size == 3
