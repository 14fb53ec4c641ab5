"""Questions about a run in SQL, answered by a query engine that can read the run's views and nothing else.

Four walls stand between a query and anything but its answer: the statement's syntax tree may hold only reading nodes,
the engine has no access to files, extensions or Python variables and its configuration is locked, the transaction is
read-only, and the data come in as Arrow datasets that the engine cannot write.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import orjson
import pyarrow as pa

from lehr.catalog import TABLE_VIEWS
from lehr.queries import NAMED_QUERIES
from lehr.views import RECORD_VIEWS, TableView, record_view, view_names, view_schema
from schemas.errors import InputError, LehrError
from schemas.run import Run

_SETTINGS: dict[str, Any] = {
    "python_enable_replacements": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "temp_directory": "",
}
_EXPLAIN = re.compile(r"\s*explain(\s+analyze)?\s", re.IGNORECASE)
_READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The rows of a query and what the asker should know about them."""

    table: pa.Table
    notices: tuple[str, ...]
    truncated: bool = False


def named_query(name: str) -> str:
    """SQL of a named query. Raises `InputError` listing the known ones."""
    if name not in NAMED_QUERIES:
        raise InputError(f"unknown query {name!r}: choose one of {', '.join(NAMED_QUERIES)} (`--list` explains them)")
    return NAMED_QUERIES[name].sql


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    stack = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _engine() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:", config=_SETTINGS)
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _one_reading_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    """Names of the relations that `sql` mentions. Raises `InputError` unless it is one statement that only reads."""
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise InputError(f"not a valid query: {error}") from error
    if len(statements) != 1:
        raise InputError(f"one statement at a time, please: this text holds {len(statements)}")
    kind = statements[0].type
    body = sql
    if kind == duckdb.StatementType.EXPLAIN:
        body = _EXPLAIN.sub("", sql, count=1)
    elif kind != duckdb.StatementType.SELECT:
        raise InputError(
            f"{kind.name} statements are refused: an audit only reads. Ask with SELECT, WITH, DESCRIBE, SUMMARIZE, SHOW TABLES or EXPLAIN"
        )
    tree = orjson.loads(connection.execute("SELECT json_serialize_sql(?)", [body]).fetchall()[0][0])
    if tree["error"]:
        raise InputError(f"this statement is refused: {tree['error_message']} An audit only reads")
    mentioned = set()
    for node in _walk(tree["statements"]):
        kind_of_node = node.get("type")
        if isinstance(kind_of_node, str) and kind_of_node.endswith("_NODE") and kind_of_node not in _READING_NODES:
            raise InputError(f"{kind_of_node.split('_')[0]} is refused inside a query: an audit only reads")
        if kind_of_node == "BASE_TABLE":
            mentioned.add(node["table_name"].lower())
        elif kind_of_node == "SHOW_REF" and not node.get("query"):
            mentioned.update(view_names())
    return mentioned


class Audit:
    """Asks questions about one run; opens only the views that a question mentions, once."""

    def __init__(self, run: Run, notice: Callable[[str], None] = lambda message: None) -> None:
        self.run = run
        self._notice = notice
        self._connection = _engine()
        self._views: dict[str, TableView | None] = {}

    def close(self) -> None:
        """Let go of the engine and of open files."""
        self._connection.close()

    def __enter__(self) -> Audit:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_view(self, view: str) -> bool:
        """Make a view known to the engine; returns whether anything stands behind it."""
        if view in self._views:
            table_view = self._views[view]
            return table_view is None or bool(table_view.sources)
        if view in RECORD_VIEWS:
            self._connection.register(view, record_view(self.run, view))
            self._views[view] = None
            return True
        opened = TableView(self.run, view)
        self._connection.register(view, opened.dataset)
        self._views[view] = opened
        for source in opened.running:
            where = "/".join(source.names.values())
            self._notice(
                f"{view}{f' of {where}' if where else ''}: its stage has not finished; {len(source.paths)} finished files are read, more may come"
            )
        if not opened.sources:
            self._notice(f"{view}: nothing stands in this run yet ({TABLE_VIEWS[view][2]})")
        return bool(opened.sources)

    def query(self, sql: str, limit: int | None = None) -> pa.Table:
        """Rows of one reading statement, at most `limit` (None: all). Raises `LehrError` for everything a user can cause."""
        mentioned = _one_reading_statement(self._connection, sql)
        for view in view_names():
            if view in mentioned:
                self.open_view(view)
        try:
            self._connection.execute("BEGIN TRANSACTION READ ONLY")
            try:
                with self._connection.sql(sql).to_arrow_reader(65_536) as reader:
                    return _head(reader, limit)
            finally:
                self._connection.execute("ROLLBACK")
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise self._explain(error, mentioned) from error

    def _explain(self, error: Exception, mentioned: set[str]) -> LehrError:
        message = str(error)
        for view, opened in self._views.items():
            if view in mentioned and opened is not None and isinstance(error, duckdb.InvalidInputException | OSError):
                try:
                    opened.find_damage()
                except LehrError as damage:
                    return damage
        if isinstance(error, duckdb.CatalogException) and "Table with name" in message:
            wrong = sorted(mentioned - set(view_names()))
            close = [match for name in wrong for match in difflib.get_close_matches(name, view_names(), 1)]
            hint = f" Did you mean {close[0]}?" if close else ""
            return InputError(f"no view is called {' or '.join(wrong)}.{hint} Views: {', '.join(view_names())}")
        if isinstance(error, duckdb.BinderException):
            known = [
                f"{view} ({', '.join(view_schema(view).names)})" for view in view_names() if view in mentioned
            ] or ["(no view is mentioned)"]
            return InputError(f"{message.split('LINE 1')[0].strip()}\nColumns: {'; '.join(known)}")
        if isinstance(error, duckdb.PermissionException):
            return InputError(
                f"an audit reads the views of the run and nothing else: {message.split('LINE 1')[0].strip()}"
            )
        if isinstance(error, duckdb.OutOfMemoryException):
            return InputError(f"{message.splitlines()[0]} Ask for fewer columns (sketch and text are large) or rows")
        return InputError(message)


def _head(reader: pa.RecordBatchReader, limit: int | None) -> pa.Table:
    batches, rows = [], 0
    for batch in reader:
        if limit is not None and rows + batch.num_rows >= limit:
            batches.append(batch.slice(0, limit - rows))
            break
        batches.append(batch)
        rows += batch.num_rows
    return _plain_integers(pa.Table.from_batches(batches, schema=reader.schema))


def _plain_integers(table: pa.Table) -> pa.Table:
    """Sums of integers come as 38-digit decimals: 64-bit integers again, where they fit."""
    for number, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type) and field.type.scale == 0:
            try:
                table = table.set_column(number, field.name, table.column(number).cast(pa.int64()))
            except pa.ArrowInvalid:
                continue
    return table


def ask(run: Run, sql: str, limit: int | None = None) -> Answer:
    """Answer one question about a run."""
    notices: list[str] = []
    with Audit(run, notices.append) as audit:
        table = audit.query(sql, None if limit is None else limit + 1)
    truncated = limit is not None and table.num_rows > limit
    return Answer(table=table.slice(0, limit) if truncated else table, notices=tuple(notices), truncated=truncated)
