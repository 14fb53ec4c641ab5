"""WebDataset: tar files whose adjacent members of one key make a sample. Nothing is extracted, unpickled or followed.

A key is a member's folder and its name up to the first dot; what follows is its extension. A row is the object in `.json`
(`__key__` names its key), or `.txt` as column `text`; other members are never opened. Tokens are estimated from the bytes of
these members. Members without a key (a name without a dot, or that begins with one) and folders are passed over.

Headers are walked here, 512 bytes each, because tar readers end quietly at a broken header: here it is a reject, and so is
the end of a file that has no end mark.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import orjson

from pipelines.readers.base import LOGGER, Item, Warn, build_row, check_columns, read_reject, reader
from pipelines.readers.source import BYTES_PER_TOKEN, RangeView, Source, checked_view, hash_range, make_unit
from schemas.spec import PlanSpec
from schemas.units import WorkUnit

_BLOCK = 512
_EMPTY = bytes(_BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"K", b"x", b"g", b"5"
_MAX_NAME_BYTES = 1 << 20
_BODIES = ("json", "txt")
_CHECKED_ROWS = 100
"""Samples at the start of a file that are searched for the columns asked for."""


class _Broken(Exception):
    """The tar cannot be walked further."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass(slots=True)
class _Member:
    start: int
    """Offset of its first header."""
    data: int
    size: int
    name: str
    kind: bytes

    @property
    def end(self) -> int:
        return self.data + -(-self.size // _BLOCK) * _BLOCK

    @property
    def hostile(self) -> str:
        """Why the name must not be used, empty where it may."""
        parts = self.name.replace("\\", "/").split("/")
        if not self.name.strip("/") or parts[0] == "" or parts[0].endswith(":"):
            return "an absolute or empty name"
        if ".." in parts:
            return "a name that leaves its folder"
        if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in self.name):
            return "a name with control characters"
        return ""


@dataclasses.dataclass(slots=True)
class _Group:
    """A sample's members, or the end of a broken file (`broken`)."""

    start: int
    end: int
    key: str = ""
    members: list[tuple[str, _Member]] = dataclasses.field(default_factory=list)
    broken: _Broken | None = None
    body_bytes: int = 0


def _number(field: bytes) -> int:
    """A tar number: octal text, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            raise ValueError("negative")
        return value
    text = field.split(b"\0", 1)[0].strip()
    if text.isdigit():
        return int(text, 8)
    if text:
        raise ValueError("not octal")
    return 0


def _name(data: bytes) -> str:
    """A name as text; Latin-1 where it is not UTF-8, so that different names stay different."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _text(field: bytes) -> str:
    return _name(field.split(b"\0", 1)[0])


def _pax_records(data: bytes) -> dict[str, bytes]:
    records = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 12 else 0
        record = data[len(digits) + 1 : length]
        name, equals, value = record.partition(b"=")
        if length <= len(digits) or length > len(data) or not equals or not value.endswith(b"\n"):
            raise ValueError("malformed extended header")
        records[name.decode("utf-8", "replace")] = value[:-1]
        data = data[length:]
    return records


