"""The readers of corpus formats: their registry, their contract, and how a record becomes a row.

A reader is one file in this folder with a class decorated by `@reader(name)`; nothing else has to change for a new format.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import orjson

from schemas.errors import InputError
from schemas.sample import PREVIEW_CHARS, Reject, Row
from schemas.spec import PlanSpec
from schemas.storage import join
from schemas.units import WorkUnit

LOGGER = logging.getLogger(__name__)
Item = Row | Reject
Warn = Callable[[str], None]


class Reader(Protocol):
    """What a format has to offer. Readers hold no state."""

    suffixes: tuple[str, ...]
    """Lower-case ends of file names that mean this format."""

    def scan(self, root: str, path: str, spec: PlanSpec, warn: Warn = LOGGER.warning) -> Iterator[WorkUnit]:
        """Cut `path` below `root` into units of at most `spec.unit_tokens` estimated tokens (a single row may exceed it).

        Rows are counted exactly and the bytes of every range are fingerprinted. With `spec.limit` only that many first
        rows are cut. `warn` is told what the user should know about the file.
        """

    def rows(self, root: str, unit: WorkUnit, spec: PlanSpec) -> Iterator[Item]:
        """Exactly `unit.row_count` items with consecutive row numbers from `unit.row_start`.

        Reads the unit's range alone, after it was compared with the plan: raises `SourceChanged` where it differs.
        """


_READERS: dict[str, Reader] = {}


def reader(name: str) -> Callable[[type], type]:
    """Register a reader class under `name`."""

    def register(cls: type) -> type:
        _READERS[name] = cls()
        return cls

    return register


@functools.cache
def _load() -> None:
    package = importlib.import_module("pipelines.readers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"pipelines.readers.{module.name}")


def reader_names() -> list[str]:
    """Every format there is."""
    _load()
    return sorted(_READERS)


def get_reader(name: str) -> Reader:
    """The reader of a format; raises `InputError` listing the known ones."""
    _load()
    if name not in _READERS:
        raise InputError(f"unknown corpus format {name!r}: choose one of {', '.join(reader_names())}")
    return _READERS[name]


def suffixes() -> dict[str, str]:
    """Format by suffix of the file name, longest suffix first."""
    found = {suffix: name for name in reader_names() for suffix in _READERS[name].suffixes}
    return dict(sorted(found.items(), key=lambda entry: (-len(entry[0]), entry[0])))


def format_by_suffix(path: str) -> str | None:
    """Format of a file by its name alone, None where no suffix is known."""
    return next((name for suffix, name in suffixes().items() if path.lower().endswith(suffix)), None)


def file_format(path: str, spec: PlanSpec) -> str:
    """Format of a file: the one the spec names, else by suffix. Raises `InputError` listing the known suffixes."""
    if spec.format != "auto":
        return spec.format
    found = format_by_suffix(path)
    if found is None:
        raise InputError(
            f"{path}: its name does not say its format. Known suffixes: {', '.join(sorted(suffixes()))}; or name it with --format"
        )
    return found


def read_unit(root: str, unit: WorkUnit, spec: PlanSpec) -> Iterator[Item]:
    """The rows of a unit, by its format: exactly `unit.row_count` items. Raises `SourceChanged`."""
    return get_reader(unit.format).rows(root, unit, spec)


def read_row(root: str, unit: WorkUnit, spec: PlanSpec, row: int) -> Item:
    """One row of a unit, by its number in the file. Raises `SourceChanged`, or `InputError` for a row of another unit."""
    for item in read_unit(root, unit, spec):
        if item.row == row:
            return item
    last = unit.row_start + unit.row_count - 1
    raise InputError(
        f"{join(root, unit.path)}: row {row} is not in unit {unit.unit_id} (rows {unit.row_start} to {last})"
    )


def read_reject(path: str, row: int, reason: str, detail: str = "", preview: bytes | str = "") -> Reject:
    """A row that could not be read, with the first characters of what there was."""
    if isinstance(preview, bytes):
        preview = preview[: 4 * PREVIEW_CHARS].decode("utf-8", "replace")
    return Reject(path=path, row=row, stage="read", reason=reason, detail=detail[:500], preview=preview[:PREVIEW_CHARS])


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def build_row(path: str, row: int, record: Mapping[str, Any], spec: PlanSpec) -> Item:
    """A record's row, or the reject it is: `missing_column`, `wrong_type`, `too_deep`, `row_too_large`.

    Text is taken as it is, also empty. Of messages, role and content are taken. Id and domain are scalars, made strings;
    carried columns become one JSON object with sorted keys, null where the record has no such column.
    """
    columns = spec.columns
    try:
        body: dict[str, Any]
        if columns.kind == "messages":
            body = {"messages": _messages(_required(record, columns.messages), columns.messages)}
            size = sum(len(turn["role"]) + _utf8_size(turn["content"]) for turn in body["messages"])
        elif columns.kind == "prompt":
            body = {"prompt": _string(record, columns.prompt), "completion": _string(record, columns.completion)}
            size = _utf8_size(body["prompt"]) + _utf8_size(body["completion"])
        else:
            body = {"text": _string(record, columns.text)}
            size = _utf8_size(body["text"])
        if size > spec.max_row_bytes:
            raise _Unusable("row_too_large", f"{size:,} bytes of text; max_row_bytes is {spec.max_row_bytes:,}")
        return Row(
            path=path,
            row=row,
            source_id=_scalar(record, columns.id),
            domain=_scalar(record, columns.domain),
            extra=_extra({name: record.get(name) for name in columns.keep}),
            **body,
        )
    except _Unusable as unusable:
        return read_reject(path, row, unusable.reason, unusable.detail, _preview(record, spec))


def _preview(record: Mapping[str, Any], spec: PlanSpec) -> str:
    value = record.get(spec.columns.names()[0])
    return value if isinstance(value, str) else ""


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _required(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        have = ", ".join(list(map(str, record))[:10]) or "none"
        raise _Unusable("missing_column", f"no column {name!r}; there are: {have}")
    return record[name]


def _string(record: Mapping[str, Any], name: str) -> str:
    value = _required(record, name)
    if not isinstance(value, str):
        raise _Unusable("wrong_type", f"column {name!r} is {_kind(value)}, not a string")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _Unusable("wrong_type", f"column {name!r} is {_kind(value)}, not a list of {{role, content}}")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise _Unusable("wrong_type", f"{name}[{number}] is {_kind(turn)}, not an object of role and content")
        for part in ("role", "content"):
            if not isinstance(turn.get(part), str):
                raise _Unusable("wrong_type", f"{name}[{number}].{part} is {_kind(turn.get(part))}, not a string")
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns


def _scalar(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name) if name else None
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict | list):
        raise _Unusable("wrong_type", f"column {name!r} is {_kind(value)}, not a single value")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = _dumps(value)
    return orjson.loads(text) if text.startswith('"') else text


def _extra(values: dict[str, Any]) -> str:
    return _dumps(values) if values else "{}"


def _dumps(value: Any) -> str:
    try:
        return orjson.dumps(value, default=_stringify, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()
    except TypeError as error:
        if "ecursion" in str(error):
            raise _Unusable("too_deep", "a carried column is nested deeper than 254 levels") from error
        raise _Unusable("wrong_type", f"a carried column has no JSON form ({error})") from error


def _stringify(value: Any) -> Any:
    """JSON form of what Arrow has and JSON has not: UTF-8 of bytes (hex where they are not), `str` of the rest."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, tuple):
        return list(value)
    return str(value)


def check_columns(url: str, found: set[str], spec: PlanSpec) -> None:
    """Raise `InputError` where a column that the spec reads is nowhere among those `found` in the file."""
    missing = [name for name in spec.columns.names() if name not in found]
    if missing:
        listed = ", ".join(sorted(found)[:30]) or "none"
        raise InputError(
            f"{url}: no column {', '.join(map(repr, missing))}; it has: {listed}. "
            "Name the columns with --text-column, --prompt-column, --completion-column, --messages-column, --id-column, "
            "--domain-column, --keep-columns"
        )