def _members(view: RangeView) -> Iterator[_Member]:
    """Members of the range in order; raises `_Broken` where a header or a member cannot be read to its end."""
    offset, start = view.start, -1
    name: str | None = None
    size_override: int | None = None
    while offset < view.end:
        header = view.read(offset, offset + _BLOCK)
        if len(header) < _BLOCK:
            raise _Broken("truncated", f"the file ends inside a header at byte {offset:,}")
        if header == _EMPTY:
            if start >= 0:
                raise _Broken("corrupt", f"an extended header at byte {start:,} is followed by no member")
            offset += _BLOCK
            continue
        start = offset if start < 0 else start
        try:
            stored = _number(header[148:156])
            size = _number(header[124:136])
        except ValueError as error:
            raise _Broken("corrupt", f"no tar header at byte {offset:,} ({error})") from error
        if sum(header) - sum(header[148:156]) + 8 * 32 != stored:
            raise _Broken("corrupt", f"the header at byte {offset:,} fails its checksum")
        kind = header[156:157]
        data = offset + _BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            body = view.read(data, data + size) if size <= _MAX_NAME_BYTES else b""
            if len(body) < size:
                reason = "truncated" if data + size > view.end else "corrupt"
                raise _Broken(reason, f"the extended header at byte {offset:,} is cut or too long")
            try:
                if kind == _LONG_NAME:
                    name = _text(body)
                elif kind == _PAX:
                    records = _pax_records(body)
                    if "path" in records:
                        name = _name(records["path"])
                    if "size" in records:
                        size_override = _number(b"0" + b"%o" % int(records["size"]))
            except ValueError as error:
                raise _Broken("corrupt", f"the extended header at byte {offset:,} is malformed ({error})") from error
            offset = data + -(-size // _BLOCK) * _BLOCK
            continue
        if name is None:
            prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
            name = f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])
        size = size if size_override is None else size_override
        # Links, folders and devices have no data, whatever their size field says.
        member = _Member(start, data, size if kind not in (b"1", b"2", b"3", b"4", _FOLDER, b"6") else 0, name, kind)
        if member.end > view.end:
            raise _Cut(member)
        yield member
        offset, start, name, size_override = member.end, -1, None, None
    if start >= 0:
        raise _Broken("truncated", f"the file ends behind an extended header at byte {start:,}")


class _Cut(_Broken):
    """The file ends inside a member."""

    def __init__(self, member: _Member) -> None:
        super().__init__("truncated", f"the file ends inside member {member.name!r} at byte {member.data:,}")
        self.member = member


def _split(name: str) -> tuple[str, str]:
    """(key, extension); the key is empty for a member that belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def _groups(view: RangeView) -> Iterator[_Group]:
    """Samples of the range in order, and last, where the walk broke, a group that says why."""
    group: _Group | None = None
    try:
        for member in _members(view):
            key, extension = _split(member.name)
            if member.kind == _FOLDER or (not key and not member.hostile):
                continue
            key = key or member.name
            if group is None or group.key != key:
                if group is not None:
                    yield group
                group = _Group(member.start, member.end, key)
            group.members.append((extension, member))
            group.body_bytes += member.size if extension in _BODIES else 0
            group.end = member.end
    except _Broken as broken:
        start = view.start
        if isinstance(broken, _Cut):
            start = broken.member.start
            if group is not None and group.key == _split(broken.member.name)[0]:
                start, group = group.start, None
        elif group is not None:
            start = group.end
        if group is not None:
            yield group
        yield _Group(start, view.end, broken=broken)
        return
    if group is not None:
        yield group


def _has_end_mark(source: Source) -> bool:
    return source.size >= _BLOCK and source.read(source.size - _BLOCK, source.size) == _EMPTY


@reader("webdataset")
class WebDatasetReader:
    """Tar files of `.json` or `.txt` members."""

    suffixes = (".tar",)

    def scan(self, root: str, path: str, spec: PlanSpec, warn: Warn = LOGGER.warning) -> Iterator[WorkUnit]:
        """See `Reader.scan`. A file that breaks has one more row, its last, that reads as `truncated` or `corrupt`."""
        source = Source(root, path)
        limit_bytes = spec.unit_tokens * BYTES_PER_TOKEN
        start = end = size = rows = first_row = 0
        _check_columns(source, spec)

        def unit() -> WorkUnit:
            return make_unit(
                spec,
                path=path,
                format="webdataset",
                byte_start=start,
                byte_end=end,
                row_start=first_row,
                row_count=rows,
                source_fingerprint=hash_range(source, start, end),
                estimated_tokens=max(1, -(-size // BYTES_PER_TOKEN)),
            )

        for group in self._scan_groups(source):
            if group.broken is not None:
                warn(
                    f"{source.url}: {group.broken.reason} behind {first_row + rows:,} samples ({group.broken}); what follows is "
                    "listed as one reject. Fetch or write the file again"
                )
            if rows and size + group.body_bytes > limit_bytes:
                yield unit()
                first_row, start, size, rows = first_row + rows, group.start, 0, 0
            if not rows:
                start = group.start
            rows, size, end = rows + 1, size + group.body_bytes, group.end
            if spec.limit and first_row + rows == spec.limit:
                break
        if rows:
            yield unit()
        elif not first_row:
            warn(f"{source.url} holds no sample")

    def _scan_groups(self, source: Source) -> Iterator[_Group]:
        broken = False
        for group in _groups(RangeView(source, 0, source.size)):
            yield group
            broken = group.broken is not None
        if not broken and not _has_end_mark(source):
            missing = _Broken("truncated", "the file has no end mark, so members may be missing")
            yield _Group(source.size, source.size, broken=missing)

    def rows(self, root: str, unit: WorkUnit, spec: PlanSpec) -> Iterator[Item]:
        """See `Reader.rows`. Reasons: bad_member_name, duplicate_member, row_too_large, invalid_json, invalid_utf8,
        not_an_object, too_deep, truncated, corrupt, and those of a record."""
        source = Source(root, unit.path)
        view = checked_view(source, unit)
        row, end = unit.row_start, unit.row_start + unit.row_count
        for group in _groups(view):
            if row == end:
                return
            yield _item(view, unit.path, row, group, spec)
            row += 1
        for missing in range(row, end):
            detail = "the file has no end mark, so members may be missing"
            yield read_reject(unit.path, missing, "truncated", detail)


def _item(view: RangeView, path: str, row: int, group: _Group, spec: PlanSpec) -> Item:
    if group.broken is not None:
        return read_reject(path, row, group.broken.reason, str(group.broken))
    found = _record(view, group, spec)
    if isinstance(found, tuple):
        return read_reject(path, row, found[0], found[1], group.key)
    return build_row(path, row, found, spec)


def _record(view: RangeView, group: _Group, spec: PlanSpec) -> dict[str, object] | tuple[str, str]:
    """The sample's columns, or (reason, detail) of its reject."""
    bodies: dict[str, _Member] = {}
    for extension, member in group.members:
        if member.hostile:
            return "bad_member_name", f"member {member.name!r} has {member.hostile}; it is not opened"
        if extension in _BODIES and member.kind in _REGULAR:
            if extension in bodies:
                return "duplicate_member", f"member {member.name!r} stands twice in its sample"
            bodies[extension] = member
    if group.body_bytes > spec.max_row_bytes:
        return "row_too_large", f"{group.body_bytes:,} bytes; max_row_bytes is {spec.max_row_bytes:,}"
    record: dict[str, object] = {}
    if "txt" in bodies:
        try:
            record["text"] = _read(view, bodies["txt"]).decode("utf-8")
        except UnicodeDecodeError as error:
            return "invalid_utf8", f"{bodies['txt'].name!r}: {error}"
    if "json" in bodies:
        data = _read(view, bodies["json"])
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            return _json_reason(data, error), f"{bodies['json'].name!r}: {error}"
        if not isinstance(value, dict):
            return "not_an_object", f"{bodies['json'].name!r} is a JSON {type(value).__name__}"
        record |= value
    if not bodies:
        return "missing_column", f"sample {group.key!r} has no regular .json or .txt member"
    record.setdefault("__key__", group.key)
    return record


def _json_reason(data: bytes, error: orjson.JSONDecodeError) -> str:
    if "depth limit" in str(error) or "ecursion" in str(error):
        return "too_deep"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "invalid_utf8"
    return "invalid_json"


def _read(view: RangeView, member: _Member) -> bytes:
    return view.read(member.data, member.data + member.size)


def _check_columns(source: Source, spec: PlanSpec) -> None:
    view = RangeView(source, 0, source.size)
    found: set[str] = set()
    for group in itertools.islice(_groups(view), _CHECKED_ROWS):
        record = _record(view, group, spec) if group.broken is None else ()
        if isinstance(record, dict):
            found |= record.keys()
            if set(spec.columns.names()) <= found:
                return
    if found:
        check_columns(source.url, found, spec)
